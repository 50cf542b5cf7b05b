/* The micro-kernel of the matrix product in int8, with exact sums of 32 bits. Included by matmul.h. */
#pragma once

#include "vector_int8.h"

/* Computes one register tile. Callers are functions with constant rows and vectors, into which this is inlined. */
ALWAYS_INLINE void multiply_tile(const int rows, const int vectors, const struct tile *tile) {
    const int vector_weights = VL * KR;
    const element *in[MR];
    const int8_t *weights = tile->weights;
    ivec sum[MR][NR_VECTORS];
    UNROLL
    for (int r = 0; r < rows; r++) {
        in[r] = tile->in[r];
        __builtin_prefetch((tile->residual ? tile->residual[r] : tile->out[r]) + tile->column);
        UNROLL
        for (int v = 0; v < vectors; v++) sum[r][v] = zero_ivec();
    }
    for (int s = 0; s < tile->segments.count; s++) {
        for (int k = 0; k < tile->segments.length; k += KR) {
            ivec w[NR_VECTORS];
            UNROLL
            for (int v = 0; v < vectors; v++) {
                w[v] = load_weights(weights + v * vector_weights);
                if (v * vector_weights % 64 == 0) __builtin_prefetch(weights + v * vector_weights + PREFETCH_DISTANCE);
            }
            UNROLL
            for (int r = 0; r < rows; r++) {
                ivec x = broadcast_inputs(in[r] + k);
                UNROLL
                for (int v = 0; v < vectors; v++) accumulate_products(&sum[r][v], x, w[v]);
            }
            weights += vectors * vector_weights;
        }
        UNROLL
        for (int r = 0; r < rows; r++) in[r] += tile->segments.stride;
    }
    UNROLL
    for (int v = 0; v < vectors; v++) {
        vec multiplier = load(tile->multiplier + v * VL), bias = load(tile->bias + v * VL);
        size_t at = tile->column + column_offset(v, tile->group);
        UNROLL
        for (int r = 0; r < rows; r++) {
            vec value = fmadd(to_floats(sum[r][v]), multiplier, bias);
            if (tile->residual) {
                vec residual = load_quantised(tile->residual[r] + at, tile->residual_signed);
                value = fmadd(residual, broadcast(tile->residual_multiplier), value);
            }
            if (tile->relu) {
                store_u8(tile->out[r] + at, value);
            } else {
                store_s8(tile->out[r] + at, value);
            }
        }
    }
}
