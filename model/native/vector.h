/* Vectors of VL floats in the vector extension of GCC and clang, so that one source serves every instruction set.
 *
 * The build sets VL: 16 for AVX-512, 8 for AVX2, 4 for anything else (SSE2, NEON). In float32, only the register tile
 * below depends on the instruction set in any other way. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define GROUP 16 /* channels that share an involution kernel, and the channel block of nChw16c */

/* The type of the values in a feature map. The int8 builds store 8-bit quantised values: unsigned after a ReLU, signed
 * for involution kernels and for the output of a downsample convolution. AVX2 keeps them in 16 bits for vpmaddwd. */
#if defined(INT8) && VL == 16
typedef uint8_t element;
#elif defined(INT8)
typedef uint16_t element;
#else
typedef float element;
#endif

typedef float vec __attribute__((vector_size(VL * sizeof(float))));
typedef int32_t mask __attribute__((vector_size(VL * sizeof(float))));
typedef float vec_unaligned __attribute__((vector_size(VL * sizeof(float)), aligned(sizeof(float)), may_alias));

#define ALWAYS_INLINE static inline __attribute__((always_inline))
/* For loops over a register tile, which stays in registers only if they are unrolled completely. */
#define UNROLL _Pragma("GCC unroll 64")

/* The register tile of the matrix product, in the terms of BLIS: MR pixels by NR = NR_VECTORS * VL output channels. It
 * takes MR * NR_VECTORS accumulators; the rest of the 32 or 16 registers holds a row of weights and one input. */
#define MR 6
#if VL == 16 || defined(__aarch64__)
#define NR_VECTORS 4
#else
#define NR_VECTORS 2
#endif
#define NR (NR_VECTORS * VL)

ALWAYS_INLINE vec load(const float *from) { return *(const vec_unaligned *)from; }
ALWAYS_INLINE void store(float *to, vec value) { *(vec_unaligned *)to = value; }

/* Copies value to every lane. Subtracting zero is exact for every float, so the compiler emits a plain broadcast.
 * Adding zero is not exact (-0 + 0 = +0) and would leave an addition in the innermost loop: in the prototype this made
 * 39 images/s of 53. */
ALWAYS_INLINE vec broadcast(float value) { return value - (vec){0}; }

/* max(v, 0), except that NaN stays NaN: a broken network must not look healthy. */
ALWAYS_INLINE vec relu(vec v) { return (vec)((mask)v & ~(mask)(v < (vec){0})); }

/* Maximum of each lane; NaN where a is NaN. */
ALWAYS_INLINE vec max_vec(vec a, vec b) {
    mask first = (mask)(a > b) | (mask)(a != a);
    return (vec)(((mask)a & first) | ((mask)b & ~first));
}
