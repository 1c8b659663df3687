/* One transformer block: x + mixer(norm(x)), then + MLP(norm); or, with norms behind,
 * x + norm(mixer(x)), then + norm(MLP). */
#ifndef XL_BLOCK_H
#define XL_BLOCK_H

#include "model/mixer.h"

typedef struct {
    xl_mixer_tape mixer;
    const real *xn_attn;   /* [N, d] what q, k, v and gates are made of: norm(x), or x itself */
    real *side_attn;       /* [N, d] what a norm before attention gives, one behind it gets */
    real *rstd_attn;       /* [N] */
    real *q_raw, *k_raw;   /* [N, H*D] [N, G*D] before qk_norm */
    real *rstd_q, *rstd_k; /* [N] */
    real *mid;             /* [N, d] residual stream after the mixer */
    const real *xn_mlp;    /* [N, d] what the MLP reads: norm(mid), or mid itself */
    real *side_mlp, *rstd_mlp;
    real *gate, *up, *act; /* [N, F] */
} xl_block_tape;

void xl_block_tape_plan(xl_plan *plan, const xl_config *c, const xl_mixer *m, ptrdiff_t N,
                        xl_block_tape *t);
/* bytes */
ptrdiff_t xl_block_scratch(const xl_ctx *ctx, const xl_config *c, const xl_batch *b, int training);

/* The parts of a block, in order; stage I takes them one by one. */
xl_status xl_block_project(xl_ctx *ctx, const xl_config *c, const xl_layer *w, const xl_batch *b,
                           xl_block_tape *t, const real *x, void *scratch); /* norm, q, k, v */
/* y = x + h w_o^T, then + MLP; y may be x, or NULL where the tape alone is wanted */
xl_status xl_block_finish(xl_ctx *ctx, const xl_config *c, const xl_layer *w, const xl_batch *b,
                          xl_block_tape *t, real *y, const real *x, const real *h, void *scratch);

xl_status xl_block_forward(xl_ctx *ctx, const xl_config *c, ptrdiff_t layer, const xl_layer *w,
                           const xl_batch *b, xl_block_tape *t, real *y, const real *x,
                           const xl_layer_state *first, const xl_layer_state *last, void *scratch);
/* dx [N, d]: gradient on y in, on x out (in place). x: the block's input. The tape is used up. */
xl_status xl_block_backward(xl_ctx *ctx, const xl_config *c, ptrdiff_t layer, const xl_layer *w,
                            const xl_layer *g, const xl_batch *b, xl_block_tape *t, real *dx,
                            const real *x, const xl_layer_state *first, void *scratch);

#endif
