/* What the library offers, once for each instruction set: BUILD is part of every name, as in rednet_avx512_run.
 *
 * Functions that can fail return NULL, or a message that lives for ever. Whatever a caller passes in is checked on this
 * side, however well Python has checked it. */
#pragma once

#include <stdint.h>

#define EXPORT__(build, name) rednet_##build##_##name
#define EXPORT_(build, name) EXPORT__(build, name)
#define EXPORT(name) EXPORT_(BUILD, name)

struct array {
    const float *data;
    int64_t length; /* elements */
};

struct engine;
struct workspace;
struct operators;

#pragma GCC visibility push(default)

/* config: the fields of struct config; arrays: as network_create takes them; threads: 1 to 64, with the caller's. */
struct engine *EXPORT(engine_create)(const int32_t *config, int64_t config_length, const struct array *arrays,
                                     int64_t count, int threads, const char **error);
void EXPORT(engine_free)(struct engine *engine);

/* How many threads it got: the system may give fewer than were asked for. */
int EXPORT(engine_threads)(const struct engine *engine);

/* The memory that photos of one size need; for this engine only. */
struct workspace *EXPORT(workspace_create)(const struct engine *engine, int height, int width, const char **error);
void EXPORT(workspace_free)(struct workspace *workspace);

/* photos: [batch, 3, height, width], `values` in all: bytes, or floats that are normalised already. outputs: ten
 * arrays, logits, features, four stage maps, four maps of kernel sums, as in struct outputs; NULL data where a map is
 * not wanted. Allocates nothing. Not to be called twice at a time for one engine. */
const char *EXPORT(run)(struct engine *engine, struct workspace *workspace, const void *photos, int64_t values,
                        int normalised, int64_t batch, const struct array *outputs);

struct operators *EXPORT(operators_create)(int threads);
void EXPORT(operators_free)(struct operators *operators);

/* sizes: batch, groups, channels of a group, H, W, K, stride, and 1 for the gradients; arrays, in the layouts of
 * operator.h: x, kernel, output (or its gradient), and for the gradients those of x and kernel; real: bytes of an
 * element, 4, 8, or 2 for bfloat16 in the fast case. Not to be called twice at a time. */
const char *EXPORT(involution)(struct operators *operators, const int32_t *sizes, const struct array *arrays,
                               int32_t real);

/* A pass of batch_norm.h over bfloat16 maps [rows, channels]. arrays, NULL where the pass has no use for one: x, the
 * gradient of y, y, shortcut, a, b, c, sums (zero), out, the gradient of the shortcut. Not to be called twice at a
 * time. */
const char *EXPORT(batch_norm)(struct operators *operators, int32_t pass, int64_t rows, int32_t channels,
                               int32_t blocks, int32_t relu, const struct array *arrays);

#pragma GCC visibility pop
