#include "ops/product.h"

static int rounds(const xl_ctx *ctx, int mixed) { return mixed && ctx->k->gemm_mixed; }

real *xl_take_left(xl_plan *p, const xl_ctx *ctx, ptrdiff_t m, ptrdiff_t k) {
    ptrdiff_t rows = xl_round_up(xl_max(1, m), xl_max(1, ctx->k->mixed_mr));
    ptrdiff_t least = 2 * xl_ceil_div(XL_GEMM_APACK, rows); /* scratch of float32 products */
    return xl_take(p, "", XL_ROLE_WORK, XL_DT_REAL, 2,
                   XL_SHAPE(rows, xl_max(xl_round_up(k, XL_PAIR_K), least) / 2));
}

real *xl_take_right(xl_plan *p, const xl_ctx *ctx, ptrdiff_t k, ptrdiff_t n) {
    return xl_take(p, "", XL_ROLE_WORK, XL_DT_REAL, 2,
                   XL_SHAPE(xl_round_up(k, XL_PAIR_K), xl_round_up(n, ctx->k->nr)));
}

xl_left xl_pack_left(const xl_ctx *ctx, int mixed, ptrdiff_t m, ptrdiff_t k, const real *a,
                     ptrdiff_t rsa, ptrdiff_t csa, real *pack) {
    if (rounds(ctx, mixed)) {
        ptrdiff_t rows = xl_round_up(m, ctx->k->mixed_mr);
        for (ptrdiff_t k0 = 0; k0 < k; k0 += XL_ROUNDED_KC)
            ctx->k->pack_a_mixed(xl_min(XL_ROUNDED_KC, k - k0), m, a + k0 * csa, rsa, csa,
                                 (xl_bf16 *)pack + k0 * rows);
    }
    return (xl_left){a, rsa, csa, pack};
}

void xl_pack_right(const xl_ctx *ctx, int mixed, ptrdiff_t k, ptrdiff_t n, const real *b,
                   ptrdiff_t rsb, ptrdiff_t csb, real *pack) {
    const xl_kernels *kn = ctx->k;
    ptrdiff_t columns = xl_round_up(n, kn->nr);
    if (rounds(ctx, mixed)) {
        for (ptrdiff_t k0 = 0; k0 < k; k0 += XL_ROUNDED_KC)
            kn->pack_b_mixed(xl_min(XL_ROUNDED_KC, k - k0), n, b + k0 * rsb, rsb, csb,
                             (xl_bf16 *)pack + k0 * columns);
        return;
    }
    for (ptrdiff_t k0 = 0; k0 < k; k0 += XL_GEMM_KC)
        kn->pack_b(xl_min(XL_GEMM_KC, k - k0), n, b + k0 * rsb, rsb, csb, pack + k0 * columns);
}

void xl_packed_product(const xl_ctx *ctx, int mixed, ptrdiff_t m, ptrdiff_t n, ptrdiff_t k,
                       real alpha, xl_left a, const real *b, real beta, real *c, ptrdiff_t ldc) {
    const xl_kernels *kn = ctx->k;
    ptrdiff_t columns = xl_round_up(n, kn->nr);
    if (rounds(ctx, mixed)) {
        ptrdiff_t rows = xl_round_up(m, kn->mixed_mr);
        for (ptrdiff_t k0 = 0; k0 == 0 || k0 < k; k0 += XL_ROUNDED_KC) {
            ptrdiff_t kc = xl_min(XL_ROUNDED_KC, k - k0);
            kn->gemm_mixed(m, n, kc, alpha, (const xl_bf16 *)a.pack + k0 * rows,
                           (const xl_bf16 *)b + k0 * columns, xl_round_up(kc, XL_PAIR_K),
                           k0 ? (real)1 : beta, c, ldc);
        }
        return;
    }
    for (ptrdiff_t k0 = 0; k0 == 0 || k0 < k; k0 += XL_GEMM_KC)
        kn->gemm_packed(m, n, xl_min(XL_GEMM_KC, k - k0), alpha, a.p + k0 * a.cs, a.rs, a.cs,
                        b + k0 * columns, k0 ? (real)1 : beta, c, ldc, a.pack);
}
