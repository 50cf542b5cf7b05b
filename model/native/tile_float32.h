/* The micro-kernel of the matrix product in float32. Included by matmul.h.
 *
 * Measured on one core of a Sapphire Rapids class Xeon: 157-174 of 175 GFLOP/s with inputs and weights in cache,
 * 148-151 in stage 4 at batch size 1, where weights come from the L3 cache, and 116-140 for 16 inputs. */
#pragma once

/* Computes one register tile. Callers are functions with constant rows and vectors, into which this is inlined. */
ALWAYS_INLINE void multiply_tile(const int rows, const int vectors, const struct tile *tile) {
    const float *in[MR], *weights = tile->weights;
    vec sum[MR][NR_VECTORS];
    UNROLL
    for (int r = 0; r < rows; r++) {
        in[r] = tile->in[r];
        UNROLL
        for (int v = 0; v < vectors; v++) {
            sum[r][v] = load(tile->bias + v * VL);
            /* The lines that the epilogue reads or writes arrive in the cache while the product runs. */
            if (v * VL % GROUP == 0) {
                const float *line = tile->residual ? tile->residual[r] : tile->out[r];
                __builtin_prefetch(line + tile->column + column_offset(v, tile->group));
            }
        }
    }
    for (int s = 0; s < tile->segments.count; s++) {
        for (int k = 0; k < tile->segments.length; k++) {
            vec w[NR_VECTORS];
            UNROLL
            for (int v = 0; v < vectors; v++) {
                w[v] = load(weights + v * VL);
                if (v * VL % GROUP == 0) __builtin_prefetch(weights + v * VL + PREFETCH_DISTANCE);
            }
            UNROLL
            for (int r = 0; r < rows; r++) {
                vec x = broadcast(in[r][k]);
                UNROLL
                for (int v = 0; v < vectors; v++) sum[r][v] += x * w[v];
            }
            weights += vectors * VL;
        }
        UNROLL
        for (int r = 0; r < rows; r++) in[r] += tile->segments.stride;
    }
    UNROLL
    for (int r = 0; r < rows; r++) {
        float *out = tile->out[r] + tile->column;
        if (tile->residual) {
            const float *residual = tile->residual[r] + tile->column;
            UNROLL
            for (int v = 0; v < vectors; v++) sum[r][v] += load(residual + v * VL);
        }
        UNROLL
        for (int v = 0; v < vectors; v++) {
            store(out + column_offset(v, tile->group), tile->relu ? relu(sum[r][v]) : sum[r][v]);
        }
    }
}
