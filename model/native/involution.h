/* Involution of 16 channels at a time, on planar maps: each output pixel is the sum of its K*K window, weighted by its
 * own kernel.
 *
 * Neighbouring pixels share most of their windows. A run of up to 7 is computed at once, its sums in registers: each
 * pixel of the input is loaded once per row of the window and goes into all sums it belongs to (K = 7: 13 loads for 49
 * multiply-adds). The kernel's weights are broadcast from the first-level cache. */
#pragma once

#include "map.h"

#define RUN 7 /* divides the widths 112, 56, 28, 14, 7 of a 224-pixel photo; fits beside one input in 16 registers */

struct window {
    const float *x; /* the first pixel of the first window */
    size_t x_row; /* floats from one row of x to the next; pixels are GROUP apart */
    const float *kernel; /* K*K weights of the first pixel */
    size_t kernel_pixel; /* floats from one pixel's weights to the next one's */
    float *out;
    size_t out_pixel;
    const float *scale, *shift; /* out = sum * scale + shift: the batch norm that follows */
    bool relu;
};

ALWAYS_INLINE void finish(const struct window *w, int pixel, int channel, vec sum) {
    vec value = sum * load(w->scale + channel) + load(w->shift + channel);
    store(w->out + (size_t)pixel * w->out_pixel + channel, w->relu ? relu(value) : value);
}

/* A run of `pixels` outputs. Always inlined into functions where the first three arguments are constants. */
ALWAYS_INLINE void involve_run(const int size, const int stride, const int pixels, const struct window *w) {
    UNROLL
    for (int channel = 0; channel < GROUP; channel += VL) {
        const float *x = w->x + channel, *kernel[RUN];
        vec sum[RUN];
        UNROLL
        for (int p = 0; p < pixels; p++) {
            kernel[p] = w->kernel + (size_t)p * w->kernel_pixel;
            sum[p] = (vec){0};
        }
        for (int row = 0; row < size; row++) {
            UNROLL
            for (int column = 0; column < stride * (pixels - 1) + size; column++) {
                vec value = load(x + column * GROUP);
                UNROLL
                for (int p = 0; p < pixels; p++) {
                    int tap = column - stride * p;
                    if (0 <= tap && tap < size) sum[p] += value * broadcast(kernel[p][tap]);
                }
            }
            UNROLL
            for (int p = 0; p < pixels; p++) kernel[p] += size;
            x += w->x_row;
        }
        UNROLL
        for (int p = 0; p < pixels; p++) finish(w, p, channel, sum[p]);
    }
}

/* Any kernel size and stride, one pixel after the other. */
static void involve_any(int size, int stride, int pixels, const struct window *w) {
    for (int p = 0; p < pixels; p++) {
        const float *kernel = w->kernel + (size_t)p * w->kernel_pixel;
        for (int channel = 0; channel < GROUP; channel += VL) {
            const float *x = w->x + (size_t)(p * stride * GROUP + channel);
            vec sum = {0};
            for (int row = 0; row < size; row++, x += w->x_row) {
                for (int column = 0; column < size; column++) {
                    sum += load(x + column * GROUP) * broadcast(kernel[row * size + column]);
                }
            }
            finish(w, p, channel, sum);
        }
    }
}

typedef void involve_function(const struct window *);
#define RUN_FUNCTION(name, k, s, n) \
    static __attribute__((noinline)) void name##_##k##_##s##_##n(const struct window *w) { name##_run(k, s, n, w); }
/* clang-format off */
#define RUN_FUNCTIONS(name, k, s) \
    RUN_FUNCTION(name, k, s, 1) RUN_FUNCTION(name, k, s, 2) RUN_FUNCTION(name, k, s, 3) RUN_FUNCTION(name, k, s, 4) \
    RUN_FUNCTION(name, k, s, 5) RUN_FUNCTION(name, k, s, 6) RUN_FUNCTION(name, k, s, 7) \
    static involve_function *const name##_##k##_##s[RUN] = { \
        name##_##k##_##s##_1, name##_##k##_##s##_2, name##_##k##_##s##_3, name##_##k##_##s##_4, \
        name##_##k##_##s##_5, name##_##k##_##s##_6, name##_##k##_##s##_7, \
    };
/* clang-format on */
RUN_FUNCTIONS(involve, 3, 1)
RUN_FUNCTIONS(involve, 7, 1)
RUN_FUNCTIONS(involve, 7, 2)

/* The functions for runs of 1 to RUN pixels, or NULL where there are none for this kernel size and stride. */
static involve_function *const *involve_functions(int size, int stride) {
    if (size == 3 && stride == 1) return involve_3_1;
    if (size == 7 && stride == 1) return involve_7_1;
    if (size == 7 && stride == 2) return involve_7_2;
    return NULL;
}

/* Neighbouring outputs of one row, in runs of nearly equal length. */
static void in_runs(involve_function *const *functions, int stride, int pixels, struct window w) {
    int runs = ceil_div(pixels, RUN);
    for (int r = 0, done = 0; r < runs; r++) {
        int run = pixels * (r + 1) / runs - done;
        functions[run - 1](&w);
        done += run;
        w.x += (size_t)(run * stride) * GROUP;
        w.kernel += (size_t)run * w.kernel_pixel;
        w.out += (size_t)run * w.out_pixel;
    }
}

static void involve_row(int size, int stride, int pixels, const struct window *w) {
    involve_function *const *functions = involve_functions(size, stride);
    if (functions) {
        in_runs(functions, stride, pixels, *w);
    } else {
        involve_any(size, stride, pixels, w);
    }
}
