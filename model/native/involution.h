/* Involution on blocked maps, 16 channels at a time: each output pixel is the sum of its K*K window, weighted by its
 * own kernel.
 *
 * The windows of neighbouring pixels overlap. A strip of up to 7 pixels is computed at once with its sums in registers:
 * each input pixel is loaded once per row of the window and added to every sum that it belongs to (K = 7: 13 loads for
 * 49 multiply-adds). The weights are broadcast from the L1 cache. The blocked layout took the involutions of an image
 * from 2.35 to 1.85 ms, and constant kernel sizes and strides to 1.5 ms. */
#pragma once

#include "map.h"

#define STRIP \
    7 /* divides the widths 112, 56, 28, 14 and 7 of a 224-pixel photo; 7 sums and an input fit 16 registers */

struct window {
    const element *x; /* first pixel of the first window; pixels are GROUP elements apart */
    size_t x_row; /* stride between rows of x, in elements */
    const element *kernel; /* K*K weights of the first output pixel */
    size_t kernel_pixel; /* stride between the weights of two pixels */
    element *out;
    size_t out_pixel;
    const float *bn_scale, *bn_shift; /* out = sum * bn_scale + bn_shift: the batch norm after the involution */
    bool relu;
};

#ifdef INT8
#include "involution_int8.h"
#else
#include "involution_float32.h"
#endif

typedef void involve_function(const struct window *);
#define STRIP_FUNCTION(name, k, s, n) \
    static __attribute__((noinline)) void name##_##k##_##s##_##n(const struct window *w) { name##_strip(k, s, n, w); }
/* clang-format off */
#define STRIP_FUNCTIONS(name, k, s) \
    STRIP_FUNCTION(name, k, s, 1) STRIP_FUNCTION(name, k, s, 2) STRIP_FUNCTION(name, k, s, 3) STRIP_FUNCTION(name, k, s, 4) \
    STRIP_FUNCTION(name, k, s, 5) STRIP_FUNCTION(name, k, s, 6) STRIP_FUNCTION(name, k, s, 7) \
    static involve_function *const name##_##k##_##s[STRIP] = { \
        name##_##k##_##s##_1, name##_##k##_##s##_2, name##_##k##_##s##_3, name##_##k##_##s##_4, \
        name##_##k##_##s##_5, name##_##k##_##s##_6, name##_##k##_##s##_7, \
    };
/* clang-format on */
STRIP_FUNCTIONS(involve, 3, 1)
STRIP_FUNCTIONS(involve, 7, 1)
STRIP_FUNCTIONS(involve, 7, 2)

/* Functions for strips of 1 to STRIP pixels; NULL if none were compiled for this kernel size and stride. */
static involve_function *const *involve_functions(int size, int stride) {
    if (size == 3 && stride == 1) return involve_3_1;
    if (size == 7 && stride == 1) return involve_7_1;
    if (size == 7 && stride == 2) return involve_7_2;
    return NULL;
}

/* Computes neighbouring outputs of one row in strips of nearly equal length. */
static void in_strips(involve_function *const *functions, int stride, int pixels, struct window w) {
    int strips = ceil_div(pixels, STRIP);
    for (int s = 0, done = 0; s < strips; s++) {
        int strip = pixels * (s + 1) / strips - done;
        functions[strip - 1](&w);
        done += strip;
        w.x += (size_t)(strip * stride) * GROUP;
        w.kernel += (size_t)strip * w.kernel_pixel;
        w.out += (size_t)strip * w.out_pixel;
    }
}

static void involve_row(int size, int stride, int pixels, const struct window *w) {
    involve_function *const *functions = involve_functions(size, stride);
    if (functions) {
        in_strips(functions, stride, pixels, *w);
    } else {
        involve_any(size, stride, pixels, w);
    }
}
