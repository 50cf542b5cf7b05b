/* The register tile of the matrix product, in int8. Included by matmul.h. Sums are exact. */
#pragma once

#include "vector_int8.h"

/* One register tile. Always inlined into functions where rows and vectors are constants. */
ALWAYS_INLINE void multiply_tile(const int rows, const int vectors, const struct tile *tile) {
    const int step = VL * TOGETHER; /* weights of a vector */
    const element *in[ROWS];
    const int8_t *weights = tile->weights;
    products sum[ROWS][VECTORS];
    UNROLL
    for (int r = 0; r < rows; r++) {
        in[r] = tile->in[r];
        __builtin_prefetch((tile->residual ? tile->residual[r] : tile->out[r]) + tile->column);
        UNROLL
        for (int v = 0; v < vectors; v++) sum[r][v] = no_products();
    }
    for (int s = 0; s < tile->stretches.count; s++) {
        for (int k = 0; k < tile->stretches.length; k += TOGETHER) {
            products w[VECTORS];
            UNROLL
            for (int v = 0; v < vectors; v++) {
                w[v] = load_weights(weights + v * step);
                if (v * step % 64 == 0) __builtin_prefetch(weights + v * step + AHEAD);
            }
            UNROLL
            for (int r = 0; r < rows; r++) {
                products x = repeat(in[r] + k);
                UNROLL
                for (int v = 0; v < vectors; v++) add_products(&sum[r][v], x, w[v]);
            }
            weights += vectors * step;
        }
        UNROLL
        for (int r = 0; r < rows; r++) in[r] += tile->stretches.stride;
    }
    UNROLL
    for (int v = 0; v < vectors; v++) {
        vec multiplier = load(tile->multiplier + v * VL), bias = load(tile->bias + v * VL);
        size_t at = tile->column + place(v, tile->group);
        UNROLL
        for (int r = 0; r < rows; r++) {
            vec value = multiply_add(floats_of(sum[r][v]), multiplier, bias);
            if (tile->residual) {
                vec residual = values_of(tile->residual[r] + at, tile->residual_signed);
                value = multiply_add(residual, broadcast(tile->residual_step), value);
            }
            if (tile->relu) {
                store_unsigned(tile->out[r] + at, value);
            } else {
                store_signed(tile->out[r] + at, value);
            }
        }
    }
}
