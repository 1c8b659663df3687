#include "model/block.h"

void xl_block_tape_plan(xl_plan *p, const xl_config *c, const xl_mixer *m, ptrdiff_t N,
                        xl_block_tape *t) {
    xl_mixer_tape_plan(p, c, m, N, &t->mixer);
    t->side_attn = xl_take_reals(p, N * c->d);
    t->rstd_attn = xl_take_reals(p, N);
    if (c->qk_norm) {
        t->q_raw = xl_take_reals(p, N * c->H * c->D);
        t->k_raw = xl_take_reals(p, N * c->G * c->D);
        t->rstd_q = xl_take_reals(p, N);
        t->rstd_k = xl_take_reals(p, N);
    }
    t->mid = xl_take_reals(p, N * c->d);
    t->side_mlp = xl_take_reals(p, N * c->d);
    t->rstd_mlp = xl_take_reals(p, N);
    t->gate = xl_take_reals(p, N * c->F);
    t->up = xl_take_reals(p, N * c->F);
    t->act = xl_take_reals(p, N * c->F);
}

typedef struct {
    real *out; /* [N, d] norms behind: a normalised output; its gradient */
    real *dact, *dxn, *dh, *dq, *dk, *dv; /* of the backward */
    void *mixer;                          /* the mixer's scratch; between mixers, the matmuls' */
} workspace;

static ptrdiff_t plan(const xl_ctx *ctx, const xl_config *c, const xl_batch *b, int training,
                      char *base, workspace *w) {
    xl_plan p = {.base = base, .size = PTRDIFF_MAX};
    ptrdiff_t N = b->B * b->T, q = c->H * c->D, kv = c->G * c->D;
    if (c->post_norm) w->out = xl_take_reals(&p, N * c->d);
    if (training) {
        w->dact = xl_take_reals(&p, N * c->F);
        w->dxn = xl_take_reals(&p, N * c->d);
        w->dh = xl_take_reals(&p, N * q);
        w->dq = xl_take_reals(&p, N * q);
        w->dk = xl_take_reals(&p, N * kv);
        w->dv = xl_take_reals(&p, N * kv);
    }
    ptrdiff_t most = xl_mixer_scratch(ctx, c, b, training);
    most = xl_max(most, xl_linear_scratch(ctx, N, c->d, q));
    most = xl_max(most, xl_linear_scratch(ctx, N, q, c->d));
    most = xl_max(most, xl_linear_scratch(ctx, N, c->d, c->F));
    most = xl_max(most, xl_linear_scratch(ctx, N, c->F, c->d));
    w->mixer = xl_take(&p, "", XL_ROLE_WORK, XL_DT_U8, 1, XL_SHAPE(most));
    return p.failed || most < 0 ? -1 : p.used;
}

ptrdiff_t xl_block_scratch(const xl_ctx *ctx, const xl_config *c, const xl_batch *b, int training) {
    workspace w;
    return plan(ctx, c, b, training, NULL, &w);
}

xl_status xl_block_project(xl_ctx *ctx, const xl_config *c, const xl_layer *w, const xl_batch *b,
                           xl_block_tape *t, const real *x, void *scratch) {
    ptrdiff_t N = b->B * b->T, q = c->H * c->D, kv = c->G * c->D;
    workspace s;
    plan(ctx, c, b, 0, scratch, &s);
    XL_TRY(xl_poll(ctx));
    const real *in = t->xn_attn = c->post_norm ? x : t->side_attn;
    real *q_out = c->qk_norm ? t->q_raw : t->mixer.q, *k_out = c->qk_norm ? t->k_raw : t->mixer.k;
    real eps = (real)c->eps;
    if (!c->post_norm)
        XL_TRY(xl_rmsnorm_forward(ctx, N, c->d, t->side_attn, t->rstd_attn, x, w->norm_attn, eps));
    XL_TRY(xl_linear_forward(ctx, N, c->d, q, q_out, in, w->wq, w->bq, s.mixer));
    XL_TRY(xl_linear_forward(ctx, N, c->d, kv, k_out, in, w->wk, w->bk, s.mixer));
    XL_TRY(xl_linear_forward(ctx, N, c->d, kv, t->mixer.v, in, w->wv, w->bv, s.mixer));
    if (!c->qk_norm) return XL_OK;
    XL_TRY(xl_rmsnorm_forward(ctx, N, q, t->mixer.q, t->rstd_q, q_out, w->norm_q, eps));
    return xl_rmsnorm_forward(ctx, N, kv, t->mixer.k, t->rstd_k, k_out, w->norm_k, eps);
}

/* y += norm(x); y NULL: rstd alone is wanted. */
static xl_status add_norm(xl_ctx *ctx, const xl_config *c, ptrdiff_t N, real *y, real *rstd,
                          const real *x, const real *weight, real *work) {
    XL_TRY(xl_rmsnorm_forward(ctx, N, c->d, work, rstd, x, weight, (real)c->eps));
    return y ? xl_add_heads(ctx, N, 1, 1, c->d, y, work) : XL_OK;
}

xl_status xl_block_finish(xl_ctx *ctx, const xl_config *c, const xl_layer *w, const xl_batch *b,
                          xl_block_tape *t, real *y, const real *x, const real *h, void *scratch) {
    ptrdiff_t N = b->B * b->T, d = c->d, F = c->F, q = c->H * c->D;
    workspace s;
    plan(ctx, c, b, 0, scratch, &s);
    const real *in = t->xn_mlp = c->post_norm ? t->mid : t->side_mlp;
    XL_TRY(xl_copy(ctx, N * d, t->mid, x));
    if (c->post_norm) {
        XL_TRY(xl_linear_forward(ctx, N, q, d, t->side_attn, h, w->wo, NULL, s.mixer));
        XL_TRY(add_norm(ctx, c, N, t->mid, t->rstd_attn, t->side_attn, w->norm_attn, s.out));
    } else {
        XL_TRY(xl_matmul(ctx, N, d, q, 1, h, q, 1, w->wo, 1, q, 1, t->mid, d, s.mixer));
        XL_TRY(xl_rmsnorm_forward(ctx, N, d, t->side_mlp, t->rstd_mlp, t->mid, w->norm_mlp,
                                  (real)c->eps));
    }
    XL_TRY(xl_linear_forward(ctx, N, d, F, t->gate, in, w->w_gate, NULL, s.mixer));
    XL_TRY(xl_linear_forward(ctx, N, d, F, t->up, in, w->w_up, NULL, s.mixer));
    XL_TRY(xl_swiglu_forward(ctx, N, F, t->act, t->gate, t->up));
    if (y) XL_TRY(xl_copy(ctx, N * d, y, t->mid));
    if (c->post_norm) {
        XL_TRY(xl_linear_forward(ctx, N, F, d, t->side_mlp, t->act, w->w_down, NULL, s.mixer));
        return add_norm(ctx, c, N, y, t->rstd_mlp, t->side_mlp, w->norm_mlp, s.out);
    }
    if (!y) return XL_OK;
    return xl_matmul(ctx, N, d, F, 1, t->act, F, 1, w->w_down, 1, F, 1, y, d, s.mixer);
}

xl_status xl_block_forward(xl_ctx *ctx, const xl_config *c, ptrdiff_t layer, const xl_layer *w,
                           const xl_batch *b, xl_block_tape *t, real *y, const real *x,
                           const xl_layer_state *first, const xl_layer_state *last, void *scratch) {
    workspace s;
    plan(ctx, c, b, 0, scratch, &s);
    XL_TRY(xl_block_project(ctx, c, w, b, t, x, scratch));
    XL_TRY(xl_mixer_forward(ctx, c, &c->mixer[layer], w, b, &t->mixer, t->xn_attn, first, last,
                            s.mixer));
    return xl_block_finish(ctx, c, w, b, t, y, x, t->mixer.h, scratch);
}

/* Gradient of the output of attention or MLP, from that of the stream to which it was added: the same,
 * or what the norm behind makes of it (into s->out). */
static xl_status output_gradient(xl_ctx *ctx, const xl_config *c, ptrdiff_t N, const real **dout,
                                 real *dw, const real *dx, const real *out, const real *weight,
                                 const real *rstd, workspace *s) {
    *dout = c->post_norm ? s->out : dx;
    if (!c->post_norm) return XL_OK;
    XL_TRY(xl_zero(ctx, N * c->d, s->out));
    return xl_rmsnorm_backward(ctx, N, c->d, s->out, dw, dx, out, weight, rstd);
}

/* Gradient before the norm of q or k (raw, [N, width]), into `to`. */
static xl_status head_norm_gradient(xl_ctx *ctx, ptrdiff_t N, ptrdiff_t width, real *to, real *dw,
                                    const real *dy, const real *raw, const real *weight,
                                    const real *rstd) {
    XL_TRY(xl_zero(ctx, N * width, to));
    return xl_rmsnorm_backward(ctx, N, width, to, dw, dy, raw, weight, rstd);
}

/* x_mid = x + h w_o^T;  y = x_mid + (silu(g) u) w_down^T, read upwards. The first gradient of a buffer
 * is written by its product (beta 0), not added to zeros. With norms behind, attention and MLP read the
 * stream itself, and their inputs' gradients are added to its own (dx). */
xl_status xl_block_backward(xl_ctx *ctx, const xl_config *c, ptrdiff_t layer, const xl_layer *w,
                            const xl_layer *g, const xl_batch *b, xl_block_tape *t, real *dx,
                            const real *x, const xl_layer_state *first, void *scratch) {
    ptrdiff_t N = b->B * b->T, d = c->d, F = c->F, q = c->H * c->D, kv = c->G * c->D;
    int post = c->post_norm;
    workspace s;
    plan(ctx, c, b, 1, scratch, &s);
    const real *dout, *in = t->xn_mlp;
    real *din = post ? dx : s.dxn;
    XL_TRY(xl_poll(ctx));
    XL_TRY(output_gradient(ctx, c, N, &dout, g->norm_mlp, dx, t->side_mlp, w->norm_mlp, t->rstd_mlp,
                           &s));
    XL_TRY(xl_matmul(ctx, N, F, d, 1, dout, d, 1, w->w_down, F, 1, 0, s.dact, F, s.mixer));
    XL_TRY(xl_linear_backward(ctx, N, F, d, NULL, (real *)g->w_down.data, NULL, dout, t->act,
                              w->w_down, s.mixer));
    XL_TRY(xl_swiglu_backward(ctx, N, F, t->gate, t->up, s.dact, t->gate, t->up));
    XL_TRY(xl_matmul(ctx, N, d, F, 1, t->gate, F, 1, w->w_gate, d, 1, post, din, d, s.mixer));
    XL_TRY(xl_linear_backward(ctx, N, d, F, NULL, (real *)g->w_gate.data, NULL, t->gate, in,
                              w->w_gate, s.mixer));
    XL_TRY(xl_linear_backward(ctx, N, d, F, din, (real *)g->w_up.data, NULL, t->up, in, w->w_up,
                              s.mixer));
    if (!post)
        XL_TRY(xl_rmsnorm_backward(ctx, N, d, dx, g->norm_mlp, s.dxn, t->mid, w->norm_mlp,
                                   t->rstd_mlp));

    in = t->xn_attn;
    XL_TRY(output_gradient(ctx, c, N, &dout, g->norm_attn, dx, t->side_attn, w->norm_attn,
                           t->rstd_attn, &s));
    XL_TRY(xl_matmul(ctx, N, q, d, 1, dout, d, 1, w->wo, q, 1, 0, s.dh, q, s.mixer));
    XL_TRY(xl_linear_backward(ctx, N, q, d, NULL, (real *)g->wo.data, NULL, dout, t->mixer.h, w->wo,
                              s.mixer));
    XL_TRY(xl_zero(ctx, N * q, s.dq));
    XL_TRY(xl_zero(ctx, N * kv, s.dk));
    XL_TRY(xl_zero(ctx, N * kv, s.dv));
    if (!post) XL_TRY(xl_zero(ctx, N * d, s.dxn));
    XL_TRY(xl_mixer_backward(ctx, c, &c->mixer[layer], w, g, b, &t->mixer, s.dq, s.dk, s.dv, din,
                             s.dh, in, first, s.mixer));
    const real *dq = s.dq, *dk = s.dk;
    if (c->qk_norm) { /* dh, then dq itself, are used up */
        XL_TRY(
            head_norm_gradient(ctx, N, q, s.dh, g->norm_q, s.dq, t->q_raw, w->norm_q, t->rstd_q));
        XL_TRY(
            head_norm_gradient(ctx, N, kv, s.dq, g->norm_k, s.dk, t->k_raw, w->norm_k, t->rstd_k));
        dq = s.dh, dk = s.dq;
    }
    XL_TRY(
        xl_linear_backward(ctx, N, d, q, din, (real *)g->wq.data, g->bq, dq, in, w->wq, s.mixer));
    XL_TRY(
        xl_linear_backward(ctx, N, d, kv, din, (real *)g->wk.data, g->bk, dk, in, w->wk, s.mixer));
    XL_TRY(xl_linear_backward(ctx, N, d, kv, din, (real *)g->wv.data, g->bv, s.dv, in, w->wv,
                              s.mixer));
    if (post) return XL_OK;
    return xl_rmsnorm_backward(ctx, N, d, dx, g->norm_attn, s.dxn, x, w->norm_attn, t->rstd_attn);
}
