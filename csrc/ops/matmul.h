/* Between matmul.c, which chooses, and the products of its other files; everyone else includes basic.h. */
#ifndef XL_MATMUL_H
#define XL_MATMUL_H

#include "ops/basic.h"

#define XL_ALONE (1 << 14) /* multiplications that cost less than waking a thread */

/* xl_matmul with operands rounded to bf16; the kernels must have gemm_mixed. */
void xl_matmul_mixed(xl_ctx *ctx, ptrdiff_t M, ptrdiff_t N, ptrdiff_t K, real alpha, const real *a,
                     ptrdiff_t rsa, ptrdiff_t csa, xl_mat b, ptrdiff_t rsb, ptrdiff_t csb,
                     real beta, real *c, ptrdiff_t ldc, void *scratch);
/* 0 where the kernels have none; -1 on overflow */
ptrdiff_t xl_matmul_mixed_scratch(const xl_ctx *ctx, ptrdiff_t M, ptrdiff_t N, ptrdiff_t K);

/* xl_matmul with an int8 matrix W, B(k, n) = W(n, k); rows of a are rsa apart. */
void xl_matmul_int8(xl_ctx *ctx, ptrdiff_t M, ptrdiff_t N, ptrdiff_t K, real alpha, const real *a,
                    ptrdiff_t rsa, xl_mat b, real beta, real *c, ptrdiff_t ldc, void *scratch);
ptrdiff_t xl_matmul_int8_scratch(ptrdiff_t M, ptrdiff_t K); /* -1 on overflow */

#endif
