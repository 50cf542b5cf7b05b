/* The exported functions, which validate their arguments. The library is this one translation unit, so that everything
 * can be inlined and only these functions are visible outside. */
#define _POSIX_C_SOURCE 200809L

#include "engine.h"

#include "network.h"
#ifndef INT8 /* training does not use int8 */
#include "batch_norm.h"
#include "operator.h"
#endif

struct engine {
    struct network *network;
    struct pool *pool;
    struct team teams[MAX_THREADS];
};

void EXPORT(engine_free)(struct engine *engine) {
    if (!engine) return;
    if (!engine->pool ||
        pool_alive(engine->pool)) { /* in a forked child, barriers may have waiters that do not exist */
        for (int t = 0; t < MAX_THREADS; t++) barrier_destroy(&engine->teams[t].barrier);
    }
    if (engine->pool) pool_destroy(engine->pool);
    network_free(engine->network);
    free(engine);
}

struct engine *EXPORT(engine_create)(const int32_t *config, int64_t config_length, const struct array *arrays,
                                     int64_t count, int threads, const char **error) {
    *error = NULL;
    if (config_length != (int64_t)(sizeof(struct config) / sizeof(int32_t))) {
        *error = "the configuration has the wrong length: it is of another version";
    } else if (!between(threads, 1, MAX_THREADS)) {
        *error = "the number of threads is out of range";
    }
    if (*error) return NULL;
    struct engine *engine = calloc(1, sizeof *engine);
    if (!engine) {
        *error = "out of memory";
        return NULL;
    }
    for (int t = 0; t < MAX_THREADS; t++) barrier_init(&engine->teams[t].barrier);
    engine->network = network_create((const struct config *)config, arrays, count, error);
    engine->pool = *error ? NULL : pool_create(threads);
    if (engine->pool) return engine;
    if (!*error) *error = "out of memory";
    EXPORT(engine_free)(engine);
    return NULL;
}

int EXPORT(engine_threads)(const struct engine *engine) { return engine->pool->threads; }

struct workspace *EXPORT(workspace_create)(const struct engine *engine, int height, int width, const char **error) {
    *error = NULL;
    return workspace_create(engine->network, height, width, engine->pool->threads, error);
}

void EXPORT(workspace_free)(struct workspace *workspace) { workspace_free(workspace); }

const char *EXPORT(run)(struct engine *engine, struct workspace *workspace, const void *photos, int64_t values,
                        int normalised, int64_t batch, const struct array *outputs) {
    const struct config *c = &engine->network->config;
    if (workspace->network != engine->network) return "the workspace belongs to another engine";
    int64_t photo = (int64_t)3 * workspace->height * workspace->width;
    if (batch < 0 || batch > INT_MAX / MAX_THREADS || values != batch * photo) return "the photos have the wrong size";
    struct outputs requested = {(float *)outputs[0].data, (float *)outputs[1].data, {NULL}, {NULL}};
    int64_t lengths[2 + 2 * STAGES] = {c->classes, stage_channels(c, STAGES - 1)};
    for (int s = 0; s < STAGES; s++) {
        int64_t pixels = (int64_t)workspace->sides[s + 1][0] * workspace->sides[s + 1][1];
        lengths[2 + s] = pixels * stage_channels(c, s);
        lengths[2 + STAGES + s] = pixels * ((c->base_channels << s) / GROUP);
        requested.stages[s] = (float *)outputs[2 + s].data;
        requested.sums[s] = (float *)outputs[2 + STAGES + s].data;
    }
    for (int i = 0; i < 2 + 2 * STAGES; i++) {
        if (outputs[i].data ? outputs[i].length != batch * lengths[i] : i < 2) return "an output has the wrong length";
    }
    if (batch == 0) return NULL;
    struct photos in = {normalised ? NULL : photos, normalised ? photos : NULL};
    struct call call = {engine->network, workspace, in, (int)batch, &requested, engine->teams, &engine->pool->all};
    return pool_run(engine->pool, run_thread, &call) ? NULL : "the engine's threads do not outlive a fork";
}

#ifndef INT8
struct operators *EXPORT(operators_create)(int threads) {
    struct operators *operators = calloc(1, sizeof *operators);
    if (operators) operators->pool = pool_create(max(1, min(threads, MAX_THREADS)));
    if (operators && operators->pool) return operators;
    free(operators);
    return NULL;
}

void EXPORT(operators_free)(struct operators *operators) {
    if (!operators) return;
    for (int t = 0; t < operators->pool->threads; t++) free(operators->scratch[t]);
    pool_destroy(operators->pool);
    free(operators);
}

static const char *grow(struct operators *operators, size_t floats) {
    if (floats <= operators->floats) return NULL;
    operators->floats = 0;
    for (int t = 0; t < operators->pool->threads; t++) {
        free(operators->scratch[t]);
        operators->scratch[t] = NULL;
    }
    for (int t = 0; t < operators->pool->threads; t++) {
        if (posix_memalign((void **)&operators->scratch[t], 64, floats * sizeof(float))) return "out of memory";
    }
    operators->floats = floats;
    return NULL;
}

const char *EXPORT(involution)(struct operators *operators, const int32_t *sizes, const struct array *arrays,
                               int32_t element_size) {
    for (int i = 0; i < 7; i++) {
        if (!between(sizes[i], i == 0 ? 0 : 1, 1 << 24)) return "a size is out of range";
    }
    if (element_size != sizeof(bfloat16) && element_size != sizeof(float) && element_size != sizeof(double))
        return "elements must be of 2, 4 or 8 bytes";
    struct operation o = {
        .x = (const void *)arrays[0].data,
        .kernel = (const void *)arrays[1].data,
        .out = (void *)arrays[2].data,
        .batch = sizes[0],
        .groups = sizes[1],
        .group_channels = sizes[2],
        .x_height = sizes[3],
        .x_width = sizes[4],
        .out_height = ceil_div(sizes[3], sizes[6]),
        .out_width = ceil_div(sizes[4], sizes[6]),
        .size = sizes[5],
        .stride = sizes[6],
        .element_size = (size_t)element_size,
    };
    if (sizes[7]) o.grad_x = (void *)arrays[3].data, o.grad_kernel = (void *)arrays[4].data;
    if (o.size % 2 == 0 || o.size > MAX_KERNEL_SIZE || (int64_t)o.batch * o.groups > INT_MAX / 2 ||
        (int64_t)o.groups * o.group_channels > 1 << 24)
        return "a size is out of range";
    int64_t channels = (int64_t)o.groups * o.group_channels, taps = (int64_t)o.groups * o.size * o.size;
    int64_t in = (int64_t)o.batch * o.x_height * o.x_width, out = (int64_t)o.batch * o.out_height * o.out_width;
    int64_t lengths[5] = {in * channels, out * taps, out * channels, in * channels, out * taps};
    for (int i = 0; i < (sizes[7] ? 5 : 3); i++) {
        if (arrays[i].length != lengths[i] || (!arrays[i].data && lengths[i])) return "an array has the wrong length";
    }
    if (element_size == sizeof(bfloat16) && !operator_fast(&o)) return "bfloat16 requires the sizes of the fast case";
    const char *error = operator_fast(&o) ? grow(operators, operator_floats(&o)) : NULL;
    if (error) return error;
    struct operator_call call = {&o, operators};
    return pool_run(operators->pool, operator_thread, &call) ? NULL : "the operator's threads do not outlive a fork";
}

const char *EXPORT(batch_norm)(struct operators *operators, int32_t pass, int64_t rows, int32_t channels,
                               int32_t blocks, int32_t relu, const struct array *arrays) {
    if (!between(pass, STATISTICS, GRADIENTS) || !between(channels, 1, 1 << 24) || !between(blocks, 1, 1 << 16) ||
        rows < blocks || rows > INT64_MAX >> 32)
        return "a size is out of range";
    const int64_t map = rows * channels, sums = (int64_t)blocks * 2 * channels;
    const int64_t lengths[] = {map, map, map, map, channels, channels, channels, sums, map, map};
    for (int i = 0; i < 10; i++) {
        if (arrays[i].data && arrays[i].length != lengths[i]) return "an array has the wrong length";
    }
    /* The arrays that each pass requires. */
    static const bool needed[4][10] = {{1, 0, 0, 0, 1, 0, 0, 1, 0, 0},
                                       {1, 0, 0, 0, 1, 1, 0, 0, 1, 0},
                                       {1, 1, 0, 0, 1, 0, 0, 1, 0, 0},
                                       {1, 1, 0, 0, 1, 1, 1, 0, 1, 0}};
    for (int i = 0; i < 10; i++) {
        if (needed[pass][i] && !arrays[i].data) return "an array is missing";
    }
    struct batch_norm n = {
        .pass = pass,
        .rows = rows,
        .channels = channels,
        .blocks = blocks,
        .x = (const void *)arrays[0].data,
        .grad = (const void *)arrays[1].data,
        .y = (const void *)arrays[2].data,
        .shortcut = (const void *)arrays[3].data,
        .a = arrays[4].data,
        .b = arrays[5].data,
        .c = arrays[6].data,
        .relu = relu,
        .sums = (void *)arrays[7].data,
        .out = (void *)arrays[8].data,
        .grad_shortcut = (void *)arrays[9].data,
    };
    struct batch_norm_call call = {&n, &operators->pool->all};
    return pool_run(operators->pool, batch_norm_thread, &call) ? NULL : "the operator's threads do not outlive a fork";
}
#endif
