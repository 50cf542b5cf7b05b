/* int8 vectors in AVX2. Quantised values take 16 bits, because vpmaddwd adds the products of two of them exactly in
 * each 32-bit lane, while the sums of vpmaddubsw saturate at 16 bits. Weights are stored as bytes. Included by
 * vector_int8.h. */
#pragma once

typedef __m256i ivec;

ALWAYS_INLINE ivec zero_ivec(void) { return _mm256_setzero_si256(); }

ALWAYS_INLINE ivec broadcast_inputs(const element *inputs) {
    int32_t two;
    memcpy(&two, inputs, sizeof two);
    return _mm256_set1_epi32(two);
}

ALWAYS_INLINE ivec load_weights(const int8_t *weights) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)weights));
}

ALWAYS_INLINE void accumulate_products(ivec *sum, ivec inputs, ivec weights) {
    *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(inputs, weights));
}

ALWAYS_INLINE vec fmadd(vec a, vec b, vec c) { return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }

ALWAYS_INLINE vec to_floats(ivec sum) { return (vec)_mm256_cvtepi32_ps(sum); }

ALWAYS_INLINE vec load_quantised(const element *from, bool is_signed) {
    (void)is_signed; /* int16 holds both ranges */
    return to_floats(_mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i *)from)));
}

ALWAYS_INLINE void store_narrowed(element *to, ivec values) {
    __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(values, values), 0x08);
    _mm_storeu_si128((__m128i *)to, _mm256_castsi256_si128(packed));
}

ALWAYS_INLINE ivec round_and_clamp(vec value, int low, int high) {
    __m256i rounded = _mm256_cvtps_epi32((__m256)value);
    return _mm256_min_epi32(_mm256_max_epi32(rounded, _mm256_set1_epi32(low)), _mm256_set1_epi32(high));
}

ALWAYS_INLINE void store_u8(element *to, vec value) { store_narrowed(to, round_and_clamp(value, 0, 255)); }
ALWAYS_INLINE void store_s8(element *to, vec value) { store_narrowed(to, round_and_clamp(value, -128, 127)); }

ALWAYS_INLINE ivec load_quantised_ints(const element *from) {
    return _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from));
}

#define max_quantised _mm256_max_epi16
