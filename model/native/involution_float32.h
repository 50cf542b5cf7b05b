/* Sums over windows in float32. Included by involution.h. */
#pragma once

ALWAYS_INLINE void epilogue(const struct window *w, int pixel, int channel, vec sum) {
    vec value = sum * load(w->bn_scale + channel) + load(w->bn_shift + channel);
    store(w->out + (size_t)pixel * w->out_pixel + channel, w->relu ? relu(value) : value);
}

/* Computes a strip. Callers are functions with constants for the first three arguments, into which this is inlined. */
ALWAYS_INLINE void involve_strip(const int size, const int stride, const int pixels, const struct window *w) {
    UNROLL
    for (int channel = 0; channel < GROUP; channel += VL) {
        const float *x = w->x + channel, *kernel[STRIP];
        vec sum[STRIP];
        UNROLL
        for (int p = 0; p < pixels; p++) {
            kernel[p] = w->kernel + (size_t)p * w->kernel_pixel;
            sum[p] = (vec){0};
        }
        for (int row = 0; row < size; row++) {
            UNROLL
            for (int column = 0; column < stride * (pixels - 1) + size; column++) {
                vec value = load(x + column * GROUP);
                UNROLL
                for (int p = 0; p < pixels; p++) {
                    int tap = column - stride * p;
                    if (0 <= tap && tap < size) sum[p] += value * broadcast(kernel[p][tap]);
                }
            }
            UNROLL
            for (int p = 0; p < pixels; p++) kernel[p] += size;
            x += w->x_row;
        }
        UNROLL
        for (int p = 0; p < pixels; p++) epilogue(w, p, channel, sum[p]);
    }
}

/* Computes pixels one at a time, for any kernel size and stride. */
static void involve_any(int size, int stride, int pixels, const struct window *w) {
    for (int p = 0; p < pixels; p++) {
        const float *kernel = w->kernel + (size_t)p * w->kernel_pixel;
        for (int channel = 0; channel < GROUP; channel += VL) {
            const float *x = w->x + (size_t)(p * stride * GROUP + channel);
            vec sum = {0};
            for (int row = 0; row < size; row++, x += w->x_row) {
                for (int column = 0; column < size; column++) {
                    sum += load(x + column * GROUP) * broadcast(kernel[row * size + column]);
                }
            }
            epilogue(w, p, channel, sum);
        }
    }
}
