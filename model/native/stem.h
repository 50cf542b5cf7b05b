/* From pixels to the first feature map: convolution, involution, convolution, pooling. */
#pragma once

#include "block.h"

#define STEM_TILE 448 /* pixels that a thread takes at a time */

struct stem {
    float table[3][256]; /* what a pixel's value becomes: (value / 255 - mean) / std */
    struct matrix first; /* 3x3, stride 2 */
    struct involution involution;
    struct matrix last; /* 3x3 */
};

/* Memory that the threads of a team share. Borders are zero from the outset, and nothing writes there. */
struct stem_space {
    float *pixels; /* the normalised photo, plain with border 1 */
    float *planes; /* behind the first convolution, planar with border */
    float *middle; /* behind the involution, plain with border 1 */
};

/* A plain map with a border of one pixel. */
static struct map bordered_map(float *buffer, int height, int width, int channels) {
    size_t pixel = (size_t)channels, row = pixel * (size_t)(width + 2);
    return (struct map){buffer + row + pixel, height, width, row * (size_t)(height + 2), row, pixel, GROUP, 0};
}

/* The first pixels of the 3x3 windows around those of a bordered map. */
static struct map windows(struct map map) {
    map.data -= map.row + map.pixel;
    return map;
}

/* Photos as they come in, [3, height, width] each: bytes, or floats that are normalised already. */
struct photos {
    const uint8_t *bytes;
    const float *floats; /* one of the two is NULL */
};

static void take_row(const struct stem *stem, struct photos photo, struct map out, int y) {
    size_t plane = (size_t)out.height * (size_t)out.width, row = (size_t)y * (size_t)out.width;
    float *to = out.data + (size_t)y * out.row;
    for (size_t from = row; from < row + (size_t)out.width; from++) {
        for (size_t channel = 0; channel < 3; channel++) {
            size_t at = channel * plane + from;
            *to++ = photo.bytes ? stem->table[channel][photo.bytes[at]] : photo.floats[at];
        }
    }
}

/* Maxima over 3x3 pixels, stride 2. Where the window leaves the map, it sees a pixel twice instead. */
static void pool_row(const float *const rows[3], int width, int channels, float *out) {
    for (int x = 0; x < width; x += 2) {
        int columns[3] = {most(x - 1, 0), x, least(x + 1, width - 1)};
        for (int channel = 0; channel < channels; channel += VL, out += VL) {
            vec top = load(rows[1] + (size_t)x * (size_t)channels + (size_t)channel);
            for (int r = 0; r < 3; r++) {
                for (int c = 0; c < 3; c++) {
                    top = larger(top, load(rows[r] + (size_t)columns[c] * (size_t)channels + (size_t)channel));
                }
            }
            store(out, top);
        }
    }
}

/* Rows of the pooled map. The convolution's rows live in a ring of three; each is made once, or twice between threads.
 */
static void last_and_pool(const struct stem *stem, struct map in, struct range rows, struct scratch *scratch,
                          float *out) {
    int channels = stem->last.outputs, made = most(2 * rows.first - 1, 0), height = in.height, width = in.width;
    size_t length = (size_t)width * (size_t)channels;
    for (int y = rows.first; y < rows.end; y++) {
        int last = least(2 * y + 1, height - 1);
        for (; made <= last; made++) {
            struct range pixels = {made * width, (made + 1) * width};
            struct map row = tile_map(scratch->rows + (size_t)(made % 3) * length, channels, pixels.first);
            struct product product = {&stem->last, windows(in), row, NULL, three_by_three(in, (int)in.pixel), true};
            multiply_all(&product, pixels);
        }
        int wanted[3] = {most(2 * y - 1, 0), 2 * y, last};
        const float *ring[3];
        for (int r = 0; r < 3; r++) ring[r] = scratch->rows + (size_t)(wanted[r] % 3) * length;
        pool_row(ring, width, channels, out + (size_t)y * (size_t)ceil_div(width, 2) * (size_t)channels);
    }
}

/* One photo; out: [height / 4, width / 4, stem channels], rounded up. */
static void run_stem(const struct worker *worker, const struct stem *stem, struct photos photo, int height, int width,
                     const struct stem_space *space, float *out) {
    struct map input = bordered_map(space->pixels, height, width, 3);
    for (int y; (y = take(worker->team)) < height;) take_row(stem, photo, input, y);
    meet(worker->team);

    int half = stem->involution.channels;
    struct map strided = every(input, 2);
    struct map planes = planar_map(space->planes, 1, strided.height, strided.width, stem->involution.size / 2);
    struct map middle = bordered_map(space->middle, strided.height, strided.width, half);
    struct range pixels = {0, strided.height * strided.width};
    strided.data = windows(input).data;
    struct product first = {&stem->first, strided, planes, NULL, three_by_three(input, 3), true};
    int items = shares(worker, pixels.end, STEM_TILE);
    for (int item; (item = take(worker->team)) < items;) multiply_all(&first, part(pixels, item, items));
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
