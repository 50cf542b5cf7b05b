/* Batch norm for training in bfloat16, fused with the residual add and the ReLU after it: each pass reads and writes a
 * map once.
 *
 * Maps are [rows, channels] in channels-last order, one row per pixel. Passes that sum over rows return one partial sum
 * per block of rows. The blocks depend only on the number of rows, so results do not depend on the number of threads.
 */
#pragma once

#include "bfloat16.h"
#include "threads.h"

enum { STATISTICS, NORMALISE, GRADIENT_SUMS, GRADIENTS }; /* passes */

struct batch_norm {
    int pass;
    int64_t rows;
    int channels, blocks;
    const bfloat16 *x;
    const bfloat16 *grad; /* gradient of y */
    const bfloat16 *y; /* the output, if there was a ReLU; else NULL */
    const bfloat16 *shortcut; /* NULL if there is none */
    const float *a, *b, *c; /* [channels] */
    bool relu;
    float *sums; /* [blocks, 2, channels] */
    bfloat16 *out; /* y, or the gradient of x */
    bfloat16 *grad_shortcut; /* NULL if there is none */
};

ALWAYS_INLINE float wide(bfloat16 value) {
    float result;
    widen(&value, &result, 1);
    return result;
}

/* Sums x - a and its square. `a` is close to the mean, so that the variance loses no precision to cancellation. */
static void statistics(const struct batch_norm *n, int64_t first, int64_t last, float *restrict sum,
                       float *restrict squares) {
    for (int64_t row = first; row < last; row++) {
        const bfloat16 *restrict x = n->x + row * n->channels;
        for (int c = 0; c < n->channels; c++) {
            float value = wide(x[c]) - n->a[c];
            sum[c] += value;
            squares[c] += value * value;
        }
    }
}

/* y = relu(a * x + b + shortcut). The ReLU keeps NaN. */
ALWAYS_INLINE void normalise(const struct batch_norm *n, int64_t first, int64_t last, const bool added,
                             const bool relu) {
    const float *restrict a = n->a, *restrict b = n->b;
    for (int64_t row = first; row < last; row++) {
        const bfloat16 *restrict x = n->x + row * n->channels, *restrict shortcut = n->shortcut + row * n->channels;
        bfloat16 *restrict out = n->out + row * n->channels;
        for (int c = 0; c < n->channels; c++) {
            float value = a[c] * wide(x[c]) + b[c];
            if (added) value += wide(shortcut[c]);
            if (relu) value = value < 0 ? 0 : value;
            narrow(&value, out + c, 1);
        }
    }
}

/* Sums the gradient before the ReLU, and its products with x - a, where `a` is the mean. */
ALWAYS_INLINE void gradient_sums(const struct batch_norm *n, int64_t first, int64_t last, const bool relu,
                                 float *restrict sum, float *restrict products) {
    for (int64_t row = first; row < last; row++) {
        const bfloat16 *restrict x = n->x + row * n->channels, *restrict y = n->y + row * n->channels,
                                 *restrict grad = n->grad + row * n->channels;
        for (int c = 0; c < n->channels; c++) {
            float value = wide(grad[c]);
            if (relu) value = wide(y[c]) == 0 ? 0 : value;
            sum[c] += value;
            products[c] += value * (wide(x[c]) - n->a[c]);
        }
    }
}

/* The gradient of x is a * g + b * x + c, where g is the gradient before the ReLU, which is also that of the shortcut.
 */
ALWAYS_INLINE void gradients(const struct batch_norm *n, int64_t first, int64_t last, const bool relu,
                             const bool added) {
    const float *restrict a = n->a, *restrict b = n->b, *restrict shift = n->c;
    for (int64_t row = first; row < last; row++) {
        int64_t at = row * n->channels;
        const bfloat16 *restrict x = n->x + at, *restrict y = n->y + at, *restrict grad = n->grad + at;
        bfloat16 *restrict out = n->out + at, *restrict shortcut = n->grad_shortcut + at;
        for (int c = 0; c < n->channels; c++) {
            float value = wide(grad[c]);
            if (relu) value = wide(y[c]) == 0 ? 0 : value;
            if (added) narrow(&value, shortcut + c, 1);
            value = a[c] * value + b[c] * wide(x[c]) + shift[c];
            narrow(&value, out + c, 1);
        }
    }
}

struct batch_norm_call {
    const struct batch_norm *norm;
    struct team *all;
};

static void batch_norm_block(const struct batch_norm *n, int block) {
    int64_t first = n->rows * block / n->blocks, last = n->rows * (block + 1) / n->blocks;
    float *sums = n->sums + (int64_t)block * 2 * n->channels;
    if (n->pass == STATISTICS) {
        statistics(n, first, last, sums, sums + n->channels);
    } else if (n->pass == NORMALISE) {
        if (n->shortcut) {
            n->relu ? normalise(n, first, last, true, true) : normalise(n, first, last, true, false);
        } else {
            n->relu ? normalise(n, first, last, false, true) : normalise(n, first, last, false, false);
        }
    } else if (n->pass == GRADIENT_SUMS) {
        n->y ? gradient_sums(n, first, last, true, sums, sums + n->channels)
             : gradient_sums(n, first, last, false, sums, sums + n->channels);
    } else if (n->grad_shortcut) {
        n->y ? gradients(n, first, last, true, true) : gradients(n, first, last, false, true);
    } else {
        n->y ? gradients(n, first, last, true, false) : gradients(n, first, last, false, false);
    }
}

static void batch_norm_thread(void *context, int thread) {
    (void)thread;
    const struct batch_norm_call *call = context;
    for (int block; (block = next_item(call->all)) < call->norm->blocks;) batch_norm_block(call->norm, block);
}
