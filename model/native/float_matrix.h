/* Float32 matrix products of the int8 builds, for the first convolution of the stem and for the classifier. */
#pragma once

#include "map.h"

struct float_matrix {
    float *weights; /* panels of VL columns, each [inputs][VL] */
    float *bias;
    int inputs, outputs;
};

/* Computes one panel for all rows, four at a time; only the first `count` of its columns are stored. */
static void multiply_float_panel(const struct float_matrix *m, int column, int count, const float *in, int rows,
                                 float *out) {
    for (int first = 0; first < rows; first += 4) {
        int block = min(4, rows - first);
        const float *x = in + (size_t)first * (size_t)m->inputs,
                    *weights = m->weights + (size_t)column * (size_t)m->inputs;
        vec sum[4];
        for (int i = 0; i < 4; i++) sum[i] = load(m->bias + column);
        for (int k = 0; k < m->inputs; k++, weights += VL) {
            vec w = load(weights);
            UNROLL
            for (int i = 0; i < 4; i++)
                sum[i] += broadcast(x[(size_t)(i < block ? i : 0) * (size_t)m->inputs + (size_t)k]) * w;
        }
        for (int i = 0; i < block; i++)
            memcpy(out + (size_t)(first + i) * (size_t)m->outputs + column, &sum[i], (size_t)count * sizeof(float));
    }
}
