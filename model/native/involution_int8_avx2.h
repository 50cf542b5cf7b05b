/* Windows on AVX2. Included by involution_int8.h.
 *
 * A pixel and the one below it, channel by channel, are what vpmaddwd multiplies with a tap and the one below. Two
 * unpackings join them within 128-bit halves: channels 0-3 and 8-11 in one vector, 4-7 and 12-15 in the other. */
#pragma once

#define TALL 2 /* rows, and */
#define WIDE 1 /* columns, of the taps that are multiplied together */

typedef struct {
    __m256i low, high;
} joined;
typedef joined window_sum;

ALWAYS_INLINE window_sum no_window(void) { return (window_sum){_mm256_setzero_si256(), _mm256_setzero_si256()}; }

ALWAYS_INLINE joined join(const element *x, size_t below) {
    __m256i upper = _mm256_loadu_si256((const __m256i *)x), lower = _mm256_loadu_si256((const __m256i *)(x + below));
    return (joined){_mm256_unpacklo_epi16(upper, lower), _mm256_unpackhi_epi16(upper, lower)};
}

ALWAYS_INLINE void add_taps_of(window_sum *sum, joined pixels, const element *taps) {
    products both = repeat(taps);
    add_products(&sum->low, pixels.low, both);
    add_products(&sum->high, pixels.high, both);
}

/* Sixteen floats in the order of a window's sums. */
ALWAYS_INLINE vec quarters(const float *from) {
    return (vec)_mm256_set_m128(_mm_loadu_ps(from + 8), _mm_loadu_ps(from));
}

ALWAYS_INLINE void finish(const struct window *w, int pixel, window_sum sum) {
    vec low = multiply_add(floats_of(sum.low), quarters(w->scale), quarters(w->shift));
    vec high = multiply_add(floats_of(sum.high), quarters(w->scale + 4), quarters(w->shift + 4));
    /* packing puts the channels in order again */
    __m256i codes = _mm256_packs_epi32(between_codes(low, 0, 255), between_codes(high, 0, 255));
    _mm256_storeu_si256((__m256i *)(w->out + (size_t)pixel * w->out_pixel), codes);
}
