/* The two ways in which RedNet's layers meet: an involution with the generator of its kernels, and a bottleneck block.
 *
 * Both go tile by tile: the kernels of some dozens of pixels are made, used and forgotten while they are in the cache.
 * For a whole map they would be the largest tensor of the network. */
#pragma once

#include "involution.h"
#include "matmul.h"
#include "threads.h"

#define KERNEL_TILE 112 /* most pixels whose kernels exist at a time */
#define KERNEL_TILE_ELEMENTS (80 * 1024) /* and most elements, if that is not fewer than half of the pixels */
#define BLOCK_TILE 224 /* pixels of the last convolution: its weights are read once for each tile */
/* With no more pixels than this for each of its threads, a team shares output channels instead: few pixels go with
 * large weights, and each core then reads only a part of them. */
#define FEW_PIXELS 64

struct involution {
    struct matrix reduce, span; /* C -> C / r -> K * K * C / 16 */
    float *scale, *shift;
    int size, stride, channels;
    int taps; /* of a kernel, padding included */
#ifdef INT8
    float kernel_step; /* the real value of 1 */
#endif
};

/* What a thread needs for itself. */
struct scratch {
    element *pooled, *reduced, *kernels, *involved, *rows;
};

/* A thread at work on images, alone or in a team. */
struct worker {
    struct team *team;
    int rank; /* in the team */
    struct scratch *scratch;
};

static int kernel_tile(const struct involution *layer) {
    return most(KERNEL_TILE / 2, least(KERNEL_TILE, KERNEL_TILE_ELEMENTS / columns(&layer->span)));
}

/* In how many items a team shares pixels: as many for each thread, none of more than `limit` pixels. */
ALWAYS_INLINE int shares(const struct worker *worker, int pixels, int limit) {
    int size = worker->team->barrier.size;
    return size * ceil_div(pixels, size * limit);
}

#ifdef INT8
typedef uint32_t sums __attribute__((vector_size(VL * sizeof(uint32_t))));

ALWAYS_INLINE sums load_sums(const element *from) { return (sums)load_codes(from); }

/* Half a code is rounded up. */
ALWAYS_INLINE void store_average(element *to, sums sum, int count) {
    sums half = sum + (uint32_t)(count / 2);
    sums average = count == 4 ? half / 4 : half / (uint32_t)count;
    store_small(to, (products)average);
}
#else
typedef vec sums;
ALWAYS_INLINE sums load_sums(const element *from) { return load(from); }
ALWAYS_INLINE void store_average(element *to, sums sum, int count) { store(to, sum * broadcast(1.0f / (float)count)); }
#endif

/* Averages over stride x stride pixels; at an odd border, over those that exist. */
static void average(struct map in, const struct involution *layer, struct range pixels, element *out) {
    int width = ceil_div(in.width, layer->stride), height = ceil_div(in.height, layer->stride);
    for (int p = pixels.first; p < pixels.end; p++) {
        int top = p / width % height * layer->stride, left = p % width * layer->stride;
        int bottom = least(top + layer->stride, in.height), right = least(left + layer->stride, in.width);
        const element *image = in.data + (size_t)(p / width / height) * in.image;
        int count = (bottom - top) * (right - left);
        for (int channel = 0; channel < layer->channels; channel += VL, out += VL) {
            const element *plane = image + (size_t)(channel / GROUP) * in.group + channel % GROUP;
            sums sum = {0};
            for (int y = top; y < bottom; y++) {
                for (int x = left; x < right; x++) sum += load_sums(plane + (size_t)y * in.row + (size_t)x * in.pixel);
            }
            store_average(out, sum, count);
        }
    }
}

/* The kernels of some pixels, K*K for each group, pixel after pixel. */
static struct map make_kernels(const struct involution *layer, struct map in, struct range pixels,
                               struct scratch *scratch) {
    if (layer->stride > 1) {
        average(in, layer, pixels, scratch->pooled);
        in = tile_map(scratch->pooled, layer->channels, pixels.first);
    }
    struct map reduced = tile_map(scratch->reduced, columns(&layer->reduce), pixels.first);
    struct map kernels = tile_map(scratch->kernels, columns(&layer->span), pixels.first);
    struct product reduce = {&layer->reduce, in, reduced, NULL, one_by_one(in, layer->channels), true, false};
    struct product span = {&layer->span, reduced, kernels, NULL, {1, layer->span.inputs, 0}, false, false};
    multiply_all(&reduce, pixels);
    multiply_all(&span, pixels);
    return kernels;
}

static void add_taps(const struct involution *layer, struct map kernels, struct range pixels, float *totals) {
    int groups = layer->channels / GROUP, taps = layer->taps;
    for (int p = pixels.first; p < pixels.end; p++) {
        const element *kernel = kernels.data + (size_t)(p - kernels.origin) * kernels.pixel;
        for (int g = 0; g < groups; g++, kernel += taps) {
#ifdef INT8
            int codes = 0;
            for (int t = 0; t < taps; t++) codes += (int8_t)kernel[t];
            float sum = (float)codes * layer->kernel_step;
#else
            float sum = 0;
            for (int t = 0; t < taps; t++) sum += kernel[t];
#endif
            totals[(size_t)p * (size_t)groups + (size_t)g] = sum;
        }
    }
}

/* The stretches of neighbouring pixels that a tile has in each row of the map, for its first group. */
static int find_rows(const struct involution *layer, struct map in, struct map out, struct map kernels,
                     struct range pixels, struct window *rows, int *lengths) {
    int width = ceil_div(in.width, layer->stride), height = ceil_div(in.height, layer->stride), count = 0;
    const element *corner = in.data - (size_t)(layer->size / 2) * (in.row + in.pixel);
    for (int p = pixels.first; p < pixels.end; p += lengths[count++]) {
        int x = p % width, y = p / width % height, image = p / width / height;
        lengths[count] = least(width - x, pixels.end - p);
        rows[count] = (struct window){
            .x = corner + (size_t)image * in.image + (size_t)(y * layer->stride) * in.row +
                 (size_t)(x * layer->stride) * in.pixel,
            .x_row = in.row,
            .kernel = kernels.data + (size_t)(p - kernels.origin) * kernels.pixel,
            .kernel_pixel = kernels.pixel,
            .out_pixel = out.pixel,
            .scale = layer->scale,
            .shift = layer->shift,
            .relu = true,
        };
        locate(out, p, 1, &rows[count].out);
    }
    return count;
}

/* relu(batch norm(involution)) of a planar map with border, for some pixels of a plain map.
 * sums: NULL, or where the sums of the kernels go, [pixels of out][groups]. */
static void involve(const struct involution *layer, struct map in, struct map out, struct range pixels,
                    struct scratch *scratch, float *sums) {
    struct window rows[KERNEL_TILE];
    int lengths[KERNEL_TILE], taps = layer->taps;
    int tiles = ceil_div(pixels.end - pixels.first, kernel_tile(layer));
    for (int t = 0; t < tiles; t++) {
        struct range tile = part(pixels, t, tiles);
        struct map kernels = make_kernels(layer, in, tile, scratch);
        if (sums) add_taps(layer, kernels, tile, sums);
        int count = find_rows(layer, in, out, kernels, tile, rows, lengths);
        /* Group by group: rows of one plane stay in the first-level cache for the rows below. */
        for (int g = 0; g < layer->channels / GROUP; g++) {
            for (int r = 0; r < count; r++) {
                involve_row(layer->size, layer->stride, lengths[r], &rows[r]);
                rows[r].x += in.group, rows[r].kernel += taps, rows[r].out += GROUP;
                rows[r].scale += GROUP, rows[r].shift += GROUP;
            }
        }
    }
}

struct block {
    struct matrix first, last, shortcut; /* shortcut.weights is NULL where the block's input itself is added */
    struct involution involution;
    int in_channels, out_channels;
};

/* Memory that the threads of a team share. */
struct bottleneck_space {
    element *planes; /* the middle of the block, planar with border */
    element *middle; /* the same behind the involution, plain */
    int bordered_height, bordered_width, bordered_channels, bordered_images; /* whose border in `planes` is clear */
};

static void clear_planes(const struct block *block, struct map planes, int images, struct bottleneck_space *space) {
    int channels = block->involution.channels;
    if (space->bordered_height == planes.height && space->bordered_width == planes.width &&
        space->bordered_channels == channels && space->bordered_images == images)
        return;
    clear_border(planes, images, channels / GROUP, block->involution.size / 2);
    space->bordered_height = planes.height, space->bordered_width = planes.width;
    space->bordered_channels = channels, space->bordered_images = images;
}

/* A block for n images of height x width. Without a shortcut convolution, out must be in: each pixel is read, as the
 * residual, before it is written. sums as for `involve`. */
static void run_block(const struct worker *worker, const struct block *block, int images, int height, int width,
                      element *in, element *out, struct bottleneck_space *space, float *sums) {
    const struct involution *layer = &block->involution;
    int channels = layer->channels, pixels = images * height * width;
    struct map input = plain_map(in, height, width, block->in_channels);
    struct map planes = planar_map(space->planes, images, height, width, layer->size / 2);
    struct product first = {&block->first, input, planes, NULL, one_by_one(input, block->in_channels), true, false};
    int threads = worker->team->barrier.size;
    if (worker->rank == 0) clear_planes(block, planes, images, space);
    bool few = threads > 1 && pixels <= FEW_PIXELS * threads;
    int items = few ? panels(&block->first) : shares(worker, pixels, BLOCK_TILE);
    for (int item; (item = take(worker->team)) < items;) {
        if (few) {
            multiply(&first, (struct range){0, pixels}, (struct range){item, item + 1});
        } else {
            multiply_all(&first, part((struct range){0, pixels}, item, items));
        }
    }
    meet(worker->team);

    struct map strided = every(input, layer->stride);
    struct map output = plain_map(out, strided.height, strided.width, block->out_channels);
    pixels = images * output.height * output.width;
    few = threads > 1 && pixels <= FEW_PIXELS * threads;
    struct map middle = plain_map(space->middle, output.height, output.width, channels);
    struct product shortcut = {
        &block->shortcut, strided, output, NULL, one_by_one(input, block->in_channels), false, false};
    struct product last = {&block->last,
                           middle,
                           output,
                           block->shortcut.weights ? &output : &input,
                           one_by_one(middle, channels),
                           true,
                           block->shortcut.weights != NULL};
    items = shares(worker, pixels, BLOCK_TILE);
    for (int item; (item = take(worker->team)) < items;) {
        struct range tile = part((struct range){0, pixels}, item, items);
        if (few) {
            involve(layer, planes, middle, tile, worker->scratch, sums);
        } else {
            last.in = tile_map(worker->scratch->involved, channels, tile.first);
            involve(layer, planes, last.in, tile, worker->scratch, sums);
            if (block->shortcut.weights) multiply_all(&shortcut, tile);
            multiply_all(&last, tile);
        }
    }
    meet(worker->team);
    if (few) {
        for (int panel; (panel = take(worker->team)) < panels(&block->last);) {
            struct range all = {0, pixels}, one = {panel, panel + 1};
            if (block->shortcut.weights) multiply(&shortcut, all, one);
            multiply(&last, all, one);
        }
        meet(worker->team);
    }
}
