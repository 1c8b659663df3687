/* Kernels: one thread, one instruction set, no failure, no memory of their own.
 *
 * `body.inc.h` holds every body once, in GCC/Clang vector extensions; `mixed.inc.h` and `int8.inc.h`
 * hold the products of bf16 operands and of bytes, which need intrinsics. generic.c, avx2.c, avx512.c,
 * avx512bf16.c and amx.c instantiate them under a target pragma; select.c picks a table at run time. All arrays have unit
 * stride unless strides are given; x and y may be the same array where a comment says "in place". */
#ifndef XL_KERNELS_H
#define XL_KERNELS_H

#include "base/plan.h"
#include "base/real.h"

/* gemm: rows of B packed per pass (KC) and columns (NC). A panel of KC x NC stays in L2. */
#define XL_GEMM_KC 256
#define XL_GEMM_NC 512
#define XL_GEMM_MR_MAX 16
#define XL_GEMM_APACK (XL_GEMM_KC * XL_GEMM_MR_MAX)
/* the same for operands rounded to bf16, of large and of small products: each slice is padded to a
 * multiple of XL_PAIR_K. A large slice costs less than reading and writing C once more. */
#define XL_MIXED_KC 1152
#define XL_ROUNDED_KC 384
#define XL_PAIR_K XL_PANEL
#define XL_DOTS 4 /* rows of w that `dots` takes at once */
/* reals of scratch that `gemm` needs */
#define XL_GEMM_PACK (XL_GEMM_KC * XL_GEMM_NC + XL_GEMM_APACK + 64)

/* C[m,n] = beta*C + alpha * sum_k A(m,k) B(k,n), A(m,k) = a[m*rsa + k*csa], B(k,n) = b[k*rsb + n*csb],
 * C row-major with row stride ldc; beta = 0 does not read C. The sum over k runs upwards in one order
 * that depends on k alone: an element of C does not depend on m, n or on the other rows. pack:
 * XL_GEMM_PACK reals. */
typedef void (*xl_gemm)(ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, real alpha, const real *a,
                        ptrdiff_t rsa, ptrdiff_t csa, const real *b, ptrdiff_t rsb, ptrdiff_t csb,
                        real beta, real *c, ptrdiff_t ldc, real *pack);

typedef struct xl_kernels {
    const char *name; /* "generic", "avx2", "avx512", "avx512bf16", "amx" */
    int mr, nr;       /* register tile of the matrix product */

    xl_gemm gemm;

    /* The two halves of gemm, for ops that share a packed B between threads.
     * pack_b: B(k,n) for k < kc, n < n into panels of nr columns: out[panel][k][nr], zero padded.
     * gemm_packed: C = beta*C + alpha * A * packed, one slice kc <= XL_GEMM_KC of the sum;
     * apack: XL_GEMM_APACK reals. */
    void (*pack_b)(ptrdiff_t kc, ptrdiff_t n, const real *b, ptrdiff_t rsb, ptrdiff_t csb,
                   real *out);
    /* of n rows of a matrix in panels (base/plan.h), each `depth` long: B(k,n) = W(n,k) */
    void (*pack_b_panels)(ptrdiff_t kc, ptrdiff_t n, const xl_bf16 *panels, ptrdiff_t depth,
                          real *out);
    void (*gemm_packed)(ptrdiff_t m, ptrdiff_t n, ptrdiff_t kc, real alpha, const real *a,
                        ptrdiff_t rsa, ptrdiff_t csa, const real *packed, real beta, real *c,
                        ptrdiff_t ldc, real *apack);

    /* The same with both operands packed and rounded to bf16 (to nearest, ties to even), sums in
     * float; 0 where the processor has no instructions for it, and in double. One of rsa, csa and
     * one of rsb, csb is 1. Packed: A in tiles of mixed_mr rows, B in panels of nr columns, each of
     * xl_round_up(kc, XL_PAIR_K) entries a row or column, zero padded. */
    int mixed_mr;
    void (*pack_a_mixed)(ptrdiff_t kc, ptrdiff_t m, const real *a, ptrdiff_t rsa, ptrdiff_t csa,
                         xl_bf16 *out);
    void (*pack_b_mixed)(ptrdiff_t kc, ptrdiff_t n, const real *b, ptrdiff_t rsb, ptrdiff_t csb,
                         xl_bf16 *out);
    /* depth: entries from a packed column of b to the next, the padded kc or more: a matrix in panels
     * is B packed in one slice */
    void (*gemm_mixed)(ptrdiff_t m, ptrdiff_t n, ptrdiff_t kc, real alpha, const xl_bf16 *a,
                       const xl_bf16 *b, ptrdiff_t depth, real beta, real *c, ptrdiff_t ldc);
    xl_gemm gemm_rounded; /* the whole product of operands rounded to bf16 */
    double (*peak_mixed)(ptrdiff_t rounds, real *sink); /* as xl_peak_rounds */

    /* y[r * XL_DOTS + c] = x_r . w_c for r < rows, c < count <= XL_DOTS, x_r = x + r*ldx, w_c = w +
     * c*ldw. A product does not depend on rows and count. */
    void (*dots)(ptrdiff_t n, ptrdiff_t rows, const real *x, ptrdiff_t ldx, ptrdiff_t count,
                 const real *w, ptrdiff_t ldw, real *y);
    /* y[r * XL_PANEL + c] = x_r . w_c for the rows w_c of a panel. A product does not depend on rows. */
    void (*dots_panel)(ptrdiff_t n, ptrdiff_t rows, const real *x, ptrdiff_t ldx,
                       const xl_bf16 *panel, real *y);
    /* dots_panel of rows that round_mixed made, of which those up to a multiple of 16 may be read; 0 where
     * gemm_mixed is */
    void (*dots_panel_mixed)(ptrdiff_t n, ptrdiff_t rows, const xl_bf16 *x, ptrdiff_t ldx,
                             const xl_bf16 *panel, real *y);
    /* to nearest, ties to even; y padded with zeros to a multiple of XL_PAIR_K */
    void (*round_mixed)(ptrdiff_t n, const real *x, xl_bf16 *y);

    /* A row of n entries rotated and rounded to bytes up to 127, xl_int8_row of its depth of them with
     * its tail; the scale of a row that is not finite is NaN. */
    void (*round_int8)(ptrdiff_t n, const real *x, int8_t *out);
    /* C[m,n] = beta*C + alpha * X W^T of rows that round_int8 made, behind one another, and of the
     * first n rows of an int8 matrix in panels, `scale` theirs. Sums are exact. Up to 31 rows behind
     * the last one are read. */
    void (*gemm_int8)(ptrdiff_t m, ptrdiff_t n, ptrdiff_t depth, real alpha, const int8_t *x,
                      const int8_t *panels, const real *scale, real beta, real *c, ptrdiff_t ldc);
    double (*peak_int8)(ptrdiff_t rounds, real *sink); /* as xl_peak_rounds */
    /* x [n], n a multiple of XL_ROTATION, each XL_ROTATION entries by the Hadamard matrix over its
     * root; twice is the identity, but for rounding. */
    void (*rotate)(ptrdiff_t n, real *x);

    real (*dot)(ptrdiff_t n, const real *x, const real *y);
    real (*sum)(ptrdiff_t n, const real *x);
    real (*max)(ptrdiff_t n, const real *x); /* -INFINITY for n = 0; NaN if any x is NaN */
    double (*sumsq)(ptrdiff_t n, const real *x);
    void (*axpy)(ptrdiff_t n, real a, const real *x, real *y); /* y += a x */
    /* y += sum of a[r] x_r for r < rows, x_r = x + r*ldx, upwards in r */
    void (*axpys)(ptrdiff_t n, ptrdiff_t rows, const real *a, const real *x, ptrdiff_t ldx,
                  real *y);
    void (*scale)(ptrdiff_t n, real a, real *x);                         /* x *= a */
    void (*add)(ptrdiff_t n, const real *x, real *y);                    /* y += x */
    void (*mul_add)(ptrdiff_t n, const real *x, const real *y, real *z); /* z += x*y elementwise */

    /* y = exp(x - shift), returns the sum of y; in place allowed; x = -INFINITY gives 0. Relative
     * error of each exp <= 2 ulp; 0 below -86.5 (float) and -707 (double). */
    real (*exp_sum)(ptrdiff_t n, const real *x, real shift, real *y);
    void (*exp)(ptrdiff_t n, const real *x, real *y);        /* in place allowed */
    void (*elu_above)(ptrdiff_t n, real above, real *x);     /* x = elu(x) + 1 + above */
    void (*sigmoid)(ptrdiff_t n, const real *x, real *y);    /* in place allowed */
    void (*logsigmoid)(ptrdiff_t n, const real *x, real *y); /* in place allowed */

    /* Rows of a chunk of the mLSTM, of which the first `seen` entries of n count. decay = exp(c - top),
     * 0 where top = -INFINITY; p *= decay; both 0 behind `seen`; returns the sum of p. */
    real (*decay_row)(ptrdiff_t n, ptrdiff_t seen, const double *c, double top, real *decay,
                      real *p);
    real (*masked_dot)(ptrdiff_t n, ptrdiff_t seen, const real *x, real *row); /* row: 0 behind */
    void (*add_mul)(ptrdiff_t n, real a, const real *x, real *y);              /* y = (y + a) x */
    void (*scale_to)(ptrdiff_t n, real a, const real *x, real *y);             /* y = a x */
    /* y = a x + b z; in place allowed */
    void (*combine)(ptrdiff_t n, real a, const real *x, real b, const real *z, real *y);
    /* c [D, E] = forget c + input k v^T, n [D] likewise with v = 1, out [E] = scale q c; returns
     * scale q.n: one pass over the state. */
    real (*mlstm_step)(ptrdiff_t D, ptrdiff_t E, real forget, real input, const real *k,
                       const real *v, real scale, const real *q, real *c, real *n, real *out);

    /* y = x * rstd * w, rstd = 1/sqrt(mean x^2 + eps) */
    real (*rmsnorm)(ptrdiff_t n, const real *x, const real *w, real eps, real *y);
    /* y = silu(g) * u */
    void (*swiglu)(ptrdiff_t n, const real *g, const real *u, real *y);
    /* dg, du written (not added); dg may be g, du may be u */
    void (*swiglu_backward)(ptrdiff_t n, const real *dy, const real *g, const real *u, real *dg,
                            real *du);
    /* decoupled weight decay, bias correction c1 = 1 - beta1^t, c2 = 1 - beta2^t */
    void (*adamw)(ptrdiff_t n, real *p, const real *g, real *m, real *v, real lr, real beta1,
                  real beta2, real eps, real decay, real c1, real c2, real gscale);
} xl_kernels;

/* The product of an op: mixed: of operands rounded to bf16, where the processor gains by it. */
static inline xl_gemm xl_gemm_of(const xl_kernels *k, int mixed) {
    return mixed && k->gemm_rounded ? k->gemm_rounded : k->gemm;
}

extern const xl_kernels xl_kernels_generic;
#ifdef __x86_64__
extern const xl_kernels xl_kernels_avx2;
extern const xl_kernels xl_kernels_avx512;
extern const xl_kernels xl_kernels_avx512bf16;
extern const xl_kernels xl_kernels_amx;
#endif

/* The table called `name`, or NULL if unknown or not supported by this processor;
 * name NULL: the best one. */
const xl_kernels *xl_select_kernels(const char *name);

#endif
