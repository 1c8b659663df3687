#include "ops/basic.h"

#define BLOCK 2048 /* entries whose sums a thread holds: 16 KiB */

xl_status xl_merge(xl_ctx *ctx, ptrdiff_t n, real *out, ptrdiff_t count, const real *const *x,
                   const double *weights) {
#pragma omp parallel for num_threads(ctx->threads)
    for (ptrdiff_t start = 0; start < n; start += BLOCK) {
        double sum[BLOCK] = {0};
        ptrdiff_t size = xl_min(BLOCK, n - start);
        for (ptrdiff_t m = 0; m < count; m++)
            for (ptrdiff_t i = 0; i < size; i++) sum[i] += weights[m] * (double)x[m][start + i];
        for (ptrdiff_t i = 0; i < size; i++) out[start + i] = (real)sum[i];
    }
    return XL_OK;
}
