/* Matrix products of operands rounded to bf16.
 *
 * Rounding costs as much as a good part of the product, so every entry is packed once: A by all
 * threads before the product, and B likewise, or, where B has so many columns that its packed form
 * would go to memory and back (the head), by the thread that uses a block of columns up. An element
 * of C is the same sum in the same order whatever the number of threads or rows. */
#include "kernels/kernels.h"
#include "ops/matmul.h"

#include <omp.h>

#define BLOCK_M 256 /* rows of a task, about */
#define BLOCK_N 384 /* columns of a task, */
#define NARROW_N 96 /* or half as many, and so on down to this, for more tasks to share out */
#define TASKS 4     /* of a thread, at least, where blocks are wider than that */

typedef struct {
    xl_bf16 *a, *b;                 /* packed; b: of all of B, or [threads] blocks */
    ptrdiff_t slice;                /* of k: a multiple of XL_PAIR_K */
    ptrdiff_t rows, columns, depth; /* padded */
    ptrdiff_t block_m, block_n;     /* of a task; block_n is a multiple of every nr */
    ptrdiff_t pack_m;               /* rows of A packed at once */
    int own;                        /* a thread packs its own block of columns */
} workspace;

static ptrdiff_t plan(const xl_ctx *ctx, ptrdiff_t M, ptrdiff_t N, ptrdiff_t K, char *base,
                      workspace *w) {
    xl_plan p = {.base = base, .size = PTRDIFF_MAX};
    ptrdiff_t slices = xl_max(1, xl_ceil_div(K, XL_MIXED_KC)), mr = ctx->k->mixed_mr;
    w->slice = xl_max(XL_PAIR_K, xl_round_up(xl_ceil_div(K, slices), XL_PAIR_K));
    w->depth = xl_round_up(xl_max(1, K), XL_PAIR_K);
    w->rows = xl_round_up(M, mr);
    w->block_m = xl_round_up(BLOCK_M, mr);
    w->pack_m = xl_round_up(xl_min(BLOCK_M, xl_ceil_div(M, ctx->threads)), mr);
    w->own = N >= 2 * BLOCK_N * ctx->threads;
    ptrdiff_t blocks_m = w->own ? 1 : xl_ceil_div(M, w->block_m);
    w->block_n = BLOCK_N;
    while (w->block_n > NARROW_N && blocks_m * xl_ceil_div(N, w->block_n) < TASKS * ctx->threads)
        w->block_n /= 2;
    w->columns = w->own ? BLOCK_N * ctx->threads : xl_round_up(N, BLOCK_N);
    /* not w->slice: it falls where K grows, and a caller's last block may be shorter */
    ptrdiff_t of_b = w->own ? XL_MIXED_KC : w->depth;
    w->a = xl_take(&p, "", XL_ROLE_WORK, XL_DT_BF16, 2, XL_SHAPE(w->rows, w->depth));
    w->b = xl_take(&p, "", XL_ROLE_WORK, XL_DT_BF16, 2, XL_SHAPE(w->columns, of_b));
    return p.failed ? -1 : p.used;
}

ptrdiff_t xl_matmul_mixed_scratch(const xl_ctx *ctx, ptrdiff_t M, ptrdiff_t N, ptrdiff_t K) {
    workspace w;
    return ctx->k->gemm_mixed ? plan(ctx, M, N, K, NULL, &w) : 0;
}

/* Slices lie one after the other: `lines` rows or columns, each as long as the slice is deep. */
static xl_bf16 *place(xl_bf16 *packed, ptrdiff_t lines, ptrdiff_t k0, ptrdiff_t kc,
                      ptrdiff_t line) {
    return packed + k0 * lines + line * xl_round_up(kc, XL_PAIR_K);
}

/* B(k, n) from k0 and j0 on: `packed`, or in place where B lies in panels of bf16; *depth: entries from
 * one column to the next. */
static const xl_bf16 *panels_of(xl_mat b, ptrdiff_t K, ptrdiff_t k0, ptrdiff_t kc, ptrdiff_t j0,
                                const xl_bf16 *packed, ptrdiff_t *depth) {
    *depth = xl_round_up(b.dtype == XL_DT_PANELS ? K : kc, XL_PAIR_K);
    return b.dtype == XL_DT_PANELS ? (const xl_bf16 *)b.data + j0 * *depth + k0 * XL_PANEL : packed;
}

static void pack_b(const xl_kernels *k, ptrdiff_t kc, ptrdiff_t n, xl_mat b, ptrdiff_t k0,
                   ptrdiff_t j0, ptrdiff_t rsb, ptrdiff_t csb, xl_bf16 *out) {
    if (b.dtype == XL_DT_REAL)
        k->pack_b_mixed(kc, n, (const real *)b.data + k0 * rsb + j0 * csb, rsb, csb, out);
}

void xl_matmul_mixed(xl_ctx *ctx, ptrdiff_t M, ptrdiff_t N, ptrdiff_t K, real alpha, const real *a,
                     ptrdiff_t rsa, ptrdiff_t csa, xl_mat b, ptrdiff_t rsb, ptrdiff_t csb,
                     real beta, real *c, ptrdiff_t ldc, void *scratch) {
    const xl_kernels *k = ctx->k;
    workspace w;
    plan(ctx, M, N, K, scratch, &w);
    ptrdiff_t packs_a = xl_ceil_div(M, w.pack_m);
    ptrdiff_t slices = xl_max(1, xl_ceil_div(K, w.slice));
    ptrdiff_t packs_b = w.own || b.dtype == XL_DT_PANELS ? 0 : xl_ceil_div(N, w.block_n);
#pragma omp parallel num_threads(ctx->threads)
    {
#pragma omp for schedule(dynamic) collapse(2)
        for (ptrdiff_t s = 0; s < slices; s++)
            for (ptrdiff_t block = 0; block < packs_a + packs_b; block++) {
                ptrdiff_t k0 = s * w.slice, kc = xl_min(w.slice, K - k0);
                if (block < packs_a) {
                    ptrdiff_t i = block * w.pack_m;
                    k->pack_a_mixed(kc, xl_min(w.pack_m, M - i), a + i * rsa + k0 * csa, rsa, csa,
                                    place(w.a, w.rows, k0, kc, i));
                } else {
                    ptrdiff_t j = (block - packs_a) * w.block_n;
                    pack_b(k, kc, xl_min(w.block_n, N - j), b, k0, j, rsb, csb,
                           place(w.b, w.columns, k0, kc, j));
                }
            }
        if (w.own) {
            xl_bf16 *panel = w.b + omp_get_thread_num() * BLOCK_N * XL_MIXED_KC;
#pragma omp for schedule(dynamic)
            for (ptrdiff_t j = 0; j < N; j += w.block_n)
                for (ptrdiff_t s = 0; s < slices; s++) {
                    ptrdiff_t k0 = s * w.slice, kc = xl_min(w.slice, K - k0);
                    ptrdiff_t n = xl_min(w.block_n, N - j), depth;
                    pack_b(k, kc, n, b, k0, j, rsb, csb, panel);
                    const xl_bf16 *of_b = panels_of(b, K, k0, kc, j, panel, &depth);
                    k->gemm_mixed(M, n, kc, alpha, place(w.a, w.rows, k0, kc, 0), of_b, depth,
                                  s ? (real)1 : beta, c + j, ldc);
                }
        } else {
#pragma omp for schedule(dynamic) collapse(2)
            for (ptrdiff_t i = 0; i < M; i += w.block_m)
                for (ptrdiff_t j = 0; j < N; j += w.block_n)
                    for (ptrdiff_t s = 0; s < slices; s++) {
                        ptrdiff_t k0 = s * w.slice, kc = xl_min(w.slice, K - k0), depth;
                        const xl_bf16 *of_b =
                            panels_of(b, K, k0, kc, j, place(w.b, w.columns, k0, kc, j), &depth);
                        k->gemm_mixed(xl_min(w.block_m, M - i), xl_min(w.block_n, N - j), kc, alpha,
                                      place(w.a, w.rows, k0, kc, i), of_b, depth,
                                      s ? (real)1 : beta, c + i * ldc + j, ldc);
                    }
        }
    }
}
