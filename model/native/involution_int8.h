/* Sums over windows in int8. Included by involution.h.
 *
 * One instruction multiplies KR taps, TAP_ROWS rows by TAP_COLS columns. Kernels are padded with zero taps to
 * multiples of both, so a window may read, without using them, up to TAP_COLS - 1 pixels to its right. */
#pragma once

#include "vector_int8.h"

#if VL == 16
#include "involution_int8_avx512.h"
#else
#include "involution_int8_avx2.h"
#endif

/* Taps in a row, padding included. */
ALWAYS_INLINE int padded_row(int size) { return (size + TAP_COLS - 1) / TAP_COLS * TAP_COLS; }

/* Taps of a kernel, padding included. */
ALWAYS_INLINE int padded_taps(int size) { return (size + TAP_ROWS - 1) / TAP_ROWS * TAP_ROWS * padded_row(size); }

/* Index of a tap in a padded kernel. */
ALWAYS_INLINE int tap_index(int size, int row, int column) {
    return (row / TAP_ROWS * padded_row(size) + column / TAP_COLS * TAP_COLS) * TAP_ROWS + row % TAP_ROWS * TAP_COLS +
           column % TAP_COLS;
}

/* Whether a column of the window is the first of TAP_COLS columns. */
ALWAYS_INLINE bool starts_taps(int size, int column) {
    return 0 <= column && column < padded_row(size) && column % TAP_COLS == 0;
}

/* Offset to the row below. In the last row of a window it is 0: the zero taps below may multiply any pixels. */
ALWAYS_INLINE size_t row_below(const struct window *w, int size, int row) { return row + 1 < size ? w->x_row : 0; }

/* Computes a strip. Callers are functions with constants for the first three arguments, into which this is inlined. */
ALWAYS_INLINE void involve_strip(const int size, const int stride, const int pixels, const struct window *w) {
    const element *x = w->x, *kernel[STRIP];
    window_sum sum[STRIP];
    UNROLL
    for (int p = 0; p < pixels; p++) {
        kernel[p] = w->kernel + (size_t)p * w->kernel_pixel;
        sum[p] = zero_window_sum();
    }
    for (int row = 0; row < size; row += TAP_ROWS) {
        size_t below = row_below(w, size, row);
        UNROLL
        for (int column = 0; column <= stride * (pixels - 1) + padded_row(size) - TAP_COLS; column++) {
            bool used = false;
            UNROLL
            for (int p = 0; p < pixels; p++) used |= starts_taps(size, column - stride * p);
            if (!used) continue;
            interleaved values = interleave(x + column * GROUP, below);
            UNROLL
            for (int p = 0; p < pixels; p++) {
                int tap = column - stride * p;
                if (starts_taps(size, tap)) accumulate_taps(&sum[p], values, kernel[p] + tap * TAP_ROWS);
            }
        }
        UNROLL
        for (int p = 0; p < pixels; p++) kernel[p] += padded_row(size) * TAP_ROWS;
        x += TAP_ROWS * w->x_row;
    }
    UNROLL
    for (int p = 0; p < pixels; p++) epilogue(w, p, sum[p]);
}

/* Computes pixels one at a time, for any kernel size and stride. */
static void involve_any(int size, int stride, int pixels, const struct window *w) {
    for (int p = 0; p < pixels; p++) {
        const element *x = w->x + (size_t)(p * stride) * GROUP, *kernel = w->kernel + (size_t)p * w->kernel_pixel;
        window_sum sum = zero_window_sum();
        for (int row = 0; row < size; row += TAP_ROWS, x += TAP_ROWS * w->x_row) {
            size_t below = row_below(w, size, row);
            for (int tap = 0; tap < padded_row(size); tap += TAP_COLS, kernel += KR) {
                accumulate_taps(&sum, interleave(x + tap * GROUP, below), kernel);
            }
        }
        epilogue(w, p, sum);
    }
}
