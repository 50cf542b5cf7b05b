/* Codes of 8 bits, their products, and what becomes of sums. */
#pragma once

#include <immintrin.h>

#include "vector.h"

ALWAYS_INLINE void add_products(__m512i *sum, __m512i bytes, __m512i weights) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(*sum) : "v"(bytes), "v"(weights));
}

/* Rounds to the nearest code, half to even, and to the nearest end of the range beyond it. */
ALWAYS_INLINE __m128i unsigned_codes(__m512 value) {
    return _mm512_cvtusepi32_epi8(_mm512_max_epi32(_mm512_cvtps_epi32(value), _mm512_setzero_si512()));
}

ALWAYS_INLINE __m128i signed_codes(__m512 value) { return _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(value)); }

/* 16 codes as floats. */
ALWAYS_INLINE __m512 values_of(const element *codes, bool is_signed) {
    __m128i loaded = _mm_loadu_si128((const __m128i *)codes);
    return _mm512_cvtepi32_ps(is_signed ? _mm512_cvtepi8_epi32(loaded) : _mm512_cvtepu8_epi32(loaded));
}
