#include "ops/peak.h"

#include "kernels/peak.h"

#define BLOCK 16384 /* reals of a sum */

xl_status xl_peak(xl_ctx *ctx, xl_dtype operands, ptrdiff_t rounds, double *flops) {
    double one = 0;
#pragma omp parallel for num_threads(ctx->threads) schedule(static, 1)
    for (int i = 0; i < ctx->threads; i++) {
        real sink;
        double done = xl_peak_rounds(ctx->k, operands, rounds, &sink);
        if (i == 0) one = done;
    }
    *flops = one * ctx->threads; /* all threads do the same */
    return XL_OK;
}

xl_status xl_stream(xl_ctx *ctx, ptrdiff_t n, const real *x, double *largest) {
    double most = -INFINITY;
#pragma omp parallel for num_threads(ctx->threads) schedule(static) reduction(max : most)
    for (ptrdiff_t i = 0; i < n; i += BLOCK) {
        double sum = (double)ctx->k->sum(xl_min(BLOCK, n - i), x + i);
        most = sum > most ? sum : most;
    }
    *largest = most;
    return XL_OK;
}
