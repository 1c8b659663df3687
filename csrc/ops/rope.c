#include "ops/basic.h"

xl_status xl_rope_table(xl_ctx *ctx, ptrdiff_t N, ptrdiff_t D, real *table, const int32_t *pos,
                        const double *inv_freq) {
    if (D < 2 || D % 2)
        return xl_fail(ctx, XL_VALUE, "head width is %td, RoPE needs an even one", D);
#pragma omp parallel for num_threads(ctx->threads) if (N >= XL_FEW_ROWS)
    for (ptrdiff_t n = 0; n < N; n++)
        for (ptrdiff_t j = 0; j < D / 2; j++) {
            double angle = (double)pos[n] * inv_freq[j];
            table[n * D + j] = (real)cos(angle);
            table[n * D + D / 2 + j] = (real)sin(angle);
        }
    return XL_OK;
}

xl_status xl_rope(xl_ctx *ctx, ptrdiff_t B, ptrdiff_t H, ptrdiff_t T, ptrdiff_t D, xl_heads x,
                  const real *table, real scale, int inverse) {
    ptrdiff_t half = D / 2;
    real sine_scale = inverse ? -scale : scale;
#pragma omp parallel for num_threads(ctx->threads) collapse(2) if (B * T >= XL_FEW_ROWS)
    for (ptrdiff_t b = 0; b < B; b++)
        for (ptrdiff_t t = 0; t < T; t++) {
            const real *c = table + (b * T + t) * D, *s = c + half;
            for (ptrdiff_t h = 0; h < H; h++) {
                real *lo = xl_at(x, b, h, t), *hi = lo + half;
                for (ptrdiff_t j = 0; j < half; j++) {
                    real u = lo[j], v = hi[j], cosine = scale * c[j], sine = sine_scale * s[j];
                    lo[j] = u * cosine - v * sine;
                    hi[j] = v * cosine + u * sine;
                }
            }
        }
    return XL_OK;
}
