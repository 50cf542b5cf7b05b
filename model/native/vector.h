/* Vectors of VL floats, in the vector extension that GCC and clang share: one source for every instruction set.
 *
 * The build chooses VL: 16 for AVX-512, 8 for AVX2, 4 for anything else (SSE2, NEON). Where more than VL changes with
 * the instruction set, it is the register tile below. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define GROUP 16 /* channels that share an involution kernel; maps are stored in multiples of it */

/* What a map is made of. In the int8 build these are codes: bytes from 0 after a ReLU, signed ones for the kernels of
 * an involution and for what a shortcut convolution adds. */
#if defined(INT8) && VL == 16
typedef uint8_t element;
#elif defined(INT8)
typedef uint16_t element;
#else
typedef float element;
#endif

typedef float vec __attribute__((vector_size(VL * sizeof(float))));
typedef int32_t mask __attribute__((vector_size(VL * sizeof(float))));
typedef float vec_anywhere __attribute__((vector_size(VL * sizeof(float)), aligned(sizeof(float)), may_alias));

#define ALWAYS_INLINE static inline __attribute__((always_inline))
#define UNROLL \
    _Pragma("GCC unroll 64") /* loops over a register tile: they must disappear for it to stay in registers */

/* The register tile of the matrix product: ROWS pixels by VECTORS vectors of output channels. Their product is the
 * number of accumulators; what is left of 32 or 16 registers holds a row of weights and one broadcast value. */
#define ROWS 6
#if VL == 16 || defined(__aarch64__)
#define VECTORS 4
#else
#define VECTORS 2
#endif

ALWAYS_INLINE vec load(const float *from) { return *(const vec_anywhere *)from; }
ALWAYS_INLINE void store(float *to, vec value) { *(vec_anywhere *)to = value; }

/* value in every lane. Subtracting zero is exact for every float, so the compiler makes it a plain broadcast; adding
 * zero would not be (-0 + 0 = +0), and would stay as an addition in the innermost loop. */
ALWAYS_INLINE vec broadcast(float value) { return value - (vec){0}; }

/* max(v, 0), and NaN stays NaN: a broken network must not look healthy. */
ALWAYS_INLINE vec relu(vec v) { return (vec)((mask)v & ~(mask)(v < (vec){0})); }

/* NaN if a is. */
ALWAYS_INLINE vec larger(vec a, vec b) {
    mask first = (mask)(a > b) | (mask)(a != a);
    return (vec)(((mask)a & first) | ((mask)b & ~first));
}
