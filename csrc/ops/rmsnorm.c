#include "kernels/kernels.h"
#include "ops/basic.h"

#define COLUMN_BLOCK 64 /* columns of a task of the weight gradient */

xl_status xl_rmsnorm_forward(xl_ctx *ctx, ptrdiff_t N, ptrdiff_t d, real *y, real *rstd,
                             const real *x, const real *w, real eps) {
#pragma omp parallel for num_threads(ctx->threads) if (N >= XL_FEW_ROWS)
    for (ptrdiff_t n = 0; n < N; n++) rstd[n] = ctx->k->rmsnorm(d, x + n * d, w, eps, y + n * d);
    return XL_OK;
}

/* y_j = x_j r w_j with r = (mean x^2 + eps)^(-1/2):
 * dx_j = r w_j dy_j - x_j r^3 / d * sum_i dy_i w_i x_i;   dw_j = sum_n dy_j x_j r */
xl_status xl_rmsnorm_backward(xl_ctx *ctx, ptrdiff_t N, ptrdiff_t d, real *dx, real *dw,
                              const real *dy, const real *x, const real *w, const real *rstd) {
    if (dx) {
#pragma omp parallel for num_threads(ctx->threads)
        for (ptrdiff_t n = 0; n < N; n++) {
            const real *g = dy + n * d, *v = x + n * d;
            real *out = dx + n * d, r = rstd[n], s[4] = {0};
            ptrdiff_t j = 0;
            for (; j + 4 <= d; j += 4)
                for (int l = 0; l < 4; l++) s[l] += g[j + l] * w[j + l] * v[j + l];
            real dot = (s[0] + s[1]) + (s[2] + s[3]);
            for (; j < d; j++) dot += g[j] * w[j] * v[j];
            real c = r * r * r * dot / (real)d;
            for (j = 0; j < d; j++) out[j] += r * w[j] * g[j] - c * v[j];
        }
    }
    if (dw) {
#pragma omp parallel for num_threads(ctx->threads) schedule(dynamic)
        for (ptrdiff_t j0 = 0; j0 < d; j0 += COLUMN_BLOCK)
            for (ptrdiff_t n = 0; n < N; n++)
                for (ptrdiff_t j = j0; j < xl_min(d, j0 + COLUMN_BLOCK); j++)
                    dw[j] += dy[n * d + j] * x[n * d + j] * rstd[n];
    }
    return XL_OK;
}
