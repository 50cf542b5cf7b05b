/* The stem: convolution, involution, convolution and max pooling. */
#pragma once

#include "block.h"

#ifdef INT8
#include "float_matrix.h"

#define STEM_STRIP 8 /* pixels that the first convolution computes at once, with their sums in registers */
#define POOLED (32 / (int)sizeof(element))
typedef __m256i pooled;
ALWAYS_INLINE pooled load_pooled(const element *from) { return _mm256_loadu_si256((const __m256i *)from); }
ALWAYS_INLINE void store_pooled(element *to, pooled values) { _mm256_storeu_si256((__m256i *)to, values); }
#define max_vec max_quantised
#else
#define POOLED VL
typedef vec pooled;
#define load_pooled load
#define store_pooled store
#endif

#define STEM_TILE 448 /* the most pixels in a work item */

struct stem {
    float table[3][256]; /* normalised pixel values: (value / 255 - mean) / std */
#ifdef INT8
    struct float_matrix first; /* 3x3, stride 2 */
#else
    struct matrix first;
#endif
    struct involution involution;
    struct matrix last; /* 3x3 */
};

/* Memory that the threads of a team share. Borders are zero after the allocation and are never written. */
struct stem_space {
    float *pixels; /* the normalised photo, NHWC with a border of 1 */
    element *planes; /* output of the first convolution, blocked with a border */
    element *middle; /* output of the involution, NHWC with a border of 1 */
};

/* An NHWC map with a border of one pixel. */
static struct map bordered_nhwc_map(element *buffer, int height, int width, int channels) {
    size_t pixel = (size_t)channels, row = pixel * (size_t)(width + 2);
    return (struct map){buffer + row + pixel, height, width, row * (size_t)(height + 2), row, pixel, GROUP, 0};
}

/* A view of the first pixel of the 3x3 window around each pixel of a bordered map. */
static struct map window_corners(struct map map) {
    map.data -= map.row + map.pixel;
    return map;
}

/* Computes a range of output pixels of the first convolution, in float32 in every build. */
#ifdef INT8
static void first_convolution(const struct float_matrix *first, const float *photo, int height, int width,
                              struct map out, struct range pixels) {
    (void)height;
    element *to[STEM_STRIP];
    size_t row = (size_t)(width + 2) * 3;
    for (int p = pixels.first; p < pixels.end;) {
        int x = p % out.width, y = p / out.width, strip = min(STEM_STRIP, min(out.width - x, pixels.end - p));
        locate_pixels(out, p, strip, to);
        for (int column = 0; column < first->outputs; column += VL) {
            const float *from = photo + (size_t)(2 * y) * row + (size_t)(2 * x) * 3;
            const float *weights = first->weights + (size_t)column * 27;
            vec sum[STEM_STRIP];
            for (int i = 0; i < STEM_STRIP; i++) sum[i] = load(first->bias + column);
            for (int line = 0; line < 3; line++, from += row) {
                for (int k = 0; k < 9; k++, weights += VL) {
                    vec w = load(weights);
                    if (strip == STEM_STRIP) {
                        UNROLL
                        for (int i = 0; i < STEM_STRIP; i++) sum[i] += broadcast(from[6 * i + k]) * w;
                    } else {
                        for (int i = 0; i < strip; i++) sum[i] += broadcast(from[6 * i + k]) * w;
                    }
                }
            }
            for (int i = 0; i < strip; i++)
                store_u8(to[i] + (size_t)(column / GROUP) * out.group + (size_t)(column % GROUP), sum[i]);
        }
        p += strip;
    }
}
#else
static void first_convolution(const struct matrix *first, float *photo, int height, int width, struct map out,
                              struct range pixels) {
    struct map input = bordered_nhwc_map(photo, height, width, 3), strided = strided_map(input, 2);
    strided.data = window_corners(input).data;
    struct product product = {first, strided, out, NULL, segments_3x3(input, 3), true, false};
    multiply_all(&product, pixels);
}
#endif

/* Input photos, [3, height, width] each. One of the two pointers is NULL. */
struct photos {
    const uint8_t *bytes;
    const float *floats; /* already normalised */
};

static void load_photo_row(const struct stem *stem, struct photos photo, float *pixels, int height, int width, int y) {
    size_t plane = (size_t)height * (size_t)width, row = (size_t)y * (size_t)width;
    float *to = pixels + ((size_t)(y + 1) * (size_t)(width + 2) + 1) * 3;
    for (size_t from = row; from < row + (size_t)width; from++) {
        for (size_t channel = 0; channel < 3; channel++) {
            size_t at = channel * plane + from;
            *to++ = photo.bytes ? stem->table[channel][photo.bytes[at]] : photo.floats[at];
        }
    }
}

/* Max pooling over 3x3 pixels at stride 2. Outside of the map a window repeats the pixel at the edge. */
static void pool_row(const element *const rows[3], int width, int channels, element *out) {
    for (int x = 0; x < width; x += 2) {
        int columns[3] = {max(x - 1, 0), x, min(x + 1, width - 1)};
        for (int channel = 0; channel < channels; channel += POOLED, out += POOLED) {
            pooled top = load_pooled(rows[1] + (size_t)x * (size_t)channels + (size_t)channel);
            for (int r = 0; r < 3; r++) {
                for (int c = 0; c < 3; c++) {
                    top = max_vec(top, load_pooled(rows[r] + (size_t)columns[c] * (size_t)channels + (size_t)channel));
                }
            }
            store_pooled(out, top);
        }
    }
}

/* Computes rows of the pooled map. A ring buffer holds three rows of the convolution; each row is computed once, or
 * twice where the ranges of two threads meet. */
static void last_and_pool(const struct stem *stem, struct map in, struct range rows, struct scratch *scratch,
                          element *out) {
    int channels = stem->last.outputs, done = max(2 * rows.first - 1, 0), height = in.height, width = in.width;
    size_t length = (size_t)width * (size_t)channels;
    for (int y = rows.first; y < rows.end; y++) {
        int last = min(2 * y + 1, height - 1);
        for (; done <= last; done++) {
            struct range pixels = {done * width, (done + 1) * width};
            struct map row = tile_map(scratch->rows + (size_t)(done % 3) * length, channels, pixels.first);
            struct product product = {&stem->last, window_corners(in), row, NULL, segments_3x3(in, (int)in.pixel), true,
                                      false};
            multiply_all(&product, pixels);
        }
        int needed[3] = {max(2 * y - 1, 0), 2 * y, last};
        const element *ring[3];
        for (int r = 0; r < 3; r++) ring[r] = scratch->rows + (size_t)(needed[r] % 3) * length;
        pool_row(ring, width, channels, out + (size_t)y * (size_t)ceil_div(width, 2) * (size_t)channels);
    }
}

/* Runs the stem on one photo; out: [ceil(height / 4), ceil(width / 4), stem channels]. */
static void run_stem(const struct worker *worker, const struct stem *stem, struct photos photo, int height, int width,
                     const struct stem_space *space, element *out) {
    for (int y; (y = next_item(worker->team)) < height;) load_photo_row(stem, photo, space->pixels, height, width, y);
    synchronise(worker->team);

    int half = stem->involution.channels;
    int strided_height = ceil_div(height, 2), strided_width = ceil_div(width, 2);
    struct map planes = blocked_map(space->planes, 1, strided_height, strided_width, stem->involution.size / 2);
    struct map middle = bordered_nhwc_map(space->middle, strided_height, strided_width, half);
    struct range pixels = {0, strided_height * strided_width};
    int items = work_items(worker, pixels.end, STEM_TILE);
    for (int item; (item = next_item(worker->team)) < items;)
        first_convolution(&stem->first, space->pixels, height, width, planes, subrange(pixels, item, items));
    synchronise(worker->team);

    for (int item; (item = next_item(worker->team)) < items;) {
        involve(&stem->involution, planes, middle, subrange(pixels, item, items), worker->scratch, NULL);
    }
    synchronise(worker->team);

    struct range rows = {0, ceil_div(middle.height, 2)};
    items = min(rows.end, worker->team->barrier.size);
    for (int item; (item = next_item(worker->team)) < items;) {
        last_and_pool(stem, middle, subrange(rows, item, items), worker->scratch, out);
    }
    synchronise(worker->team);
}
