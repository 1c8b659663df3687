/* Products with int8 matrices: rows are rotated and rounded to bytes by all threads, then blocks of C
 * are dealt out. Sums are exact, so that no order matters. */
#include "kernels/kernels.h"
#include "ops/matmul.h"

#define BLOCK_M 256        /* rows of a task */
#define BLOCK_BYTES 524288 /* of weights of a task, at most: they stay in the second cache */
#define TASKS 8            /* of a thread, about */
#define PADDED_M 32        /* products on tiles read whole ones */

ptrdiff_t xl_matmul_int8_scratch(ptrdiff_t M, ptrdiff_t K) {
    ptrdiff_t bytes;
    if (__builtin_mul_overflow(xl_round_up(M, PADDED_M), xl_int8_row(xl_int8_depth(K)), &bytes))
        return -1;
    return bytes;
}

void xl_matmul_int8(xl_ctx *ctx, ptrdiff_t M, ptrdiff_t N, ptrdiff_t K, real alpha, const real *a,
                    ptrdiff_t rsa, xl_mat b, real beta, real *c, ptrdiff_t ldc, void *scratch) {
    const xl_kernels *k = ctx->k;
    const ptrdiff_t depth = xl_int8_depth(K), row = xl_int8_row(depth);
    int8_t *rounded = scratch;
    ptrdiff_t block_n =
        xl_min(xl_ceil_div(N, TASKS * ctx->threads), BLOCK_BYTES / xl_max(1, depth));
    block_n = xl_round_up(xl_max(1, block_n), XL_PANEL);
#pragma omp parallel num_threads(ctx->threads) if (M * N * K > XL_ALONE)
    {
#pragma omp for schedule(static)
        for (ptrdiff_t i = 0; i < M; i++) k->round_int8(K, a + i * rsa, rounded + i * row);
#pragma omp for schedule(dynamic) collapse(2)
        for (ptrdiff_t i = 0; i < M; i += BLOCK_M)
            for (ptrdiff_t j = 0; j < N; j += block_n)
                k->gemm_int8(xl_min(BLOCK_M, M - i), xl_min(block_n, N - j), depth, alpha,
                             rounded + i * row, (const int8_t *)b.data + j * depth, b.scale + j,
                             beta, c + i * ldc + j, ldc);
    }
}
