/* Convolutions as matrix products: out[p] = act(weights * in[p] + bias + residual[p]).
 *
 * This is an indirect GEMM as in XNNPACK: the kernel finds each pixel through a pointer, so that strided, bordered and
 * blocked maps need no copy (no im2col). A 1x1 convolution multiplies the channels of a pixel. A 3x3 convolution is the
 * same product over three segments of 3 * C contiguous elements. Sizes are named as in BLIS: MR x NR is the register
 * tile, a block has up to MC pixels, and weights are packed in panels of NR columns. */
#pragma once

#include <stdlib.h>

#include "map.h"

#define MC 512 /* the most pixels in a block */
#define MIN_MC 96
#define L2_ELEMENTS \
    (512 * 1024 / (int)sizeof(element)) /* the most inputs in a block, so that they stay in the L2 cache */
/* Weights are prefetched 1 KB ahead of their use, because the late stages stream them from beyond the L2 cache: 50.6 ->
 * 52.3 images/s, and most of it at batch size 1. */
#define PREFETCH_DISTANCE (1024 / (int)sizeof(element))

struct matrix {
#ifdef INT8
    int8_t *weights; /* panels of NR columns, each [inputs / KR][columns][KR] */
    float *multiplier; /* [columns], requantisation: weight scale * input scale / output scale */
    float residual_multiplier; /* residual scale / output scale */
#else
    float *weights; /* panels of NR columns, each [inputs][columns]; the last panel may be narrower */
#endif
    float *bias; /* [columns] */
    int inputs, outputs;
    int vectors; /* outputs rounded up to whole vectors; the columns beyond `outputs` are zeros */
};

ALWAYS_INLINE int panels(const struct matrix *m) { return ceil_div(m->vectors, NR_VECTORS); }
ALWAYS_INLINE int columns(const struct matrix *m) { return m->vectors * VL; }

/* Layout of a pixel's inputs: `count` segments of `length` contiguous elements, `stride` elements apart. */
struct segments {
    int count, length;
    size_t stride;
};

static struct segments segments_1x1(struct map in, int channels) {
    if (in.group == GROUP) return (struct segments){1, channels, 0};
    return (struct segments){channels / GROUP, GROUP, in.group};
}

/* `in` must start at the first pixel of a window; see `window_corners`. */
static struct segments segments_3x3(struct map in, int channels) { return (struct segments){3, 3 * channels, in.row}; }

struct tile {
    element *const *in, *const *out, *const *residual; /* addresses of up to MR pixels; residual may be NULL */
    struct segments segments;
#ifdef INT8
    const int8_t *weights;
    const float *multiplier;
    float residual_multiplier;
    bool residual_signed;
#else
    const float *weights;
#endif
    const float *bias;
    size_t column, group; /* of the output: offset of the tile's first column, and stride between groups */
    bool relu;
};

/* Offset of the tile's vector v in a map whose groups are `group` elements apart. */
ALWAYS_INLINE size_t column_offset(int v, size_t group) {
    return (size_t)(v * VL / GROUP) * group + (size_t)(v * VL % GROUP);
}

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
#if NR_VECTORS == 4
TILES(3)
TILES(4)
#endif
static void (*const multiply_tiles[NR_VECTORS][MR])(const struct tile *) = {
    TILE_NAMES(1),
    TILE_NAMES(2),
#if NR_VECTORS == 4
    TILE_NAMES(3),
    TILE_NAMES(4),
#endif
};

struct product {
    const struct matrix *matrix;
    struct map in, out;
    const struct map *residual; /* NULL for none; else it and `out` are NHWC, and it may be `out` itself */
    struct segments segments;
    bool relu; /* in int8, outputs are unsigned with a ReLU and signed without */
    bool residual_signed; /* int8 only */
};

/* Computes a range of pixels and a range of panels of output channels. */
static void multiply(const struct product *p, struct range pixels, struct range panels) {
    element *in[MC], *out[MC], *residual[MC];
    const struct matrix *m = p->matrix;
    int mc = max(MIN_MC, min(MC, L2_ELEMENTS / m->inputs));
    int blocks = ceil_div(pixels.end - pixels.first, mc);
    for (int b = 0; b < blocks; b++) {
        struct range block = subrange(pixels, b, blocks);
        int first = block.first, count = block.end - block.first;
        locate_pixels(p->in, first, count, in);
        locate_pixels(p->out, first, count, out);
        if (p->residual) locate_pixels(*p->residual, first, count, residual);
        /* Tiles have nearly equal heights: 49 pixels are split into 5s and 6s, with no small tile at the end. */
        int tiles = ceil_div(count, MR);
        for (int n = panels.first; n < panels.end; n++) {
            size_t column = (size_t)n * NR;
            int vectors = min(NR_VECTORS, m->vectors - n * NR_VECTORS);
            struct tile tile = {
                .segments = p->segments,
                .weights = m->weights + column * (size_t)m->inputs,
#ifdef INT8
                .multiplier = m->multiplier + column,
                .residual_multiplier = m->residual_multiplier,
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
