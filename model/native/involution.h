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
    const element *x; /* the first pixel of the first window */
    size_t x_row; /* elements from one row of x to the next; pixels are GROUP apart */
    const element *kernel; /* K*K weights of the first pixel */
    size_t kernel_pixel; /* elements from one pixel's weights to the next one's */
    element *out;
    size_t out_pixel;
    const float *scale, *shift; /* out = sum * scale + shift: the batch norm that follows */
    bool relu;
};

#ifdef INT8
#include "involution_int8.h"
#else
#include "involution_float32.h"
#endif

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
