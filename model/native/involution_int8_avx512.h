/* Windows on AVX-512 with VNNI. Included by involution_int8.h.
 *
 * Four neighbouring pixels of a plane are 64 bytes, [pixel][channel]; permuted to [channel][pixel] they are what
 * vpdpbusd multiplies with four taps of a row. */
#pragma once

#define TALL 1 /* rows, and */
#define WIDE 4 /* columns, of the taps that are multiplied together */

typedef __m512i joined;
typedef __m512i window_sum;

ALWAYS_INLINE window_sum no_window(void) { return _mm512_setzero_si512(); }

ALWAYS_INLINE joined join(const element *x, size_t below) {
    (void)below;
    const __m512i order = _mm512_set_epi32(0x3f2f1f0f, 0x3e2e1e0e, 0x3d2d1d0d, 0x3c2c1c0c, 0x3b2b1b0b, 0x3a2a1a0a,
                                           0x39291909, 0x38281808, 0x37271707, 0x36261606, 0x35251505, 0x34241404,
                                           0x33231303, 0x32221202, 0x31211101, 0x30201000);
    return _mm512_permutexvar_epi8(order, _mm512_loadu_si512(x));
}

ALWAYS_INLINE void add_taps_of(window_sum *sum, joined bytes, const element *taps) {
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(*sum) : "v"(bytes), "m"(*(const int32_t (*)[1])taps));
}

ALWAYS_INLINE void finish(const struct window *w, int pixel, window_sum sum) {
    vec value = multiply_add(floats_of(sum), load(w->scale), load(w->shift));
    store_unsigned(w->out + (size_t)pixel * w->out_pixel, value);
}
