/* The ops on rows: matrix product, linear, embedding, RMSNorm, RoPE, SwiGLU, losses, AdamW, merge.
 *
 * Forward writes, backward ADDS into gradients, NULL gradients are not wanted. Matrices are
 * row-major and contiguous. N rows; `scratch` is sized by the *_scratch function of the op (bytes).
 * Results are bitwise independent of ctx->threads. */
#ifndef XL_BASIC_H
#define XL_BASIC_H

#include "base/plan.h"
#include "base/real.h"
#include "base/status.h"
#include "ops/cells.h"

/* A weight matrix [rows, cols], as `real` and row-major, or for inference alone in panels of bf16 or of
 * signed bytes (base/plan.h). */
typedef struct {
    const void *data;
    xl_dtype dtype;    /* XL_DT_REAL, XL_DT_PANELS or XL_DT_I8 */
    int mixed;         /* its products, gradients too, may round both operands to bf16 where the
                        * processor has instructions for that; sums stay `real`. Of int8: nothing,
                        * the other operand is always rotated and rounded to bytes */
    const real *scale; /* of each row of an int8 matrix, else NULL */
} xl_mat;

static inline xl_mat xl_real_mat(const real *p) { return (xl_mat){p, XL_DT_REAL, 0, NULL}; }

/* The matrix [rows, cols] that a plan has placed at `data` (NULL: not wanted). */
static inline xl_mat xl_stored_mat(void *data, xl_dtype dtype, int mixed, ptrdiff_t rows,
                                   ptrdiff_t cols) {
    int scaled = data && dtype == XL_DT_I8;
    const real *scale = scaled ? (const real *)((char *)data + xl_scales_at(rows, cols)) : NULL;
    return (xl_mat){data, dtype, mixed, scale};
}

/* ---- panels.c ----------------------------------------------------------------------------- */

#define XL_INT8_COLS 131072 /* 127 * 127 * this is below 2^31 */

/* A matrix w [rows, cols] into panels at `to`: XL_DT_PANELS (rounded to nearest, ties to even), or
 * XL_DT_I8, where the largest entry of a rotated row becomes 127. scratch: xl_pack_scratch bytes. */
xl_status xl_pack_weights(xl_ctx *ctx, xl_dtype dtype, ptrdiff_t rows, ptrdiff_t cols, void *to,
                          const real *w, void *scratch);
ptrdiff_t xl_pack_scratch(const xl_ctx *ctx, ptrdiff_t cols);
xl_status xl_unpack_weights(xl_ctx *ctx, ptrdiff_t rows, ptrdiff_t cols, real *w, xl_mat from);
/* Row `row` of a matrix of `cols` columns as reals. */
void xl_mat_row(const xl_ctx *ctx, xl_mat w, ptrdiff_t row, ptrdiff_t cols, real *out);

/* ---- matmul.c ----------------------------------------------------------------------------- */

/* C[M,N] = beta*C + alpha * sum_k A(m,k) B(k,n) with A(m,k) = a[m*rsa + k*csa] and
 * B(k,n) = b[k*rsb + n*csb]; ldc is C's row stride. Each sum runs upwards in k. */
xl_status xl_matmul(xl_ctx *ctx, ptrdiff_t M, ptrdiff_t N, ptrdiff_t K, real alpha, const real *a,
                    ptrdiff_t rsa, ptrdiff_t csa, xl_mat b, ptrdiff_t rsb, ptrdiff_t csb, real beta,
                    real *c, ptrdiff_t ldc, void *scratch);
ptrdiff_t xl_matmul_scratch(const xl_ctx *ctx, ptrdiff_t M, ptrdiff_t N, ptrdiff_t K);

/* ---- linear.c ----------------------------------------------------------------------------- */

/* y[N,M] = x[N,K] w[M,K]^T + bias[M] (bias may be NULL) */
xl_status xl_linear_forward(xl_ctx *ctx, ptrdiff_t N, ptrdiff_t K, ptrdiff_t M, real *y,
                            const real *x, xl_mat w, const real *bias, void *scratch);
/* dx[N,K] += dy w;  dw[M,K] += dy^T x;  dbias[M] += column sums of dy */
xl_status xl_linear_backward(xl_ctx *ctx, ptrdiff_t N, ptrdiff_t K, ptrdiff_t M, real *dx, real *dw,
                             real *dbias, const real *dy, const real *x, xl_mat w, void *scratch);
ptrdiff_t xl_linear_scratch(const xl_ctx *ctx, ptrdiff_t N, ptrdiff_t K, ptrdiff_t M);

/* ---- embedding.c -------------------------------------------------------------------------- */

/* y[n] = w[ids[n]]; an id outside 0..V-1 is refused before anything is written */
xl_status xl_embedding_forward(xl_ctx *ctx, ptrdiff_t N, ptrdiff_t V, ptrdiff_t d, real *y,
                               const int32_t *ids, xl_mat w);
xl_status xl_embedding_backward(xl_ctx *ctx, ptrdiff_t N, ptrdiff_t V, ptrdiff_t d, real *dw,
                                const real *dy, const int32_t *ids);

/* ---- rmsnorm.c ---------------------------------------------------------------------------- */

/* y = x rstd w, rstd[n] = 1/sqrt(mean x_n^2 + eps) */
xl_status xl_rmsnorm_forward(xl_ctx *ctx, ptrdiff_t N, ptrdiff_t d, real *y, real *rstd,
                             const real *x, const real *w, real eps);
xl_status xl_rmsnorm_backward(xl_ctx *ctx, ptrdiff_t N, ptrdiff_t d, real *dx, real *dw,
                              const real *dy, const real *x, const real *w, const real *rstd);

/* ---- rope.c ------------------------------------------------------------------------------- */

/* table[n] = cos(pos_n inv_freq_j), j < D/2, then the sines: [N, D] */
xl_status xl_rope_table(xl_ctx *ctx, ptrdiff_t N, ptrdiff_t D, real *table, const int32_t *pos,
                        const double *inv_freq);
/* Rotates (x_j, x_{j+D/2}) in place, by the negative angle if inverse, and multiplies them by scale.
 * The backward of a rotation is its inverse with the same scale. table: [B, T, D]. */
xl_status xl_rope(xl_ctx *ctx, ptrdiff_t B, ptrdiff_t H, ptrdiff_t T, ptrdiff_t D, xl_heads x,
                  const real *table, real scale, int inverse);

/* ---- swiglu.c ----------------------------------------------------------------------------- */

/* y = silu(gate) up, [N, F] */
xl_status xl_swiglu_forward(xl_ctx *ctx, ptrdiff_t N, ptrdiff_t F, real *y, const real *gate,
                            const real *up);
/* The exception to "adds": dgate and dup are WRITTEN and may be gate and up themselves, whose
 * values are dead after this point; it saves two buffers of the largest size in the model. */
xl_status xl_swiglu_backward(xl_ctx *ctx, ptrdiff_t N, ptrdiff_t F, real *dgate, real *dup,
                             const real *dy, const real *gate, const real *up);

/* ---- losses.c ----------------------------------------------------------------------------- */

typedef enum { XL_KL_RENORMALISED = 0, XL_KL_TAIL = 1, XL_KL_SAMPLED = 2 } xl_kl_form;

typedef struct {
    ptrdiff_t N, d, V, k; /* k = 0: no targets */
    double ce_weight, kl_weight, scale;
    xl_kl_form form;
} xl_head;

/* Head and stage II loss in one (paper.md (13), numerics.md): logits = x w^T are made for a block
 * of rows at a time and never held at once. labels[n] is the next token or -1 (the row counts
 * nothing). target_ids, target_logp [N, k]: the teacher's targets; entries of log-probability
 * -INFINITY are padding. sums[3] receives CE, KL (sums over counted rows) and the count; row_ce
 * (NULL or [N]) the cross-entropy of each row, 0 where not counted. dx and dw get the gradient of
 * scale * (ce_weight CE + kl_weight KL). */
xl_status xl_head_loss(xl_ctx *ctx, const xl_head *a, double *sums, real *row_ce, real *dx,
                       real *dw, const real *x, xl_mat w, const int32_t *labels,
                       const int32_t *target_ids, const real *target_logp, void *scratch);
/* The k most probable tokens of each row, best first, ties to the lower id: ids, logp (of the full
 * softmax) [N, k] and their summed probability mass [N]. */
xl_status xl_head_topk(xl_ctx *ctx, const xl_head *a, int32_t *ids, real *logp, real *mass,
                       const real *x, xl_mat w, void *scratch);
/* k draws from each row's softmax, by the inverse of its distribution function at uniform [N, k] in
 * [0, 1), which rise within a row: the tokens that were drawn by rising id, and how often each was,
 * [N, k]; behind them id 0 with count 0. XL_FLOATING names a row whose largest logit is not
 * finite. */
xl_status xl_head_draws(xl_ctx *ctx, const xl_head *a, int32_t *ids, int32_t *counts, const real *x,
                        xl_mat w, const double *uniform, void *scratch);
/* Per row, over the whole vocabulary, for one or more students of one teacher: kl = KL(teacher ||
 * student), agree = 1 where both have the same most probable token, nll of the labels, [students,
 * N], and the teacher's nll [N] (nll 0 where the label is -1). The teacher's logits are made once.
 * x[m], w[m]: hidden states [N, d] and head of student m. */
xl_status xl_head_divergence(xl_ctx *ctx, const xl_head *a, ptrdiff_t students, real *kl,
                             real *agree, real *nll, real *teacher_nll, const real *const *x,
                             const xl_mat *w, const real *teacher_x, xl_mat teacher_w,
                             const int32_t *labels, void *scratch);
ptrdiff_t xl_head_scratch(const xl_ctx *ctx, const xl_head *a);

/* sums[2] = sum (h - target)^2, sum target^2, over n reals. scratch: xl_sums_scratch(n). */
xl_status xl_mse_forward(xl_ctx *ctx, ptrdiff_t n, double *sums, const real *h, const real *target,
                         void *scratch);
/* dh += 2 scale (h - target) */
xl_status xl_mse_backward(xl_ctx *ctx, ptrdiff_t n, real *dh, const real *h, const real *target,
                          real scale);

/* ---- sample.c ----------------------------------------------------------------------------- */

/* One token a row of logits [N, V]: ids [N]. temperature 0: the most probable one, the first of
 * equals. Else the first token at which the distribution function of softmax(logits / temperature)
 * exceeds uniform[n]; top_p < 1 leaves the fewest most probable tokens whose mass reaches top_p, of
 * equals (as float) the first. XL_FLOATING names a row whose largest logit is not finite. */
xl_status xl_sample(xl_ctx *ctx, ptrdiff_t N, ptrdiff_t V, int32_t *ids, const real *logits,
                    double temperature, double top_p, const double *uniform, void *scratch);
ptrdiff_t xl_sample_scratch(const xl_ctx *ctx, ptrdiff_t V);

/* ---- adamw.c ------------------------------------------------------------------------------ */

/* One step of AdamW (decoupled decay, bias correction) on n parameters, in place; the gradient is
 * multiplied by gscale first (clipping). step counts from 1. */
xl_status xl_adamw_step(xl_ctx *ctx, ptrdiff_t n, real *p, const real *g, real *m, real *v,
                        double lr, double beta1, double beta2, double eps, double decay,
                        ptrdiff_t step, double gscale);
/* sum of squares in double, added in fixed blocks */
xl_status xl_sumsq(xl_ctx *ctx, ptrdiff_t n, double *sum, const real *x, void *scratch);
ptrdiff_t xl_sums_scratch(ptrdiff_t n);

/* ---- flat.c ------------------------------------------------------------------------------- */

xl_status xl_zero(xl_ctx *ctx, ptrdiff_t n, real *x);
xl_status xl_copy(xl_ctx *ctx, ptrdiff_t n, real *to, const real *from);
/* to [N, G, D] += from [N, H, D], each group's heads in order */
xl_status xl_add_heads(xl_ctx *ctx, ptrdiff_t N, ptrdiff_t H, ptrdiff_t G, ptrdiff_t D, real *to,
                       const real *from);

/* ---- merge.c ------------------------------------------------------------------------------ */

/* out [n] = sum of weights[m] x[m] for m < count, added in double in this order and rounded once. out
 * may be one of x. */
xl_status xl_merge(xl_ctx *ctx, ptrdiff_t n, real *out, ptrdiff_t count, const real *const *x,
                   const double *weights);

#endif
