/* Vectors of the int8 builds: loading, multiplying and storing quantised values in each instruction set.
 *
 * An `ivec` has VL lanes of 32 bits. As an accumulator each lane is one sum; as an operand each lane holds KR
 * neighbouring inputs or weights, which one instruction multiplies and adds (KR as in XNNPACK). Quantising rounds to
 * nearest, ties to even, and saturates. */
#pragma once

#include <immintrin.h>
#include <string.h>

#include "vector.h"

#if VL == 16
#define KR 4
#include "vector_int8_avx512.h"
#else
#define KR 2
#include "vector_int8_avx2.h"
#endif
