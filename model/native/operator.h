/* Involution as an operator of its own, with both gradients, for training.
 *
 * x and its gradient are [B, H, W, C], the output [B, h, w, C], kernels and their gradient [B, h, w, C / width, K * K].
 * An item of work is one image and one group of channels. For 16 channels and the usual kernels it first copies the
 * group into a plane with a border, which stays in the second-level cache while it is used. Kernels and outputs pass
 * through a buffer of one row. Arrays of bfloat16 are converted on these copies; all sums are in float32. */
#pragma once

#include "bfloat16.h"
#include "involution.h"
#include "threads.h"

struct operation {
    const void *x, *kernel;
    void *out; /* with gradients: the gradient of the output, which is only read */
    void *grad_x, *grad_kernel; /* both or none */
    int batch, groups, width; /* channels of a group */
    int x_height, x_width, height, width_out;
    int size, stride;
    size_t real; /* bytes of an element: 2 (bfloat16), 4 or 8 */
};

#define REAL float
#include "operator_any.h"
#undef REAL
#define REAL double
#include "operator_any.h"
#undef REAL

/* The gradient of x: a run of pixels adds what it took, weighted as it was; the mirror of involve_run. */
ALWAYS_INLINE void spread_run(const int size, const int stride, const int pixels, const struct window *w) {
    UNROLL
    for (int channel = 0; channel < GROUP; channel += VL) {
        float *x = (float *)w->x + channel;
        const float *kernel[RUN];
        vec grad[RUN];
        UNROLL
        for (int p = 0; p < pixels; p++) {
            kernel[p] = w->kernel + (size_t)p * w->kernel_pixel;
            grad[p] = load(w->out + (size_t)p * w->out_pixel + channel);
        }
        for (int row = 0; row < size; row++) {
            UNROLL
            for (int column = 0; column < stride * (pixels - 1) + size; column++) {
                vec value = load(x + column * GROUP);
                UNROLL
                for (int p = 0; p < pixels; p++) {
                    int tap = column - stride * p;
                    if (0 <= tap && tap < size) value += grad[p] * broadcast(kernel[p][tap]);
                }
                store(x + column * GROUP, value);
            }
            UNROLL
            for (int p = 0; p < pixels; p++) kernel[p] += size;
            x += w->x_row;
        }
    }
}

/* The gradient of a pixel's kernel: for each tap the product, over 16 channels, of the output's gradient and the
 * window. With the channels of x in separate lines ([row][channel][pixel]), neighbouring lanes are neighbouring taps
 * and nothing is ever summed across lanes. A row of taps needs `lanes` of them, one more than there are taps; the
 * surplus is overwritten by the row below, and of the last row it is not stored. */
#define CORRELATE(size, lanes) \
    typedef float taps_##size __attribute__((vector_size(lanes * sizeof(float)))); \
    typedef float taps_##size##_anywhere \
        __attribute__((vector_size(lanes * sizeof(float)), aligned(sizeof(float)), may_alias)); \
    static void correlate_##size(const float *lines, size_t length, const float *grad, float *kernel) { \
        taps_##size sum[size] = {0}; \
        for (int channel = 0; channel < GROUP; channel++) { \
            UNROLL \
            for (int row = 0; row < size; row++) { \
                const float *line = lines + (size_t)(row * GROUP + channel) * length; \
                sum[row] += *(const taps_##size##_anywhere *)line * (grad[channel] - (taps_##size){0}); \
            } \
        } \
        UNROLL \
        for (int row = 0; row < size - 1; row++) *(taps_##size##_anywhere *)(kernel + row * size) = sum[row]; \
        memcpy(kernel + (size - 1) * size, &sum[size - 1], size * sizeof(float)); \
    }
CORRELATE(3, 4)
CORRELATE(7, 8)

RUN_FUNCTIONS(spread, 3, 1)
RUN_FUNCTIONS(spread, 7, 1)
RUN_FUNCTIONS(spread, 7, 2)

static bool operator_fast(const struct operation *o) {
    return o->real <= sizeof(float) && o->width == GROUP && involve_functions(o->size, o->stride);
}

/* What a thread needs for itself. */
struct operator_scratch {
    float *kernel, *out, *grad_kernel; /* of a row of outputs */
    float *plane; /* x with its border; with gradients: the gradient of x */
    float *lines; /* with gradients: x in lines */
};

static size_t row_floats(const struct operation *o, int per_pixel) {
    return (size_t)ceil_div(o->width_out * per_pixel, GROUP) * GROUP;
}

static size_t plane_floats(const struct operation *o) {
    int border = o->size / 2;
    return (size_t)GROUP * (size_t)(o->x_height + 2 * border) * (size_t)(o->x_width + 2 * border);
}

/* Distance between the lines of two channels. */
static size_t line_floats(const struct operation *o) { return (size_t)(o->x_width + o->size / 2 * 2 + GROUP); }

static size_t operator_floats(const struct operation *o) {
    size_t lines = (size_t)GROUP * (size_t)(o->x_height + o->size / 2 * 2) * line_floats(o);
    return 2 * row_floats(o, o->size * o->size) + row_floats(o, GROUP) + plane_floats(o) + (o->grad_x ? lines : 0);
}

static struct operator_scratch divide_scratch(const struct operation *o, float *floats) {
    struct operator_scratch s;
    s.kernel = floats;
    s.grad_kernel = s.kernel + row_floats(o, o->size * o->size);
    s.out = s.grad_kernel + row_floats(o, o->size * o->size);
    s.plane = s.out + row_floats(o, GROUP);
    s.lines = s.plane + plane_floats(o);
    return s;
}

/* `pixels` times `each` elements from an array, where pixels are `step` elements apart. */
static void gather(const struct operation *o, const void *array, size_t first, size_t step, int pixels, int each,
                   float *to) {
    for (int p = 0; p < pixels; p++, first += step, to += each) {
        if (o->real == sizeof(float)) {
            memcpy(to, (const float *)array + first, (size_t)each * sizeof(float));
        } else {
            widen((const bfloat16 *)array + first, to, each);
        }
    }
}

/* The way back. */
static void scatter(const struct operation *o, const float *from, void *array, size_t first, size_t step, int pixels,
                    int each) {
    for (int p = 0; p < pixels; p++, first += step, from += each) {
        if (o->real == sizeof(float)) {
            memcpy((float *)array + first, from, (size_t)each * sizeof(float));
        } else {
            narrow(from, (bfloat16 *)array + first, each);
        }
    }
}

static void copy_into_lines(const struct operation *o, size_t first, float *lines) {
    int border = o->size / 2;
    size_t length = line_floats(o), channels = (size_t)(o->groups * GROUP);
    memset(lines, 0, (size_t)(o->x_height + 2 * border) * GROUP * length * sizeof(float));
    for (int y = 0; y < o->x_height; y++) {
        float *line = lines + (size_t)(y + border) * GROUP * length + border;
        for (int column = 0; column < o->x_width; column++, first += channels) {
            float x[GROUP];
            gather(o, o->x, first, 0, 1, GROUP, x);
            for (int channel = 0; channel < GROUP; channel++)
                line[(size_t)channel * length + (size_t)column] = x[channel];
        }
    }
}

/* The gradients that come from a row of outputs. */
static void row_gradients(const struct operation *o, const struct operator_scratch *s, int y, const struct window *w) {
    size_t length = line_floats(o);
    for (int column = 0; column < o->width_out; column++) {
        const float *window = s->lines + (size_t)(y * o->stride) * GROUP * length + (size_t)(column * o->stride);
        float *kernel = s->grad_kernel + (size_t)column * w->kernel_pixel;
        (o->size == 7 ? correlate_7 : correlate_3)(window, length, w->out + (size_t)column * GROUP, kernel);
    }
    in_runs(o->size == 3 ? spread_3_1 : o->stride == 1 ? spread_7_1 : spread_7_2, o->stride, o->width_out, *w);
}

static void operator_item(const struct operation *o, int image, int group, float *floats) {
    static const float ones[GROUP] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}, zeros[GROUP];
    struct operator_scratch s = divide_scratch(o, floats);
    int border = o->size / 2, taps = o->size * o->size;
    size_t channels = (size_t)(o->groups * GROUP), kernels = (size_t)(o->groups * taps);
    struct map plane = planar_map(s.plane, 1, o->x_height, o->x_width, border);
    size_t x_row = (size_t)o->x_width * channels;
    size_t x_first = (size_t)image * (size_t)o->x_height * x_row + (size_t)group * GROUP;
    if (o->grad_x) {
        memset(s.plane, 0, plane.image * sizeof(float));
        copy_into_lines(o, x_first, s.lines);
    } else {
        clear_border(plane, 1, 1, border);
        for (int y = 0; y < o->x_height; y++) {
            gather(o, o->x, x_first + (size_t)y * x_row, channels, o->x_width, GROUP,
                   plane.data + (size_t)y * plane.row);
        }
    }
    for (int y = 0; y < o->height; y++) {
        size_t pixel = ((size_t)image * (size_t)o->height + (size_t)y) * (size_t)o->width_out;
        size_t tap = pixel * kernels + (size_t)(group * taps), out = pixel * channels + (size_t)group * GROUP;
        struct window w = {
            .x = s.plane + (size_t)(y * o->stride) * plane.row,
            .x_row = plane.row,
            .kernel = s.kernel,
            .kernel_pixel = (size_t)taps,
            .out = s.out,
            .out_pixel = GROUP,
            .scale = ones,
            .shift = zeros,
        };
        gather(o, o->kernel, tap, kernels, o->width_out, taps, s.kernel);
        if (o->grad_x) {
            gather(o, o->out, out, channels, o->width_out, GROUP, s.out);
            row_gradients(o, &s, y, &w);
            scatter(o, s.grad_kernel, o->grad_kernel, tap, kernels, o->width_out, taps);
        } else {
            involve_row(o->size, o->stride, o->width_out, &w);
            scatter(o, s.out, o->out, out, channels, o->width_out, GROUP);
        }
    }
    for (int y = 0; o->grad_x && y < o->x_height; y++) {
        const float *row = plane.data + (size_t)y * plane.row;
        scatter(o, row, o->grad_x, x_first + (size_t)y * x_row, channels, o->x_width, GROUP);
    }
}

/* Threads, and memory of theirs that lasts from call to call: fresh memory of this size would be mapped anew, page by
 * page. */
struct operators {
    struct pool *pool;
    float *scratch[MOST_THREADS];
    size_t floats;
};

struct operator_call {
    const struct operation *operation;
    struct operators *operators;
};

static void operator_thread(void *context, int thread) {
    const struct operator_call *call = context;
    const struct operation *o = call->operation;
    struct team *all = &call->operators->pool->all;
    for (int item; (item = take(all)) < o->batch * o->groups;) {
        int image = item / o->groups, group = item % o->groups;
        if (operator_fast(o)) {
            operator_item(o, image, group, call->operators->scratch[thread]);
        } else if (o->real == sizeof(float)) {
            operator_any_float(o, image, group);
        } else {
            operator_any_double(o, image, group);
        }
    }
}
