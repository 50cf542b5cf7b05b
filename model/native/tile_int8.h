/* The register tile of the matrix product, in int8. Included by matmul.h.
 *
 * vpdpbusd takes four neighbouring inputs of a pixel, as bytes from 0, times four signed weights of each of 16 columns,
 * and adds the four products to 32-bit sums, exactly. GCC 12 copies and spills the accumulators of its intrinsic, so
 * the instruction is written out. */
#pragma once

#include "codes.h"

/* One register tile. Always inlined into functions where rows and vectors are constants. */
ALWAYS_INLINE void multiply_tile(const int rows, const int vectors, const struct tile *tile) {
    const element *in[ROWS];
    const int8_t *weights = tile->weights;
    __m512i sum[ROWS][VECTORS];
    UNROLL
    for (int r = 0; r < rows; r++) {
        in[r] = tile->in[r];
        __builtin_prefetch((tile->residual ? tile->residual[r] : tile->out[r]) + tile->column);
        UNROLL
        for (int v = 0; v < vectors; v++) sum[r][v] = _mm512_setzero_si512();
    }
    for (int s = 0; s < tile->stretches.count; s++) {
        for (int k = 0; k < tile->stretches.length; k += 4) {
            __m512i w[VECTORS];
            UNROLL
            for (int v = 0; v < vectors; v++) {
                w[v] = _mm512_loadu_si512(weights + 64 * v);
                __builtin_prefetch(weights + 64 * v + AHEAD);
            }
            UNROLL
            for (int r = 0; r < rows; r++) {
                int32_t four;
                memcpy(&four, in[r] + k, sizeof four);
                __m512i x = _mm512_set1_epi32(four);
                UNROLL
                for (int v = 0; v < vectors; v++) add_products(&sum[r][v], x, w[v]);
            }
            weights += 64 * vectors;
        }
        UNROLL
        for (int r = 0; r < rows; r++) in[r] += tile->stretches.stride;
    }
    UNROLL
    for (int v = 0; v < vectors; v++) {
        __m512 multiplier = _mm512_loadu_ps(tile->multiplier + v * VL), bias = _mm512_loadu_ps(tile->bias + v * VL);
        size_t at = tile->column + place(v, tile->group);
        UNROLL
        for (int r = 0; r < rows; r++) {
            __m512 value = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r][v]), multiplier, bias);
            if (tile->residual) {
                __m512 residual = values_of(tile->residual[r] + at, tile->residual_signed);
                value = _mm512_fmadd_ps(residual, _mm512_set1_ps(tile->residual_step), value);
            }
            __m128i codes = tile->relu ? unsigned_codes(value) : signed_codes(value);
            _mm_storeu_si128((__m128i *)(tile->out[r] + at), codes);
        }
    }
}
