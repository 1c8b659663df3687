/* The one numeric type of the core.
 *
 * The same sources build two modules: `_core_f32` (real = float), which does the work, and
 * `_core_f64` (real = double, -DXL_REAL_F64), whose only purpose is sharp gradient checks:
 * the noise floor of a finite difference is about 1e5 times lower in double. */
#ifndef XL_REAL_H
#define XL_REAL_H

#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>

#ifdef XL_REAL_F64
typedef double real;
#define XL_REAL_MAX DBL_MAX
#define XL_REAL_MIN DBL_MIN
#else
typedef float real;
#define XL_REAL_MAX FLT_MAX
#define XL_REAL_MIN FLT_MIN
#endif

/* Storage type of weights for inference; a struct, so that it is never mistaken for an integer. */
typedef struct {
    uint16_t bits;
} xl_bf16;

static inline float xl_bf16_widen(xl_bf16 x) {
    union {
        uint32_t u;
        float f;
    } w = {.u = (uint32_t)x.bits << 16};
    return w.f;
}

/* To nearest, ties to even; a NaN stays one. */
static inline xl_bf16 xl_bf16_round(float x) {
    union {
        float f;
        uint32_t u;
    } w = {.f = x};
    if (x != x) return (xl_bf16){0x7fc0};
    return (xl_bf16){(uint16_t)((w.u + 0x7fff + (w.u >> 16 & 1)) >> 16)};
}

static inline ptrdiff_t xl_min(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }
static inline ptrdiff_t xl_max(ptrdiff_t a, ptrdiff_t b) { return a > b ? a : b; }
static inline ptrdiff_t xl_ceil_div(ptrdiff_t a, ptrdiff_t b) { return (a + b - 1) / b; }
static inline ptrdiff_t xl_round_up(ptrdiff_t a, ptrdiff_t b) { return xl_ceil_div(a, b) * b; }

#endif
