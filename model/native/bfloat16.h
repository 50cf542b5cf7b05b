/* bfloat16: the upper half of a float32. */
#pragma once

#include <stdint.h>
#include <string.h>

typedef uint16_t bfloat16;

static inline void widen(const bfloat16 *restrict from, float *restrict to, int count) {
    for (int i = 0; i < count; i++) {
        uint32_t bits = (uint32_t)from[i] << 16;
        memcpy(to + i, &bits, sizeof bits);
    }
}

/* Rounds to nearest, ties to even; NaN stays NaN. */
static inline void narrow(const float *restrict from, bfloat16 *restrict to, int count) {
    for (int i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, from + i, sizeof bits);
        uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);
        to[i] = (bfloat16)((from[i] == from[i] ? rounded : bits | 0x400000) >> 16);
    }
}
