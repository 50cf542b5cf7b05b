/* Runs the engine and the operator over many shapes under a sanitizer: `make sanitize`. With any argument it runs over
 * a few shapes only, for emulators.
 *
 * It also checks that results are bit-identical for any number of threads and any batch, and that the fast case of the
 * operator agrees with the plain loops. */
#define _POSIX_C_SOURCE 200809L

#include <math.h>
#include <stdio.h>

#include "engine.c"

static uint32_t state = 1;

static float noise(void) {
    state = state * 1664525u + 1013904223u;
    return (float)(state >> 8) / (float)(1 << 23) - 1;
}

static float *noises(size_t count, float scale) {
    float *values = malloc((count ? count : 1) * sizeof *values);
    for (size_t i = 0; i < count; i++) values[i] = noise() * scale;
    return values;
}

#define FAIL(...) (printf(__VA_ARGS__), exit(1))

/* Random arrays of a network, in the order of network_create. */
struct weights {
    struct array arrays[1024];
    int count;
};

static void add(struct weights *w, int64_t length, float scale) {
    w->arrays[w->count++] = (struct array){noises((size_t)length, scale), length};
}

#ifdef INT8
/* Quantised weights, a bias, and multipliers that keep most results within the quantised range. */
static void add_matrix(struct weights *w, int outputs, int inputs) {
    float *weights = noises((size_t)outputs * (size_t)inputs, 127);
    for (int64_t i = 0; i < (int64_t)outputs * inputs; i++) weights[i] = rintf(weights[i]);
    w->arrays[w->count++] = (struct array){weights, (int64_t)outputs * inputs};
    add(w, outputs, 20);
    add(w, outputs, 0.02f / sqrtf((float)inputs));
}

static void add_float_matrix(struct weights *w, int outputs, int inputs) {
    add(w, (int64_t)outputs * inputs, 50 / sqrtf((float)inputs));
    add(w, outputs, 20);
}

static void add_scale(struct weights *w) { add(w, 1, 1); }
#else
#define add_float_matrix add_matrix
#define add_scale(w) ((void)0)

static void add_matrix(struct weights *w, int outputs, int inputs) {
    add(w, (int64_t)outputs * inputs, 1.7f / sqrtf((float)inputs));
    add(w, outputs, 0.1f);
}
#endif

static void add_involution(struct weights *w, int channels, int size, int reduction) {
    add_matrix(w, channels / reduction, channels);
    add_matrix(w, size * size * channels / GROUP, channels / reduction);
    add_scale(w);
    add(w, channels, 1);
    add(w, channels, 0.1f);
}

static void make_weights(struct weights *w, const struct config *c) {
    int half = c->stem_channels / 2, channels = c->stem_channels;
    w->count = 0;
    add(w, 3 * 256, 2);
    add_float_matrix(w, half, 27);
    add_involution(w, half, c->stem_kernel_size, c->reduction);
    add_matrix(w, c->stem_channels, 9 * half);
    for (int s = 0; s < STAGES; s++) {
        for (int b = 0; b < c->blocks[s]; b++) {
            int middle = c->base_channels << s, out = 4 * middle;
            add_matrix(w, middle, channels);
            add_involution(w, middle, c->kernel_size, c->reduction);
            add_matrix(w, out, middle);
            add_scale(w);
            if ((b == 0 && c->strides[s] > 1) || channels != out) add_matrix(w, out, channels);
            channels = out;
        }
    }
    for (int s = 0; s < STAGES; s++) add_scale(w);
    add_float_matrix(w, c->classes, channels);
}

enum { BATCH = 9 };

static void check_network(const struct config *c, int height, int width, int max_threads, int max_images) {
    struct weights w;
    make_weights(&w, c);
    size_t photo = 3 * (size_t)height * (size_t)width, features = (size_t)c->base_channels * 32,
           classes = (size_t)c->classes;
    uint8_t *photos = malloc(BATCH * photo);
    for (size_t i = 0; i < BATCH * photo; i++) photos[i] = (uint8_t)(noise() * 128 + 128);
    float *expected = NULL;
    for (int threads = 1; threads <= max_threads; threads++) {
        const char *error = NULL;
        struct engine *engine =
            EXPORT(engine_create)((const int32_t *)c, sizeof *c / sizeof(int32_t), w.arrays, w.count, threads, &error);
        struct workspace *workspace = engine ? EXPORT(workspace_create)(engine, height, width, &error) : NULL;
        if (!workspace) FAIL("%dx%d: %s\n", width, height, error);
        for (int batch = 0; batch <= max_images; batch++) {
            float *out = malloc((size_t)BATCH * (classes + features) * sizeof *out);
            struct array outputs[2 + 2 * STAGES] = {{out, batch * (int64_t)classes},
                                                    {out + BATCH * classes, batch * (int64_t)features}};
            for (int s = 0; s < STAGES; s++) { /* stage maps and kernel sums at odd batch sizes */
                size_t pixels = (size_t)workspace->sides[s + 1][0] * (size_t)workspace->sides[s + 1][1] * (size_t)batch;
                size_t stage = pixels * (size_t)stage_channels(c, s),
                       sums = pixels * (size_t)((c->base_channels << s) / GROUP);
                if (batch % 2) outputs[2 + s] = (struct array){malloc(stage * sizeof(float)), (int64_t)stage};
                if (batch % 2) outputs[2 + STAGES + s] = (struct array){malloc(sums * sizeof(float)), (int64_t)sums};
            }
            error = EXPORT(run)(engine, workspace, photos, batch * (int64_t)photo, 0, batch, outputs);
            if (error) FAIL("%dx%d: %s\n", width, height, error);
            if (!expected && batch == max_images) {
                expected = out, out = NULL;
                for (size_t i = 0; i < (size_t)batch * classes; i++) {
                    if (!isfinite(expected[i])) FAIL("%dx%d: not finite\n", width, height);
                }
            } else if (expected) {
                if (memcmp(out, expected, (size_t)batch * classes * sizeof *out) ||
                    memcmp(out + BATCH * classes, expected + BATCH * classes, (size_t)batch * features * sizeof *out)) {
                    FAIL("%dx%d: batch %d on %d threads differs\n", width, height, batch, threads);
                }
            }
            free(out);
            for (int i = 2; i < 2 + 2 * STAGES; i++) free((void *)outputs[i].data);
        }
        if (!EXPORT(run)(engine, workspace, photos, 1, 0, 1, (struct array[2 + 2 * STAGES]){{0}}))
            FAIL("a wrong number of pixels was accepted\n");
        EXPORT(workspace_free)(workspace);
        EXPORT(engine_free)(engine);
    }
    const char *error = NULL; /* too few, too many and too short arrays are rejected */
    int64_t length = w.arrays[w.count - 1].length;
    for (int wrong = 0; wrong < 3; wrong++) {
        w.arrays[w.count - 1].length = length - (wrong == 2);
        if (EXPORT(engine_create)((const int32_t *)c, sizeof *c / sizeof(int32_t), w.arrays,
                                  w.count + (wrong < 2 ? 2 * wrong - 1 : 0), 2, &error)) {
            FAIL("wrong arrays were accepted\n");
        }
    }
    for (int i = 0; i < w.count; i++) free((void *)w.arrays[i].data);
    free(expected);
    free(photos);
}

#ifndef INT8
static void check_operator(struct operators *operators, int batch, int groups, int width, int height, int columns,
                           int size, int stride) {
    int h = ceil_div(height, stride), v = ceil_div(columns, stride), channels = groups * width;
    size_t lengths[5] = {(size_t)(batch * height * columns * channels), (size_t)(batch * h * v * groups * size * size),
                         (size_t)(batch * h * v * channels)};
    lengths[3] = lengths[0], lengths[4] = lengths[1];
    struct array floats[5], doubles[5];
    for (int i = 0; i < 5; i++) {
        float *values = noises(lengths[i], 1);
        double *same = malloc((lengths[i] ? lengths[i] : 1) * sizeof *same);
        for (size_t k = 0; k < lengths[i]; k++) same[k] = values[k];
        floats[i] = (struct array){values, (int64_t)lengths[i]},
        doubles[i] = (struct array){(float *)same, (int64_t)lengths[i]};
    }
    for (int gradients = 0; gradients < 2; gradients++) {
        int32_t sizes[8] = {batch, groups, width, height, columns, size, stride, gradients};
        const char *error = EXPORT(involution)(operators, sizes, floats, 4);
        if (!error) error = EXPORT(involution)(operators, sizes, doubles, 8);
        if (error) FAIL("operator: %s\n", error);
        for (int i = 2; i < 5; i++) {
            for (size_t k = 0; k < lengths[i]; k++) {
                if (!(fabs(floats[i].data[k] - ((const double *)doubles[i].data)[k]) < 1e-3)) {
                    FAIL("operator %d %d %d %dx%d K %d stride %d: array %d differs\n", batch, groups, width, height,
                         columns, size, stride, i);
                }
            }
        }
    }
    for (int i = 0; i < 5; i++) free((void *)floats[i].data), free((void *)doubles[i].data);
}

/* Allocates exactly the required length, so that a sanitizer reports every access beyond it. */
static struct array bfloats(size_t length) {
    float *values = noises(length, 1);
    bfloat16 *halves = malloc((length ? length : 1) * sizeof *halves);
    narrow(values, halves, (int)length);
    free(values);
    return (struct array){(float *)halves, (int64_t)length};
}

static void check_bfloat16_operator(struct operators *operators, int groups, int height, int columns, int size,
                                    int stride) {
    int h = ceil_div(height, stride), v = ceil_div(columns, stride), channels = groups * GROUP;
    size_t map = (size_t)(2 * height * columns * channels), kernel = (size_t)(2 * h * v * groups * size * size),
           out = (size_t)(2 * h * v * channels);
    struct array arrays[5] = {bfloats(map), bfloats(kernel), bfloats(out), bfloats(map), bfloats(kernel)};
    for (int gradients = 0; gradients < 2; gradients++) {
        int32_t sizes[8] = {2, groups, GROUP, height, columns, size, stride, gradients};
        const char *error = EXPORT(involution)(operators, sizes, arrays, 2);
        if (error) FAIL("bfloat16 operator: %s\n", error);
    }
    for (int i = 0; i < 5; i++) free((void *)arrays[i].data);
}

static void check_batch_norm(struct operators *operators, int rows, int channels, int blocks) {
    size_t map = (size_t)(rows * channels), sums = (size_t)(2 * blocks * channels);
    struct array arrays[10];
    for (int i = 0; i < 10; i++) {
        size_t length = i == 7 ? sums : i >= 4 && i <= 6 ? (size_t)channels : map;
        arrays[i] = i >= 4 && i <= 7 ? (struct array){noises(length, 1), (int64_t)length} : bfloats(length);
    }
    for (int pass = STATISTICS; pass <= GRADIENTS; pass++) {
        for (int relu = 0; relu < 2; relu++) {
            const char *error = EXPORT(batch_norm)(operators, pass, rows, channels, blocks, relu, arrays);
            if (error) FAIL("batch norm: %s\n", error);
        }
    }
    arrays[0].length--;
    if (!EXPORT(batch_norm)(operators, STATISTICS, rows, channels, blocks, 0, arrays))
        FAIL("a short map was accepted\n");
    for (int i = 0; i < 10; i++) free((void *)arrays[i].data);
}
#endif

int main(int arguments, char **argument) {
    (void)argument;
    bool quick = arguments > 1;
    struct config usual = {{1, 2, 4, 1}, {1, 2, 2, 2}, 32, 16, 5, 7, 3, 4},
                  odd = {{1, 1, 2, 1}, {2, 1, 3, 1}, 64, 16, 70, 5, 7, 2};
    struct config wide = {{1, 1, 1, 1}, {1, 2, 2, 2}, 64, 32, 1000, 7, 3, 4};
    check_network(&usual, 1, 1, 2, 3);
    check_network(&odd, 7, 30, 3, 4);
    if (!quick) {
        check_network(&usual, 64, 64, 5, BATCH);
        check_network(&usual, 160, 160, 2, BATCH); /* late stages run several groups of images, of unequal size */
        check_network(&usual, 33, 100, 5, BATCH);
        check_network(&odd, 50, 70, 5, BATCH);
        check_network(&wide, 96, 64, 5, BATCH);
    }
#ifndef INT8
    struct operators *operators = EXPORT(operators_create)(3);
    for (int size = 1; size <= 7; size += 2) {
        for (int stride = 1; stride <= 3; stride++) {
            check_operator(operators, 2, 3, 16, 9, 16, size, stride);
            check_operator(operators, 3, 1, 16, 1, 1, size, stride);
            check_operator(operators, 1, 2, 16, 20, 15, size, stride);
            check_operator(operators, 2, 2, 5, 6, 7, size, stride);
        }
    }
    check_operator(operators, 0, 2, 16, 6, 7, 3, 1);
    for (int wide = 0; wide < 2; wide++) {
        check_bfloat16_operator(operators, 1 + wide, 1 + 8 * wide, 1 + 15 * wide, 3, 1);
        check_bfloat16_operator(operators, 1 + wide, 1 + 8 * wide, 1 + 15 * wide, 7, 1);
        check_bfloat16_operator(operators, 1 + wide, 1 + 8 * wide, 1 + 15 * wide, 7, 2);
    }
    check_batch_norm(operators, 1, 1, 1);
    check_batch_norm(operators, 37, 48, 5);
    EXPORT(operators_free)(operators);
#endif
    puts("no complaint");
    return 0;
}
