/* The whole network: its memory, and one call from pixels to logits. */
#pragma once

#include "weights.h"

/* From this stage on, counted from 0, a thread works on several images at once, of about so many pixels in all: weights
 * of megabytes are then read once for all of them. */
#define LATE_STAGE 2
#define LATE_PIXELS 784
#define MOST_LATE_IMAGES 16

/* Memory for one photo, or a few in the late stages: each thread has its own, a team uses that of its first thread. */
struct space {
    struct stem_space stem;
    struct bottleneck_space bottleneck;
    element *stage[STAGES + 1]; /* the stem's map, then those of the stages */
    struct scratch scratch;
};

/* All memory that photos of one size need. */
struct workspace {
    const struct network *network; /* that it was made for */
    int height, width, threads;
    int sides[STAGES + 1][2]; /* height and width of the stem's map, then of the stages' */
    int late_images;
    void *memory;
    struct space spaces[MOST_THREADS];
};

/* Hands out pieces of one allocation; without memory it only counts. */
struct arena {
    element *memory;
    size_t used; /* elements */
};

static element *piece(struct arena *arena, size_t elements) {
    element *start = arena->memory ? arena->memory + arena->used : NULL;
    size_t bytes = (elements * sizeof(element) + 127) / 64 * 64; /* whole cache lines, and one between neighbours */
    arena->used += bytes / sizeof(element);
    return start;
}

static size_t larger_size(size_t a, size_t b) { return a > b ? a : b; }

static void place_space(const struct network *n, const struct workspace *w, struct space *space, struct arena *arena) {
    const struct config *c = &n->config;
    int height = ceil_div(w->height, 2), width = ceil_div(w->width, 2), half = c->stem_channels / 2;
    space->stem.pixels =
        (float *)piece(arena, (size_t)(w->height + 2) * (size_t)(w->width + 2) * 3 * (sizeof(float) / sizeof(element)));
    space->stem.planes = piece(arena, planar_elements(1, height, width, half, c->stem_kernel_size / 2));
    space->stem.middle = piece(arena, (size_t)(height + 2) * (size_t)(width + 2) * (size_t)half);
    space->stage[0] = piece(arena, (size_t)w->sides[0][0] * (size_t)w->sides[0][1] * (size_t)c->stem_channels);

    const struct involution *widest = &n->stem.involution;
    size_t planes = 0, middle = 0, tile = 0;
    size_t pooled = 0, reduced = (size_t)kernel_tile(widest) * (size_t)columns(&widest->reduce);
    size_t kernels = (size_t)kernel_tile(widest) * (size_t)columns(&widest->span);
    for (int s = 0; s < STAGES; s++) {
        int images = s < LATE_STAGE ? 1 : w->late_images, kept = s + 1 < LATE_STAGE ? 1 : w->late_images;
        const int *in = w->sides[s], *out = w->sides[s + 1];
        space->stage[s + 1] =
            piece(arena, (size_t)kept * (size_t)out[0] * (size_t)out[1] * (size_t)stage_channels(c, s));
        for (int b = 0; b < least(c->blocks[s], 2); b++, in = out) { /* the blocks behind the second are like it */
            const struct involution *layer = &n->blocks[s][b].involution;
            size_t kernel_pixels = (size_t)kernel_tile(layer), channels = (size_t)layer->channels;
            planes = larger_size(planes, planar_elements(images, in[0], in[1], layer->channels, layer->size / 2));
            middle = larger_size(middle, (size_t)out[0] * (size_t)out[1] * channels);
            pooled = larger_size(pooled, kernel_pixels * channels);
            reduced = larger_size(reduced, kernel_pixels * (size_t)columns(&layer->reduce));
            kernels = larger_size(kernels, kernel_pixels * (size_t)columns(&layer->span));
            tile = larger_size(tile, (size_t)BLOCK_TILE * channels);
        }
    }
    space->bottleneck.planes = piece(arena, planes);
    space->bottleneck.middle = piece(arena, middle);
    space->scratch.pooled = piece(arena, pooled);
    space->scratch.reduced = piece(arena, reduced);
    space->scratch.kernels = piece(arena, kernels);
    space->scratch.involved =
        piece(arena, larger_size(tile, (size_t)CHUNK * PANEL)); /* the head's logits come here, too */
    space->scratch.rows = piece(arena, 3 * (size_t)width * (size_t)c->stem_channels);
}

static struct workspace *workspace_create(const struct network *n, int height, int width, int threads,
                                          const char **error) {
    if (!between(height, 1, LARGEST_SIDE) || !between(width, 1, LARGEST_SIDE) || !between(threads, 1, MOST_THREADS)) {
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
        w->late_images = most(1, least(MOST_LATE_IMAGES, LATE_PIXELS / least(LATE_PIXELS, late[0] * late[1])));
        struct arena count = {0};
        for (int t = 0; t < threads; t++) place_space(n, w, &w->spaces[t], &count);
        w->memory = calloc(count.used + 64 / sizeof(element), sizeof(element)); /* zeros, which borders stay */
        if (w->memory) {
            struct arena arena = {(element *)(((uintptr_t)w->memory + 63) & ~(uintptr_t)63), 0};
            for (int t = 0; t < threads; t++) place_space(n, w, &w->spaces[t], &arena);
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

/* What a call makes. Stage maps are [B, height, width, channels]; kernel sums, of each stage's last involution,
 * [B, height, width, groups]. Where data is NULL it is not wanted. */
struct outputs {
    float *logits, *features, *stages[STAGES], *sums[STAGES];
};

struct call {
    const struct network *network;
    struct workspace *workspace;
    struct photos photos;
    int batch;
    const struct outputs *outputs;
    struct team *teams; /* one for each thread, for images of its own and for those that threads share */
    struct team *all;
};

/* Values of a map, out of the engine. */
#ifdef INT8
ALWAYS_INLINE float map_step(const struct network *n, int stage) { return n->map_steps[stage]; }
ALWAYS_INLINE vec load_values(const element *from) { return values_of(from, false); }
#else
ALWAYS_INLINE float map_step(const struct network *n, int stage) { return (void)n, (void)stage, 1; }
ALWAYS_INLINE vec load_values(const element *from) { return load(from); }
#endif

/* Stage maps have a multiple of 64 channels, so whole vectors. */
static void copy_values(const element *from, size_t count, float step, float *to) {
    for (size_t i = 0; i < count; i += VL) store(to + i, load_values(from + i) * broadcast(step));
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
        element *to = block->shortcut.weights ? out : in;
        run_block(worker, block, images, side[0], side[1], in, to, &space->bottleneck, sums);
        in = to;
    }
    float *map = call->outputs->stages[stage];
    if (map && worker->rank == 0) {
        size_t floats = pixels * (size_t)stage_channels(&n->config, stage);
        copy_values(in, (size_t)images * floats, map_step(n, stage), map + (size_t)first * floats);
    }
}

static void average_pixels(const element *map, int pixels, int channels, float step, float *features) {
    vec share = broadcast(step / (float)pixels);
    for (int channel = 0; channel < channels; channel += VL) {
        vec sum = {0};
        for (int p = 0; p < pixels; p++) sum += load_values(map + (size_t)p * (size_t)channels + (size_t)channel);
        store(features + channel, sum * share);
    }
}

/* Images first, first + 1, ... from pixels to features: the early stages one by one, while their large maps are in the
 * cache, the late stages together. */
static void run_images(const struct call *call, const struct worker *worker, struct space *space, int first,
                       int images) {
    const struct workspace *w = call->workspace;
    const struct config *c = &call->network->config;
    size_t values = (size_t)3 * (size_t)w->height * (size_t)w->width;
    element *map[STAGES + 1];
    for (int s = 0; s <= STAGES; s++) {
        /* The first stage writes over its input where no shortcut convolution needs that. */
        map[s] = s == 1 && !call->network->blocks[0][0].shortcut.weights ? space->stage[0] : space->stage[s];
    }
    size_t kept =
        (size_t)w->sides[LATE_STAGE][0] * (size_t)w->sides[LATE_STAGE][1] * (size_t)stage_channels(c, LATE_STAGE - 1);
    for (int i = 0; i < images; i++) {
        struct photos photo = call->photos;
        if (photo.bytes) photo.bytes += (size_t)(first + i) * values;
        if (photo.floats) photo.floats += (size_t)(first + i) * values;
        run_stem(worker, &call->network->stem, photo, w->height, w->width, &space->stem, map[0]);
        for (int s = 0; s < LATE_STAGE; s++) {
            element *out = map[s + 1] + (s + 1 == LATE_STAGE ? (size_t)i * kept : 0);
            run_stage(call, worker, space, s, first + i, 1, map[s], out);
        }
    }
    for (int s = LATE_STAGE; s < STAGES; s++) run_stage(call, worker, space, s, first, images, map[s], map[s + 1]);
    int pixels = w->sides[STAGES][0] * w->sides[STAGES][1], channels = stage_channels(c, STAGES - 1);
    for (int i = 0; i < images && worker->rank == 0; i++) {
        average_pixels(map[STAGES] + (size_t)i * (size_t)pixels * (size_t)channels, pixels, channels,
                       map_step(call->network, STAGES - 1),
                       call->outputs->features + (size_t)(first + i) * (size_t)channels);
    }
}

#ifdef INT8
/* The linear classifier over the whole batch: threads share the classes, so that each weight is read once. */
static void run_head(const struct call *call, struct scratch *scratch) {
    const struct float_matrix *head = &call->network->head;
    (void)scratch;
    for (int panel; (panel = take(call->all)) < ceil_div(head->outputs, VL);) {
        multiply_floats(head, panel * VL, least(VL, head->outputs - panel * VL), call->outputs->features, call->batch,
                        call->outputs->logits);
    }
}
#else
/* One panel as a matrix of its own. */
static struct matrix panel_of(const struct matrix *m, int panel) {
    size_t column = (size_t)panel * PANEL;
    int vectors = least(VECTORS, m->vectors - panel * VECTORS), outputs = least(PANEL, m->outputs - panel * PANEL);
    return (struct matrix){m->weights + column * (size_t)m->inputs, m->bias + column, m->inputs, outputs, vectors};
}

/* The linear classifier over the whole batch: threads share the classes, so that each weight is read once. */
static void run_head(const struct call *call, struct scratch *scratch) {
    const struct matrix *head = &call->network->head;
    struct map features = plain_map(call->outputs->features, 1, INT_MAX, head->inputs);
    for (int panel; (panel = take(call->all)) < panels(head);) {
        int column = panel * PANEL, width = least(PANEL, head->outputs - column);
        for (int first = 0; first < call->batch; first += CHUNK) {
            struct range images = {first, least(call->batch, first + CHUNK)};
            /* Made aside: the last panel may be wider than the classes that are left. */
            struct matrix part = panel_of(head, panel);
            struct map logits = tile_map(scratch->involved, PANEL, first);
            struct product product = {&part, features, logits, NULL, one_by_one(features, head->inputs), false, false};
            multiply_all(&product, images);
            for (int i = first; i < images.end; i++) {
                memcpy(call->outputs->logits + (size_t)i * (size_t)head->outputs + column,
                       scratch->involved + (size_t)(i - first) * PANEL, (size_t)width * sizeof(float));
            }
        }
    }
}
#endif

/* One thread's part of a call. Each takes an equal number of whole images; what remains, fewer images than threads, is
 * shared: one image, one team. */
static void run_thread(void *context, int thread) {
    const struct call *call = context;
    struct workspace *w = call->workspace;
    int threads = w->threads, own = call->batch / threads, rest = call->batch % threads;
    struct worker worker = {&call->teams[thread], 0, &w->spaces[thread].scratch};
    worker.team->barrier.size = 1;
    int groups = ceil_div(own, w->late_images);
    for (int g = 0; g < groups; g++) {
        struct range images = part((struct range){thread * own, (thread + 1) * own}, g, groups);
        run_images(call, &worker, &w->spaces[thread], images.first, images.end - images.first);
    }
    if (rest) {
        meet(call->all); /* nobody joins a team before it has its size */
        int index = thread * rest / threads;
        int first = ceil_div(index * threads, rest), end = ceil_div((index + 1) * threads, rest);
        worker.team = &call->teams[first], worker.rank = thread - first;
        if (worker.rank == 0) worker.team->barrier.size = end - first;
        meet(call->all);
        run_images(call, &worker, &w->spaces[first], threads * own + index, 1);
    }
    meet(call->all);
    run_head(call, &w->spaces[thread].scratch);
}
