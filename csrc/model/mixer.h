/* The student's mixer (paper.md 1) and the teacher's attention: q, k, v in, head outputs out. */
#ifndef XL_MIXER_H
#define XL_MIXER_H

#include "model/params.h"

/* One batch: B rows of T steps, N = B*T. */
typedef struct {
    ptrdiff_t B, T;
    const int32_t *ids;     /* [B, T] */
    const int32_t *pos;     /* [B, T] position in the document */
    const uint8_t *reset;   /* [B, T] or NULL: a document starts here */
    const int32_t *lengths; /* [B] or NULL: valid steps of each row */
    const int32_t *past; /* [B] tokens of the current document already in the state, with a state */
    ptrdiff_t span;      /* positions that full attention can see: T, or the state's capacity */
    double gate;         /* in [0, 1]: forces every output gate; < 0: the model's own */
    ptrdiff_t chunk;     /* of the chunkwise mLSTM */
    int recompute; /* training holds each block's input alone and makes its activations again */
    real *rope;    /* [ropes, N, D] tables of this batch */
} xl_batch;

/* Everything that a layer's mixer leaves for its backward; [N, heads*D] unless said. */
typedef struct {
    real *q, *k, *v;     /* after RoPE; H, G, G heads */
    real *phi_q, *phi_k; /* H heads */
    real *i, *f, *o;     /* [N, H] pre-activations */
    real *hm, *hs;       /* outputs of the two branches */
    real *lse;           /* [B, H, T] */
    real *h;             /* mixed */
    xl_lolcats_tape lolcats;
} xl_mixer_tape;

void xl_mixer_tape_plan(xl_plan *plan, const xl_config *c, const xl_mixer *m, ptrdiff_t N,
                        xl_mixer_tape *t);
/* bytes of scratch for forward and backward */
ptrdiff_t xl_mixer_scratch(const xl_ctx *ctx, const xl_config *c, const xl_batch *b, int training);

/* q, k, v (projections, before RoPE) of the tape -> h; xn [N, d] feeds the gates. first (or NULL): the
 * state that the rows go on from. last (or NULL, as without first): gets the state behind them, except
 * its position; where it is first itself, a step of decoding or a prefill, no backward can follow. */
xl_status xl_mixer_forward(xl_ctx *ctx, const xl_config *c, const xl_mixer *m, const xl_layer *w,
                           const xl_batch *b, xl_mixer_tape *t, const real *xn,
                           const xl_layer_state *first, const xl_layer_state *last, void *scratch);
/* dh -> dq, dk, dv (before RoPE) and dxn, added, each NULL if not wanted (then all are); gradients
 * of the mixer's own parameters into g. first is the forward's; no gradient flows into it. The tape's
 * q and k are turned back by RoPE (dead after). */
xl_status xl_mixer_backward(xl_ctx *ctx, const xl_config *c, const xl_mixer *m, const xl_layer *w,
                            const xl_layer *g, const xl_batch *b, xl_mixer_tape *t, real *dq,
                            real *dk, real *dv, real *dxn, const real *dh, const real *xn,
                            const xl_layer_state *first, void *scratch);

#endif
