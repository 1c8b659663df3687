/* AdamW, sums of squares, and the mean-squared error: flat vectors in fixed blocks. */
#include "kernels/kernels.h"
#include "ops/basic.h"

#define BLOCK 16384 /* reals of a task; sums are added block by block in order */

xl_status xl_adamw_step(xl_ctx *ctx, ptrdiff_t n, real *p, const real *g, real *m, real *v,
                        double lr, double beta1, double beta2, double eps, double decay,
                        ptrdiff_t step, double gscale) {
    if (step < 1) return xl_fail(ctx, XL_VALUE, "step is %td, the first is 1", step);
    real c1 = (real)(1 - pow(beta1, (double)step)), c2 = (real)(1 - pow(beta2, (double)step));
#pragma omp parallel for num_threads(ctx->threads) schedule(dynamic)
    for (ptrdiff_t i = 0; i < n; i += BLOCK)
        ctx->k->adamw(xl_min(BLOCK, n - i), p + i, g + i, m + i, v + i, (real)lr, (real)beta1,
                      (real)beta2, (real)eps, (real)decay, c1, c2, (real)gscale);
    return XL_OK;
}

ptrdiff_t xl_sums_scratch(ptrdiff_t n) {
    return 2 * (xl_ceil_div(n, BLOCK) + 1) * (ptrdiff_t)sizeof(double);
}

xl_status xl_sumsq(xl_ctx *ctx, ptrdiff_t n, double *sum, const real *x, void *scratch) {
    double *part = scratch;
    ptrdiff_t blocks = xl_ceil_div(n, BLOCK);
#pragma omp parallel for num_threads(ctx->threads) schedule(dynamic)
    for (ptrdiff_t i = 0; i < blocks; i++)
        part[i] = ctx->k->sumsq(xl_min(BLOCK, n - i * BLOCK), x + i * BLOCK);
    *sum = 0;
    for (ptrdiff_t i = 0; i < blocks; i++) *sum += part[i];
    return XL_OK;
}

xl_status xl_mse_forward(xl_ctx *ctx, ptrdiff_t n, double *sums, const real *h, const real *target,
                         void *scratch) {
    double *part = scratch;
    ptrdiff_t blocks = xl_ceil_div(n, BLOCK);
#pragma omp parallel for num_threads(ctx->threads) schedule(dynamic)
    for (ptrdiff_t i = 0; i < blocks; i++) {
        ptrdiff_t start = i * BLOCK, end = xl_min(n, start + BLOCK);
        double s[4] = {0};
        for (ptrdiff_t j = start; j < end; j++) {
            double e = (double)h[j] - (double)target[j];
            s[j & 3] += e * e;
        }
        part[2 * i] = (s[0] + s[1]) + (s[2] + s[3]);
        part[2 * i + 1] = ctx->k->sumsq(end - start, target + start);
    }
    sums[0] = sums[1] = 0;
    for (ptrdiff_t i = 0; i < blocks; i++) {
        sums[0] += part[2 * i];
        sums[1] += part[2 * i + 1];
    }
    return XL_OK;
}

xl_status xl_mse_backward(xl_ctx *ctx, ptrdiff_t n, real *dh, const real *h, const real *target,
                          real scale) {
#pragma omp parallel for num_threads(ctx->threads)
    for (ptrdiff_t i = 0; i < n; i++) dh[i] += 2 * scale * (h[i] - target[i]);
    return XL_OK;
}
