/* Sums over windows in int8. Included by involution.h.
 *
 * Four neighbouring pixels of a plane are 64 bytes, [pixel][channel]; permuted to [channel][pixel] they are what
 * vpdpbusd multiplies with four taps of a row. Rows of kernels are padded with zeros to whole fours, so a window may
 * read, and not use, up to three pixels to the right of itself. */
#pragma once

#include "codes.h"

/* Taps in a row, the padding included. */
ALWAYS_INLINE int padded(int size) { return (size + 3) / 4 * 4; }

ALWAYS_INLINE __m512i pixels_inside(void) {
    return _mm512_set_epi32(0x3f2f1f0f, 0x3e2e1e0e, 0x3d2d1d0d, 0x3c2c1c0c, 0x3b2b1b0b, 0x3a2a1a0a, 0x39291909,
                            0x38281808, 0x37271707, 0x36261606, 0x35251505, 0x34241404, 0x33231303, 0x32221202,
                            0x31211101, 0x30201000);
}

ALWAYS_INLINE void add_taps_of(__m512i *sum, __m512i bytes, const element *taps) {
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(*sum) : "v"(bytes), "m"(*(const int32_t (*)[1])taps));
}

ALWAYS_INLINE void finish(const struct window *w, int pixel, __m512i sum) {
    __m512 value = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_loadu_ps(w->scale), _mm512_loadu_ps(w->shift));
    _mm_storeu_si128((__m128i *)(w->out + (size_t)pixel * w->out_pixel), unsigned_codes(value));
}

/* A run of `pixels` outputs. Always inlined into functions where the first three arguments are constants. */
ALWAYS_INLINE void involve_run(const int size, const int stride, const int pixels, const struct window *w) {
    const element *x = w->x, *kernel[RUN];
    const __m512i order = pixels_inside();
    __m512i sum[RUN];
    UNROLL
    for (int p = 0; p < pixels; p++) {
        kernel[p] = w->kernel + (size_t)p * w->kernel_pixel;
        sum[p] = _mm512_setzero_si512();
    }
    for (int row = 0; row < size; row++) {
        UNROLL
        for (int column = 0; column <= stride * (pixels - 1) + padded(size) - 4; column++) {
            bool used = false;
            UNROLL
            for (int p = 0; p < pixels; p++) {
                int tap = column - stride * p;
                used |= 0 <= tap && tap < padded(size) && tap % 4 == 0;
            }
            if (!used) continue;
            __m512i bytes = _mm512_permutexvar_epi8(order, _mm512_loadu_si512(x + column * GROUP));
            UNROLL
            for (int p = 0; p < pixels; p++) {
                int tap = column - stride * p;
                if (0 <= tap && tap < padded(size) && tap % 4 == 0) add_taps_of(&sum[p], bytes, kernel[p] + tap);
            }
        }
        UNROLL
        for (int p = 0; p < pixels; p++) kernel[p] += padded(size);
        x += w->x_row;
    }
    UNROLL
    for (int p = 0; p < pixels; p++) finish(w, p, sum[p]);
}

/* Any kernel size and stride, one pixel after the other. */
static void involve_any(int size, int stride, int pixels, const struct window *w) {
    for (int p = 0; p < pixels; p++) {
        const element *x = w->x + (size_t)(p * stride) * GROUP, *kernel = w->kernel + (size_t)p * w->kernel_pixel;
        __m512i sum = _mm512_setzero_si512();
        for (int row = 0; row < size; row++, x += w->x_row) {
            for (int tap = 0; tap < padded(size); tap += 4, kernel += 4) {
                __m512i bytes = _mm512_loadu_si512(x + tap * GROUP);
                add_taps_of(&sum, _mm512_permutexvar_epi8(pixels_inside(), bytes), kernel);
            }
        }
        finish(w, p, sum);
    }
}
