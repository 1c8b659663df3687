/* Buffers of activations: cleared, copied and added by all threads, like the products between which
 * that happens: they are as large. */
#include "kernels/kernels.h"
#include "ops/basic.h"

#include <string.h>

#define PIECE 16384 /* reals of a task: a decoding step's buffers are one, and wake no thread */

xl_status xl_zero(xl_ctx *ctx, ptrdiff_t n, real *x) {
#pragma omp parallel for num_threads(ctx->threads) if (n > PIECE)
    for (ptrdiff_t i = 0; i < n; i += PIECE)
        memset(x + i, 0, (size_t)xl_min(PIECE, n - i) * sizeof(real));
    return XL_OK;
}

xl_status xl_copy(xl_ctx *ctx, ptrdiff_t n, real *to, const real *from) {
    if (to == from) return XL_OK;
#pragma omp parallel for num_threads(ctx->threads) if (n > PIECE)
    for (ptrdiff_t i = 0; i < n; i += PIECE)
        memcpy(to + i, from + i, (size_t)xl_min(PIECE, n - i) * sizeof(real));
    return XL_OK;
}

xl_status xl_add_heads(xl_ctx *ctx, ptrdiff_t N, ptrdiff_t H, ptrdiff_t G, ptrdiff_t D, real *to,
                       const real *from) {
    ptrdiff_t rep = H / G;
#pragma omp parallel for num_threads(ctx->threads)
    for (ptrdiff_t n = 0; n < N; n++)
        for (ptrdiff_t h = 0; h < H; h++)
            ctx->k->add(D, from + (n * H + h) * D, to + (n * G + h / rep) * D);
    return XL_OK;
}
