/* Where the pixels of a feature map lie in memory.
 *
 * Pixels are counted through: p = (image * height + y) * width + x. A plain map has its channels side by side, pixel
 * after pixel. A planar map keeps GROUP channels side by side and puts one plane per group behind the other, with a
 * border of zeros around each image: an involution then reads whole windows without a test for the edge, and the rows
 * that one group needs stay in the first-level cache. */
#pragma once

#include <limits.h>
#include <string.h>

#include "vector.h"

struct map {
    element *data; /* the first channel of pixel 0; borders lie before it */
    int height, width;
    size_t image, row, pixel; /* elements from one to the next */
    size_t group; /* elements from one group of channels to the next; GROUP in a plain map */
    int origin; /* the number of the pixel at data: not 0 in a map that holds a tile of a larger one */
};

struct range {
    int first, end;
};

ALWAYS_INLINE int least(int a, int b) { return a < b ? a : b; }
ALWAYS_INLINE int most(int a, int b) { return a > b ? a : b; }
ALWAYS_INLINE int ceil_div(int a, int b) { return (a + b - 1) / b; }

/* Part `index` of `parts` nearly equal ones. */
ALWAYS_INLINE struct range part(struct range all, int index, int parts) {
    int64_t length = all.end - all.first;
    return (struct range){all.first + (int)(length * index / parts), all.first + (int)(length * (index + 1) / parts)};
}

static struct map plain_map(element *data, int height, int width, int channels) {
    size_t pixel = (size_t)channels, row = pixel * (size_t)width;
    return (struct map){data, height, width, row * (size_t)height, row, pixel, GROUP, 0};
}

/* A plain map for the pixels origin, origin + 1, ... of some other map. */
static struct map tile_map(element *data, int channels, int origin) {
    struct map map = plain_map(data, 1, INT_MAX, channels);
    map.origin = origin;
    return map;
}

/* The pixels (stride * y, stride * x) of a map. */
static struct map every(struct map map, int stride) {
    map.height = ceil_div(map.height, stride), map.width = ceil_div(map.width, stride);
    map.row *= (size_t)stride, map.pixel *= (size_t)stride;
    return map;
}

static size_t planar_elements(int images, int height, int width, int channels, int border) {
    return (size_t)images * (size_t)(height + 2 * border) * (size_t)(width + 2 * border) * (size_t)channels;
}

static struct map planar_map(element *buffer, int images, int height, int width, int border) {
    size_t row = (size_t)(width + 2 * border) * GROUP, image = row * (size_t)(height + 2 * border);
    element *data = buffer + (size_t)border * (row + GROUP);
    return (struct map){data, height, width, image, row, GROUP, image * (size_t)images, 0};
}

/* Zeros around every plane of a planar map of n images. */
static void clear_border(struct map map, int images, int groups, int border) {
    size_t side = (size_t)border * map.pixel * sizeof(element);
    for (int g = 0; g < groups; g++) {
        for (int i = 0; i < images; i++) {
            element *corner =
                map.data + (size_t)g * map.group + (size_t)i * map.image - (size_t)border * (map.row + map.pixel);
            for (int y = 0; y < map.height + 2 * border; y++, corner += map.row) {
                if (y < border || y >= map.height + border) {
                    memset(corner, 0, map.row * sizeof(element));
                } else {
                    memset(corner, 0, side);
                    memset(corner + map.row - (size_t)border * map.pixel, 0, side);
                }
            }
        }
    }
}

/* The addresses of pixels first, first + 1, ... */
ALWAYS_INLINE void locate(struct map map, int first, int count, element **address) {
    first -= map.origin;
    int x = first % map.width, line = first / map.width, y = line % map.height, image = line / map.height;
    for (int p = 0; p < count; p++) {
        address[p] = map.data + (size_t)image * map.image + (size_t)y * map.row + (size_t)x * map.pixel;
        if (++x == map.width) {
            x = 0;
            if (++y == map.height) y = 0, image++;
        }
    }
}
