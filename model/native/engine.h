/* The interface of the library, once for each instruction set: every name contains BUILD, as in rednet_avx512_run.
 *
 * Functions that can fail return NULL on success, or a static error message. All arguments are validated here, even
 * those that Python has validated before.
 *
 * Timings in the comments of this folder: RedNet-50 at 224x224 in float32 on two cores of a Sapphire Rapids class Xeon
 * (AVX-512, VNNI), unless they say int8; most come from the prototype. */
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

/* config: the fields of struct config; arrays: in the order of network_create; threads: 1 to 64, including the caller.
 */
struct engine *EXPORT(engine_create)(const int32_t *config, int64_t config_length, const struct array *arrays,
                                     int64_t count, int threads, const char **error);
void EXPORT(engine_free)(struct engine *engine);

/* The number of threads, which is lower than requested if the system allows no more. */
int EXPORT(engine_threads)(const struct engine *engine);

/* Allocates the memory for photos of one size, for this engine only. */
struct workspace *EXPORT(workspace_create)(const struct engine *engine, int height, int width, const char **error);
void EXPORT(workspace_free)(struct workspace *workspace);

/* Runs a batch. photos: [batch, 3, height, width], `values` elements in total, as bytes or as normalised floats.
 * outputs: ten arrays as in struct outputs (logits, features, four stage maps, four maps of kernel sums); data is NULL
 * for a map that is not requested. Allocates nothing. Only one call per engine may run at a time. */
const char *EXPORT(run)(struct engine *engine, struct workspace *workspace, const void *photos, int64_t values,
                        int normalised, int64_t batch, const struct array *outputs);

struct operators *EXPORT(operators_create)(int threads);
void EXPORT(operators_free)(struct operators *operators);

/* The involution or its gradients. sizes: batch, groups, channels per group, H, W, K, stride, and 1 for the gradients.
 * arrays, in the layouts of operator.h: x, kernel, the output (or its gradient), and the gradients of x and kernel.
 * element_size: 4, 8, or 2 for bfloat16 in the fast case. Only one call may run at a time. */
const char *EXPORT(involution)(struct operators *operators, const int32_t *sizes, const struct array *arrays,
                               int32_t element_size);

/* A pass of batch_norm.h over bfloat16 maps [rows, channels]. arrays, NULL if the pass does not use them: x, the
 * gradient of y, y, shortcut, a, b, c, sums (zeroed), out, the gradient of the shortcut. Only one call may run at a
 * time. */
const char *EXPORT(batch_norm)(struct operators *operators, int32_t pass, int64_t rows, int32_t channels,
                               int32_t blocks, int32_t relu, const struct array *arrays);

#pragma GCC visibility pop
