/* Sums over windows in int8. Included by involution.h.
 *
 * Taps are multiplied TOGETHER: TALL rows and WIDE columns of them. Kernels are padded with zeros to whole ones, so a
 * window may read, and not use, up to WIDE - 1 pixels to the right of itself. */
#pragma once

#include "vector_int8.h"

#if VL == 16
#include "involution_int8_avx512.h"
#else
#include "involution_int8_avx2.h"
#endif

/* Taps in a row, the padding included. */
ALWAYS_INLINE int padded(int size) { return (size + WIDE - 1) / WIDE * WIDE; }

ALWAYS_INLINE int taps_of(int size) { return (size + TALL - 1) / TALL * TALL * padded(size); }

/* Where a kernel has the tap of a row and a column. */
ALWAYS_INLINE int tap_at(int size, int row, int column) {
    return (row / TALL * padded(size) + column / WIDE * WIDE) * TALL + row % TALL * WIDE + column % WIDE;
}

/* Whether taps that are multiplied together begin in a column of a window. */
ALWAYS_INLINE bool has_taps(int size, int column) { return 0 <= column && column < padded(size) && column % WIDE == 0; }

/* Elements to the row below; where the window ends there, none: the padding's zero is multiplied with something. */
ALWAYS_INLINE size_t row_below(const struct window *w, int size, int row) { return row + 1 < size ? w->x_row : 0; }

/* A run of `pixels` outputs. Always inlined into functions where the first three arguments are constants. */
ALWAYS_INLINE void involve_run(const int size, const int stride, const int pixels, const struct window *w) {
    const element *x = w->x, *kernel[RUN];
    window_sum sum[RUN];
    UNROLL
    for (int p = 0; p < pixels; p++) {
        kernel[p] = w->kernel + (size_t)p * w->kernel_pixel;
        sum[p] = no_window();
    }
    for (int row = 0; row < size; row += TALL) {
        size_t below = row_below(w, size, row);
        UNROLL
        for (int column = 0; column <= stride * (pixels - 1) + padded(size) - WIDE; column++) {
            bool used = false;
            UNROLL
            for (int p = 0; p < pixels; p++) used |= has_taps(size, column - stride * p);
            if (!used) continue;
            joined codes = join(x + column * GROUP, below);
            UNROLL
            for (int p = 0; p < pixels; p++) {
                int tap = column - stride * p;
                if (has_taps(size, tap)) add_taps_of(&sum[p], codes, kernel[p] + tap * TALL);
            }
        }
        UNROLL
        for (int p = 0; p < pixels; p++) kernel[p] += padded(size) * TALL;
        x += TALL * w->x_row;
    }
    UNROLL
    for (int p = 0; p < pixels; p++) finish(w, p, sum[p]);
}

/* Any kernel size and stride, one pixel after the other. */
static void involve_any(int size, int stride, int pixels, const struct window *w) {
    for (int p = 0; p < pixels; p++) {
        const element *x = w->x + (size_t)(p * stride) * GROUP, *kernel = w->kernel + (size_t)p * w->kernel_pixel;
        window_sum sum = no_window();
        for (int row = 0; row < size; row += TALL, x += TALL * w->x_row) {
            size_t below = row_below(w, size, row);
            for (int tap = 0; tap < padded(size); tap += WIDE, kernel += TOGETHER) {
                add_taps_of(&sum, join(x + tap * GROUP, below), kernel);
            }
        }
        finish(w, p, sum);
    }
}
