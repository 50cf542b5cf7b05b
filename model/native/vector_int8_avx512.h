/* Codes on AVX-512 with VNNI: bytes, of which one instruction multiplies and adds four in each 32-bit lane. Included by
 * vector_int8.h. */
#pragma once

typedef __m512i products;

ALWAYS_INLINE products no_products(void) { return _mm512_setzero_si512(); }

ALWAYS_INLINE products repeat(const element *codes) {
    int32_t four;
    memcpy(&four, codes, sizeof four);
    return _mm512_set1_epi32(four);
}

ALWAYS_INLINE products load_weights(const int8_t *weights) { return _mm512_loadu_si512(weights); }

/* GCC 12 copies and spills the accumulators of the intrinsic, so the instruction is written out. */
ALWAYS_INLINE void add_products(products *sum, products codes, products weights) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(*sum) : "v"(codes), "v"(weights));
}

ALWAYS_INLINE vec multiply_add(vec a, vec b, vec c) { return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }

ALWAYS_INLINE vec floats_of(products sum) { return (vec)_mm512_cvtepi32_ps(sum); }

ALWAYS_INLINE vec values_of(const element *codes, bool is_signed) {
    __m128i loaded = _mm_loadu_si128((const __m128i *)codes);
    return floats_of(is_signed ? _mm512_cvtepi8_epi32(loaded) : _mm512_cvtepu8_epi32(loaded));
}

ALWAYS_INLINE void store_unsigned(element *to, vec value) {
    __m512i rounded = _mm512_max_epi32(_mm512_cvtps_epi32((__m512)value), _mm512_setzero_si512());
    _mm_storeu_si128((__m128i *)to, _mm512_cvtusepi32_epi8(rounded));
}

ALWAYS_INLINE void store_signed(element *to, vec value) {
    _mm_storeu_si128((__m128i *)to, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32((__m512)value)));
}

ALWAYS_INLINE void store_small(element *to, products codes) {
    _mm_storeu_si128((__m128i *)to, _mm512_cvtepi32_epi8(codes));
}

ALWAYS_INLINE products load_codes(const element *from) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from));
}

#define largest_codes _mm256_max_epu8
