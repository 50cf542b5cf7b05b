/* int8 vectors in AVX-512 with VNNI, where vpdpbusd multiplies and adds four bytes in each 32-bit lane. Included by
 * vector_int8.h. */
#pragma once

typedef __m512i ivec;

ALWAYS_INLINE ivec zero_ivec(void) { return _mm512_setzero_si512(); }

ALWAYS_INLINE ivec broadcast_inputs(const element *inputs) {
    int32_t four;
    memcpy(&four, inputs, sizeof four);
    return _mm512_set1_epi32(four);
}

ALWAYS_INLINE ivec load_weights(const int8_t *weights) { return _mm512_loadu_si512(weights); }

/* Inline assembly, because GCC 12 copies and spills the accumulators of the intrinsic: 96 instead of 189 images/s. */
ALWAYS_INLINE void accumulate_products(ivec *sum, ivec inputs, ivec weights) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(*sum) : "v"(inputs), "v"(weights));
}

ALWAYS_INLINE vec fmadd(vec a, vec b, vec c) { return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }

ALWAYS_INLINE vec to_floats(ivec sum) { return (vec)_mm512_cvtepi32_ps(sum); }

ALWAYS_INLINE vec load_quantised(const element *from, bool is_signed) {
    __m128i loaded = _mm_loadu_si128((const __m128i *)from);
    return to_floats(is_signed ? _mm512_cvtepi8_epi32(loaded) : _mm512_cvtepu8_epi32(loaded));
}

ALWAYS_INLINE void store_u8(element *to, vec value) {
    __m512i rounded = _mm512_max_epi32(_mm512_cvtps_epi32((__m512)value), _mm512_setzero_si512());
    _mm_storeu_si128((__m128i *)to, _mm512_cvtusepi32_epi8(rounded));
}

ALWAYS_INLINE void store_s8(element *to, vec value) {
    _mm_storeu_si128((__m128i *)to, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32((__m512)value)));
}

ALWAYS_INLINE void store_narrowed(element *to, ivec values) {
    _mm_storeu_si128((__m128i *)to, _mm512_cvtepi32_epi8(values));
}

ALWAYS_INLINE ivec load_quantised_ints(const element *from) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from));
}

#define max_quantised _mm256_max_epu8
