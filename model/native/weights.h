/* The configuration and the weights of a network, read one array at a time and packed for the matrix product. */
#pragma once

#include "engine.h"
#include "stem.h"

#define STAGES 4
#define EXPANSION 4
#define MAX_SIDE 16384 /* pixels, of a photo */
#ifdef INT8
#define MAX_STRIDE 2048 /* a sum over MAX_STRIDE^2 unsigned values fits 32 bits */
#else
#define MAX_STRIDE MAX_SIDE
#endif
#define MAX_WIDTH 65536 /* channels and classes */
#define MAX_KERNEL_SIZE 63
#define MAX_BLOCKS 64 /* per stage */

struct config {
    int32_t blocks[STAGES], strides[STAGES];
    int32_t stem_channels, base_channels, classes, kernel_size, stem_kernel_size, reduction;
};

struct network {
    struct config config;
    struct stem stem;
    struct block *blocks[STAGES];
#ifdef INT8
    struct float_matrix head;
    float map_scales[STAGES]; /* quantisation scale of each stage's map */
#else
    struct matrix head;
#endif
};

/* Reads the caller's arrays in order and checks each length against the configuration. The first error is kept, and
 * later reads do nothing. */
struct reader {
    const struct array *next;
    int64_t left;
    const char *error;
};

static const float *read_array(struct reader *reader, int64_t length) {
    if (reader->error) return NULL;
    if (!reader->left || !reader->next->data || reader->next->length != length) {
        reader->error = "the arrays are not those of this network";
        return NULL;
    }
    reader->left--;
    return (reader->next++)->data;
}

static float *read_floats(struct reader *reader, int length) {
    const float *from = read_array(reader, length);
    float *copy = from ? malloc((size_t)length * sizeof(float)) : NULL;
    if (copy) memcpy(copy, from, (size_t)length * sizeof(float));
    if (from && !copy) reader->error = "out of memory";
    return copy;
}

#ifdef INT8
#include "weights_int8.h"
#else
/* Reads weights [outputs][inputs] and a bias [outputs] and packs them into panels. */
static void read_matrix(struct reader *reader, struct matrix *m, int outputs, int inputs) {
    const float *weights = read_array(reader, (int64_t)outputs * inputs), *bias = read_array(reader, outputs);
    if (reader->error) return;
    *m = (struct matrix){.inputs = inputs, .outputs = outputs, .vectors = ceil_div(outputs, VL)};
    m->weights = calloc((size_t)columns(m) * (size_t)inputs + PREFETCH_DISTANCE + NR, sizeof(float));
    m->bias = calloc((size_t)columns(m), sizeof(float));
    if (!m->weights || !m->bias) {
        reader->error = "out of memory";
        return;
    }
    memcpy(m->bias, bias, (size_t)outputs * sizeof(float));
    for (int first = 0; first < columns(m); first += NR) {
        int width = min(NR, columns(m) - first);
        float *panel = m->weights + (size_t)first * (size_t)inputs;
        for (int column = 0; column < min(width, outputs - first); column++) {
            const float *row = weights + (size_t)(first + column) * (size_t)inputs;
            for (int k = 0; k < inputs; k++) panel[(size_t)k * (size_t)width + (size_t)column] = row[k];
        }
    }
}

static void free_matrix(struct matrix *m) {
    free(m->weights);
    free(m->bias);
}

#define read_float_matrix read_matrix
#define free_float_matrix free_matrix
#define read_span(reader, layer, inputs) \
    read_matrix(reader, &(layer)->span, (layer)->taps *((layer)->channels / GROUP), inputs)
#define read_scale(reader, to) ((void)0)
ALWAYS_INLINE int padded_taps(int size) { return size * size; }
#endif

static void read_involution(struct reader *reader, struct involution *layer, int channels, int size, int stride,
                            int reduction) {
    layer->size = size, layer->stride = stride, layer->channels = channels;
    layer->taps = padded_taps(size);
    read_matrix(reader, &layer->reduce, channels / reduction, channels);
    read_span(reader, layer, channels / reduction);
    read_scale(reader, &layer->kernel_scale);
    layer->bn_scale = read_floats(reader, channels);
    layer->bn_shift = read_floats(reader, channels);
}

static void free_involution(struct involution *layer) {
    free_matrix(&layer->reduce);
    free_matrix(&layer->span);
    free(layer->bn_scale);
    free(layer->bn_shift);
}

static bool between(int value, int low, int high) { return low <= value && value <= high; }

/* Returns NULL, or an error message. */
static const char *check_config(const struct config *c) {
    for (int s = 0; s < STAGES; s++) {
        if (!between(c->blocks[s], 1, MAX_BLOCKS)) return "the number of blocks is out of range";
        if (!between(c->strides[s], 1, MAX_STRIDE)) return "the stride is out of range";
    }
    if (!between(c->stem_channels, 1, MAX_WIDTH) || c->stem_channels % (2 * GROUP))
        return "stem_channels must be a multiple of 32";
    if (!between(c->base_channels, 1, MAX_WIDTH / 32) || c->base_channels % GROUP)
        return "base_channels must be a multiple of 16, at most 2048";
    if (!between(c->classes, 1, MAX_WIDTH)) return "the number of classes is out of range";
    int sizes[2] = {c->kernel_size, c->stem_kernel_size};
    for (int i = 0; i < 2; i++) {
        if (!between(sizes[i], 1, MAX_KERNEL_SIZE) || sizes[i] % 2 == 0) return "the kernel size is out of range";
    }
    if (c->reduction < 1 || c->base_channels % c->reduction || c->stem_channels / 2 % c->reduction)
        return "the reduction ratio does not divide";
    return NULL;
}

ALWAYS_INLINE int stage_channels(const struct config *c, int stage) { return (c->base_channels * EXPANSION) << stage; }

static void network_free(struct network *n) {
    if (!n) return;
    free_float_matrix(&n->stem.first);
    free_involution(&n->stem.involution);
    free_matrix(&n->stem.last);
    for (int s = 0; s < STAGES; s++) {
        for (int b = 0; n->blocks[s] && b < n->config.blocks[s]; b++) {
            struct block *block = &n->blocks[s][b];
            free_matrix(&block->conv1);
            free_involution(&block->involution);
            free_matrix(&block->conv3);
            free_matrix(&block->downsample);
        }
        free(n->blocks[s]);
    }
    free_float_matrix(&n->head);
    free(n);
}

/* Creates a network from float32 arrays in this order: the table of the stem; the stem (convolution, involution,
 * convolution); each block (conv1, involution, conv3, and downsample if there is one); the head. A convolution is its
 * weights and its bias with the batch norm folded in; the inputs of a window are [row][column][channel]. An involution
 * is reduce, span, and the scale and shift of the batch norm after it.
 *
 * The int8 builds take quantised weights (integers from -127 to 127) for all but the first convolution of the stem and
 * the head. A multiplier for each output follows each of these biases, the kernel scale follows span, the residual
 * multiplier follows conv3, and the scales of the four stage maps precede the head. Biases and shifts are divided by
 * the scale of their output, and the scale of a batch norm includes the requantisation. */
static struct network *network_create(const struct config *config, const struct array *arrays, int64_t count,
                                      const char **error) {
    if ((*error = check_config(config))) return NULL;
    struct network *n = calloc(1, sizeof *n);
    if (!n) {
        *error = "out of memory";
        return NULL;
    }
    n->config = *config;
    struct reader reader = {arrays, count, NULL};
    const float *table = read_array(&reader, 3 * 256);
    if (table) memcpy(n->stem.table, table, sizeof n->stem.table);
    int half = config->stem_channels / 2, channels = config->stem_channels;
    read_float_matrix(&reader, &n->stem.first, half, 27);
    read_involution(&reader, &n->stem.involution, half, config->stem_kernel_size, 1, config->reduction);
    read_matrix(&reader, &n->stem.last, config->stem_channels, 9 * half);
    for (int s = 0; s < STAGES && !reader.error; s++) {
        n->blocks[s] = calloc((size_t)config->blocks[s], sizeof *n->blocks[s]);
        if (!n->blocks[s]) reader.error = "out of memory";
        for (int b = 0; b < config->blocks[s] && !reader.error; b++) {
            struct block *block = &n->blocks[s][b];
            int stride = b == 0 ? config->strides[s] : 1, middle = config->base_channels << s;
            block->in_channels = channels;
            block->out_channels = channels = stage_channels(config, s);
            read_matrix(&reader, &block->conv1, middle, block->in_channels);
            read_involution(&reader, &block->involution, middle, config->kernel_size, stride, config->reduction);
            read_matrix(&reader, &block->conv3, channels, middle);
            read_scale(&reader, &block->conv3.residual_multiplier);
            if (stride > 1 || block->in_channels != channels)
                read_matrix(&reader, &block->downsample, channels, block->in_channels);
        }
    }
    for (int s = 0; s < STAGES; s++) read_scale(&reader, &n->map_scales[s]);
    read_float_matrix(&reader, &n->head, config->classes, channels);
    if (!reader.error && reader.left) reader.error = "there are more arrays than this network has";
    if ((*error = reader.error)) {
        network_free(n);
        return NULL;
    }
    return n;
}
