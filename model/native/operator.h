/* Involution as an operator of its own, with both gradients, for training.
 *
 * x and its gradient are [B, H, W, C], the output [B, h, w, C], kernels and their gradient [B, h, w, C / width, K * K].
 * An item of work is one image and one group of channels. For 16 channels and the usual kernels it first copies the
 * group into a plane with a border, which stays in the second-level cache while it is used. */
#pragma once

#include "involution.h"
#include "threads.h"

struct operation {
    const void *x, *kernel;
    void *out; /* with gradients: the gradient of the output, which is only read */
    void *grad_x, *grad_kernel; /* both or none */
    int batch, groups, width; /* channels of a group */
    int x_height, x_width, height, width_out;
    int size, stride;
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

static bool operator_fast(const struct operation *o, size_t real) {
    return real == sizeof(float) && o->width == GROUP && involve_functions(o->size, o->stride);
}

/* Floats that a thread needs for itself: a plane, and with gradients the same in lines. */
static size_t operator_floats(const struct operation *o) {
    size_t border = (size_t)(o->size / 2), height = (size_t)o->x_height + 2 * border,
           width = (size_t)o->x_width + 2 * border;
    return GROUP * (height * width + (o->grad_x ? height * (width + GROUP) : 0));
}

static void copy_into_plane(const struct operation *o, const float *x, struct map plane) {
    size_t channels = (size_t)(o->groups * GROUP);
    for (int y = 0; y < o->x_height; y++) {
        for (int column = 0; column < o->x_width; column++, x += channels) {
            memcpy(plane.data + (size_t)y * plane.row + (size_t)column * GROUP, x, GROUP * sizeof(float));
        }
    }
}

static void copy_into_lines(const struct operation *o, const float *x, float *lines, size_t length) {
    int border = o->size / 2;
    memset(lines, 0, (size_t)(o->x_height + 2 * border) * GROUP * length * sizeof(float));
    for (int y = 0; y < o->x_height; y++) {
        float *line = lines + (size_t)(y + border) * GROUP * length + border;
        for (int column = 0; column < o->x_width; column++, x += o->groups * GROUP) {
            for (int channel = 0; channel < GROUP; channel++)
                line[(size_t)channel * length + (size_t)column] = x[channel];
        }
    }
}

static void operator_item(const struct operation *o, int image, int group, float *scratch) {
    static const float ones[GROUP] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}, zeros[GROUP];
    int border = o->size / 2, channels = o->groups * GROUP, taps = o->size * o->size;
    struct map plane = planar_map(scratch, 1, o->x_height, o->x_width, border);
    float *lines = scratch + plane.image;
    size_t length = (size_t)(o->x_width + 2 * border + GROUP);
    size_t x_offset =
        (size_t)image * (size_t)o->x_height * (size_t)o->x_width * (size_t)channels + (size_t)group * GROUP;
    if (o->grad_x) {
        memset(scratch, 0, plane.image * sizeof(float));
        copy_into_lines(o, (const float *)o->x + x_offset, lines, length);
    } else {
        clear_border(plane, 1, 1, border);
        copy_into_plane(o, (const float *)o->x + x_offset, plane);
    }
    for (int y = 0; y < o->height; y++) {
        size_t pixel = ((size_t)image * (size_t)o->height + (size_t)y) * (size_t)o->width_out;
        size_t tap = (pixel * (size_t)o->groups + (size_t)group) * (size_t)taps;
        struct window w = {
            .x = scratch + (size_t)(y * o->stride) * plane.row,
            .x_row = plane.row,
            .kernel = (const float *)o->kernel + tap,
            .kernel_pixel = (size_t)(o->groups * taps),
            .out = (float *)o->out + pixel * (size_t)channels + (size_t)group * GROUP,
            .out_pixel = (size_t)channels,
            .scale = ones,
            .shift = zeros,
        };
        if (!o->grad_x) {
            involve_row(o->size, o->stride, o->width_out, &w);
            continue;
        }
        for (int column = 0; column < o->width_out; column++) {
            const float *window = lines + (size_t)(y * o->stride) * GROUP * length + (size_t)(column * o->stride);
            float *kernel = (float *)o->grad_kernel + tap + (size_t)column * w.kernel_pixel;
            (o->size == 7 ? correlate_7 : correlate_3)(window, length, w.out + (size_t)column * w.out_pixel, kernel);
        }
        in_runs(o->size == 3 ? spread_3_1 : o->stride == 1 ? spread_7_1 : spread_7_2, o->stride, o->width_out, w);
    }
    if (o->grad_x) {
        float *to = (float *)o->grad_x + x_offset;
        for (int y = 0; y < o->x_height; y++) {
            for (int column = 0; column < o->x_width; column++, to += channels) {
                memcpy(to, plane.data + (size_t)y * plane.row + (size_t)column * GROUP, GROUP * sizeof(float));
            }
        }
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
    size_t real;
};

static void operator_thread(void *context, int thread) {
    const struct operator_call *call = context;
    const struct operation *o = call->operation;
    struct team *all = &call->operators->pool->all;
    for (int item; (item = take(all)) < o->batch * o->groups;) {
        int image = item / o->groups, group = item % o->groups;
        if (operator_fast(o, call->real)) {
            operator_item(o, image, group, call->operators->scratch[thread]);
        } else if (call->real == sizeof(float)) {
            operator_any_float(o, image, group);
        } else {
            operator_any_double(o, image, group);
        }
    }
}
