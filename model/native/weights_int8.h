/* Reads the weights of the int8 builds. Included by weights.h. */
#pragma once

static void read_scale(struct reader *reader, float *scale) {
    const float *from = read_array(reader, 1);
    if (from) *scale = *from;
}

/* Reads and packs `outputs` rows of quantised weights. Row i goes to column column_of[i], or i if column_of is NULL. */
static void pack_matrix(struct reader *reader, struct matrix *m, int outputs, int inputs, int all_columns,
                        const int *column_of) {
    const float *weights = read_array(reader, (int64_t)outputs * inputs), *bias = read_array(reader, outputs),
                *multiplier = read_array(reader, outputs);
    if (reader->error) return;
    *m = (struct matrix){.outputs = all_columns, .vectors = ceil_div(all_columns, VL)};
    m->inputs = ceil_div(inputs, KR) * KR;
    m->weights = calloc((size_t)columns(m) * (size_t)m->inputs + PREFETCH_DISTANCE + KR * NR, 1);
    m->bias = calloc((size_t)columns(m), sizeof(float));
    m->multiplier = calloc((size_t)columns(m), sizeof(float));
    if (!m->weights || !m->bias || !m->multiplier) {
        reader->error = "out of memory";
        return;
    }
    for (int i = 0; i < outputs; i++) {
        int column = column_of ? column_of[i] : i, first = column / NR * NR, width = min(NR, columns(m) - first);
        int8_t *panel = m->weights + (size_t)first * (size_t)m->inputs;
        m->bias[column] = bias[i], m->multiplier[column] = multiplier[i];
        for (int k = 0; k < inputs; k++) {
            float weight = weights[(size_t)i * (size_t)inputs + (size_t)k];
            if (!(weight >= -127 && weight <= 127) || weight != (float)(int)weight) {
                reader->error = "a weight is not an integer from -127 to 127";
                return;
            }
            int at = (k / KR * width + column - first) * KR + k % KR;
            panel[at] = (int8_t)weight;
        }
    }
}

static void read_matrix(struct reader *reader, struct matrix *m, int outputs, int inputs) {
    pack_matrix(reader, m, outputs, inputs, outputs, NULL);
}

/* Inserts the zero taps that pad each kernel; see involution_int8.h. */
static void read_span(struct reader *reader, struct involution *layer, int inputs) {
    int size = layer->size, outputs = size * size * (layer->channels / GROUP);
    int *column_of = malloc((size_t)outputs * sizeof *column_of);
    if (!column_of) {
        reader->error = "out of memory";
        return;
    }
    for (int i = 0; i < outputs; i++) {
        column_of[i] = i / (size * size) * layer->taps + tap_index(size, i / size % size, i % size);
    }
    pack_matrix(reader, &layer->span, outputs, inputs, layer->taps * (layer->channels / GROUP), column_of);
    free(column_of);
}

static void free_matrix(struct matrix *m) {
    free(m->weights);
    free(m->bias);
    free(m->multiplier);
}

static void read_float_matrix(struct reader *reader, struct float_matrix *m, int outputs, int inputs) {
    const float *weights = read_array(reader, (int64_t)outputs * inputs), *bias = read_array(reader, outputs);
    if (reader->error) return;
    size_t width = (size_t)ceil_div(outputs, VL) * VL;
    *m = (struct float_matrix){calloc(width * (size_t)inputs, sizeof(float)), calloc(width, sizeof(float)), inputs,
                               outputs};
    if (!m->weights || !m->bias) {
        reader->error = "out of memory";
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
