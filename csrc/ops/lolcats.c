/* LoLCATs (arXiv:2410.10254): softmax attention inside the window, linear attention over what has left
 * it, one normaliser. Both parts are the ops that there are; what they add up to is their mix by the
 * linear part's share of the normaliser, whose log-odds are
 *     o = log den - log g - log sum exp(z - max z)
 * with den = sum_L phi(q).phi(k) of the linear part. docs/math/lolcats.md. */
#include "ops/attention.h"
#include "ops/basic.h"

#include <string.h>

/* A contiguous [B, T, heads, width] buffer seen as heads. */
static xl_heads view(real *p, ptrdiff_t T, ptrdiff_t heads, ptrdiff_t width) {
    return (xl_heads){p, T * heads * width, width, heads * width};
}

void xl_lolcats_tape_plan(xl_plan *p, ptrdiff_t N, ptrdiff_t H, ptrdiff_t G, ptrdiff_t D,
                          xl_lolcats_tape *t) {
    t->k = xl_take_reals(p, N * G * D);
    t->v = xl_take_reals(p, N * G * D);
    t->i = xl_take_reals(p, N);
    t->f = xl_take_reals(p, 1);
    t->reset = xl_take(p, "", XL_ROLE_WORK, XL_DT_U8, 1, XL_SHAPE(N));
    t->phi_q = xl_take_reals(p, N * H * D);
    t->phi_k = xl_take_reals(p, N * H * D);
    t->hl = xl_take_reals(p, N * H * D);
    t->hs = xl_take_reals(p, N * H * D);
    t->o = xl_take_reals(p, N * H);
    t->sums.lse = xl_take_reals(p, N * H);
    t->sums.log_sum = xl_take_reals(p, N * H);
    t->sums.peak = xl_take(p, "", XL_ROLE_WORK, XL_DT_I32, 1, XL_SHAPE(N * H));
}

/* Zeroed by the backward, but for dlog_sum. */
typedef struct {
    real *dhl, *dhs, *dphi_q, *dphi_k, *dv; /* [B, T, H, D] */
    real *dk;                               /* [B, T, G, D] */
    real *do_;                              /* [B, T, H] */
    real *dlog_sum;                         /* [B, H, T] */
    void *op;
} workspace;

static xl_fmap map_args(const xl_lolcats *l, ptrdiff_t G) {
    const xl_attn *a = &l->attn;
    return (xl_fmap){a->B, a->H, G, a->T, a->D, l->map, a->mixed};
}

static xl_gate gate_args(const xl_attn *a) { return (xl_gate){a->B, a->H, a->G, a->T, a->D}; }

static xl_mlstm linear_args(const xl_lolcats *l, const xl_lolcats_tape *t, xl_form form) {
    const xl_attn *a = &l->attn;
    return (xl_mlstm){.B = a->B,
                      .H = a->H,
                      .T = a->T,
                      .D = a->D,
                      .E = a->D,
                      .v_rep = a->H / a->G,
                      .scale = 1,
                      .normalizer = XL_RATIO,
                      .form = form,
                      .chunk = l->chunk,
                      .reset = t->reset,
                      .lengths = a->lengths,
                      .mixed = a->mixed};
}

static ptrdiff_t plan(const xl_ctx *ctx, const xl_lolcats *l, ptrdiff_t past_slots, int training,
                      char *base, workspace *w) {
    xl_plan p = {.base = base, .size = PTRDIFF_MAX};
    const xl_attn *a = &l->attn;
    ptrdiff_t N = a->B * a->T, q = N * a->H * a->D;
    if (training) {
        w->dhl = xl_take_reals(&p, q);
        w->dhs = xl_take_reals(&p, q);
        w->dphi_q = xl_take_reals(&p, q);
        w->dphi_k = xl_take_reals(&p, q);
        w->dv = xl_take_reals(&p, q);
        w->dk = xl_take_reals(&p, N * a->G * a->D);
        w->do_ = xl_take_reals(&p, N * a->H);
        w->dlog_sum = xl_take_reals(&p, N * a->H);
    }
    const xl_lolcats_tape none = {0};
    xl_mlstm linear = linear_args(l, &none, XL_CHUNKWISE);
    xl_fmap map = map_args(l, a->H);
    ptrdiff_t most =
        xl_max(xl_attention_scratch(ctx, a, past_slots),
               xl_max(xl_mlstm_scratch(ctx, &linear), xl_feature_map_scratch(ctx, &map)));
    w->op = xl_take(&p, "", XL_ROLE_WORK, XL_DT_U8, 1, XL_SHAPE(most));
    return p.failed ? -1 : p.used;
}

ptrdiff_t xl_lolcats_scratch(const xl_ctx *ctx, const xl_lolcats *a, ptrdiff_t past_slots,
                             int training) {
    workspace w;
    return plan(ctx, a, past_slots, training, NULL, &w);
}

/* ---- what leaves the window ---------------------------------------------------------------- */

/* At step t of row b the key of this position in the document enters the linear part; < 0: none does. */
static ptrdiff_t leaving(const xl_attn *a, ptrdiff_t b, ptrdiff_t t) {
    ptrdiff_t position = a->pos[b * a->T + t] - a->window;
    return t < xl_attn_length(a, b) && position >= a->sinks ? position : -1;
}

static void put(ptrdiff_t D, const real *from, real *to) {
    if (from)
        memcpy(to, from, (size_t)D * sizeof(real));
    else
        memset(to, 0, (size_t)D * sizeof(real));
}

/* Keys, values and gates of the linear part. */
static void collect(const xl_ctx *ctx, const xl_attn *a, xl_lolcats_tape *tape, xl_heads k,
                    xl_heads v, const xl_kv *past) {
    ptrdiff_t G = a->G, D = a->D, T = a->T;
    *tape->f = INFINITY;
#pragma omp parallel for num_threads(ctx->threads) collapse(2) if (a->B * T >= XL_FEW_ROWS)
    for (ptrdiff_t b = 0; b < a->B; b++)
        for (ptrdiff_t t = 0; t < T; t++) {
            ptrdiff_t position = leaving(a, b, t), from = t - a->window, n = b * T + t;
            tape->i[n] = position < 0 ? -INFINITY : 0;
            tape->reset[n] = a->pos[n] == 0;
            for (ptrdiff_t g = 0; g < G; g++) {
                const real *key = NULL, *value = NULL;
                if (position >= 0 && from >= 0) {
                    key = xl_at(k, b, g, from);
                    value = xl_at(v, b, g, from);
                } else if (position >= 0) {
                    ptrdiff_t slot = b * past->slots + xl_slot(past, a->sinks, position);
                    key = past->k + (slot * G + g) * D;
                    value = past->v + (slot * G + g) * D;
                }
                put(D, key, tape->k + (n * G + g) * D);
                put(D, value, tape->v + (n * G + g) * D);
            }
        }
}

/* Adds gradients of what left, [B, T, heads, D], to those of the keys or values that it was,
 * but for those of the cache. */
static void give_back(const xl_ctx *ctx, const xl_attn *a, xl_heads dx, ptrdiff_t heads,
                      const real *from) {
    ptrdiff_t T = a->T, D = a->D, rep = heads / a->G;
#pragma omp parallel for num_threads(ctx->threads) collapse(2)
    for (ptrdiff_t b = 0; b < a->B; b++)
        for (ptrdiff_t t = 0; t < T; t++)
            for (ptrdiff_t h = 0; t >= a->window && leaving(a, b, t) >= 0 && h < heads; h++)
                ctx->k->add(D, from + ((b * T + t) * heads + h) * D,
                            xl_at(dx, b, h / rep, t - a->window));
}

/* ---- forward ------------------------------------------------------------------------------- */

static double log_sigmoid(double x) { return x < 0 ? x - log1p(exp(x)) : -log1p(exp(-x)); }

static xl_heads gate_i(const xl_attn *a, const xl_lolcats_tape *t) {
    return (xl_heads){t->i, a->T, 0, 1}; /* the same for all heads */
}
static xl_heads gate_f(const xl_lolcats_tape *t) { return (xl_heads){t->f, 0, 0, 0}; }

/* y from the outputs of both parts, from log den, which o holds, and log_sum. */
static xl_status join(xl_ctx *ctx, const xl_attn *a, xl_heads y, const xl_lolcats_tape *t,
                      const real *factor) {
    ptrdiff_t T = a->T, H = a->H;
    for (ptrdiff_t h = 0; h < H; h++) {
        real log_g = (real)log_sigmoid((double)factor[h]);
        for (ptrdiff_t b = 0; b < a->B; b++)
            for (ptrdiff_t s = 0; s < T; s++)
                t->o[(b * T + s) * H + h] -= log_g + t->sums.log_sum[(b * H + h) * T + s];
    }
    xl_gate gate = gate_args(a);
    return xl_mix_forward(ctx, &gate, y, view(t->hl, T, H, a->D), view(t->hs, T, H, a->D),
                          view(t->o, T, H, 1));
}

xl_status xl_lolcats_forward(xl_ctx *ctx, const xl_lolcats *l, xl_heads y, xl_lolcats_tape *t,
                             xl_mlstm_state last, xl_heads q, xl_heads k, xl_heads v,
                             const real *w_q, const real *w_k, const real *factor,
                             const xl_kv *past, xl_mlstm_state first, void *scratch) {
    const xl_attn *a = &l->attn;
    ptrdiff_t T = a->T, H = a->H, G = a->G, D = a->D;
    workspace w;
    plan(ctx, l, past ? past->slots : 0, 0, scratch, &w);
    XL_TRY(xl_attention_forward(ctx, a, view(t->hs, T, H, D), t->sums, q, k, v, past, w.op));
    collect(ctx, a, t, k, v, past);
    xl_mlstm linear = linear_args(l, t, XL_CHUNKWISE);
    const xl_mlstm_maps maps = {
        G, l->map, w_q, w_k, view(t->phi_q, T, H, D), view(t->phi_k, T, H, D)};
    XL_TRY(xl_mlstm_forward(ctx, &linear, &maps, view(t->hl, T, H, D), view(t->o, T, H, 1), last, q,
                            view(t->k, T, G, D), view(t->v, T, G, D), gate_i(a, t), gate_f(t),
                            first, w.op));
    return join(ctx, a, y, t, factor);
}

xl_status xl_lolcats_step(xl_ctx *ctx, const xl_lolcats *l, xl_heads y, xl_lolcats_tape *t,
                          xl_heads q, xl_heads k, xl_heads v, const real *w_q, const real *w_k,
                          const real *factor, xl_kv *past, xl_mlstm_state state, void *scratch) {
    const xl_attn *a = &l->attn;
    ptrdiff_t T = a->T, H = a->H, G = a->G, D = a->D;
    xl_heads phi_q = view(t->phi_q, T, H, D), phi_k = view(t->phi_k, T, H, D);
    workspace w;
    plan(ctx, l, past->slots, 0, scratch, &w);
    XL_TRY(xl_attention_check(ctx, a, past));
    collect(ctx, a, t, k, v, past); /* before the new key takes the place of what leaves */
    XL_TRY(xl_attention_step(ctx, a, view(t->hs, T, H, D), t->sums.log_sum, q, k, v, past, w.op));
    xl_fmap mq = map_args(l, H), mk = map_args(l, G);
    XL_TRY(xl_feature_map_forward(ctx, &mq, phi_q, q, w_q, w.op));
    XL_TRY(xl_feature_map_forward(ctx, &mk, phi_k, view(t->k, T, G, D), w_k, w.op));
    xl_mlstm linear = linear_args(l, t, XL_RECURRENT);
    XL_TRY(xl_mlstm_forward(ctx, &linear, NULL, view(t->hl, T, H, D), view(t->o, T, H, 1), state,
                            phi_q, phi_k, view(t->v, T, G, D), gate_i(a, t), gate_f(t), state,
                            w.op));
    return join(ctx, a, y, t, factor);
}

/* ---- backward ------------------------------------------------------------------------------ */

/* o = log den - log g - log_sum: gradients on the last two from that on o. */
static void share_gradients(const xl_attn *a, const workspace *w, real *dfactor,
                            const real *factor) {
    ptrdiff_t T = a->T, H = a->H;
    for (ptrdiff_t h = 0; h < H; h++) {
        double sum = 0;
        for (ptrdiff_t b = 0; b < a->B; b++)
            for (ptrdiff_t s = 0; s < T; s++) {
                real d = w->do_[(b * T + s) * H + h];
                w->dlog_sum[(b * H + h) * T + s] = -d;
                sum += (double)d;
            }
        if (dfactor) dfactor[h] -= (real)(sum / (1 + exp((double)factor[h])));
    }
}

xl_status xl_lolcats_backward(xl_ctx *ctx, const xl_lolcats *l, xl_heads dq, xl_heads dk,
                              xl_heads dv, real *dw_q, real *dw_k, real *dfactor, xl_heads dy,
                              const xl_lolcats_tape *t, xl_heads q, xl_heads k, xl_heads v,
                              const real *w_q, const real *w_k, const real *factor,
                              const xl_kv *past, xl_mlstm_state first, void *scratch) {
    const xl_attn *a = &l->attn;
    ptrdiff_t T = a->T, H = a->H, G = a->G, D = a->D, N = a->B * T;
    xl_heads hl = view(t->hl, T, H, D), hs = view(t->hs, T, H, D), none = {0};
    xl_heads phi_q = view(t->phi_q, T, H, D), phi_k = view(t->phi_k, T, H, D);
    workspace w;
    plan(ctx, l, 0, 1, scratch, &w);
    xl_heads dhl = view(w.dhl, T, H, D), dhs = view(w.dhs, T, H, D), do_ = view(w.do_, T, H, 1);
    xl_heads dphi_q = view(w.dphi_q, T, H, D), dphi_k = view(w.dphi_k, T, H, D);
    real *const buffers[] = {w.dhl, w.dhs, w.dphi_q, w.dphi_k, w.dv};
    for (size_t j = 0; j < sizeof buffers / sizeof *buffers; j++)
        XL_TRY(xl_zero(ctx, N * H * D, buffers[j]));
    XL_TRY(xl_zero(ctx, N * G * D, w.dk));
    XL_TRY(xl_zero(ctx, N * H, w.do_));

    xl_gate gate = gate_args(a);
    XL_TRY(
        xl_mix_backward(ctx, &gate, dhl, dq.p ? dhs : none, do_, dy, hl, hs, view(t->o, T, H, 1)));
    share_gradients(a, &w, dfactor, factor);
    if (dq.p)
        XL_TRY(xl_attention_backward(ctx, a, dq, dk, dv, dhs, w.dlog_sum, q, k, v, hs, t->sums,
                                     past, w.op));
    xl_mlstm linear = linear_args(l, t, XL_CHUNKWISE);
    const xl_mlstm_state no_state = {0};
    XL_TRY(xl_mlstm_backward(ctx, &linear, dphi_q, dphi_k, dv.p ? view(w.dv, T, H, D) : none, none,
                             none, no_state, dhl, do_, phi_q, phi_k, view(t->v, T, G, D),
                             gate_i(a, t), gate_f(t), first, no_state, w.op));
    xl_fmap mq = map_args(l, H), mk = map_args(l, G);
    XL_TRY(xl_feature_map_backward(ctx, &mq, dq, dw_q, dphi_q, phi_q, q, w_q, w.op));
    XL_TRY(xl_feature_map_backward(ctx, &mk, dk.p ? view(w.dk, T, G, D) : none, dw_k, dphi_k, phi_k,
                                   view(t->k, T, G, D), w_k, w.op));
    if (dk.p) give_back(ctx, a, dk, G, w.dk);
    if (dv.p) give_back(ctx, a, dv, H, w.dv);
    return XL_OK;
}
