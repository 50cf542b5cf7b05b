/* The whole network: its memory, and one call from pixels to logits.
 *
 * Each thread runs whole images from pixels to features, without barriers. Only the images that are left over, fewer
 * than threads, are split: a team of threads runs one together. */
#pragma once

#include "weights.h"

/* From this stage on (counted from 0) a thread runs several images at once, LATE_PIXELS pixels or a little less, and
 * reads the weights, megabytes per layer, once for all of them: 52.0 images/s with one image at a time, 53.6 with two,
 * 54.4 with four. */
#define LATE_STAGE 2
#define LATE_PIXELS 784
#define MAX_LATE_IMAGES 16

/* Memory for one photo, or for several in the late stages. Each thread has one; a team uses that of its first thread.
 */
struct space {
    struct stem_space stem;
    struct bottleneck_space bottleneck;
    element *stage[STAGES + 1]; /* the map of the stem, then those of the stages */
    struct scratch scratch;
};

/* All memory that a call needs for photos of one size. */
struct workspace {
    const struct network *network; /* the only network that may use it */
    int height, width, threads;
    int sides[STAGES + 1][2]; /* height and width of the map of the stem, then of the stages */
    int late_images;
    void *memory;
    struct space spaces[MAX_THREADS];
};

/* An arena allocator. Without memory it only counts the elements that would be used. */
struct arena {
    element *memory;
    size_t used; /* elements */
};

static element *alloc(struct arena *arena, size_t elements) {
    element *start = arena->memory ? arena->memory + arena->used : NULL;
    size_t bytes = (elements * sizeof(element) + 127) / 64 * 64; /* whole cache lines, and one between pieces */
    arena->used += bytes / sizeof(element);
    return start;
}

static size_t max_size(size_t a, size_t b) { return a > b ? a : b; }

static void alloc_space(const struct network *n, const struct workspace *w, struct space *space, struct arena *arena) {
    const struct config *c = &n->config;
    int height = ceil_div(w->height, 2), width = ceil_div(w->width, 2), half = c->stem_channels / 2;
    space->stem.pixels =
        (float *)alloc(arena, (size_t)(w->height + 2) * (size_t)(w->width + 2) * 3 * (sizeof(float) / sizeof(element)));
    space->stem.planes = alloc(arena, blocked_elements(1, height, width, half, c->stem_kernel_size / 2));
    space->stem.middle = alloc(arena, (size_t)(height + 2) * (size_t)(width + 2) * (size_t)half);
    space->stage[0] = alloc(arena, (size_t)w->sides[0][0] * (size_t)w->sides[0][1] * (size_t)c->stem_channels);

    const struct involution *widest = &n->stem.involution;
    size_t planes = 0, middle = 0, tile = 0;
    size_t pooled = 0, reduced = (size_t)kernel_tile(widest) * (size_t)columns(&widest->reduce);
    size_t kernels = (size_t)kernel_tile(widest) * (size_t)columns(&widest->span);
    for (int s = 0; s < STAGES; s++) {
        int images = s < LATE_STAGE ? 1 : w->late_images, out_images = s + 1 < LATE_STAGE ? 1 : w->late_images;
        const int *in = w->sides[s], *out = w->sides[s + 1];
        space->stage[s + 1] =
            alloc(arena, (size_t)out_images * (size_t)out[0] * (size_t)out[1] * (size_t)stage_channels(c, s));
        for (int b = 0; b < min(c->blocks[s], 2); b++, in = out) { /* later blocks have the sizes of the second */
            const struct involution *layer = &n->blocks[s][b].involution;
            size_t kernel_pixels = (size_t)kernel_tile(layer), channels = (size_t)layer->channels;
            planes = max_size(planes, blocked_elements(images, in[0], in[1], layer->channels, layer->size / 2));
            middle = max_size(middle, (size_t)out[0] * (size_t)out[1] * channels);
            pooled = max_size(pooled, kernel_pixels * channels);
            reduced = max_size(reduced, kernel_pixels * (size_t)columns(&layer->reduce));
            kernels = max_size(kernels, kernel_pixels * (size_t)columns(&layer->span));
            tile = max_size(tile, (size_t)BLOCK_TILE * channels);
        }
    }
    space->bottleneck.planes = alloc(arena, planes);
    space->bottleneck.middle = alloc(arena, middle);
    space->scratch.pooled = alloc(arena, pooled);
    space->scratch.reduced = alloc(arena, reduced);
    space->scratch.kernels = alloc(arena, kernels);
    space->scratch.involved = alloc(arena, max_size(tile, (size_t)MC * NR)); /* also holds the head's logits */
    space->scratch.rows = alloc(arena, 3 * (size_t)width * (size_t)c->stem_channels);
}

static struct workspace *workspace_create(const struct network *n, int height, int width, int threads,
                                          const char **error) {
    if (!between(height, 1, MAX_SIDE) || !between(width, 1, MAX_SIDE) || !between(threads, 1, MAX_THREADS)) {
        *error = "the size of the photos or the number of threads is out of range";
        return NULL;
    }
    struct workspace *w = calloc(1, sizeof *w);
    if (w) {
        w->network = n;
        w->height = height, w->width = width, w->threads = threads;
        w->sides[0][0] = ceil_div(ceil_div(height, 2), 2), w->sides[0][1] = ceil_div(ceil_div(width, 2), 2);
        for (int s = 0; s < STAGES; s++) {
            for (int i = 0; i < 2; i++) w->sides[s + 1][i] = ceil_div(w->sides[s][i], n->config.strides[s]);
        }
        const int *late = w->sides[LATE_STAGE + 1];
        w->late_images = max(1, min(MAX_LATE_IMAGES, LATE_PIXELS / min(LATE_PIXELS, late[0] * late[1])));
        struct arena count = {0};
        for (int t = 0; t < threads; t++) alloc_space(n, w, &w->spaces[t], &count);
        w->memory =
            calloc(count.used + 64 / sizeof(element), sizeof(element)); /* zeroed, because borders must be zero */
        if (w->memory) {
            struct arena arena = {(element *)(((uintptr_t)w->memory + 63) & ~(uintptr_t)63), 0};
            for (int t = 0; t < threads; t++) alloc_space(n, w, &w->spaces[t], &arena);
            return w;
        }
        free(w);
    }
    *error = "out of memory";
    return NULL;
}

static void workspace_free(struct workspace *w) {
    if (w) free(w->memory);
    free(w);
}

/* Outputs of a call. Stage maps are [B, height, width, channels]; kernel sums, of the last involution of each stage,
 * are [B, height, width, groups]. NULL for a map that is not requested. */
struct outputs {
    float *logits, *features, *stages[STAGES], *sums[STAGES];
};

struct call {
    const struct network *network;
    struct workspace *workspace;
    struct photos photos;
    int batch;
    const struct outputs *outputs;
    struct team *teams; /* one per thread: first of this thread alone, then for an image that threads share */
    struct team *all;
};

/* Conversion of maps to float32 outputs. */
#ifdef INT8
ALWAYS_INLINE float map_scale(const struct network *n, int stage) { return n->map_scales[stage]; }
ALWAYS_INLINE vec load_values(const element *from) { return load_quantised(from, false); }
#else
ALWAYS_INLINE float map_scale(const struct network *n, int stage) { return (void)n, (void)stage, 1; }
ALWAYS_INLINE vec load_values(const element *from) { return load(from); }
#endif

/* The channels of a stage map are a multiple of 64 and therefore whole vectors. */
static void copy_values(const element *from, size_t count, float scale, float *to) {
    for (size_t i = 0; i < count; i += VL) store(to + i, load_values(from + i) * broadcast(scale));
}

static void run_stage(const struct call *call, const struct worker *worker, struct space *space, int stage, int first,
                      int images, element *in, element *out) {
    const struct network *n = call->network;
    const int *side = call->workspace->sides[stage], *out_side = call->workspace->sides[stage + 1];
    size_t pixels = (size_t)out_side[0] * (size_t)out_side[1];
    for (int b = 0; b < n->config.blocks[stage]; b++, side = out_side) {
        const struct block *block = &n->blocks[stage][b];
        bool last = b == n->config.blocks[stage] - 1;
        float *sums = last ? call->outputs->sums[stage] : NULL;
        if (sums) sums += (size_t)first * pixels * (size_t)(block->involution.channels / GROUP);
        element *to = block->downsample.weights ? out : in;
        run_block(worker, block, images, side[0], side[1], in, to, &space->bottleneck, sums);
        in = to;
    }
    float *map = call->outputs->stages[stage];
    if (map && worker->rank == 0) {
        size_t floats = pixels * (size_t)stage_channels(&n->config, stage);
        copy_values(in, (size_t)images * floats, map_scale(n, stage), map + (size_t)first * floats);
    }
}

static void average_pixels(const element *map, int pixels, int channels, float scale, float *features) {
    vec factor = broadcast(scale / (float)pixels);
    for (int channel = 0; channel < channels; channel += VL) {
        vec sum = {0};
        for (int p = 0; p < pixels; p++) sum += load_values(map + (size_t)p * (size_t)channels + (size_t)channel);
        store(features + channel, sum * factor);
    }
}

/* Runs the images first, first + 1, ... from pixels to features: early stages one image at a time, so that their large
 * maps stay in the cache, and late stages together. */
static void run_images(const struct call *call, const struct worker *worker, struct space *space, int first,
                       int images) {
    const struct workspace *w = call->workspace;
    const struct config *c = &call->network->config;
    size_t values = (size_t)3 * (size_t)w->height * (size_t)w->width;
    element *map[STAGES + 1];
    for (int s = 0; s <= STAGES; s++) {
        /* Without a downsample convolution, the first stage overwrites its input. */
        map[s] = s == 1 && !call->network->blocks[0][0].downsample.weights ? space->stage[0] : space->stage[s];
    }
    size_t late_elements =
        (size_t)w->sides[LATE_STAGE][0] * (size_t)w->sides[LATE_STAGE][1] * (size_t)stage_channels(c, LATE_STAGE - 1);
    for (int i = 0; i < images; i++) {
        struct photos photo = call->photos;
        if (photo.bytes) photo.bytes += (size_t)(first + i) * values;
        if (photo.floats) photo.floats += (size_t)(first + i) * values;
        run_stem(worker, &call->network->stem, photo, w->height, w->width, &space->stem, map[0]);
        for (int s = 0; s < LATE_STAGE; s++) {
            element *out = map[s + 1] + (s + 1 == LATE_STAGE ? (size_t)i * late_elements : 0);
            run_stage(call, worker, space, s, first + i, 1, map[s], out);
        }
    }
    for (int s = LATE_STAGE; s < STAGES; s++) run_stage(call, worker, space, s, first, images, map[s], map[s + 1]);
    int pixels = w->sides[STAGES][0] * w->sides[STAGES][1], channels = stage_channels(c, STAGES - 1);
    for (int i = 0; i < images && worker->rank == 0; i++) {
        average_pixels(map[STAGES] + (size_t)i * (size_t)pixels * (size_t)channels, pixels, channels,
                       map_scale(call->network, STAGES - 1),
                       call->outputs->features + (size_t)(first + i) * (size_t)channels);
    }
}

#ifdef INT8
/* The classifier, over the whole batch. Threads split the classes, so that each weight is read once. */
static void run_head(const struct call *call, struct scratch *scratch) {
    const struct float_matrix *head = &call->network->head;
    (void)scratch;
    for (int panel; (panel = next_item(call->all)) < ceil_div(head->outputs, VL);) {
        multiply_float_panel(head, panel * VL, min(VL, head->outputs - panel * VL), call->outputs->features,
                             call->batch, call->outputs->logits);
    }
}
#else
/* A view of one panel as a matrix. */
static struct matrix panel_of(const struct matrix *m, int panel) {
    size_t column = (size_t)panel * NR;
    int vectors = min(NR_VECTORS, m->vectors - panel * NR_VECTORS), outputs = min(NR, m->outputs - panel * NR);
    return (struct matrix){m->weights + column * (size_t)m->inputs, m->bias + column, m->inputs, outputs, vectors};
}

/* The classifier, over the whole batch. Threads split the classes, so that each weight is read once. */
static void run_head(const struct call *call, struct scratch *scratch) {
    const struct matrix *head = &call->network->head;
    struct map features = nhwc_map(call->outputs->features, 1, INT_MAX, head->inputs);
    for (int panel; (panel = next_item(call->all)) < panels(head);) {
        int column = panel * NR, width = min(NR, head->outputs - column);
        for (int first = 0; first < call->batch; first += MC) {
            struct range images = {first, min(call->batch, first + MC)};
            /* Computed in scratch memory, because the last panel may be wider than the classes that are left. */
            struct matrix panel_matrix = panel_of(head, panel);
            struct map logits = tile_map(scratch->involved, NR, first);
            struct product product = {&panel_matrix, features, logits, NULL, segments_1x1(features, head->inputs),
                                      false,         false};
            multiply_all(&product, images);
            for (int i = first; i < images.end; i++) {
                memcpy(call->outputs->logits + (size_t)i * (size_t)head->outputs + column,
                       scratch->involved + (size_t)(i - first) * NR, (size_t)width * sizeof(float));
            }
        }
    }
}
#endif

/* Runs one thread's part of a call: an equal number of whole images for each thread, then the remaining images, each of
 * which is split by a team of threads. */
static void run_thread(void *context, int thread) {
    const struct call *call = context;
    struct workspace *w = call->workspace;
    int threads = w->threads, own = call->batch / threads, rest = call->batch % threads;
    struct worker worker = {&call->teams[thread], 0, &w->spaces[thread].scratch};
    worker.team->barrier.size = 1;
    int groups = ceil_div(own, w->late_images);
    for (int g = 0; g < groups; g++) {
        struct range images = subrange((struct range){thread * own, (thread + 1) * own}, g, groups);
        run_images(call, &worker, &w->spaces[thread], images.first, images.end - images.first);
    }
    if (rest) {
        synchronise(call->all); /* threads join a team only after its size is set */
        int index = thread * rest / threads;
        int first = ceil_div(index * threads, rest), end = ceil_div((index + 1) * threads, rest);
        worker.team = &call->teams[first], worker.rank = thread - first;
        if (worker.rank == 0) worker.team->barrier.size = end - first;
        synchronise(call->all);
        run_images(call, &worker, &w->spaces[first], threads * own + index, 1);
    }
    synchronise(call->all);
    run_head(call, &w->spaces[thread].scratch);
}
