/* Convolutions as matrix products over scattered pixels: out[p] = act(weights * in[p] + bias + residual[p]).
 *
 * A 1x1 convolution multiplies the channels of a pixel. A 3x3 convolution is the same product over three stretches of
 * 3 * C contiguous elements. Pixels are found through pointers, so that strided, bordered and planar maps need no copy.
 */
#pragma once

#include <stdlib.h>

#include "map.h"

#define PANEL (VECTORS * VL) /* output channels that one register tile makes */
#define CHUNK 512 /* pixels whose addresses are worked out at a time */
#define CACHE_ELEMENTS \
    (512 * 1024 / (int)sizeof(element)) /* of a chunk's inputs at most: they stay in the second-level cache */
#define AHEAD \
    (1024 / \
     (int)sizeof( \
         element)) /* elements from use to prefetch of weights: late layers stream them from beyond that cache */

struct matrix {
#ifdef INT8
    int8_t *weights; /* panel after panel of PANEL columns, each [inputs / TOGETHER][columns][TOGETHER] */
    float *multiplier; /* [columns]: real value of a product, in steps of the output */
    float residual_step; /* of what is added, in steps of the output */
#else
    float *weights; /* panel after panel of PANEL columns, each [inputs][columns]; the last may be narrower */
#endif
    float *bias; /* [columns] */
    int inputs, outputs;
    int vectors; /* of all columns: outputs rounded up to whole vectors, the rest zeros */
};

ALWAYS_INLINE int panels(const struct matrix *m) { return ceil_div(m->vectors, VECTORS); }
ALWAYS_INLINE int columns(const struct matrix *m) { return m->vectors * VL; }

/* How a pixel's inputs lie in memory: `count` stretches of `length` elements, `stride` apart. */
struct stretches {
    int count, length;
    size_t stride;
};

static struct stretches one_by_one(struct map in, int channels) {
    if (in.group == GROUP) return (struct stretches){1, channels, 0};
    return (struct stretches){channels / GROUP, GROUP, in.group};
}

/* `in` must be shifted to the window's first pixel: see `windows`. */
static struct stretches three_by_three(struct map in, int channels) {
    return (struct stretches){3, 3 * channels, in.row};
}

struct tile {
    element *const *in, *const *out, *const *residual; /* of ROWS pixels; residual may be NULL */
    struct stretches stretches;
#ifdef INT8
    const int8_t *weights;
    const float *multiplier;
    float residual_step;
    bool residual_signed;
#else
    const float *weights;
#endif
    const float *bias;
    size_t column, group; /* of the output: where the tile's first column lies, and from 16 channels to the next 16 */
    bool relu;
};

/* Where the tile's vector v lies in a map whose groups are `group` floats apart. */
ALWAYS_INLINE size_t place(int v, size_t group) { return (size_t)(v * VL / GROUP) * group + (size_t)(v * VL % GROUP); }

#ifdef INT8
#include "tile_int8.h"
#else
#include "tile_float32.h"
#endif

#define TILE(rows, vectors) \
    static __attribute__((noinline)) void multiply_##rows##x##vectors(const struct tile *t) { \
        multiply_tile(rows, vectors, t); \
    }
#define TILES(vectors) \
    TILE(1, vectors) TILE(2, vectors) TILE(3, vectors) TILE(4, vectors) TILE(5, vectors) TILE(6, vectors)
#define TILE_NAMES(v) {multiply_1x##v, multiply_2x##v, multiply_3x##v, multiply_4x##v, multiply_5x##v, multiply_6x##v}
TILES(1)
TILES(2)
#if VECTORS == 4
TILES(3)
TILES(4)
#endif
static void (*const multiply_tiles[VECTORS][ROWS])(const struct tile *) = {
    TILE_NAMES(1),
    TILE_NAMES(2),
#if VECTORS == 4
    TILE_NAMES(3),
    TILE_NAMES(4),
#endif
};

struct product {
    const struct matrix *matrix;
    struct map in, out;
    const struct map *residual; /* NULL: none; a plain map, as `out` then is; may be `out` itself */
    struct stretches stretches;
    bool relu; /* in int8 it also decides between bytes from 0 and signed ones */
    bool residual_signed; /* of int8 only */
};

/* The product for some pixels and some panels of output channels. */
static void multiply(const struct product *p, struct range pixels, struct range panels) {
    element *in[CHUNK], *out[CHUNK], *residual[CHUNK];
    const struct matrix *m = p->matrix;
    int chunk = most(96, least(CHUNK, CACHE_ELEMENTS / m->inputs));
    int chunks = ceil_div(pixels.end - pixels.first, chunk);
    for (int c = 0; c < chunks; c++) {
        struct range piece = part(pixels, c, chunks);
        int first = piece.first, count = piece.end - piece.first;
        locate(p->in, first, count, in);
        locate(p->out, first, count, out);
        if (p->residual) locate(*p->residual, first, count, residual);
        /* Tiles of nearly equal height: 49 pixels are 5 and 6 at a time, with no ragged tile at the end. */
        int tiles = ceil_div(count, ROWS);
        for (int n = panels.first; n < panels.end; n++) {
            size_t column = (size_t)n * PANEL;
            int vectors = least(VECTORS, m->vectors - n * VECTORS);
            struct tile tile = {
                .stretches = p->stretches,
                .weights = m->weights + column * (size_t)m->inputs,
#ifdef INT8
                .multiplier = m->multiplier + column,
                .residual_step = m->residual_step,
                .residual_signed = p->residual_signed,
#endif
                .bias = m->bias + column,
                .column = column / GROUP * p->out.group + column % GROUP,
                .group = p->out.group,
                .relu = p->relu,
            };
            for (int t = 0; t < tiles; t++) {
                int at = count * t / tiles, rows = count * (t + 1) / tiles - at;
                tile.in = in + at, tile.out = out + at, tile.residual = p->residual ? residual + at : NULL;
                multiply_tiles[vectors - 1][rows - 1](&tile);
            }
        }
    }
}

static void multiply_all(const struct product *p, struct range pixels) {
    multiply(p, pixels, (struct range){0, panels(p->matrix)});
}
