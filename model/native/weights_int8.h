/* Weights of the int8 build on their way in. Included by weights.h. */
#pragma once

static void take_step(struct source *source, float *step) {
    const float *from = take_array(source, 1);
    if (from) *step = *from;
}

/* Packs `outputs` rows of whole numbers, of which row i goes to column place[i], or i where place is NULL. */
static void pack_matrix(struct source *source, struct matrix *m, int outputs, int inputs, int all_columns,
                        const int *place) {
    const float *weights = take_array(source, (int64_t)outputs * inputs), *bias = take_array(source, outputs),
                *multiplier = take_array(source, outputs);
    if (source->error) return;
    *m = (struct matrix){.outputs = all_columns, .vectors = ceil_div(all_columns, VL)};
    m->inputs = ceil_div(inputs, TOGETHER) * TOGETHER;
    m->weights = calloc((size_t)columns(m) * (size_t)m->inputs + AHEAD + TOGETHER * PANEL, 1);
    m->bias = calloc((size_t)columns(m), sizeof(float));
    m->multiplier = calloc((size_t)columns(m), sizeof(float));
    if (!m->weights || !m->bias || !m->multiplier) {
        source->error = "out of memory";
        return;
    }
    for (int i = 0; i < outputs; i++) {
        int column = place ? place[i] : i, first = column / PANEL * PANEL, width = least(PANEL, columns(m) - first);
        int8_t *panel = m->weights + (size_t)first * (size_t)m->inputs;
        m->bias[column] = bias[i], m->multiplier[column] = multiplier[i];
        for (int k = 0; k < inputs; k++) {
            float weight = weights[(size_t)i * (size_t)inputs + (size_t)k];
            if (!(weight >= -127 && weight <= 127) || weight != (float)(int)weight) {
                source->error = "a weight is not a whole number from -127 to 127";
                return;
            }
            int at = (k / TOGETHER * width + column - first) * TOGETHER + k % TOGETHER;
            panel[at] = (int8_t)weight;
        }
    }
}

static void take_matrix(struct source *source, struct matrix *m, int outputs, int inputs) {
    pack_matrix(source, m, outputs, inputs, outputs, NULL);
}

/* Kernels get zeros where taps that are multiplied together are none. */
static void take_span(struct source *source, struct involution *layer, int inputs) {
    int size = layer->size, outputs = size * size * (layer->channels / GROUP);
    int *place = malloc((size_t)outputs * sizeof *place);
    if (!place) {
        source->error = "out of memory";
        return;
    }
    for (int i = 0; i < outputs; i++) {
        place[i] = i / (size * size) * layer->taps + tap_at(size, i / size % size, i % size);
    }
    pack_matrix(source, &layer->span, outputs, inputs, layer->taps * (layer->channels / GROUP), place);
    free(place);
}

static void free_matrix(struct matrix *m) {
    free(m->weights);
    free(m->bias);
    free(m->multiplier);
}

static void take_float_matrix(struct source *source, struct float_matrix *m, int outputs, int inputs) {
    const float *weights = take_array(source, (int64_t)outputs * inputs), *bias = take_array(source, outputs);
    if (source->error) return;
    size_t width = (size_t)ceil_div(outputs, VL) * VL;
    *m = (struct float_matrix){calloc(width * (size_t)inputs, sizeof(float)), calloc(width, sizeof(float)), inputs,
                               outputs};
    if (!m->weights || !m->bias) {
        source->error = "out of memory";
        return;
    }
    memcpy(m->bias, bias, (size_t)outputs * sizeof(float));
    for (int i = 0; i < outputs; i++) {
        float *panel = m->weights + (size_t)(i / VL * VL) * (size_t)inputs + i % VL;
        for (int k = 0; k < inputs; k++) panel[(size_t)k * VL] = weights[(size_t)i * (size_t)inputs + (size_t)k];
    }
}

static void free_float_matrix(struct float_matrix *m) {
    free(m->weights);
    free(m->bias);
}
