/* Memory layouts of feature maps.
 *
 * A pixel has one index over the whole batch: p = (image * height + y) * width + x. There are two layouts. NHWC stores
 * all channels of a pixel together. Blocked maps (oneDNN's nChw16c, with the group of channels outermost) store one
 * plane of GROUP channels per group, with a border of zeros around each image: an involution then reads whole windows
 * without testing for the edge, and the rows that it needs of one group stay in the L1 cache. */
#pragma once

#include <limits.h>
#include <string.h>

#include "vector.h"

struct map {
    element *data; /* first channel of the pixel `origin`; the border lies before it */
    int height, width;
    size_t image, row, pixel; /* strides in elements */
    size_t group; /* stride between groups of channels; GROUP in NHWC */
    int origin; /* index of the pixel at `data`; not 0 in a map that holds one tile of a larger map */
};

struct range {
    int first, end;
};

ALWAYS_INLINE int min(int a, int b) { return a < b ? a : b; }
ALWAYS_INLINE int max(int a, int b) { return a > b ? a : b; }
ALWAYS_INLINE int ceil_div(int a, int b) { return (a + b - 1) / b; }

/* Part `index` of `parts` parts of nearly equal length. */
ALWAYS_INLINE struct range subrange(struct range all, int index, int parts) {
    int64_t length = all.end - all.first;
    return (struct range){all.first + (int)(length * index / parts), all.first + (int)(length * (index + 1) / parts)};
}

static struct map nhwc_map(element *data, int height, int width, int channels) {
    size_t pixel = (size_t)channels, row = pixel * (size_t)width;
    return (struct map){data, height, width, row * (size_t)height, row, pixel, GROUP, 0};
}

/* An NHWC map that holds the pixels origin, origin + 1, ... of a larger map. */
static struct map tile_map(element *data, int channels, int origin) {
    struct map map = nhwc_map(data, 1, INT_MAX, channels);
    map.origin = origin;
    return map;
}

/* A view of the pixels (stride * y, stride * x). */
static struct map strided_map(struct map map, int stride) {
    map.height = ceil_div(map.height, stride), map.width = ceil_div(map.width, stride);
    map.row *= (size_t)stride, map.pixel *= (size_t)stride;
    return map;
}

static size_t blocked_elements(int images, int height, int width, int channels, int border) {
    return (size_t)images * (size_t)(height + 2 * border) * (size_t)(width + 2 * border) * (size_t)channels;
}

static struct map blocked_map(element *buffer, int images, int height, int width, int border) {
    size_t row = (size_t)(width + 2 * border) * GROUP, image = row * (size_t)(height + 2 * border);
    element *data = buffer + (size_t)border * (row + GROUP);
    return (struct map){data, height, width, image, row, GROUP, image * (size_t)images, 0};
}

/* Writes zeros to the border of every plane of a blocked map. */
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

/* Computes the addresses of the pixels first, first + 1, ... */
ALWAYS_INLINE void locate_pixels(struct map map, int first, int count, element **address) {
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
