/* The register tile of the matrix product, in float32. Included by matmul.h. */
#pragma once

/* One register tile. Always inlined into functions where rows and vectors are constants. */
ALWAYS_INLINE void multiply_tile(const int rows, const int vectors, const struct tile *tile) {
    const float *in[ROWS], *weights = tile->weights;
    vec sum[ROWS][VECTORS];
    UNROLL
    for (int r = 0; r < rows; r++) {
        in[r] = tile->in[r];
        UNROLL
        for (int v = 0; v < vectors; v++) {
            sum[r][v] = load(tile->bias + v * VL);
            /* What the epilogue will read or write comes into the cache while the product runs. */
            if (v * VL % GROUP == 0) {
                const float *line = tile->residual ? tile->residual[r] : tile->out[r];
                __builtin_prefetch(line + tile->column + place(v, tile->group));
            }
        }
    }
    for (int s = 0; s < tile->stretches.count; s++) {
        for (int k = 0; k < tile->stretches.length; k++) {
            vec w[VECTORS];
            UNROLL
            for (int v = 0; v < vectors; v++) {
                w[v] = load(weights + v * VL);
                if (v * VL % GROUP == 0) __builtin_prefetch(weights + v * VL + AHEAD);
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
        for (int r = 0; r < rows; r++) in[r] += tile->stretches.stride;
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
            store(out + place(v, tile->group), tile->relu ? relu(sum[r][v]) : sum[r][v]);
        }
    }
}
