#include "kernels/kernels.h"
#include "ops/basic.h"

xl_status xl_swiglu_forward(xl_ctx *ctx, ptrdiff_t N, ptrdiff_t F, real *y, const real *gate,
                            const real *up) {
#pragma omp parallel for num_threads(ctx->threads) if (N >= XL_FEW_ROWS)
    for (ptrdiff_t n = 0; n < N; n++) ctx->k->swiglu(F, gate + n * F, up + n * F, y + n * F);
    return XL_OK;
}

xl_status xl_swiglu_backward(xl_ctx *ctx, ptrdiff_t N, ptrdiff_t F, real *dgate, real *dup,
                             const real *dy, const real *gate, const real *up) {
#pragma omp parallel for num_threads(ctx->threads)
    for (ptrdiff_t n = 0; n < N; n++)
        ctx->k->swiglu_backward(F, dy + n * F, gate + n * F, up + n * F, dgate + n * F,
                                dup + n * F);
    return XL_OK;
}
