/* Float32 products of the int8 build: the first convolution of the stem, and the classifier. */
#pragma once

#include "map.h"

struct float_matrix {
    float *weights; /* VL columns after VL columns, each [inputs][VL] */
    float *bias;
    int inputs, outputs;
};

/* VL outputs for up to four rows of inputs; `count` is how many of the outputs exist. */
static void multiply_floats(const struct float_matrix *m, int column, int count, const float *in, int rows,
                            float *out) {
    for (int first = 0; first < rows; first += 4) {
        int run = least(4, rows - first);
        const float *x = in + (size_t)first * (size_t)m->inputs,
                    *weights = m->weights + (size_t)column * (size_t)m->inputs;
        vec sum[4];
        for (int i = 0; i < 4; i++) sum[i] = load(m->bias + column);
        for (int k = 0; k < m->inputs; k++, weights += VL) {
            vec w = load(weights);
            UNROLL
            for (int i = 0; i < 4; i++)
                sum[i] += broadcast(x[(size_t)(i < run ? i : 0) * (size_t)m->inputs + (size_t)k]) * w;
        }
        for (int i = 0; i < run; i++)
            memcpy(out + (size_t)(first + i) * (size_t)m->outputs + column, &sum[i], (size_t)count * sizeof(float));
    }
}
