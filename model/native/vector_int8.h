/* Codes of 8 bits, their products, and what becomes of sums: the part of the int8 builds that knows instructions.
 *
 * A vector of `products` holds VL sums of 32 bits, each of TOGETHER neighbouring inputs times as many weights. Values
 * become codes by rounding to the nearest, half to even, and to the nearest end of the range beyond it. */
#pragma once

#include <immintrin.h>
#include <string.h>

#include "vector.h"

#if VL == 16
#define TOGETHER 4
#include "vector_int8_avx512.h"
#else
#define TOGETHER 2
#include "vector_int8_avx2.h"
#endif
