/* Matrix products over threads.
 *
 * B is packed once into panels, by all threads; then tiles of C are dealt out. An element of C is
 * the same sum in the same order whatever the number of threads or rows. Few rows (decoding) skip
 * the packing: there every weight is read once, by dot products. */
#include "kernels/kernels.h"
#include "ops/basic.h"

#include <omp.h>

#define ROWS_BY_DOTS 16 /* up to here packing B costs more than it saves */
#define BLOCK_M 256     /* rows of a task */
#define BLOCK_N 192     /* columns of a task; a multiple of every nr */

typedef struct {
    real *packed, *apack;
} workspace;

static ptrdiff_t plan(const xl_ctx *ctx, ptrdiff_t N, ptrdiff_t K, char *base, workspace *w) {
    xl_plan p = {.base = base, .size = PTRDIFF_MAX};
    ptrdiff_t columns = xl_round_up(N, BLOCK_N), size;
    if (__builtin_mul_overflow(columns, K, &size)) return -1;
    w->packed = xl_take_reals(&p, size);
    w->apack = xl_take_reals(&p, (ptrdiff_t)ctx->threads * XL_GEMM_KC * XL_GEMM_MR_MAX);
    return p.failed ? -1 : p.used;
}

ptrdiff_t xl_matmul_scratch(const xl_ctx *ctx, ptrdiff_t M, ptrdiff_t N, ptrdiff_t K) {
    (void)M;
    workspace w;
    return plan(ctx, N, K, NULL, &w);
}

static void by_dots(xl_ctx *ctx, ptrdiff_t M, ptrdiff_t N, ptrdiff_t K, real alpha, const real *a,
                    ptrdiff_t rsa, xl_mat b, ptrdiff_t csb, real beta, real *c, ptrdiff_t ldc) {
    const xl_kernels *k = ctx->k;
    ptrdiff_t block = xl_max(8, xl_min(64, N / 64));
#pragma omp parallel for num_threads(ctx->threads) schedule(dynamic)
    for (ptrdiff_t j0 = 0; j0 < N; j0 += block)
        for (ptrdiff_t j = j0; j < xl_min(N, j0 + block); j++) {
            real y[ROWS_BY_DOTS];
            if (b.dtype == XL_DT_BF16)
                k->dots_bf16(K, M, a, rsa, (const xl_bf16 *)b.data + j * csb, y);
            else
                k->dots(K, M, a, rsa, (const real *)b.data + j * csb, y);
            for (ptrdiff_t i = 0; i < M; i++) {
                real *p = c + i * ldc + j;
                *p = beta == 0 ? alpha * y[i] : alpha * y[i] + beta * *p;
            }
        }
}

xl_status xl_matmul(xl_ctx *ctx, ptrdiff_t M, ptrdiff_t N, ptrdiff_t K, real alpha, const real *a,
                    ptrdiff_t rsa, ptrdiff_t csa, xl_mat b, ptrdiff_t rsb, ptrdiff_t csb, real beta,
                    real *c, ptrdiff_t ldc, void *scratch) {
    if (M == 0 || N == 0) return XL_OK;
    if (M <= ROWS_BY_DOTS && csa == 1 && rsb == 1) {
        by_dots(ctx, M, N, K, alpha, a, rsa, b, csb, beta, c, ldc);
        return XL_OK;
    }
    const xl_kernels *k = ctx->k;
    workspace w;
    plan(ctx, N, K, scratch, &w);
    ptrdiff_t columns = xl_round_up(N, BLOCK_N), slices = xl_max(1, xl_ceil_div(K, XL_GEMM_KC));
    ptrdiff_t blocks_n = columns / BLOCK_N, blocks_m = xl_ceil_div(M, BLOCK_M);
#pragma omp parallel num_threads(ctx->threads)
    {
#pragma omp for schedule(dynamic) collapse(2)
        for (ptrdiff_t s = 0; s < slices; s++)
            for (ptrdiff_t j = 0; j < blocks_n; j++) {
                ptrdiff_t k0 = s * XL_GEMM_KC, kc = xl_min(XL_GEMM_KC, K - k0), j0 = j * BLOCK_N;
                ptrdiff_t n = xl_min(BLOCK_N, N - j0), at = k0 * rsb + j0 * csb;
                real *out = w.packed + k0 * columns + j0 * kc;
                if (b.dtype == XL_DT_BF16)
                    k->pack_b_bf16(kc, n, (const xl_bf16 *)b.data + at, rsb, csb, out);
                else
                    k->pack_b(kc, n, (const real *)b.data + at, rsb, csb, out);
            }
        real *apack = w.apack + (ptrdiff_t)omp_get_thread_num() * XL_GEMM_KC * XL_GEMM_MR_MAX;
#pragma omp for schedule(dynamic) collapse(2)
        for (ptrdiff_t j = 0; j < blocks_n; j++)
            for (ptrdiff_t i = 0; i < blocks_m; i++)
                for (ptrdiff_t s = 0; s < slices; s++) {
                    ptrdiff_t k0 = s * XL_GEMM_KC, kc = xl_min(XL_GEMM_KC, K - k0);
                    ptrdiff_t i0 = i * BLOCK_M, j0 = j * BLOCK_N;
                    k->gemm_packed(xl_min(BLOCK_M, M - i0), xl_min(BLOCK_N, N - j0), kc, alpha,
                                   a + i0 * rsa + k0 * csa, rsa, csa,
                                   w.packed + k0 * columns + j0 * kc, s ? (real)1 : beta,
                                   c + i0 * ldc + j0, ldc, apack);
                }
    }
    return XL_OK;
}
