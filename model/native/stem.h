/* From pixels to the first feature map: convolution, involution, convolution, pooling. */
#pragma once

#include "block.h"

#ifdef INT8
#include "float_matrix.h"

#define FIRST_RUN 8 /* pixels whose sums the first convolution keeps in registers */
#define POOLED (32 / (int)sizeof(element))
typedef __m256i pooled;
ALWAYS_INLINE pooled load_pooled(const element *from) { return _mm256_loadu_si256((const __m256i *)from); }
ALWAYS_INLINE void store_pooled(element *to, pooled codes) { _mm256_storeu_si256((__m256i *)to, codes); }
#define larger largest_codes
#else
#define POOLED VL
typedef vec pooled;
#define load_pooled load
#define store_pooled store
#endif

#define STEM_TILE 448 /* pixels that a thread takes at a time */

struct stem {
    float table[3][256]; /* what a pixel's value becomes: (value / 255 - mean) / std */
#ifdef INT8
    struct float_matrix first; /* 3x3, stride 2 */
#else
    struct matrix first;
#endif
    struct involution involution;
    struct matrix last; /* 3x3 */
};

/* Memory that the threads of a team share. Borders are zero from the outset, and nothing writes there. */
struct stem_space {
    float *pixels; /* the normalised photo, plain with border 1 */
    element *planes; /* behind the first convolution, planar with border */
    element *middle; /* behind the involution, plain with border 1 */
};

/* A plain map with a border of one pixel. */
static struct map bordered_map(element *buffer, int height, int width, int channels) {
    size_t pixel = (size_t)channels, row = pixel * (size_t)(width + 2);
    return (struct map){buffer + row + pixel, height, width, row * (size_t)(height + 2), row, pixel, GROUP, 0};
}

/* The first pixels of the 3x3 windows around those of a bordered map. */
static struct map windows(struct map map) {
    map.data -= map.row + map.pixel;
    return map;
}

/* The first convolution, of floats, for some of its output pixels. */
#ifdef INT8
static void first_convolution(const struct float_matrix *first, const float *photo, int height, int width,
                              struct map out, struct range pixels) {
    (void)height;
    element *to[FIRST_RUN];
    size_t row = (size_t)(width + 2) * 3;
    for (int p = pixels.first; p < pixels.end;) {
        int x = p % out.width, y = p / out.width, run = least(FIRST_RUN, least(out.width - x, pixels.end - p));
        locate(out, p, run, to);
        for (int column = 0; column < first->outputs; column += VL) {
            const float *from = photo + (size_t)(2 * y) * row + (size_t)(2 * x) * 3;
            const float *weights = first->weights + (size_t)column * 27;
            vec sum[FIRST_RUN];
            for (int i = 0; i < FIRST_RUN; i++) sum[i] = load(first->bias + column);
            for (int line = 0; line < 3; line++, from += row) {
                for (int k = 0; k < 9; k++, weights += VL) {
                    vec w = load(weights);
                    if (run == FIRST_RUN) {
                        UNROLL
                        for (int i = 0; i < FIRST_RUN; i++) sum[i] += broadcast(from[6 * i + k]) * w;
                    } else {
                        for (int i = 0; i < run; i++) sum[i] += broadcast(from[6 * i + k]) * w;
                    }
                }
            }
            for (int i = 0; i < run; i++)
                store_unsigned(to[i] + (size_t)(column / GROUP) * out.group + (size_t)(column % GROUP), sum[i]);
        }
        p += run;
    }
}
#else
static void first_convolution(const struct matrix *first, float *photo, int height, int width, struct map out,
                              struct range pixels) {
    struct map input = bordered_map(photo, height, width, 3), strided = every(input, 2);
    strided.data = windows(input).data;
    struct product product = {first, strided, out, NULL, three_by_three(input, 3), true, false};
    multiply_all(&product, pixels);
}
#endif

/* Photos as they come in, [3, height, width] each: bytes, or floats that are normalised already. */
struct photos {
    const uint8_t *bytes;
    const float *floats; /* one of the two is NULL */
};

static void take_row(const struct stem *stem, struct photos photo, float *pixels, int height, int width, int y) {
    size_t plane = (size_t)height * (size_t)width, row = (size_t)y * (size_t)width;
    float *to = pixels + ((size_t)(y + 1) * (size_t)(width + 2) + 1) * 3;
    for (size_t from = row; from < row + (size_t)width; from++) {
        for (size_t channel = 0; channel < 3; channel++) {
            size_t at = channel * plane + from;
            *to++ = photo.bytes ? stem->table[channel][photo.bytes[at]] : photo.floats[at];
        }
    }
}

/* Maxima over 3x3 pixels, stride 2. Where the window leaves the map, it sees a pixel twice instead. */
static void pool_row(const element *const rows[3], int width, int channels, element *out) {
    for (int x = 0; x < width; x += 2) {
        int columns[3] = {most(x - 1, 0), x, least(x + 1, width - 1)};
        for (int channel = 0; channel < channels; channel += POOLED, out += POOLED) {
            pooled top = load_pooled(rows[1] + (size_t)x * (size_t)channels + (size_t)channel);
            for (int r = 0; r < 3; r++) {
                for (int c = 0; c < 3; c++) {
                    top = larger(top, load_pooled(rows[r] + (size_t)columns[c] * (size_t)channels + (size_t)channel));
                }
            }
            store_pooled(out, top);
        }
    }
}

/* Rows of the pooled map. The convolution's rows live in a ring of three; each is made once, or twice between threads.
 */
static void last_and_pool(const struct stem *stem, struct map in, struct range rows, struct scratch *scratch,
                          element *out) {
    int channels = stem->last.outputs, made = most(2 * rows.first - 1, 0), height = in.height, width = in.width;
    size_t length = (size_t)width * (size_t)channels;
    for (int y = rows.first; y < rows.end; y++) {
        int last = least(2 * y + 1, height - 1);
        for (; made <= last; made++) {
            struct range pixels = {made * width, (made + 1) * width};
            struct map row = tile_map(scratch->rows + (size_t)(made % 3) * length, channels, pixels.first);
            struct product product = {&stem->last, windows(in), row, NULL, three_by_three(in, (int)in.pixel),
                                      true,        false};
            multiply_all(&product, pixels);
        }
        int wanted[3] = {most(2 * y - 1, 0), 2 * y, last};
        const element *ring[3];
        for (int r = 0; r < 3; r++) ring[r] = scratch->rows + (size_t)(wanted[r] % 3) * length;
        pool_row(ring, width, channels, out + (size_t)y * (size_t)ceil_div(width, 2) * (size_t)channels);
    }
}

/* One photo; out: [height / 4, width / 4, stem channels], rounded up. */
static void run_stem(const struct worker *worker, const struct stem *stem, struct photos photo, int height, int width,
                     const struct stem_space *space, element *out) {
    for (int y; (y = take(worker->team)) < height;) take_row(stem, photo, space->pixels, height, width, y);
    meet(worker->team);

    int half = stem->involution.channels;
    int strided_height = ceil_div(height, 2), strided_width = ceil_div(width, 2);
    struct map planes = planar_map(space->planes, 1, strided_height, strided_width, stem->involution.size / 2);
    struct map middle = bordered_map(space->middle, strided_height, strided_width, half);
    struct range pixels = {0, strided_height * strided_width};
    int items = shares(worker, pixels.end, STEM_TILE);
    for (int item; (item = take(worker->team)) < items;)
        first_convolution(&stem->first, space->pixels, height, width, planes, part(pixels, item, items));
    meet(worker->team);

    for (int item; (item = take(worker->team)) < items;) {
        involve(&stem->involution, planes, middle, part(pixels, item, items), worker->scratch, NULL);
    }
    meet(worker->team);

    struct range rows = {0, ceil_div(middle.height, 2)};
    items = least(rows.end, worker->team->barrier.size);
    for (int item; (item = take(worker->team)) < items;) {
        last_and_pool(stem, middle, part(rows, item, items), worker->scratch, out);
    }
    meet(worker->team);
}
