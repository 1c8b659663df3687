/* Products whose operands are packed once and used several times, inside one thread: the products of
 * the sequence ops. mixed: operands are rounded to bf16 where the kernels have products of those. */
#ifndef XL_PRODUCT_H
#define XL_PRODUCT_H

#include "base/plan.h"
#include "base/status.h"
#include "kernels/kernels.h"

/* A(i, k) = p[i*rs + k*cs], one of rs and cs is 1; `pack` holds its rounded form, or is scratch. */
typedef struct {
    const real *p;
    ptrdiff_t rs, cs;
    real *pack;
} xl_left;

/* Room in a plan for a packed A of up to m rows and k columns, or B of up to k rows and n columns. */
real *xl_take_left(xl_plan *p, const xl_ctx *ctx, ptrdiff_t m, ptrdiff_t k);
real *xl_take_right(xl_plan *p, const xl_ctx *ctx, ptrdiff_t k, ptrdiff_t n);

xl_left xl_pack_left(const xl_ctx *ctx, int mixed, ptrdiff_t m, ptrdiff_t k, const real *a,
                     ptrdiff_t rsa, ptrdiff_t csa, real *pack);
/* B(k, n) = b[k*rsb + n*csb] into panels, slice by slice of k; one of rsb and csb is 1. */
void xl_pack_right(const xl_ctx *ctx, int mixed, ptrdiff_t k, ptrdiff_t n, const real *b,
                   ptrdiff_t rsb, ptrdiff_t csb, real *pack);
/* C[m, n] = beta C + alpha A B of operands packed with these sizes and `mixed`; beta = 0 does not
 * read C. */
void xl_packed_product(const xl_ctx *ctx, int mixed, ptrdiff_t m, ptrdiff_t n, ptrdiff_t k,
                       real alpha, xl_left a, const real *b, real beta, real *c, ptrdiff_t ldc);

#endif
