/* Convolutions as matrix products over scattered pixels: out[p] = act(weights * in[p] + bias + residual[p]).
 *
 * A 1x1 convolution multiplies the channels of a pixel. A 3x3 convolution is the same product over three stretches of
 * 3 * C contiguous floats. Pixels are found through pointers, so that strided, bordered and planar maps need no copy.
 */
#pragma once

#include <stdlib.h>

#include "map.h"

#define PANEL (VECTORS * VL) /* output channels that one register tile makes */
#define CHUNK 512 /* pixels whose addresses are worked out at a time */
#define CACHE_FLOATS (128 * 1024) /* of a chunk's inputs at most: they stay in the second-level cache */
#define AHEAD 256 /* floats from use to prefetch of weights: late layers stream them from beyond that cache */

struct matrix {
    float *weights; /* panel after panel of PANEL columns, each [inputs][columns]; the last may be narrower */
    float *bias; /* [columns] */
    int inputs, outputs;
    int vectors; /* of all columns: outputs rounded up to whole vectors, the rest zeros */
};

ALWAYS_INLINE int panels(const struct matrix *m) { return ceil_div(m->vectors, VECTORS); }
ALWAYS_INLINE int columns(const struct matrix *m) { return m->vectors * VL; }

/* One panel as a matrix of its own. */
static struct matrix panel_of(const struct matrix *m, int panel) {
    size_t column = (size_t)panel * PANEL;
    int vectors = least(VECTORS, m->vectors - panel * VECTORS), outputs = least(PANEL, m->outputs - panel * PANEL);
    return (struct matrix){m->weights + column * (size_t)m->inputs, m->bias + column, m->inputs, outputs, vectors};
}

/* How a pixel's inputs lie in memory: `count` stretches of `length` floats, `stride` apart. */
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
    float *const *in, *const *out, *const *residual; /* of ROWS pixels; residual may be NULL */
    struct stretches stretches;
    const float *weights, *bias;
    size_t column, group; /* of the output: where the tile's first column lies, and from 16 channels to the next 16 */
    bool relu;
};

/* Where the tile's vector v lies in a map whose groups are `group` floats apart. */
ALWAYS_INLINE size_t place(int v, size_t group) { return (size_t)(v * VL / GROUP) * group + (size_t)(v * VL % GROUP); }

/* One register tile. Always inlined into functions where rows and vectors are constants. */
ALWAYS_INLINE void multiply_tile(const int rows, const int vectors, const struct tile *tile) {
    const float *in[ROWS], *weights = tile->weights;
    vec sum[ROWS][VECTORS];
    UNROLL
    for (int r = 0; r < rows; r++) {
        in[r] = tile->in[r];
        UNROLL
        for (int v = 0; v < vectors; v++) {
            sum[r][v] = load(tile->bias + v * VL);
            /* What the epilogue will read or write comes into the cache while the product runs. */
            if (v * VL % GROUP == 0) {
                const float *line = tile->residual ? tile->residual[r] : tile->out[r];
                __builtin_prefetch(line + tile->column + place(v, tile->group));
            }
        }
    }
    for (int s = 0; s < tile->stretches.count; s++) {
        for (int k = 0; k < tile->stretches.length; k++) {
            vec w[VECTORS];
            UNROLL
            for (int v = 0; v < vectors; v++) {
                w[v] = load(weights + v * VL);
                if (v * VL % GROUP == 0) __builtin_prefetch(weights + v * VL + AHEAD);
            }
            UNROLL
            for (int r = 0; r < rows; r++) {
                vec x = broadcast(in[r][k]);
                UNROLL
                for (int v = 0; v < vectors; v++) sum[r][v] += x * w[v];
            }
            weights += vectors * VL;
        }
        UNROLL
        for (int r = 0; r < rows; r++) in[r] += tile->stretches.stride;
    }
    UNROLL
    for (int r = 0; r < rows; r++) {
        float *out = tile->out[r] + tile->column;
        if (tile->residual) {
            const float *residual = tile->residual[r] + tile->column;
            UNROLL
            for (int v = 0; v < vectors; v++) sum[r][v] += load(residual + v * VL);
        }
        UNROLL
        for (int v = 0; v < vectors; v++) {
            store(out + place(v, tile->group), tile->relu ? relu(sum[r][v]) : sum[r][v]);
        }
    }
}

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
    bool relu;
};

/* The product for some pixels and some panels of output channels. */
static void multiply(const struct product *p, struct range pixels, struct range panels) {
    float *in[CHUNK], *out[CHUNK], *residual[CHUNK];
    const struct matrix *m = p->matrix;
    int chunk = most(96, least(CHUNK, CACHE_FLOATS / m->inputs));
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
