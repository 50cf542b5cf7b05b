/* Involution and its gradients as plain loops, for any kernel size, stride and group width, in float or double.
 *
 * Included by operator.h once for each REAL, with the layouts described there. */

#define NAMED_(name, real) name##_##real
#define NAMED(name, real) NAMED_(name, real)

/* Computes one group of one image. It calls no function, so that the compiler can vectorise the loops over channels. */
static void NAMED(operator_any, REAL)(const struct operation *o, int image, int group) {
    int channels = o->groups * o->group_channels, border = o->size / 2;
    const REAL *x =
        (const REAL *)o->x + (size_t)image * o->x_height * o->x_width * channels + (size_t)group * o->group_channels;
    REAL *grad_x = o->grad_x ? (REAL *)o->grad_x + (x - (const REAL *)o->x) : NULL;
    for (size_t p = 0; grad_x && p < (size_t)o->x_height * o->x_width; p++) {
        memset(grad_x + p * channels, 0, (size_t)o->group_channels * sizeof(REAL));
    }
    for (int y = 0; y < o->out_height; y++) {
        for (int column = 0; column < o->out_width; column++) {
            size_t pixel = ((size_t)image * o->out_height + y) * o->out_width + column;
            size_t taps = (pixel * o->groups + group) * o->size * o->size,
                   out_offset = pixel * channels + (size_t)group * o->group_channels;
            const REAL *kernel = (const REAL *)o->kernel + taps;
            REAL *grad_kernel = o->grad_kernel ? (REAL *)o->grad_kernel + taps : NULL;
            REAL *out = (REAL *)o->out + out_offset;
            if (!grad_x) memset(out, 0, (size_t)o->group_channels * sizeof(REAL));
            for (int tap = 0; tap < o->size * o->size; tap++) {
                int row = y * o->stride + tap / o->size - border, at = column * o->stride + tap % o->size - border;
                bool inside = 0 <= row && row < o->x_height && 0 <= at && at < o->x_width;
                size_t from = inside ? ((size_t)row * o->x_width + at) * channels : 0;
                if (!grad_x) {
                    for (int c = 0; inside && c < o->group_channels; c++) out[c] += kernel[tap] * x[from + c];
                } else {
                    REAL sum = 0;
                    for (int c = 0; inside && c < o->group_channels; c++) {
                        grad_x[from + c] += kernel[tap] * out[c];
                        sum += out[c] * x[from + c];
                    }
                    grad_kernel[tap] = sum;
                }
            }
        }
    }
}

#undef NAMED
#undef NAMED_
