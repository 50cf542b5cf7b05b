/* The fused layers of RedNet: an involution with its kernel generation, and a bottleneck block.
 *
 * Both work on tiles of pixels, whose involution kernels are generated, used and overwritten while they are in the L2
 * cache. The kernels of a whole map would be the largest tensor of the network (2.5 MB per image in stage 1). Tiling is
 * 3 to 5 % faster than whole maps: 53.2-54.6 instead of 51.8 images/s. */
#pragma once

#include "involution.h"
#include "matmul.h"
#include "threads.h"

/* A tile has up to KERNEL_TILE pixels; if their kernels exceed KERNEL_TILE_ELEMENTS, fewer, but at least half. Between
 * 28 and 112 pixels the size hardly matters (53 to 54.5 images/s). */
#define KERNEL_TILE 112
#define KERNEL_TILE_ELEMENTS (80 * 1024)
#define BLOCK_TILE 224 /* pixels per tile of conv3, which reads all its weights once per tile */
/* A team with at most this many pixels per thread splits output channels instead of pixels: few pixels come with large
 * weights, and then each core reads only its share of them. */
#define SPLIT_CHANNELS_PIXELS 64

struct involution {
    struct matrix reduce, span; /* kernel generation: C -> C / r -> K * K * C / 16 */
    float *bn_scale, *bn_shift; /* [C], the batch norm after the involution */
    int size, stride, channels;
    int taps; /* of a kernel, padding included */
#ifdef INT8
    float kernel_scale; /* quantisation scale of the kernels */
#endif
};

/* Buffers of one thread. */
struct scratch {
    element *pooled, *reduced, *kernels, *involved, *rows;
};

/* A thread's view of the work: its team (possibly only itself), its rank there, its buffers. */
struct worker {
    struct team *team;
    int rank;
    struct scratch *scratch;
};

static int kernel_tile(const struct involution *layer) {
    return max(KERNEL_TILE / 2, min(KERNEL_TILE, KERNEL_TILE_ELEMENTS / columns(&layer->span)));
}

/* The number of items into which a team splits pixels: a multiple of its threads, none of more than `limit` pixels. */
ALWAYS_INLINE int work_items(const struct worker *worker, int pixels, int limit) {
    int size = worker->team->barrier.size;
    return size * ceil_div(pixels, size * limit);
}

#ifdef INT8
typedef uint32_t sums __attribute__((vector_size(VL * sizeof(uint32_t))));

ALWAYS_INLINE sums load_sums(const element *from) { return (sums)load_quantised_ints(from); }

/* Rounds halves up. */
ALWAYS_INLINE void store_average(element *to, sums sum, int count) {
    sums half = sum + (uint32_t)(count / 2);
    sums average = count == 4 ? half / 4 : half / (uint32_t)count;
    store_narrowed(to, (ivec)average);
}
#else
typedef vec sums;
ALWAYS_INLINE sums load_sums(const element *from) { return load(from); }
ALWAYS_INLINE void store_average(element *to, sums sum, int count) { store(to, sum * broadcast(1.0f / (float)count)); }
#endif

/* Averages over stride x stride pixels; at an odd border, over the pixels that exist. */
static void average(struct map in, const struct involution *layer, struct range pixels, element *out) {
    int width = ceil_div(in.width, layer->stride), height = ceil_div(in.height, layer->stride);
    for (int p = pixels.first; p < pixels.end; p++) {
        int top = p / width % height * layer->stride, left = p % width * layer->stride;
        int bottom = min(top + layer->stride, in.height), right = min(left + layer->stride, in.width);
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

/* Generates the kernels of a range of pixels: [pixel][group][tap]. */
static struct map generate_kernels(const struct involution *layer, struct map in, struct range pixels,
                                   struct scratch *scratch) {
    if (layer->stride > 1) {
        average(in, layer, pixels, scratch->pooled);
        in = tile_map(scratch->pooled, layer->channels, pixels.first);
    }
    struct map reduced = tile_map(scratch->reduced, columns(&layer->reduce), pixels.first);
    struct map kernels = tile_map(scratch->kernels, columns(&layer->span), pixels.first);
    struct product reduce = {&layer->reduce, in, reduced, NULL, segments_1x1(in, layer->channels), true, false};
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
            int quantised = 0;
            for (int t = 0; t < taps; t++) quantised += (int8_t)kernel[t];
            float sum = (float)quantised * layer->kernel_scale;
#else
            float sum = 0;
            for (int t = 0; t < taps; t++) sum += kernel[t];
#endif
            totals[(size_t)p * (size_t)groups + (size_t)g] = sum;
        }
    }
}

/* Splits a tile into runs of neighbouring pixels in the same row, as windows of the first group; returns their number.
 */
static int find_rows(const struct involution *layer, struct map in, struct map out, struct map kernels,
                     struct range pixels, struct window *rows, int *lengths) {
    int width = ceil_div(in.width, layer->stride), height = ceil_div(in.height, layer->stride), count = 0;
    const element *corner = in.data - (size_t)(layer->size / 2) * (in.row + in.pixel);
    for (int p = pixels.first; p < pixels.end; p += lengths[count++]) {
        int x = p % width, y = p / width % height, image = p / width / height;
        lengths[count] = min(width - x, pixels.end - p);
        rows[count] = (struct window){
            .x = corner + (size_t)image * in.image + (size_t)(y * layer->stride) * in.row +
                 (size_t)(x * layer->stride) * in.pixel,
            .x_row = in.row,
            .kernel = kernels.data + (size_t)(p - kernels.origin) * kernels.pixel,
            .kernel_pixel = kernels.pixel,
            .out_pixel = out.pixel,
            .bn_scale = layer->bn_scale,
            .bn_shift = layer->bn_shift,
            .relu = true,
        };
        locate_pixels(out, p, 1, &rows[count].out);
    }
    return count;
}

/* Computes relu(batch_norm(involution(in))) for a range of output pixels, from a blocked map with a border to NHWC.
 * sums: NULL, or receives the sum of each kernel, [pixels of out][groups]. */
static void involve(const struct involution *layer, struct map in, struct map out, struct range pixels,
                    struct scratch *scratch, float *sums) {
    struct window rows[KERNEL_TILE];
    int lengths[KERNEL_TILE], taps = layer->taps;
    int tiles = ceil_div(pixels.end - pixels.first, kernel_tile(layer));
    for (int t = 0; t < tiles; t++) {
        struct range tile = subrange(pixels, t, tiles);
        struct map kernels = generate_kernels(layer, in, tile, scratch);
        if (sums) add_taps(layer, kernels, tile, sums);
        int count = find_rows(layer, in, out, kernels, tile, rows, lengths);
        /* Groups are the outer loop, so that the rows of one plane stay in the L1 cache for the rows below. */
        for (int g = 0; g < layer->channels / GROUP; g++) {
            for (int r = 0; r < count; r++) {
                involve_row(layer->size, layer->stride, lengths[r], &rows[r]);
                rows[r].x += in.group, rows[r].kernel += taps, rows[r].out += GROUP;
                rows[r].bn_scale += GROUP, rows[r].bn_shift += GROUP;
            }
        }
    }
}

struct block {
    struct matrix conv1, conv3, downsample; /* downsample.weights is NULL where the shortcut is the identity */
    struct involution involution;
    int in_channels, out_channels;
};

/* Memory that the threads of a team share. */
struct bottleneck_space {
    element *planes; /* output of conv1, blocked with a border */
    element *middle; /* output of the involution, NHWC */
    /* The sizes for which the border in `planes` is zero. */
    int bordered_height, bordered_width, bordered_channels, bordered_images;
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

/* Runs a block on `images` images of height x width. Without a downsample convolution `out` must be `in`: each pixel is
 * read as the residual before conv3 overwrites it, which saves memory traffic (2.3 % in float32, 1 % in int8). sums as
 * in `involve`. */
static void run_block(const struct worker *worker, const struct block *block, int images, int height, int width,
                      element *in, element *out, struct bottleneck_space *space, float *sums) {
    const struct involution *layer = &block->involution;
    int channels = layer->channels, pixels = images * height * width;
    struct map input = nhwc_map(in, height, width, block->in_channels);
    struct map planes = blocked_map(space->planes, images, height, width, layer->size / 2);
    struct product conv1 = {&block->conv1, input, planes, NULL, segments_1x1(input, block->in_channels), true, false};
    int threads = worker->team->barrier.size;
    if (worker->rank == 0) clear_planes(block, planes, images, space);
    bool split_channels = threads > 1 && pixels <= SPLIT_CHANNELS_PIXELS * threads;
    int items = split_channels ? panels(&block->conv1) : work_items(worker, pixels, BLOCK_TILE);
    for (int item; (item = next_item(worker->team)) < items;) {
        if (split_channels) {
            multiply(&conv1, (struct range){0, pixels}, (struct range){item, item + 1});
        } else {
            multiply_all(&conv1, subrange((struct range){0, pixels}, item, items));
        }
    }
    synchronise(worker->team);

    struct map strided = strided_map(input, layer->stride);
    struct map output = nhwc_map(out, strided.height, strided.width, block->out_channels);
    pixels = images * output.height * output.width;
    split_channels = threads > 1 && pixels <= SPLIT_CHANNELS_PIXELS * threads;
    struct map middle = nhwc_map(space->middle, output.height, output.width, channels);
    struct product downsample = {
        &block->downsample, strided, output, NULL, segments_1x1(input, block->in_channels), false, false};
    struct product conv3 = {&block->conv3,
                            middle,
                            output,
                            block->downsample.weights ? &output : &input,
                            segments_1x1(middle, channels),
                            true,
                            block->downsample.weights != NULL};
    items = work_items(worker, pixels, BLOCK_TILE);
    for (int item; (item = next_item(worker->team)) < items;) {
        struct range tile = subrange((struct range){0, pixels}, item, items);
        if (split_channels) {
            involve(layer, planes, middle, tile, worker->scratch, sums);
        } else {
            conv3.in = tile_map(worker->scratch->involved, channels, tile.first);
            involve(layer, planes, conv3.in, tile, worker->scratch, sums);
            if (block->downsample.weights) multiply_all(&downsample, tile);
            multiply_all(&conv3, tile);
        }
    }
    synchronise(worker->team);
    if (split_channels) {
        for (int panel; (panel = next_item(worker->team)) < panels(&block->conv3);) {
            struct range all = {0, pixels}, one = {panel, panel + 1};
            if (block->downsample.weights) multiply(&downsample, all, one);
            multiply(&conv3, all, one);
        }
        synchronise(worker->team);
    }
}
