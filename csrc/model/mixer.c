#include "model/mixer.h"

#include <string.h>

/* A [B, T, heads, width] buffer seen as heads. */
static xl_heads view(const real *p, ptrdiff_t T, ptrdiff_t heads, ptrdiff_t width) {
    return (xl_heads){(real *)p, T * heads * width, width, heads * width};
}

static xl_attn attention_args(const xl_config *c, const xl_mixer *m, const xl_batch *b) {
    xl_attn a = {.B = b->B,
                 .H = c->H,
                 .G = c->G,
                 .T = b->T,
                 .D = c->D,
                 .pos = b->pos,
                 .lengths = b->lengths,
                 .mixed = c->mixed};
    xl_attention_span(m, b->span, &a.window, &a.sinks);
    return a;
}

static xl_mlstm cell_args(const xl_config *c, const xl_mixer *m, const xl_batch *b, int stepping) {
    return (xl_mlstm){.B = b->B,
                      .H = c->H,
                      .T = b->T,
                      .D = c->D,
                      .E = c->D,
                      .v_rep = c->H / c->G,
                      .scale = m->normalizer == XL_RATIO ? 1 : (real)(1 / sqrt((double)c->D)),
                      .normalizer = m->normalizer,
                      .form = stepping ? XL_RECURRENT : XL_CHUNKWISE,
                      .chunk = b->chunk,
                      .reset = b->reset,
                      .lengths = b->lengths,
                      .mixed = c->mixed};
}

static xl_lolcats lolcats_args(const xl_config *c, const xl_mixer *m, const xl_batch *b) {
    return (xl_lolcats){attention_args(c, m, b), b->chunk, m->map};
}

static xl_fmap map_args(const xl_config *c, const xl_mixer *m, const xl_batch *b, ptrdiff_t G) {
    return (xl_fmap){b->B, c->H, G, b->T, c->D, m->map, c->mixed};
}

static xl_gate gate_args(const xl_config *c, const xl_batch *b) {
    return (xl_gate){b->B, c->H, c->G, b->T, c->D};
}

/* Turns q and k [N, heads, D] by the layer's RoPE, or back, and multiplies them by scale. */
static xl_status turn(xl_ctx *ctx, const xl_config *c, const xl_mixer *m, const xl_batch *b,
                      real *q, real *k, double scale, int inverse) {
    ptrdiff_t B = b->B, T = b->T, D = c->D;
    const real *table = b->rope + m->rope * B * T * D;
    XL_TRY(xl_rope(ctx, B, c->H, T, D, view(q, T, c->H, D), table, (real)scale, inverse));
    return xl_rope(ctx, B, c->G, T, D, view(k, T, c->G, D), table, (real)scale, inverse);
}

void xl_mixer_tape_plan(xl_plan *p, const xl_config *c, const xl_mixer *m, ptrdiff_t N,
                        xl_mixer_tape *t) {
    ptrdiff_t q = N * c->H * c->D, kv = N * c->G * c->D, gates = N * c->H;
    memset(t, 0, sizeof *t);
    t->q = xl_take_reals(p, q);
    t->k = xl_take_reals(p, kv);
    t->v = xl_take_reals(p, kv);
    t->h = xl_take_reals(p, q);
    if (m->kind == XL_MIX_LOLCATS) xl_lolcats_tape_plan(p, N, c->H, c->G, c->D, &t->lolcats);
    if (xl_has_attention(m)) t->lse = xl_take_reals(p, gates);
    t->hs = t->hm = t->h;
    if (xl_has_mlstm(m)) {
        t->phi_q = xl_take_reals(p, q);
        t->phi_k = xl_take_reals(p, q);
        t->i = xl_take_reals(p, gates);
        t->f = xl_take_reals(p, gates);
    }
    if (m->kind == XL_MIX_HYBRID) {
        t->hm = xl_take_reals(p, q);
        t->hs = xl_take_reals(p, q);
        t->o = xl_take_reals(p, gates);
    }
}

/* ---- scratch ------------------------------------------------------------------------------ */

typedef struct {
    real *dhm, *dhs, *do_, *dphi_q, *dphi_k, *dvm, *di, *df; /* zeroed by the backward */
    void *op;
} workspace;

static ptrdiff_t plan(const xl_ctx *ctx, const xl_config *c, const xl_batch *b, int training,
                      char *base, workspace *w) {
    xl_plan p = {.base = base, .size = PTRDIFF_MAX};
    ptrdiff_t N = b->B * b->T, q = N * c->H * c->D, gates = N * c->H;
    if (training) {
        w->dhm = xl_take_reals(&p, q);
        w->dhs = xl_take_reals(&p, q);
        w->do_ = xl_take_reals(&p, gates);
        w->dphi_q = xl_take_reals(&p, q);
        w->dphi_k = xl_take_reals(&p, q);
        w->dvm = xl_take_reals(&p, q);
        w->di = xl_take_reals(&p, gates);
        w->df = xl_take_reals(&p, gates);
    }
    ptrdiff_t most = xl_linear_scratch(ctx, N, c->d, c->H);
    xl_fmap fm = map_args(c, c->mixer, b, c->H); /* no form needs more than another */
    xl_gate ga = gate_args(c, b);
    most = xl_max(most, xl_max(xl_feature_map_scratch(ctx, &fm), xl_output_gate_scratch(ctx, &ga)));
    for (ptrdiff_t l = 0; l < c->layers; l++) {
        const xl_mixer *m = &c->mixer[l];
        /* the same mixer in two layers needs the same scratch */
        if (l && !memcmp(m, m - 1, sizeof *m)) continue;
        xl_attn at = attention_args(c, m, b);
        xl_mlstm ce = cell_args(c, m, b, 0);
        if (xl_has_attention(m))
            most = xl_max(most, xl_attention_scratch(
                                    ctx, &at, b->past && !training ? at.window + at.sinks : 0));
        if (xl_has_mlstm(m)) most = xl_max(most, xl_mlstm_scratch(ctx, &ce));
        xl_lolcats lo = lolcats_args(c, m, b);
        if (m->kind == XL_MIX_LOLCATS)
            most = xl_max(most, xl_lolcats_scratch(ctx, &lo,
                                                   b->past && !training ? at.window + at.sinks : 0,
                                                   training));
        xl_mixer teacher = xl_teacher_attention(m); /* stage I also runs it */
        at = attention_args(c, &teacher, b);
        if (training) most = xl_max(most, xl_attention_scratch(ctx, &at, 0));
    }
    w->op = xl_take(&p, "", XL_ROLE_WORK, XL_DT_U8, 1, XL_SHAPE(most));
    return p.failed ? -1 : p.used;
}

ptrdiff_t xl_mixer_scratch(const xl_ctx *ctx, const xl_config *c, const xl_batch *b, int training) {
    workspace w;
    return plan(ctx, c, b, training, NULL, &w);
}

/* ---- forward ------------------------------------------------------------------------------ */

static xl_status gate_pre_activations(xl_ctx *ctx, const xl_config *c, const xl_mixer *m,
                                      const xl_layer *w, const xl_batch *b, xl_mixer_tape *t,
                                      const real *xn, void *scratch) {
    ptrdiff_t N = b->B * b->T, H = c->H, D = c->D, T = b->T;
    if (m->kind == XL_MIX_LINEAR) { /* i = 1, f = 1 */
        for (ptrdiff_t j = 0; j < N * H; j++) t->i[j] = 0, t->f[j] = INFINITY;
        return XL_OK;
    }
    XL_TRY(xl_linear_forward(ctx, N, c->d, H, t->i, xn, xl_real_mat(w->wi), w->bi, scratch));
    XL_TRY(xl_linear_forward(ctx, N, c->d, H, t->f, xn, xl_real_mat(w->wf), w->bf, scratch));
    if (m->kind != XL_MIX_HYBRID) return XL_OK;
    if (b->gate >= 0) {
        real forced = (real)(log(b->gate) - log1p(-b->gate)); /* -inf at 0, +inf at 1 */
        for (ptrdiff_t j = 0; j < N * H; j++) t->o[j] = forced;
    } else if (m->gate_fixed) {
        for (ptrdiff_t j = 0; j < N * H; j++) t->o[j] = w->b_og[j % H];
    } else {
        xl_gate a = gate_args(c, b);
        return xl_output_gate_forward(ctx, &a, view(t->o, T, H, 1), view(t->q, T, H, D),
                                      view(t->k, T, c->G, D), view(t->v, T, c->G, D), w->w_og,
                                      w->b_og);
    }
    return XL_OK;
}

static xl_kv cache(const xl_layer_state *state, const xl_batch *b) {
    xl_kv kv = state->kv;
    kv.pos = b->past;
    return kv;
}

/* Leaves in `last` (NULL: not wanted) the cache behind the rows. */
static xl_status extend_cache(xl_ctx *ctx, const xl_config *c, const xl_attn *a, const xl_batch *b,
                              xl_heads k, xl_heads v, const xl_layer_state *first,
                              const xl_layer_state *last) {
    if (!last) return XL_OK;
    xl_kv past = cache(first, b), kv = cache(last, b);
    if (first != last) {
        ptrdiff_t size = b->B * kv.slots * c->G * c->D;
        XL_TRY(xl_copy(ctx, size, kv.k, past.k));
        XL_TRY(xl_copy(ctx, size, kv.v, past.v));
    }
    return xl_attention_append(ctx, a, k, v, &kv);
}

static xl_status attention_branch(xl_ctx *ctx, const xl_config *c, const xl_mixer *m,
                                  const xl_batch *b, xl_mixer_tape *t, const xl_layer_state *first,
                                  const xl_layer_state *last, void *scratch) {
    ptrdiff_t T = b->T, D = c->D;
    xl_attn a = attention_args(c, m, b);
    xl_heads o = view(t->hs, T, c->H, D), q = view(t->q, T, c->H, D), k = view(t->k, T, c->G, D),
             v = view(t->v, T, c->G, D);
    xl_attn_sums sums = {.lse = t->lse};
    if (!first) return xl_attention_forward(ctx, &a, o, sums, q, k, v, NULL, scratch);
    xl_kv past = cache(first, b);
    if (T == 1 && first == last)
        return xl_attention_step(ctx, &a, o, NULL, q, k, v, &past, scratch);
    XL_TRY(xl_attention_forward(ctx, &a, o, sums, q, k, v, &past, scratch));
    return extend_cache(ctx, c, &a, b, k, v, first, last);
}

static xl_mlstm_state cell(const xl_layer_state *state) {
    return state ? state->cell : (xl_mlstm_state){0};
}

static xl_status mlstm_branch(xl_ctx *ctx, const xl_config *c, const xl_mixer *m, const xl_layer *w,
                              const xl_batch *b, xl_mixer_tape *t, const xl_layer_state *first,
                              const xl_layer_state *last, void *scratch) {
    ptrdiff_t T = b->T, H = c->H, D = c->D;
    int in_place = first && first == last;
    xl_mlstm_state before = cell(first), behind = cell(last);
    xl_heads no_den = {0};
    xl_heads q = view(t->q, T, H, D), k = view(t->k, T, c->G, D), v = view(t->v, T, c->G, D),
             phi_q = view(t->phi_q, T, H, D), phi_k = view(t->phi_k, T, H, D),
             h = view(t->hm, T, H, D), i = view(t->i, T, H, 1), f = view(t->f, T, H, 1);
    xl_mlstm a = cell_args(c, m, b, in_place && T == 1);
    if (a.form == XL_RECURRENT) { /* the maps of all rows are one product */
        xl_fmap mq = map_args(c, m, b, H), mk = map_args(c, m, b, c->G);
        XL_TRY(xl_feature_map_forward(ctx, &mq, phi_q, q, w->map_q, scratch));
        XL_TRY(xl_feature_map_forward(ctx, &mk, phi_k, k, w->map_k, scratch));
        return xl_mlstm_forward(ctx, &a, NULL, h, no_den, behind, phi_q, phi_k, v, i, f, before,
                                scratch);
    }
    xl_mlstm_maps maps = {.G = c->G, .form = m->map, .w_q = w->map_q, .w_k = w->map_k};
    if (!in_place) maps.phi_q = phi_q, maps.phi_k = phi_k; /* a backward may follow */
    return xl_mlstm_forward(ctx, &a, &maps, h, no_den, behind, q, k, v, i, f, before, scratch);
}

static xl_status lolcats(xl_ctx *ctx, const xl_config *c, const xl_mixer *m, const xl_layer *w,
                         const xl_batch *b, xl_mixer_tape *t, const xl_layer_state *first,
                         const xl_layer_state *last, void *scratch) {
    ptrdiff_t T = b->T, D = c->D;
    xl_lolcats a = lolcats_args(c, m, b);
    xl_kv past = first ? cache(first, b) : (xl_kv){0};
    xl_mlstm_state before = cell(first), behind = cell(last);
    xl_heads h = view(t->h, T, c->H, D), q = view(t->q, T, c->H, D), k = view(t->k, T, c->G, D),
             v = view(t->v, T, c->G, D);
    if (T == 1 && first && first == last)
        return xl_lolcats_step(ctx, &a, h, &t->lolcats, q, k, v, w->map_q, w->map_k,
                               w->window_factor, &past, before, scratch);
    XL_TRY(xl_lolcats_forward(ctx, &a, h, &t->lolcats, behind, q, k, v, w->map_q, w->map_k,
                              w->window_factor, first ? &past : NULL, before, scratch));
    return extend_cache(ctx, c, &a.attn, b, k, v, first, last);
}

xl_status xl_mixer_forward(xl_ctx *ctx, const xl_config *c, const xl_mixer *m, const xl_layer *w,
                           const xl_batch *b, xl_mixer_tape *t, const real *xn,
                           const xl_layer_state *first, const xl_layer_state *last, void *scratch) {
    ptrdiff_t T = b->T, H = c->H, D = c->D;
    workspace s;
    plan(ctx, c, b, 0, scratch, &s);
    if (xl_has_mlstm(m)) XL_TRY(gate_pre_activations(ctx, c, m, w, b, t, xn, s.op));
    XL_TRY(turn(ctx, c, m, b, t->q, t->k, c->attention_factor[m->rope], 0));
    if (xl_has_attention(m)) XL_TRY(attention_branch(ctx, c, m, b, t, first, last, s.op));
    if (xl_has_mlstm(m)) XL_TRY(mlstm_branch(ctx, c, m, w, b, t, first, last, s.op));
    if (m->kind == XL_MIX_LOLCATS) return lolcats(ctx, c, m, w, b, t, first, last, s.op);
    if (m->kind != XL_MIX_HYBRID) return XL_OK;
    xl_gate a = gate_args(c, b);
    return xl_mix_forward(ctx, &a, view(t->h, T, H, D), view(t->hm, T, H, D), view(t->hs, T, H, D),
                          view(t->o, T, H, 1));
}

/* ---- backward ----------------------------------------------------------------------------- */

/* Gradient of the mLSTM branch from s->dhm down to dq, dk, dv after RoPE, dxn and parameters. */
static xl_status mlstm_backward(xl_ctx *ctx, const xl_config *c, const xl_mixer *m,
                                const xl_layer *w, const xl_layer *g, const xl_batch *b,
                                xl_mixer_tape *t, real *dq, real *dk, real *dv, real *dxn,
                                const real *dhm, const real *xn, const xl_layer_state *first,
                                workspace *s) {
    ptrdiff_t T = b->T, H = c->H, G = c->G, D = c->D, N = b->B * T;
    int gates = xl_has_gates(m);
    XL_TRY(xl_zero(ctx, N * H * D, s->dphi_q));
    XL_TRY(xl_zero(ctx, N * H * D, s->dphi_k));
    XL_TRY(xl_zero(ctx, N * H * D, s->dvm));
    XL_TRY(xl_zero(ctx, N * H, s->di));
    XL_TRY(xl_zero(ctx, N * H, s->df));
    xl_mlstm a = cell_args(c, m, b, 0);
    xl_mlstm_state none = {0};
    xl_heads no_den = {0};
    xl_heads phi_q = view(t->phi_q, T, H, D), phi_k = view(t->phi_k, T, H, D);
    xl_heads dphi_q = view(s->dphi_q, T, H, D), dphi_k = view(s->dphi_k, T, H, D);
    XL_TRY(xl_mlstm_backward(ctx, &a, dphi_q, dphi_k, view(dv ? s->dvm : NULL, T, H, D),
                             view(gates ? s->di : NULL, T, H, 1),
                             view(gates ? s->df : NULL, T, H, 1), none, view(dhm, T, H, D), no_den,
                             phi_q, phi_k, view(t->v, T, G, D), view(t->i, T, H, 1),
                             view(t->f, T, H, 1), cell(first), none, s->op));
    if (dv) XL_TRY(xl_add_heads(ctx, N, H, G, D, dv, s->dvm));
    xl_fmap mq = map_args(c, m, b, H), mk = map_args(c, m, b, G);
    XL_TRY(xl_feature_map_backward(ctx, &mq, view(dq, T, H, D), g->map_q, dphi_q, phi_q,
                                   view(t->q, T, H, D), w->map_q, s->op));
    XL_TRY(xl_feature_map_backward(ctx, &mk, view(dk, T, G, D), g->map_k, dphi_k, phi_k,
                                   view(t->k, T, G, D), w->map_k, s->op));
    if (!gates) return XL_OK;
    XL_TRY(xl_linear_backward(ctx, N, c->d, H, dxn, g->wi, g->bi, s->di, xn, xl_real_mat(w->wi),
                              s->op));
    return xl_linear_backward(ctx, N, c->d, H, dxn, g->wf, g->bf, s->df, xn, xl_real_mat(w->wf),
                              s->op);
}

static xl_status gate_backward(xl_ctx *ctx, const xl_config *c, const xl_mixer *m,
                               const xl_layer *w, const xl_layer *g, const xl_batch *b,
                               xl_mixer_tape *t, real *dq, real *dk, real *dv, workspace *s) {
    ptrdiff_t T = b->T, H = c->H, G = c->G, D = c->D;
    if (b->gate >= 0) return XL_OK; /* a forced gate has no gradient */
    if (m->gate_fixed) {
        if (g->b_og)
            for (ptrdiff_t j = 0; j < b->B * T * H; j++) g->b_og[j % H] += s->do_[j];
        return XL_OK;
    }
    xl_gate a = gate_args(c, b);
    return xl_output_gate_backward(ctx, &a, view(dq, T, H, D), view(dk, T, G, D), view(dv, T, G, D),
                                   g->w_og, g->b_og, view(s->do_, T, H, 1), view(t->q, T, H, D),
                                   view(t->k, T, G, D), view(t->v, T, G, D), w->w_og, s->op);
}

xl_status xl_mixer_backward(xl_ctx *ctx, const xl_config *c, const xl_mixer *m, const xl_layer *w,
                            const xl_layer *g, const xl_batch *b, xl_mixer_tape *t, real *dq,
                            real *dk, real *dv, real *dxn, const real *dh, const real *xn,
                            const xl_layer_state *first, void *scratch) {
    ptrdiff_t T = b->T, H = c->H, G = c->G, D = c->D, N = b->B * T;
    workspace s;
    plan(ctx, c, b, 1, scratch, &s);
    const real *dhm = dh, *dhs = dh;
    if (m->kind == XL_MIX_HYBRID) {
        XL_TRY(xl_zero(ctx, N * H * D, s.dhm));
        XL_TRY(xl_zero(ctx, N * H * D, s.dhs));
        XL_TRY(xl_zero(ctx, N * H, s.do_));
        xl_gate a = gate_args(c, b);
        XL_TRY(xl_mix_backward(ctx, &a, view(s.dhm, T, H, D), view(dq ? s.dhs : NULL, T, H, D),
                               view(s.do_, T, H, 1), view(dh, T, H, D), view(t->hm, T, H, D),
                               view(t->hs, T, H, D), view(t->o, T, H, 1)));
        dhm = s.dhm, dhs = s.dhs;
    }
    if (xl_has_attention(m) && dq) {
        xl_attn a = attention_args(c, m, b);
        xl_kv past = first ? cache(first, b) : (xl_kv){0};
        XL_TRY(xl_attention_backward(
            ctx, &a, view(dq, T, H, D), view(dk, T, G, D), view(dv, T, G, D), view(dhs, T, H, D),
            NULL, view(t->q, T, H, D), view(t->k, T, G, D), view(t->v, T, G, D),
            view(t->hs, T, H, D), (xl_attn_sums){.lse = t->lse}, first ? &past : NULL, s.op));
    }
    if (xl_has_mlstm(m))
        XL_TRY(mlstm_backward(ctx, c, m, w, g, b, t, dq, dk, dv, dxn, dhm, xn, first, &s));
    if (m->kind == XL_MIX_LOLCATS) {
        xl_lolcats a = lolcats_args(c, m, b);
        xl_kv past = first ? cache(first, b) : (xl_kv){0};
        XL_TRY(xl_lolcats_backward(ctx, &a, view(dq, T, H, D), view(dk, T, G, D), view(dv, T, G, D),
                                   g->map_q, g->map_k, g->window_factor, view(dh, T, H, D),
                                   &t->lolcats, view(t->q, T, H, D), view(t->k, T, G, D),
                                   view(t->v, T, G, D), w->map_q, w->map_k, w->window_factor,
                                   first ? &past : NULL, cell(first), s.op));
    }
    double factor = c->attention_factor[m->rope];
    if (dq) XL_TRY(turn(ctx, c, m, b, dq, dk, factor, 1));
    if (m->kind != XL_MIX_HYBRID) return XL_OK;
    /* the output gate read q and k before RoPE: turn them back */
    XL_TRY(turn(ctx, c, m, b, t->q, t->k, 1 / factor, 1));
    return gate_backward(ctx, c, m, w, g, b, t, dq, dk, dv, &s);
}
