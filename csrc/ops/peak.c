#include "ops/peak.h"

#include "kernels/peak.h"

xl_status xl_peak(xl_ctx *ctx, int mixed, ptrdiff_t rounds, double *flops) {
    double one = 0;
#pragma omp parallel for num_threads(ctx->threads) schedule(static, 1)
    for (int i = 0; i < ctx->threads; i++) {
        real sink;
        double done = xl_peak_rounds(ctx->k, mixed, rounds, &sink);
        if (i == 0) one = done;
    }
    *flops = one * ctx->threads; /* all threads do the same */
    return XL_OK;
}
