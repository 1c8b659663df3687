#include "model/params.h"

#include <stdio.h>
#include <string.h>

static xl_status check(xl_ctx *ctx, const char *name, ptrdiff_t v, ptrdiff_t low, ptrdiff_t high) {
    if (v >= low && v <= high) return XL_OK;
    return xl_fail(ctx, XL_VALUE, "%s is %td, expected %td to %td", name, v, low, high);
}

xl_status xl_config_check(xl_ctx *ctx, const xl_config *c) {
    const ptrdiff_t most = INT32_MAX;
    XL_TRY(check(ctx, "num_hidden_layers", c->layers, 1, XL_MAX_LAYERS));
    XL_TRY(check(ctx, "hidden_size", c->d, 1, most));
    XL_TRY(check(ctx, "num_attention_heads", c->H, 1, 4096));
    XL_TRY(check(ctx, "num_key_value_heads", c->G, 1, c->H));
    XL_TRY(check(ctx, "head_dim", c->D, 2, XL_MAX_HEAD_WIDTH));
    XL_TRY(check(ctx, "intermediate_size", c->F, 1, most));
    XL_TRY(check(ctx, "vocab_size", c->V, 1, most));
    if (c->D % 2) return xl_fail(ctx, XL_VALUE, "head_dim is %td, RoPE needs an even one", c->D);
    if (c->H % c->G)
        return xl_fail(ctx, XL_VALUE,
                       "num_attention_heads %td is no multiple of num_key_value_heads %td", c->H,
                       c->G);
    XL_TRY(check(ctx, "the number of RoPE kinds", c->ropes, 1, XL_MAX_ROPES));
    for (ptrdiff_t l = 0; l < c->layers; l++) {
        XL_TRY(check(ctx, "window", c->mixer[l].window, 0, most));
        XL_TRY(check(ctx, "sinks", c->mixer[l].sinks, 0, most));
        XL_TRY(check(ctx, "teacher_window", c->mixer[l].teacher_window, 0, most));
        XL_TRY(check(ctx, "rope", c->mixer[l].rope, 0, c->ropes - 1));
    }
    return XL_OK;
}

/* ---- parameters --------------------------------------------------------------------------- */

typedef struct {
    xl_plan *plan;
    const uint8_t *wanted;
    xl_dtype matrix;
    int mixed;
} taker;

static void *take(taker *t, const char *name, xl_role role, xl_dtype dtype, int ndim,
                  const ptrdiff_t *shape) {
    ptrdiff_t index = t->plan->count;
    void *p = xl_take(t->plan, name, role, dtype, ndim, shape);
    return t->wanted && !t->wanted[index] ? NULL : p;
}

static real *vector(taker *t, const char *name, xl_role role, ptrdiff_t n) {
    return take(t, name, role, XL_DT_REAL, 1, XL_SHAPE(n));
}

static xl_mat matrix(taker *t, const char *name, xl_role role, ptrdiff_t rows, ptrdiff_t cols) {
    void *data = take(t, name, role, t->matrix, 2, XL_SHAPE(rows, cols));
    return xl_stored_mat(data, t->matrix, t->mixed, rows, cols);
}

static void layer_plan(taker *t, const xl_config *c, const xl_mixer *m, xl_layer *l) {
    ptrdiff_t d = c->d, q = c->H * c->D, kv = c->G * c->D;
    memset(l, 0, sizeof *l);
    const char *post_attention = "post_attention_layernorm.weight";
    if (!c->post_norm) l->norm_attn = vector(t, "input_layernorm.weight", XL_ROLE_NORM, d);
    l->wq = matrix(t, "self_attn.q_proj.weight", XL_ROLE_PROJECTION, q, d);
    l->wk = matrix(t, "self_attn.k_proj.weight", XL_ROLE_PROJECTION, kv, d);
    l->wv = matrix(t, "self_attn.v_proj.weight", XL_ROLE_PROJECTION, kv, d);
    l->wo = matrix(t, "self_attn.o_proj.weight", XL_ROLE_PROJECTION, d, q);
    if (c->attention_bias) {
        l->bq = vector(t, "self_attn.q_proj.bias", XL_ROLE_BIAS, q);
        l->bk = vector(t, "self_attn.k_proj.bias", XL_ROLE_BIAS, kv);
        l->bv = vector(t, "self_attn.v_proj.bias", XL_ROLE_BIAS, kv);
    }
    if (c->qk_norm) {
        l->norm_q = vector(t, "self_attn.q_norm.weight", XL_ROLE_NORM, q);
        l->norm_k = vector(t, "self_attn.k_norm.weight", XL_ROLE_NORM, kv);
    }
    if (xl_has_maps(m)) {
        const ptrdiff_t *shape = XL_SHAPE(c->H, c->D, c->D);
        l->map_q = take(t, "mixer.map_q", XL_ROLE_MAP, XL_DT_REAL, 3, shape);
        l->map_k = take(t, "mixer.map_k", XL_ROLE_MAP, XL_DT_REAL, 3, shape);
    }
    if (xl_has_gates(m)) {
        const ptrdiff_t *shape = XL_SHAPE(c->H, d);
        l->wi = take(t, "mixer.i_proj.weight", XL_ROLE_GATE, XL_DT_REAL, 2, shape);
        l->bi = vector(t, "mixer.i_proj.bias", XL_ROLE_BIAS, c->H);
        l->wf = take(t, "mixer.f_proj.weight", XL_ROLE_GATE, XL_DT_REAL, 2, shape);
        l->bf = vector(t, "mixer.f_proj.bias", XL_ROLE_BIAS, c->H);
    }
    if (m->kind == XL_MIX_HYBRID) {
        if (!m->gate_fixed)
            l->w_og = take(t, "mixer.o_gate.weight", XL_ROLE_GATE, XL_DT_REAL, 2,
                           XL_SHAPE(c->H, 3 * c->D));
        l->b_og = vector(t, "mixer.o_gate.bias", XL_ROLE_BIAS, c->H);
    }
    if (m->kind == XL_MIX_LOLCATS)
        l->window_factor = vector(t, "mixer.window_factor", XL_ROLE_BIAS, c->H);
    if (c->post_norm) l->norm_attn = vector(t, post_attention, XL_ROLE_NORM, d);
    l->norm_mlp = vector(t, c->post_norm ? "post_feedforward_layernorm.weight" : post_attention,
                         XL_ROLE_NORM, d);
    l->w_gate = matrix(t, "mlp.gate_proj.weight", XL_ROLE_MLP, c->F, d);
    l->w_up = matrix(t, "mlp.up_proj.weight", XL_ROLE_MLP, c->F, d);
    l->w_down = matrix(t, "mlp.down_proj.weight", XL_ROLE_MLP, d, c->F);
}

void xl_params_plan(xl_plan *plan, const xl_config *c, const uint8_t *wanted, xl_params *out) {
    taker t = {plan, wanted, c->weights, c->mixed};
    plan->group = -1;
    plan->prefix = NULL;
    out->embed = matrix(&t, "model.embed_tokens.weight", XL_ROLE_EMBEDDING, c->V, c->d);
    for (ptrdiff_t i = 0; i < c->layers; i++) {
        char prefix[64];
        snprintf(prefix, sizeof prefix, "model.layers.%td.", i);
        plan->group = (int)i;
        plan->prefix = prefix;
        layer_plan(&t, c, &c->mixer[i], &out->layer[i]);
    }
    plan->group = -1;
    plan->prefix = NULL;
    out->norm = vector(&t, "model.norm.weight", XL_ROLE_NORM, c->d);
    out->head = out->embed;
    if (!c->tied) out->head = matrix(&t, "lm_head.weight", XL_ROLE_HEAD, c->V, c->d);
}

/* ---- states ------------------------------------------------------------------------------- */

void xl_attention_span(const xl_mixer *m, ptrdiff_t span, ptrdiff_t *window, ptrdiff_t *sinks) {
    int full = m->kind == XL_MIX_ATTENTION && m->window == 0;
    if (full || m->window == 0 || m->window >= span) {
        *window = xl_max(1, span);
        *sinks = 0;
    } else {
        *window = m->window;
        *sinks = m->sinks;
    }
}

void xl_state_plan(xl_plan *plan, const xl_config *c, ptrdiff_t B, ptrdiff_t capacity,
                   xl_layer_state *out) {
    for (ptrdiff_t i = 0; i < c->layers; i++) {
        xl_layer_state *s = &out[i];
        const xl_mixer *m = &c->mixer[i];
        char prefix[64];
        snprintf(prefix, sizeof prefix, "layers.%td.", i);
        plan->group = (int)i;
        plan->prefix = prefix;
        memset(s, 0, sizeof *s);
        if (xl_has_cache(m)) {
            ptrdiff_t window, sinks;
            xl_attention_span(m, capacity, &window, &sinks);
            s->kv.slots = window + sinks;
            const ptrdiff_t *shape = XL_SHAPE(B, s->kv.slots, c->G, c->D);
            s->kv.k = xl_take(plan, "k", XL_ROLE_WORK, XL_DT_REAL, 4, shape);
            s->kv.v = xl_take(plan, "v", XL_ROLE_WORK, XL_DT_REAL, 4, shape);
        }
        if (xl_has_maps(m)) {
            s->cell.c =
                xl_take(plan, "c", XL_ROLE_WORK, XL_DT_REAL, 4, XL_SHAPE(B, c->H, c->D, c->D));
            s->cell.n = xl_take(plan, "n", XL_ROLE_WORK, XL_DT_REAL, 3, XL_SHAPE(B, c->H, c->D));
            s->cell.m = xl_take(plan, "m", XL_ROLE_WORK, XL_DT_REAL, 2, XL_SHAPE(B, c->H));
        }
    }
    plan->group = -1;
    plan->prefix = NULL;
}
