/* The sequence ops: attention (window + sinks), feature map, mLSTM, sLSTM, output gate, LoLCATs.
 *
 * Head tensors are views with strides (in reals) over batch, head and time and unit last stride, so
 * that the model passes [B, T, H, D] and xd.ops [B, H, T, D] without a copy. `rep` = H / G repeats
 * key/value heads: query head h reads key/value head h / rep.
 *
 * Masks. pos[b*T + t] is the position of a token in its own document (0 where a document starts);
 * tokens t - pos .. t are one document. lengths (NULL: all T) gives the valid steps of each row:
 * steps behind are padding, outputs there are zeros and they touch no state.
 *
 * Forward writes its outputs. Backward ADDS into gradients; a NULL gradient is not wanted.
 * Results are bitwise independent of ctx->threads and of B and H. */
#ifndef XL_CELLS_H
#define XL_CELLS_H

#include "base/plan.h"
#include "base/real.h"
#include "base/status.h"

/* Rows from which an op on rows works on all threads: waking them costs more than fewer rows do. */
#define XL_FEW_ROWS 4

typedef struct {
    real *p;              /* NULL: absent */
    ptrdiff_t sb, sh, st; /* strides of batch, head, time */
} xl_heads;

static inline real *xl_at(xl_heads x, ptrdiff_t b, ptrdiff_t h, ptrdiff_t t) {
    return x.p + b * x.sb + h * x.sh + t * x.st;
}

/* ---- attention.c -------------------------------------------------------------------------- */

/* Keys and values of earlier tokens of each row's current document, for decoding and prefill.
 * k and v: [B, slots, G, D], contiguous; keys are stored after RoPE. Position p of the document
 * lies in slot p for p < sinks, else in slot sinks + (p - sinks) % (slots - sinks): a ring of the
 * last window. pos [B]: tokens already seen of the current document. window = slots - sinks. */
typedef struct {
    real *k, *v;
    ptrdiff_t slots;
    const int32_t *pos;
} xl_kv;

typedef struct {
    ptrdiff_t B, H, G, T, D;
    ptrdiff_t window;   /* >= 1; >= T (+ past) is full attention */
    ptrdiff_t sinks;    /* >= 0 */
    const int32_t *pos; /* [B, T]: counts up from 0, or from past->pos[b], or starts again at 0 */
    const int32_t *lengths; /* [B] or NULL */
    int mixed;              /* products of operands rounded to bf16; see xl_mat */
} xl_attn;

/* Of each row of scaled scores; [B, H, T], NULL: not wanted. */
typedef struct {
    real *lse;     /* logsumexp, for the backward */
    real *log_sum; /* the same less the largest score: log of the sum of exp(score - largest) */
    int32_t *peak; /* position in the document of the key with the largest score, for dlog_sum */
} xl_attn_sums;

/* o = softmax(q k^T / sqrt(D)) v over {s <= t, same document, t - s < window or pos_s < sinks}.
 * past (NULL or cache): tokens with pos[t] > t also see the cache of their row.
 * Cost is linear in T for a fixed window. paper.md 1.1. */
xl_status xl_attention_forward(xl_ctx *ctx, const xl_attn *a, xl_heads o, xl_attn_sums sums,
                               xl_heads q, xl_heads k, xl_heads v, const xl_kv *past,
                               void *scratch);
/* past, o, lse and, with dlog_sum ([B, H, T], NULL: none), peak are those of the forward; what past holds
 * gets no gradient. */
xl_status xl_attention_backward(xl_ctx *ctx, const xl_attn *a, xl_heads dq, xl_heads dk,
                                xl_heads dv, xl_heads dout, const real *dlog_sum, xl_heads q,
                                xl_heads k, xl_heads v, xl_heads o, xl_attn_sums sums,
                                const xl_kv *past, void *scratch);
/* Bytes of scratch for either call with ctx->threads threads. past_slots: those of the past where no
 * backward follows, else 0. */
ptrdiff_t xl_attention_scratch(const xl_ctx *ctx, const xl_attn *a, ptrdiff_t past_slots);
/* Writes the keys and values of this segment into the cache (only the last document of each row,
 * only what stays visible). Does not change pos; the caller then sets
 * pos[b] = a->pos[b, lengths[b]-1] + 1. */
xl_status xl_attention_append(xl_ctx *ctx, const xl_attn *a, xl_heads k, xl_heads v, xl_kv *past);
/* One decoding step, T = 1: appends k, v at position a->pos[b] (past->pos[b], or 0 where a document
 * starts) and attends over the cache; a row of length 0 gives zeros and leaves its cache alone.
 * log_sum [B, H] as in xl_attn_sums, or NULL. scratch: xl_attention_scratch with T = 1 and
 * past_slots = slots. */
xl_status xl_attention_step(xl_ctx *ctx, const xl_attn *a, xl_heads o, real *log_sum, xl_heads q,
                            xl_heads k, xl_heads v, xl_kv *past, void *scratch);

/* ---- feature_map.c ------------------------------------------------------------------------ */

/* phi of z: softmax: (softmax(z) + c/D) / (1 + c); elu, each entry by itself: elu(z) + 1 + c/D. c = 1e-6:
 * none is below c / (D (1 + c)) and phi(q).phi(k) is never 0. */
typedef enum { XL_MAP_SOFTMAX = 0, XL_MAP_ELU = 1 } xl_map_form;

/* phi of z = x_g w_h (z_j = sum_i x_i w[h,i,j]).
 * x: G heads, phi: H heads, w [H, D, D]. docs/math/feature_map.md. */
typedef struct {
    ptrdiff_t B, H, G, T, D;
    xl_map_form form;
    int mixed; /* products of operands rounded to bf16; see xl_mat */
} xl_fmap;
xl_status xl_feature_map_forward(xl_ctx *ctx, const xl_fmap *a, xl_heads phi, xl_heads x,
                                 const real *w, void *scratch);
/* dx (G heads, added over the rep query heads in order), dw [H, D, D]; phi of the forward. */
xl_status xl_feature_map_backward(xl_ctx *ctx, const xl_fmap *a, xl_heads dx, real *dw,
                                  xl_heads dphi, xl_heads phi, xl_heads x, const real *w,
                                  void *scratch);
ptrdiff_t xl_feature_map_scratch(const xl_ctx *ctx, const xl_fmap *a);
/* Rows z = x w, st reals apart, become features. */
void xl_features(const xl_ctx *ctx, xl_map_form form, ptrdiff_t rows, ptrdiff_t D, real *z,
                 ptrdiff_t st);

/* ---- mlstm.c ------------------------------------------------------------------------------ */

typedef enum { XL_RATIO = 0, XL_MAX = 1 } xl_normalizer;
typedef enum { XL_CHUNKWISE = 0, XL_PARALLEL = 1, XL_RECURRENT = 2 } xl_form;

typedef struct {
    ptrdiff_t B, H, T, D, E;
    ptrdiff_t v_rep; /* v has H / v_rep heads (gradient dv always has H heads) */
    real scale;      /* multiplies q */
    xl_normalizer normalizer;
    xl_form form;           /* of the forward; the backward is chunkwise */
    ptrdiff_t chunk;        /* >= 1 */
    const uint8_t *reset;   /* [B, T] or NULL: a document starts here, the state is forgotten */
    const int32_t *lengths; /* [B] or NULL */
    int mixed; /* products of operands rounded to bf16 (see xl_mat); the recurrent form has none */
} xl_mlstm;

/* State: C [B, H, D, E], n [B, H, D], m [B, H], contiguous; C and n are scaled by exp(-m).
 * All NULL: no state, m = -inf exactly like a reset. */
typedef struct {
    real *c, *n, *m;
} xl_mlstm_state;

/* Feature maps in front of the chunkwise or parallel form: q (H heads) and k (G heads) are then what the
 * maps w_q, w_k [H, D, D] make features of, a chunk at a time; the bits are those of the two ops. Features
 * are kept in phi_q, phi_k (H heads) where their p is not NULL. */
typedef struct {
    ptrdiff_t G;
    xl_map_form form;
    const real *w_q, *w_k;
    xl_heads phi_q, phi_k;
} xl_mlstm_maps;

/* i, f: gate pre-activations, read through strides: i at i.p + b*sb + h*sh + t*st. f = -inf at a step
 * forgets the state as a reset does. h = num / den as in numerics.md, eps-free; 0 / 0 gives 0.
 * `last` may be the same memory as `first`; last all NULL: not wanted. maps NULL: q, k are features.
 * log_den (p NULL: not wanted; one real a step): log of den in true units, -inf where nothing is written. */
xl_status xl_mlstm_forward(xl_ctx *ctx, const xl_mlstm *a, const xl_mlstm_maps *maps, xl_heads h,
                           xl_heads log_den, xl_mlstm_state last, xl_heads q, xl_heads k,
                           xl_heads v, xl_heads i, xl_heads f, xl_mlstm_state first, void *scratch);
/* dlast: gradient on the last state at fixed m (c, n; m is not read), or all NULL. dfirst: likewise on
 * the start state (c, n added; m set to 0), all NULL where not wanted. dlog_den (p NULL: none): gradient
 * on log_den, under XL_RATIO. The states of the chunks are computed again and kept in scratch. Always
 * chunkwise, whatever a->form. */
xl_status xl_mlstm_backward(xl_ctx *ctx, const xl_mlstm *a, xl_heads dq, xl_heads dk, xl_heads dv,
                            xl_heads di, xl_heads df, xl_mlstm_state dfirst, xl_heads dh,
                            xl_heads dlog_den, xl_heads q, xl_heads k, xl_heads v, xl_heads i,
                            xl_heads f, xl_mlstm_state first, xl_mlstm_state dlast, void *scratch);
ptrdiff_t xl_mlstm_scratch(const xl_ctx *ctx, const xl_mlstm *a);

/* ---- slstm.c ------------------------------------------------------------------------------ */

/* x: pre-activations W x + b, [B, H, T, 4, D] contiguous, gates in the order i, f, z, o;
 * r [H, 4, D(in), D(out)]: raw_t[g] = x_t[g] + y_{t-1} r[h, g]. State y, c, n, m: each [B, H, D];
 * all NULL: no state, m = -inf exactly like a reset (then m' = i). `last` may be the same memory as
 * `first`. tape: [B, H, T, 7, D], NULL when no backward follows. One decoding step is T = 1. */
typedef struct {
    ptrdiff_t B, H, T, D;
    const uint8_t *reset; /* [B, T] or NULL: a document starts here, the state is forgotten */
} xl_slstm;
typedef struct {
    real *y, *c, *n, *m;
} xl_slstm_state;
xl_status xl_slstm_forward(xl_ctx *ctx, const xl_slstm *a, real *y, xl_slstm_state last,
                           const real *x, const real *r, xl_slstm_state first, real *tape,
                           void *scratch);
/* y and tape are those of the forward. dlast: gradient on the last state at fixed m (m is not read),
 * or all NULL; dfirst likewise (y, c, n added), all NULL where not wanted. */
xl_status xl_slstm_backward(xl_ctx *ctx, const xl_slstm *a, real *dx, real *dr,
                            xl_slstm_state dfirst, const real *dy, const real *y, const real *r,
                            xl_slstm_state first, xl_slstm_state dlast, const real *tape,
                            void *scratch);
ptrdiff_t xl_slstm_scratch(const xl_ctx *ctx, const xl_slstm *a);

/* ---- gates.c ------------------------------------------------------------------------------ */

/* a[b,h,t] = [q_t k_t v_t] w_h + b_h, w [H, 3D], from pre-RoPE q, k, v. The three parts are read
 * from G-head k and v. a is [B, H, T]-strided (unit stride unused, like mLSTM gates). paper.md 1.2. */
typedef struct {
    ptrdiff_t B, H, G, T, D;
} xl_gate;
xl_status xl_output_gate_forward(xl_ctx *ctx, const xl_gate *g, xl_heads a, xl_heads q, xl_heads k,
                                 xl_heads v, const real *w, const real *bias);
xl_status xl_output_gate_backward(xl_ctx *ctx, const xl_gate *g, xl_heads dq, xl_heads dk,
                                  xl_heads dv, real *dw, real *dbias, xl_heads da, xl_heads q,
                                  xl_heads k, xl_heads v, const real *w, void *scratch);
ptrdiff_t xl_output_gate_scratch(const xl_ctx *ctx, const xl_gate *g);
/* h = o hm + (1 - o) hs, o = sigmoid(a). h may be hm or hs. */
xl_status xl_mix_forward(xl_ctx *ctx, const xl_gate *g, xl_heads h, xl_heads hm, xl_heads hs,
                         xl_heads a);
/* dhm, dhs, da added. */
xl_status xl_mix_backward(xl_ctx *ctx, const xl_gate *g, xl_heads dhm, xl_heads dhs, xl_heads da,
                          xl_heads dh, xl_heads hm, xl_heads hs, xl_heads a);

/* ---- lolcats.c ---------------------------------------------------------------------------- */

/* Softmax attention over the keys V that `attn` sees, linear attention over the document's other keys
 * L, one normaliser (arXiv:2410.10254):
 *     y = (g sum_V exp(z - max_V z) v + sum_L phi(q).phi(k) v) / (the same with v = 1)
 * with z = q.k / sqrt(D), phi the feature maps w_q, w_k [H, D, D] and g = sigmoid(factor_h), factor [H].
 * A key is in V or in L, never in both: it enters L when it leaves the window, unless it is a sink. */
typedef struct {
    xl_attn attn;
    ptrdiff_t chunk; /* of the linear part, >= 1 */
    xl_map_form map;
} xl_lolcats;

/* What a forward leaves for the backward; the scratch of a step. All contiguous. */
typedef struct {
    real *k, *v;    /* [B, T, G, D] what leaves the window at each step, 0 where nothing does */
    real *i, *f;    /* [B, T] the linear part's gates: 0 or -inf; [1] +inf */
    uint8_t *reset; /* [B, T] */
    real *phi_q, *phi_k; /* [B, T, H, D] features of q and of what leaves */
    real *hl, *hs;       /* [B, T, H, D] outputs of the linear and of the softmax part */
    real *o;             /* [B, T, H] log-odds of the linear part's share */
    xl_attn_sums sums;
} xl_lolcats_tape;
void xl_lolcats_tape_plan(xl_plan *p, ptrdiff_t N, ptrdiff_t H, ptrdiff_t G, ptrdiff_t D,
                          xl_lolcats_tape *t);

/* past (NULL or cache) as in xl_attention_forward, and like it not written; first and last: state of
 * the linear part, as in xl_mlstm_forward. */
xl_status xl_lolcats_forward(xl_ctx *ctx, const xl_lolcats *a, xl_heads y, xl_lolcats_tape *t,
                             xl_mlstm_state last, xl_heads q, xl_heads k, xl_heads v,
                             const real *w_q, const real *w_k, const real *factor,
                             const xl_kv *past, xl_mlstm_state first, void *scratch);
/* dq, dk, dv: p NULL where not wanted (then all are). t, past and first are those of the forward; what
 * past and first hold gets no gradient. */
xl_status xl_lolcats_backward(xl_ctx *ctx, const xl_lolcats *a, xl_heads dq, xl_heads dk,
                              xl_heads dv, real *dw_q, real *dw_k, real *dfactor, xl_heads dy,
                              const xl_lolcats_tape *t, xl_heads q, xl_heads k, xl_heads v,
                              const real *w_q, const real *w_k, const real *factor,
                              const xl_kv *past, xl_mlstm_state first, void *scratch);
/* One decoding step, T = 1, as xl_attention_step: past and state are advanced. */
xl_status xl_lolcats_step(xl_ctx *ctx, const xl_lolcats *a, xl_heads y, xl_lolcats_tape *t,
                          xl_heads q, xl_heads k, xl_heads v, const real *w_q, const real *w_k,
                          const real *factor, xl_kv *past, xl_mlstm_state state, void *scratch);
/* Bytes for forward and step, with `training` for the backward too; past_slots as in
 * xl_attention_scratch. */
ptrdiff_t xl_lolcats_scratch(const xl_ctx *ctx, const xl_lolcats *a, ptrdiff_t past_slots,
                             int training);

#endif
