#include "model/block.h"

void xl_block_tape_plan(xl_plan *p, const xl_config *c, const xl_mixer *m, ptrdiff_t N,
                        xl_block_tape *t) {
    xl_mixer_tape_plan(p, c, m, N, &t->mixer);
    t->xn_attn = xl_take_reals(p, N * c->d);
    t->rstd_attn = xl_take_reals(p, N);
    t->mid = xl_take_reals(p, N * c->d);
    t->xn_mlp = xl_take_reals(p, N * c->d);
    t->rstd_mlp = xl_take_reals(p, N);
    t->gate = xl_take_reals(p, N * c->F);
    t->up = xl_take_reals(p, N * c->F);
    t->act = xl_take_reals(p, N * c->F);
}

typedef struct {
    real *dact, *dxn, *dh, *dq, *dk, *dv; /* of the backward */
    void *mixer;                          /* the mixer's scratch; between mixers, the matmuls' */
} workspace;

static ptrdiff_t plan(const xl_ctx *ctx, const xl_config *c, const xl_batch *b, int training,
                      char *base, workspace *w) {
    xl_plan p = {.base = base, .size = PTRDIFF_MAX};
    ptrdiff_t N = b->B * b->T, q = c->H * c->D, kv = c->G * c->D;
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
    XL_TRY(
        xl_rmsnorm_forward(ctx, N, c->d, t->xn_attn, t->rstd_attn, x, w->norm_attn, (real)c->eps));
    XL_TRY(xl_linear_forward(ctx, N, c->d, q, t->mixer.q, t->xn_attn, w->wq, w->bq, s.mixer));
    XL_TRY(xl_linear_forward(ctx, N, c->d, kv, t->mixer.k, t->xn_attn, w->wk, w->bk, s.mixer));
    return xl_linear_forward(ctx, N, c->d, kv, t->mixer.v, t->xn_attn, w->wv, w->bv, s.mixer);
}

xl_status xl_block_finish(xl_ctx *ctx, const xl_config *c, const xl_layer *w, const xl_batch *b,
                          xl_block_tape *t, real *y, const real *x, const real *h, void *scratch) {
    ptrdiff_t N = b->B * b->T, q = c->H * c->D;
    workspace s;
    plan(ctx, c, b, 0, scratch, &s);
    XL_TRY(xl_copy(ctx, N * c->d, t->mid, x));
    XL_TRY(xl_matmul(ctx, N, c->d, q, 1, h, q, 1, w->wo, 1, q, 1, t->mid, c->d, s.mixer));
    XL_TRY(xl_rmsnorm_forward(ctx, N, c->d, t->xn_mlp, t->rstd_mlp, t->mid, w->norm_mlp,
                              (real)c->eps));
    XL_TRY(xl_linear_forward(ctx, N, c->d, c->F, t->gate, t->xn_mlp, w->w_gate, NULL, s.mixer));
    XL_TRY(xl_linear_forward(ctx, N, c->d, c->F, t->up, t->xn_mlp, w->w_up, NULL, s.mixer));
    XL_TRY(xl_swiglu_forward(ctx, N, c->F, t->act, t->gate, t->up));
    if (!y) return XL_OK;
    XL_TRY(xl_copy(ctx, N * c->d, y, t->mid));
    return xl_matmul(ctx, N, c->d, c->F, 1, t->act, c->F, 1, w->w_down, 1, c->F, 1, y, c->d,
                     s.mixer);
}

xl_status xl_block_forward(xl_ctx *ctx, const xl_config *c, ptrdiff_t layer, const xl_layer *w,
                           const xl_batch *b, xl_block_tape *t, real *y, const real *x,
                           xl_layer_state *state, void *scratch) {
    workspace s;
    plan(ctx, c, b, 0, scratch, &s);
    XL_TRY(xl_block_project(ctx, c, w, b, t, x, scratch));
    XL_TRY(xl_mixer_forward(ctx, c, &c->mixer[layer], w, b, &t->mixer, t->xn_attn, state, s.mixer));
    return xl_block_finish(ctx, c, w, b, t, y, x, t->mixer.h, scratch);
}

/* x_mid = x + h w_o^T;  y = x_mid + (silu(g) u) w_down^T, read upwards. The first gradient of a buffer
 * is written by its product (beta 0), not added to zeros. */
xl_status xl_block_backward(xl_ctx *ctx, const xl_config *c, ptrdiff_t layer, const xl_layer *w,
                            const xl_layer *g, const xl_batch *b, xl_block_tape *t, real *dx,
                            const real *x, void *scratch) {
    ptrdiff_t N = b->B * b->T, d = c->d, F = c->F, q = c->H * c->D, kv = c->G * c->D;
    workspace s;
    plan(ctx, c, b, 1, scratch, &s);
    XL_TRY(xl_poll(ctx));
    XL_TRY(xl_matmul(ctx, N, F, d, 1, dx, d, 1, w->w_down, F, 1, 0, s.dact, F, s.mixer));
    XL_TRY(xl_linear_backward(ctx, N, F, d, NULL, (real *)g->w_down.data, NULL, dx, t->act,
                              w->w_down, s.mixer));
    XL_TRY(xl_swiglu_backward(ctx, N, F, t->gate, t->up, s.dact, t->gate, t->up));
    XL_TRY(xl_matmul(ctx, N, d, F, 1, t->gate, F, 1, w->w_gate, d, 1, 0, s.dxn, d, s.mixer));
    XL_TRY(xl_linear_backward(ctx, N, d, F, NULL, (real *)g->w_gate.data, NULL, t->gate, t->xn_mlp,
                              w->w_gate, s.mixer));
    XL_TRY(xl_linear_backward(ctx, N, d, F, s.dxn, (real *)g->w_up.data, NULL, t->up, t->xn_mlp,
                              w->w_up, s.mixer));
    XL_TRY(
        xl_rmsnorm_backward(ctx, N, d, dx, g->norm_mlp, s.dxn, t->mid, w->norm_mlp, t->rstd_mlp));

    XL_TRY(xl_matmul(ctx, N, q, d, 1, dx, d, 1, w->wo, q, 1, 0, s.dh, q, s.mixer));
    XL_TRY(xl_linear_backward(ctx, N, q, d, NULL, (real *)g->wo.data, NULL, dx, t->mixer.h, w->wo,
                              s.mixer));
    XL_TRY(xl_zero(ctx, N * q, s.dq));
    XL_TRY(xl_zero(ctx, N * kv, s.dk));
    XL_TRY(xl_zero(ctx, N * kv, s.dv));
    XL_TRY(xl_zero(ctx, N * d, s.dxn));
    XL_TRY(xl_mixer_backward(ctx, c, &c->mixer[layer], w, g, b, &t->mixer, s.dq, s.dk, s.dv, s.dxn,
                             s.dh, t->xn_attn, s.mixer));
    XL_TRY(xl_linear_backward(ctx, N, d, q, s.dxn, (real *)g->wq.data, g->bq, s.dq, t->xn_attn,
                              w->wq, s.mixer));
    XL_TRY(xl_linear_backward(ctx, N, d, kv, s.dxn, (real *)g->wk.data, g->bk, s.dk, t->xn_attn,
                              w->wk, s.mixer));
    XL_TRY(xl_linear_backward(ctx, N, d, kv, s.dxn, (real *)g->wv.data, g->bv, s.dv, t->xn_attn,
                              w->wv, s.mixer));
    return xl_rmsnorm_backward(ctx, N, d, dx, g->norm_attn, s.dxn, x, w->norm_attn, t->rstd_attn);
}
