#include "kernels/kernels.h"
#include "ops/basic.h"

#define COLUMN_BLOCK 64 /* columns of a task of the backward */

static xl_status check_ids(xl_ctx *ctx, ptrdiff_t N, ptrdiff_t V, const int32_t *ids) {
    for (ptrdiff_t n = 0; n < N; n++)
        if (ids[n] < 0 || ids[n] >= V)
            return xl_fail(ctx, XL_VALUE, "token id %d at index %td is outside 0..%td", (int)ids[n],
                           n, V - 1);
    return XL_OK;
}

xl_status xl_embedding_forward(xl_ctx *ctx, ptrdiff_t N, ptrdiff_t V, ptrdiff_t d, real *y,
                               const int32_t *ids, xl_mat w) {
    XL_TRY(check_ids(ctx, N, V, ids));
#pragma omp parallel for num_threads(ctx->threads) if (N >= XL_FEW_ROWS)
    for (ptrdiff_t n = 0; n < N; n++) xl_mat_row(ctx, w, ids[n], d, y + n * d);
    return XL_OK;
}

/* Tasks own columns, not rows: a token that occurs twice is added in the order of the rows. */
xl_status xl_embedding_backward(xl_ctx *ctx, ptrdiff_t N, ptrdiff_t V, ptrdiff_t d, real *dw,
                                const real *dy, const int32_t *ids) {
    XL_TRY(check_ids(ctx, N, V, ids));
#pragma omp parallel for num_threads(ctx->threads) schedule(dynamic)
    for (ptrdiff_t j = 0; j < d; j += COLUMN_BLOCK)
        for (ptrdiff_t n = 0; n < N; n++)
            ctx->k->add(xl_min(COLUMN_BLOCK, d - j), dy + n * d + j, dw + ids[n] * d + j);
    return XL_OK;
}
