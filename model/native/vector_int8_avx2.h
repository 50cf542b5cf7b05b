/* Codes on AVX2: 16 bits for each, of which one instruction multiplies and adds two in each 32-bit lane, exactly. (The
 * instruction for bytes cuts its sums off at 16 bits.) Weights are stored as bytes. Included by vector_int8.h. */
#pragma once

typedef __m256i products;

ALWAYS_INLINE products no_products(void) { return _mm256_setzero_si256(); }

ALWAYS_INLINE products repeat(const element *codes) {
    int32_t two;
    memcpy(&two, codes, sizeof two);
    return _mm256_set1_epi32(two);
}

ALWAYS_INLINE products load_weights(const int8_t *weights) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)weights));
}

ALWAYS_INLINE void add_products(products *sum, products codes, products weights) {
    *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(codes, weights));
}

ALWAYS_INLINE vec multiply_add(vec a, vec b, vec c) { return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }

ALWAYS_INLINE vec floats_of(products sum) { return (vec)_mm256_cvtepi32_ps(sum); }

ALWAYS_INLINE vec values_of(const element *codes, bool is_signed) {
    (void)is_signed; /* both fit into 16 bits with a sign */
    return floats_of(_mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i *)codes)));
}

ALWAYS_INLINE void store_small(element *to, products codes) {
    __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(codes, codes), 0x08);
    _mm_storeu_si128((__m128i *)to, _mm256_castsi256_si128(packed));
}

ALWAYS_INLINE products between_codes(vec value, int least, int most) {
    __m256i rounded = _mm256_cvtps_epi32((__m256)value);
    return _mm256_min_epi32(_mm256_max_epi32(rounded, _mm256_set1_epi32(least)), _mm256_set1_epi32(most));
}

ALWAYS_INLINE void store_unsigned(element *to, vec value) { store_small(to, between_codes(value, 0, 255)); }
ALWAYS_INLINE void store_signed(element *to, vec value) { store_small(to, between_codes(value, -128, 127)); }

ALWAYS_INLINE products load_codes(const element *from) {
    return _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from));
}

#define largest_codes _mm256_max_epi16
