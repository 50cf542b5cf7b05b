/* The configuration of a network and its weights, taken in array by array and packed for the matrix product. */
#pragma once

#include "engine.h"
#include "stem.h"

#define STAGES 4
#define EXPANSION 4
#define LARGEST_SIDE 16384 /* of a photo */
#ifdef INT8
#define LARGEST_STRIDE 2048 /* sums of so many codes fit into 32 bits */
#else
#define LARGEST_STRIDE LARGEST_SIDE
#endif
#define LARGEST_WIDTH 65536 /* channels and classes */
#define LARGEST_KERNEL 63
#define MOST_BLOCKS 64 /* of a stage */

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
    float map_steps[STAGES]; /* the real value of a code of each stage's map */
#else
    struct matrix head;
#endif
};

/* Weights on their way in: one array after the other, each of the length that the configuration asks for. */
struct source {
    const struct array *next;
    int64_t left;
    const char *error;
};

static const float *take_array(struct source *source, int64_t length) {
    if (source->error) return NULL;
    if (!source->left || !source->next->data || source->next->length != length) {
        source->error = "the arrays are not those of this network";
        return NULL;
    }
    source->left--;
    return (source->next++)->data;
}

static float *take_floats(struct source *source, int length) {
    const float *from = take_array(source, length);
    float *copy = from ? malloc((size_t)length * sizeof(float)) : NULL;
    if (copy) memcpy(copy, from, (size_t)length * sizeof(float));
    if (from && !copy) source->error = "out of memory";
    return copy;
}

#ifdef INT8
#include "weights_int8.h"
#else
/* Weights [outputs][inputs] and a bias [outputs], packed into panels. */
static void take_matrix(struct source *source, struct matrix *m, int outputs, int inputs) {
    const float *weights = take_array(source, (int64_t)outputs * inputs), *bias = take_array(source, outputs);
    if (source->error) return;
    *m = (struct matrix){.inputs = inputs, .outputs = outputs, .vectors = ceil_div(outputs, VL)};
    m->weights = calloc((size_t)columns(m) * (size_t)inputs + AHEAD + PANEL, sizeof(float));
    m->bias = calloc((size_t)columns(m), sizeof(float));
    if (!m->weights || !m->bias) {
        source->error = "out of memory";
        return;
    }
    memcpy(m->bias, bias, (size_t)outputs * sizeof(float));
    for (int first = 0; first < columns(m); first += PANEL) {
        int width = least(PANEL, columns(m) - first);
        float *panel = m->weights + (size_t)first * (size_t)inputs;
        for (int column = 0; column < least(width, outputs - first); column++) {
            const float *row = weights + (size_t)(first + column) * (size_t)inputs;
            for (int k = 0; k < inputs; k++) panel[(size_t)k * (size_t)width + (size_t)column] = row[k];
        }
    }
}

static void free_matrix(struct matrix *m) {
    free(m->weights);
    free(m->bias);
}

#define take_float_matrix take_matrix
#define free_float_matrix free_matrix
#define take_span(source, layer, inputs) \
    take_matrix(source, &(layer)->span, (layer)->taps *((layer)->channels / GROUP), inputs)
#define take_step(source, to) ((void)0)
ALWAYS_INLINE int taps_of(int size) { return size * size; }
#endif

static void take_involution(struct source *source, struct involution *layer, int channels, int size, int stride,
                            int reduction) {
    layer->size = size, layer->stride = stride, layer->channels = channels;
    layer->taps = taps_of(size);
    take_matrix(source, &layer->reduce, channels / reduction, channels);
    take_span(source, layer, channels / reduction);
    take_step(source, &layer->kernel_step);
    layer->scale = take_floats(source, channels);
    layer->shift = take_floats(source, channels);
}

static void free_involution(struct involution *layer) {
    free_matrix(&layer->reduce);
    free_matrix(&layer->span);
    free(layer->scale);
    free(layer->shift);
}

static bool between(int value, int low, int high) { return low <= value && value <= high; }

/* NULL, or what is wrong. */
static const char *check_config(const struct config *c) {
    for (int s = 0; s < STAGES; s++) {
        if (!between(c->blocks[s], 1, MOST_BLOCKS)) return "the number of blocks is out of range";
        if (!between(c->strides[s], 1, LARGEST_STRIDE)) return "the stride is out of range";
    }
    if (!between(c->stem_channels, 1, LARGEST_WIDTH) || c->stem_channels % (2 * GROUP))
        return "stem_channels must be a multiple of 32";
    if (!between(c->base_channels, 1, LARGEST_WIDTH / 32) || c->base_channels % GROUP)
        return "base_channels must be a multiple of 16, at most 2048";
    if (!between(c->classes, 1, LARGEST_WIDTH)) return "the number of classes is out of range";
    int sizes[2] = {c->kernel_size, c->stem_kernel_size};
    for (int i = 0; i < 2; i++) {
        if (!between(sizes[i], 1, LARGEST_KERNEL) || sizes[i] % 2 == 0) return "the kernel size is out of range";
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
            free_matrix(&block->first);
            free_involution(&block->involution);
            free_matrix(&block->last);
            free_matrix(&block->shortcut);
        }
        free(n->blocks[s]);
    }
    free_float_matrix(&n->head);
    free(n);
}

/* The arrays, float32, in this order: the table of the stem; then weights and bias of each convolution, batch norms
 * taken in, inputs of a window as [row][column][channel]; for an involution reduce, span, and scale and shift of the
 * batch norm behind it. Stem: convolution, involution, convolution. Block: first, involution, last, and shortcut if
 * there is one. At the end the head.
 *
 * In int8, weights other than the stem's first and the head's are whole numbers from -127 to 127; a multiplier for each
 * output follows every bias; the real value of 1 follows span; that of the residual, in steps of the output, follows
 * last; those of the four stage maps come before the head. Scale and shift are in steps, too. */
static struct network *network_create(const struct config *config, const struct array *arrays, int64_t count,
                                      const char **error) {
    if ((*error = check_config(config))) return NULL;
    struct network *n = calloc(1, sizeof *n);
    if (!n) {
        *error = "out of memory";
        return NULL;
    }
    n->config = *config;
    struct source source = {arrays, count, NULL};
    const float *table = take_array(&source, 3 * 256);
    if (table) memcpy(n->stem.table, table, sizeof n->stem.table);
    int half = config->stem_channels / 2, channels = config->stem_channels;
    take_float_matrix(&source, &n->stem.first, half, 27);
    take_involution(&source, &n->stem.involution, half, config->stem_kernel_size, 1, config->reduction);
    take_matrix(&source, &n->stem.last, config->stem_channels, 9 * half);
    for (int s = 0; s < STAGES && !source.error; s++) {
        n->blocks[s] = calloc((size_t)config->blocks[s], sizeof *n->blocks[s]);
        if (!n->blocks[s]) source.error = "out of memory";
        for (int b = 0; b < config->blocks[s] && !source.error; b++) {
            struct block *block = &n->blocks[s][b];
            int stride = b == 0 ? config->strides[s] : 1, middle = config->base_channels << s;
            block->in_channels = channels;
            block->out_channels = channels = stage_channels(config, s);
            take_matrix(&source, &block->first, middle, block->in_channels);
            take_involution(&source, &block->involution, middle, config->kernel_size, stride, config->reduction);
            take_matrix(&source, &block->last, channels, middle);
            take_step(&source, &block->last.residual_step);
            if (stride > 1 || block->in_channels != channels)
                take_matrix(&source, &block->shortcut, channels, block->in_channels);
        }
    }
    for (int s = 0; s < STAGES; s++) take_step(&source, &n->map_steps[s]);
    take_float_matrix(&source, &n->head, config->classes, channels);
    if (!source.error && source.left) source.error = "there are more arrays than this network has";
    if ((*error = source.error)) {
        network_free(n);
        return NULL;
    }
    return n;
}
