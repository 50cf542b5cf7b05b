/* Sums over windows in AVX2. Included by involution_int8.h.
 *
 * vpmaddwd multiplies a pixel and the pixel below it with a tap and the tap below it. Two unpack instructions
 * interleave the channels of the two pixels within 128-bit halves: one vector has channels 0-3 and 8-11, the other 4-7
 * and 12-15. */
#pragma once

#define TAP_ROWS 2 /* rows of the taps that one instruction multiplies */
#define TAP_COLS 1 /* and columns */

typedef struct {
    __m256i low, high;
} interleaved;
typedef interleaved window_sum;

ALWAYS_INLINE window_sum zero_window_sum(void) { return (window_sum){_mm256_setzero_si256(), _mm256_setzero_si256()}; }

ALWAYS_INLINE interleaved interleave(const element *x, size_t below) {
    __m256i upper = _mm256_loadu_si256((const __m256i *)x), lower = _mm256_loadu_si256((const __m256i *)(x + below));
    return (interleaved){_mm256_unpacklo_epi16(upper, lower), _mm256_unpackhi_epi16(upper, lower)};
}

ALWAYS_INLINE void accumulate_taps(window_sum *sum, interleaved pixels, const element *taps) {
    ivec both = broadcast_inputs(taps);
    accumulate_products(&sum->low, pixels.low, both);
    accumulate_products(&sum->high, pixels.high, both);
}

/* The values 0-3 and 8-11 of an array, in the order of the channels in `low`. */
ALWAYS_INLINE vec load_interleaved(const float *from) {
    return (vec)_mm256_set_m128(_mm_loadu_ps(from + 8), _mm_loadu_ps(from));
}

ALWAYS_INLINE void epilogue(const struct window *w, int pixel, window_sum sum) {
    vec low = fmadd(to_floats(sum.low), load_interleaved(w->bn_scale), load_interleaved(w->bn_shift));
    vec high = fmadd(to_floats(sum.high), load_interleaved(w->bn_scale + 4), load_interleaved(w->bn_shift + 4));
    /* Packing restores the order of the channels. */
    __m256i values = _mm256_packs_epi32(round_and_clamp(low, 0, 255), round_and_clamp(high, 0, 255));
    _mm256_storeu_si256((__m256i *)(w->out + (size_t)pixel * w->out_pixel), values);
}
