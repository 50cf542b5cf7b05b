/* The involution operator with both gradients, for training.
 *
 * x and its gradient are [B, H, W, C], the output is [B, h, w, C], kernels and their gradient are [B, h, w, groups,
 * K * K]. A work item is one group of channels of one image. The fast case, groups of 16 channels and the usual
 * kernels, first copies the group into a plane with a border, which stays in the L2 cache while it is used. Kernels and
 * outputs pass through a buffer of one row. These copies also convert bfloat16; all sums are in float32.
 *
 * One operator (64x64x32x32, K = 7, two threads) takes 6.3 ms forward and 19.5 ms with the gradients; one multiply-add
 * per tap in torch takes 127 and 1803 ms. */
#pragma once

#include "bfloat16.h"
#include "involution.h"
#include "threads.h"

struct operation {
    const void *x, *kernel;
    void *out; /* with gradients, the gradient of the output, which is read */
    void *grad_x, *grad_kernel; /* both NULL without gradients */
    int batch, groups, group_channels;
    int x_height, x_width, out_height, out_width;
    int size, stride;
    size_t element_size; /* 2 (bfloat16), 4 or 8 bytes */
};

#define REAL float
#include "operator_any.h"
#undef REAL
#define REAL double
#include "operator_any.h"
#undef REAL

/* Adds the gradients of a strip to the gradient of x: the transpose of involve_strip. */
ALWAYS_INLINE void grad_x_strip(const int size, const int stride, const int pixels, const struct window *w) {
    UNROLL
    for (int channel = 0; channel < GROUP; channel += VL) {
        float *x = (float *)w->x + channel;
        const float *kernel[STRIP];
        vec grad[STRIP];
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

/* Computes the gradient of a pixel's kernel: for each tap, the dot product over 16 channels of the output's gradient
 * and the input pixel. x is laid out as [row][channel][pixel] ("lines"), so neighbouring lanes are neighbouring taps
 * and no sum runs across lanes. A row of taps takes `lanes` lanes, one more than it has taps: the next row overwrites
 * the extra value, and the last row is stored without it. */
#define GRAD_KERNEL(size, lanes) \
    typedef float taps_##size __attribute__((vector_size(lanes * sizeof(float)))); \
    typedef float taps_##size##_unaligned \
        __attribute__((vector_size(lanes * sizeof(float)), aligned(sizeof(float)), may_alias)); \
    static void grad_kernel_##size(const float *lines, size_t length, const float *grad, float *kernel) { \
        taps_##size sum[size] = {0}; \
        for (int channel = 0; channel < GROUP; channel++) { \
            UNROLL \
            for (int row = 0; row < size; row++) { \
                const float *line = lines + (size_t)(row * GROUP + channel) * length; \
                sum[row] += *(const taps_##size##_unaligned *)line * (grad[channel] - (taps_##size){0}); \
            } \
        } \
        UNROLL \
        for (int row = 0; row < size - 1; row++) *(taps_##size##_unaligned *)(kernel + row * size) = sum[row]; \
        memcpy(kernel + (size - 1) * size, &sum[size - 1], size * sizeof(float)); \
    }
GRAD_KERNEL(3, 4)
GRAD_KERNEL(7, 8)

STRIP_FUNCTIONS(grad_x, 3, 1)
STRIP_FUNCTIONS(grad_x, 7, 1)
STRIP_FUNCTIONS(grad_x, 7, 2)

static bool operator_fast(const struct operation *o) {
    return o->element_size <= sizeof(float) && o->group_channels == GROUP && involve_functions(o->size, o->stride);
}

/* Buffers of one thread. */
struct operator_scratch {
    float *kernel, *out, *grad_kernel; /* of one row of outputs */
    float *plane; /* x with a border, or its gradient */
    float *lines; /* x as [row][channel][pixel], only with gradients */
};

static size_t row_floats(const struct operation *o, int per_pixel) {
    return (size_t)ceil_div(o->out_width * per_pixel, GROUP) * GROUP;
}

static size_t plane_floats(const struct operation *o) {
    int border = o->size / 2;
    return (size_t)GROUP * (size_t)(o->x_height + 2 * border) * (size_t)(o->x_width + 2 * border);
}

/* Stride between the lines of two channels. */
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

/* Reads `count` elements of each pixel as float32; pixels are `stride` elements apart in the array. */
static void gather(const struct operation *o, const void *array, size_t first, size_t stride, int pixels, int count,
                   float *to) {
    for (int p = 0; p < pixels; p++, first += stride, to += count) {
        if (o->element_size == sizeof(float)) {
            memcpy(to, (const float *)array + first, (size_t)count * sizeof(float));
        } else {
            widen((const bfloat16 *)array + first, to, count);
        }
    }
}

/* The inverse of gather. */
static void scatter(const struct operation *o, const float *from, void *array, size_t first, size_t stride, int pixels,
                    int count) {
    for (int p = 0; p < pixels; p++, first += stride, from += count) {
        if (o->element_size == sizeof(float)) {
            memcpy((float *)array + first, from, (size_t)count * sizeof(float));
        } else {
            narrow(from, (bfloat16 *)array + first, count);
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

/* Computes the gradients of a row of outputs. */
static void row_gradients(const struct operation *o, const struct operator_scratch *s, int y, const struct window *w) {
    size_t length = line_floats(o);
    for (int column = 0; column < o->out_width; column++) {
        const float *window = s->lines + (size_t)(y * o->stride) * GROUP * length + (size_t)(column * o->stride);
        float *kernel = s->grad_kernel + (size_t)column * w->kernel_pixel;
        (o->size == 7 ? grad_kernel_7 : grad_kernel_3)(window, length, w->out + (size_t)column * GROUP, kernel);
    }
    in_strips(o->size == 3 ? grad_x_3_1 : o->stride == 1 ? grad_x_7_1 : grad_x_7_2, o->stride, o->out_width, *w);
}

static void operator_item(const struct operation *o, int image, int group, float *floats) {
    static const float ones[GROUP] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}, zeros[GROUP];
    struct operator_scratch s = divide_scratch(o, floats);
    int border = o->size / 2, taps = o->size * o->size;
    size_t channels = (size_t)(o->groups * GROUP), kernels = (size_t)(o->groups * taps);
    struct map plane = blocked_map(s.plane, 1, o->x_height, o->x_width, border);
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
    for (int y = 0; y < o->out_height; y++) {
        size_t pixel = ((size_t)image * (size_t)o->out_height + (size_t)y) * (size_t)o->out_width;
        size_t tap = pixel * kernels + (size_t)(group * taps), out = pixel * channels + (size_t)group * GROUP;
        struct window w = {
            .x = s.plane + (size_t)(y * o->stride) * plane.row,
            .x_row = plane.row,
            .kernel = s.kernel,
            .kernel_pixel = (size_t)taps,
            .out = s.out,
            .out_pixel = GROUP,
            .bn_scale = ones,
            .bn_shift = zeros,
        };
        gather(o, o->kernel, tap, kernels, o->out_width, taps, s.kernel);
        if (o->grad_x) {
            gather(o, o->out, out, channels, o->out_width, GROUP, s.out);
            row_gradients(o, &s, y, &w);
            scatter(o, s.grad_kernel, o->grad_kernel, tap, kernels, o->out_width, taps);
        } else {
            involve_row(o->size, o->stride, o->out_width, &w);
            scatter(o, s.out, o->out, out, channels, o->out_width, GROUP);
        }
    }
    for (int y = 0; o->grad_x && y < o->x_height; y++) {
        const float *row = plane.data + (size_t)y * plane.row;
        scatter(o, row, o->grad_x, x_first + (size_t)y * x_row, channels, o->x_width, GROUP);
    }
}

/* A thread pool and its buffers. The buffers are kept between calls: malloc would return memory of this size to the
 * system, and each call would pay for its page faults again. */
struct operators {
    struct pool *pool;
    float *scratch[MAX_THREADS];
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
    for (int item; (item = next_item(all)) < o->batch * o->groups;) {
        int image = item / o->groups, group = item % o->groups;
        if (operator_fast(o)) {
            operator_item(o, image, group, call->operators->scratch[thread]);
        } else if (o->element_size == sizeof(float)) {
            operator_any_float(o, image, group);
        } else {
            operator_any_double(o, image, group);
        }
    }
}
