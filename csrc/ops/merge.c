#include "ops/basic.h"

xl_status xl_merge_add(xl_ctx *ctx, ptrdiff_t n, double *out, const real *x, double weight) {
#pragma omp parallel for num_threads(ctx->threads)
    for (ptrdiff_t i = 0; i < n; i++) out[i] += weight * (double)x[i];
    return XL_OK;
}
