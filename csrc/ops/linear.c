#include "kernels/kernels.h"
#include "ops/basic.h"

#define BIAS_BLOCK 64 /* columns of a task */

ptrdiff_t xl_linear_scratch(const xl_ctx *ctx, ptrdiff_t N, ptrdiff_t K, ptrdiff_t M) {
    ptrdiff_t forward = xl_matmul_scratch(ctx, N, M, K), dx = xl_matmul_scratch(ctx, N, K, M),
              dw = xl_matmul_scratch(ctx, M, K, N);
    return forward < 0 || dx < 0 || dw < 0 ? -1 : xl_max(forward, xl_max(dx, dw));
}

xl_status xl_linear_forward(xl_ctx *ctx, ptrdiff_t N, ptrdiff_t K, ptrdiff_t M, real *y,
                            const real *x, xl_mat w, const real *bias, void *scratch) {
    if (bias) {
#pragma omp parallel for num_threads(ctx->threads) if (N >= XL_FEW_ROWS)
        for (ptrdiff_t n = 0; n < N; n++)
            for (ptrdiff_t m = 0; m < M; m++) y[n * M + m] = bias[m];
    }
    return xl_matmul(ctx, N, M, K, 1, x, K, 1, w, 1, K, bias ? 1 : 0, y, M, scratch);
}

xl_status xl_linear_backward(xl_ctx *ctx, ptrdiff_t N, ptrdiff_t K, ptrdiff_t M, real *dx, real *dw,
                             real *dbias, const real *dy, const real *x, xl_mat w, void *scratch) {
    if (dx) XL_TRY(xl_matmul(ctx, N, K, M, 1, dy, M, 1, w, K, 1, 1, dx, K, scratch));
    xl_mat input = {x, XL_DT_REAL, w.mixed, NULL};
    if (dw) XL_TRY(xl_matmul(ctx, M, K, N, 1, dy, 1, M, input, K, 1, 1, dw, K, scratch));
    if (dbias) {
#pragma omp parallel for num_threads(ctx->threads) schedule(dynamic)
        for (ptrdiff_t m0 = 0; m0 < M; m0 += BIAS_BLOCK)
            for (ptrdiff_t n = 0; n < N; n++)
                ctx->k->add(xl_min(BIAS_BLOCK, M - m0), dy + n * M + m0, dbias + m0);
    }
    return XL_OK;
}
