/* Matrix products over threads. Products of operands rounded to bf16 are in matmul_mixed.c, with int8
 * matrices in matmul_int8.c.
 *
 * B is packed into panels, then tiles of C are dealt out. With many columns, or few rows, a thread
 * packs a block of columns for itself and uses it up while it is in the cache; else all threads pack
 * B once and share it. An element of C is the same sum in the same order whatever the number of
 * threads or rows. Very few rows (decoding) skip the packing: every weight is read once, by dot
 * products. */
#include "kernels/kernels.h"
#include "ops/matmul.h"

#include <omp.h>

#define ROWS_BY_DOTS 16 /* up to here packing B costs more than it saves */
#define BLOCK_M 256     /* rows of a task */
#define BLOCK_N 192     /* columns of a task; a multiple of every nr */
#define NARROW_N 64     /* the same where there are few columns and few rows */

typedef struct {
    real *packed, *apack; /* packed: of all of B, or [threads] blocks */
} workspace;

/* Columns of a block that a thread packs for itself; 0: B is packed once, for all. */
static ptrdiff_t own_block(const xl_ctx *ctx, ptrdiff_t M, ptrdiff_t N) {
    if (N >= 4 * BLOCK_N * ctx->threads) return BLOCK_N;
    return M <= BLOCK_M ? NARROW_N : 0;
}

/* Enough for any number of rows: the last block of rows of a caller may be shorter. */
static ptrdiff_t plan(const xl_ctx *ctx, ptrdiff_t N, ptrdiff_t K, char *base, workspace *w) {
    xl_plan p = {.base = base, .size = PTRDIFF_MAX};
    ptrdiff_t own = own_block(ctx, 0, N), size = 0;
    if (own < BLOCK_N && __builtin_mul_overflow(xl_round_up(N, BLOCK_N), K, &size)) return -1;
    w->packed = xl_take_reals(&p, xl_max(size, (ptrdiff_t)ctx->threads * XL_GEMM_KC * own));
    w->apack = xl_take_reals(&p, (ptrdiff_t)ctx->threads * XL_GEMM_APACK);
    return p.failed ? -1 : p.used;
}

ptrdiff_t xl_matmul_scratch(const xl_ctx *ctx, ptrdiff_t M, ptrdiff_t N, ptrdiff_t K) {
    workspace w;
    ptrdiff_t size = plan(ctx, N, K, NULL, &w), mixed = xl_matmul_mixed_scratch(ctx, M, N, K);
    ptrdiff_t bytes = xl_matmul_int8_scratch(M, K);
    if (size < 0 || mixed < 0 || bytes < 0) return -1;
    ptrdiff_t rounded = ROWS_BY_DOTS * xl_round_up(K, XL_PAIR_K) * (ptrdiff_t)sizeof(xl_bf16);
    return xl_max(xl_max(size, mixed), xl_max(bytes, rounded));
}

/* B is row-major: rows of W are columns of B. */
static void by_dots(xl_ctx *ctx, ptrdiff_t M, ptrdiff_t N, ptrdiff_t K, real alpha, const real *a,
                    ptrdiff_t rsa, const real *b, ptrdiff_t csb, real beta, real *c,
                    ptrdiff_t ldc) {
    /* long pieces of memory: it is read fastest from one end to the other */
    ptrdiff_t block = xl_round_up(xl_max(1, N / (8 * ctx->threads)), XL_DOTS);
#pragma omp parallel for num_threads(ctx->threads) schedule(dynamic) if (M * N * K > XL_ALONE)
    for (ptrdiff_t j0 = 0; j0 < N; j0 += block)
        for (ptrdiff_t j = j0; j < xl_min(N, j0 + block); j += XL_DOTS) {
            real y[ROWS_BY_DOTS * XL_DOTS];
            ptrdiff_t n = xl_min(XL_DOTS, N - j);
            ctx->k->dots(K, M, a, rsa, n, b + j * csb, csb, y);
            for (ptrdiff_t i = 0; i < M; i++)
                for (ptrdiff_t l = 0; l < n; l++) {
                    real *p = c + i * ldc + j + l, value = alpha * y[i * XL_DOTS + l];
                    *p = beta == 0 ? value : value + beta * *p;
                }
        }
}

static void by_panels(xl_ctx *ctx, ptrdiff_t M, ptrdiff_t N, ptrdiff_t K, real alpha, const real *a,
                      ptrdiff_t rsa, xl_mat b, real beta, real *c, ptrdiff_t ldc,
                      xl_bf16 *rounded) {
    const xl_kernels *k = ctx->k;
    ptrdiff_t depth = xl_round_up(K, XL_PANEL);
    int pairs = b.mixed && k->dots_panel_mixed;
    for (ptrdiff_t i = 0; pairs && i < M; i++) k->round_mixed(K, a + i * rsa, rounded + i * depth);
    ptrdiff_t block = xl_round_up(xl_max(1, N / (8 * ctx->threads)), XL_PANEL);
#pragma omp parallel for num_threads(ctx->threads) schedule(dynamic) if (M * N * K > XL_ALONE)
    for (ptrdiff_t j0 = 0; j0 < N; j0 += block)
        for (ptrdiff_t j = j0; j < xl_min(N, j0 + block); j += XL_PANEL) {
            real y[ROWS_BY_DOTS * XL_PANEL];
            if (pairs)
                k->dots_panel_mixed(K, M, rounded, depth, (const xl_bf16 *)b.data + j * depth, y);
            else
                k->dots_panel(K, M, a, rsa, (const xl_bf16 *)b.data + j * depth, y);
            for (ptrdiff_t i = 0; i < M; i++)
                for (ptrdiff_t l = 0; l < xl_min(XL_PANEL, N - j); l++) {
                    real *p = c + i * ldc + j + l, value = alpha * y[i * XL_PANEL + l];
                    *p = beta == 0 ? value : value + beta * *p;
                }
        }
}

/* B(k, n) from k0 and j0 on; of a matrix in panels j0 is a multiple of XL_PANEL. */
static void pack(const xl_kernels *k, ptrdiff_t kc, ptrdiff_t n, ptrdiff_t K, xl_mat b,
                 ptrdiff_t k0, ptrdiff_t j0, ptrdiff_t rsb, ptrdiff_t csb, real *out) {
    ptrdiff_t depth = xl_round_up(K, XL_PANEL);
    if (b.dtype == XL_DT_PANELS)
        k->pack_b_panels(kc, n, (const xl_bf16 *)b.data + j0 * depth + k0 * XL_PANEL, depth, out);
    else
        k->pack_b(kc, n, (const real *)b.data + k0 * rsb + j0 * csb, rsb, csb, out);
}

static void by_own_panels(xl_ctx *ctx, ptrdiff_t M, ptrdiff_t N, ptrdiff_t K, real alpha,
                          const real *a, ptrdiff_t rsa, ptrdiff_t csa, xl_mat b, ptrdiff_t rsb,
                          ptrdiff_t csb, real beta, real *c, ptrdiff_t ldc, const workspace *w) {
    const xl_kernels *k = ctx->k;
    ptrdiff_t block = own_block(ctx, M, N);
#pragma omp parallel for num_threads(ctx->threads) schedule(dynamic)
    for (ptrdiff_t j0 = 0; j0 < N; j0 += block) {
        ptrdiff_t me = omp_get_thread_num(), n = xl_min(block, N - j0), k0 = 0;
        real *packed = w->packed + me * XL_GEMM_KC * block;
        real *apack = w->apack + me * XL_GEMM_APACK;
        do { /* once for K = 0 too: beta applies */
            ptrdiff_t kc = xl_min(XL_GEMM_KC, K - k0);
            pack(k, kc, n, K, b, k0, j0, rsb, csb, packed);
            k->gemm_packed(M, n, kc, alpha, a + k0 * csa, rsa, csa, packed, k0 ? (real)1 : beta,
                           c + j0, ldc, apack);
            k0 += kc;
        } while (k0 < K);
    }
}

static void by_shared_panels(xl_ctx *ctx, ptrdiff_t M, ptrdiff_t N, ptrdiff_t K, real alpha,
                             const real *a, ptrdiff_t rsa, ptrdiff_t csa, xl_mat b, ptrdiff_t rsb,
                             ptrdiff_t csb, real beta, real *c, ptrdiff_t ldc, const workspace *w) {
    const xl_kernels *k = ctx->k;
    ptrdiff_t columns = xl_round_up(N, BLOCK_N), slices = xl_max(1, xl_ceil_div(K, XL_GEMM_KC));
    ptrdiff_t blocks_n = columns / BLOCK_N, blocks_m = xl_ceil_div(M, BLOCK_M);
#pragma omp parallel num_threads(ctx->threads)
    {
#pragma omp for schedule(dynamic) collapse(2)
        for (ptrdiff_t s = 0; s < slices; s++)
            for (ptrdiff_t j = 0; j < blocks_n; j++) {
                ptrdiff_t k0 = s * XL_GEMM_KC, kc = xl_min(XL_GEMM_KC, K - k0), j0 = j * BLOCK_N;
                pack(k, kc, xl_min(BLOCK_N, N - j0), K, b, k0, j0, rsb, csb,
                     w->packed + k0 * columns + j0 * kc);
            }
        real *apack = w->apack + (ptrdiff_t)omp_get_thread_num() * XL_GEMM_APACK;
#pragma omp for schedule(dynamic) collapse(2)
        for (ptrdiff_t j = 0; j < blocks_n; j++)
            for (ptrdiff_t i = 0; i < blocks_m; i++)
                for (ptrdiff_t s = 0; s < slices; s++) {
                    ptrdiff_t k0 = s * XL_GEMM_KC, kc = xl_min(XL_GEMM_KC, K - k0);
                    ptrdiff_t i0 = i * BLOCK_M, j0 = j * BLOCK_N;
                    k->gemm_packed(xl_min(BLOCK_M, M - i0), xl_min(BLOCK_N, N - j0), kc, alpha,
                                   a + i0 * rsa + k0 * csa, rsa, csa,
                                   w->packed + k0 * columns + j0 * kc, s ? (real)1 : beta,
                                   c + i0 * ldc + j0, ldc, apack);
                }
    }
}

xl_status xl_matmul(xl_ctx *ctx, ptrdiff_t M, ptrdiff_t N, ptrdiff_t K, real alpha, const real *a,
                    ptrdiff_t rsa, ptrdiff_t csa, xl_mat b, ptrdiff_t rsb, ptrdiff_t csb, real beta,
                    real *c, ptrdiff_t ldc, void *scratch) {
    if (M == 0 || N == 0) return XL_OK;
    if (b.dtype == XL_DT_I8) {
        xl_matmul_int8(ctx, M, N, K, alpha, a, rsa, b, beta, c, ldc, scratch);
        return XL_OK;
    }
    if (M <= ROWS_BY_DOTS && csa == 1 && rsb == 1) {
        if (b.dtype == XL_DT_REAL)
            by_dots(ctx, M, N, K, alpha, a, rsa, b.data, csb, beta, c, ldc);
        else
            by_panels(ctx, M, N, K, alpha, a, rsa, b, beta, c, ldc, scratch);
        return XL_OK;
    }
    if (b.mixed && ctx->k->gemm_mixed) {
        xl_matmul_mixed(ctx, M, N, K, alpha, a, rsa, csa, b, rsb, csb, beta, c, ldc, scratch);
        return XL_OK;
    }
    workspace w;
    plan(ctx, N, K, scratch, &w);
    if (own_block(ctx, M, N))
        by_own_panels(ctx, M, N, K, alpha, a, rsa, csa, b, rsb, csb, beta, c, ldc, &w);
    else
        by_shared_panels(ctx, M, N, K, alpha, a, rsa, csa, b, rsb, csb, beta, c, ldc, &w);
    return XL_OK;
}
