#include "model/model.h"

#include <string.h>

static ptrdiff_t rows(const xl_batch *b) { return b->B * b->T; }

/* A tape that serves any layer: that of the hybrid mixer holds all others' but LoLCATs'. */
static void widest_tape(xl_plan *p, const xl_config *c, ptrdiff_t N, xl_block_tape *t) {
    xl_mixer all = {.kind = XL_MIX_HYBRID};
    ptrdiff_t l = 0;
    xl_block_tape_plan(p, c, &all, N, t);
    while (l < c->layers && c->mixer[l].kind != XL_MIX_LOLCATS) l++;
    if (l < c->layers) xl_lolcats_tape_plan(p, N, c->H, c->G, c->D, &t->mixer.lolcats);
}

/* Mixers of one branch write their output straight to h. */
static void one_branch(const xl_mixer *m, xl_mixer_tape *t, real *hm, real *hs) {
    t->hm = m->kind == XL_MIX_HYBRID ? hm : t->h;
    t->hs = m->kind == XL_MIX_HYBRID ? hs : t->h;
}

/* x: `hidden`, or where that is NULL the embeddings of the batch. */
static xl_status start(xl_ctx *ctx, const xl_config *c, const xl_params *p, xl_batch *b, real *rope,
                       real *x, const real *hidden) {
    ptrdiff_t N = rows(b);
    b->rope = rope;
    for (ptrdiff_t r = 0; r < c->ropes; r++)
        XL_TRY(xl_rope_table(ctx, N, c->D, rope + r * N * c->D, b->pos, c->inv_freq[r]));
    if (hidden) return xl_copy(ctx, N * c->d, x, hidden);
    return xl_embedding_forward(ctx, N, c->V, c->d, x, b->ids, p->embed);
}

static const xl_layer_state *layer_state(const xl_layer_state *states, ptrdiff_t l) {
    return states ? &states[l] : NULL;
}

/* ---- forward ------------------------------------------------------------------------------ */

typedef struct {
    real *rope, *x, *rstd;
    xl_block_tape tape;
    void *block;
} forward_work;

static ptrdiff_t forward_plan(const xl_ctx *ctx, const xl_config *c, const xl_batch *b, char *base,
                              forward_work *w) {
    xl_plan p = {.base = base, .size = PTRDIFF_MAX};
    ptrdiff_t N = rows(b), block = xl_block_scratch(ctx, c, b, 0);
    w->rope = xl_take_reals(&p, c->ropes * N * c->D);
    w->x = xl_take_reals(&p, N * c->d);
    w->rstd = xl_take_reals(&p, N);
    widest_tape(&p, c, N, &w->tape);
    w->block = xl_take(&p, "", XL_ROLE_WORK, XL_DT_U8, 1, XL_SHAPE(block));
    return p.failed || block < 0 ? -1 : p.used;
}

ptrdiff_t xl_model_forward_scratch(const xl_ctx *ctx, const xl_config *c, const xl_batch *b) {
    forward_work w;
    return forward_plan(ctx, c, b, NULL, &w);
}

/* A layer's part of a tap: `from` [count], NULL where the layer has no such thing. */
static void tap(real *to, ptrdiff_t layer, ptrdiff_t count, const real *from) {
    if (!to) return;
    to += layer * count;
    if (from)
        memcpy(to, from, (size_t)count * sizeof(real));
    else
        for (ptrdiff_t j = 0; j < count; j++) to[j] = NAN;
}

static void tap_mixer(const xl_taps *taps, const xl_config *c, ptrdiff_t l, ptrdiff_t N,
                      const xl_mixer_tape *t) {
    const xl_mixer *m = &c->mixer[l];
    tap(taps->o, l, N * c->H, m->kind == XL_MIX_HYBRID ? t->o : NULL);
    tap(taps->f, l, N * c->H, xl_has_mlstm(m) ? t->f : NULL);
    tap(taps->q, l, N * c->H * c->D, t->q);
    tap(taps->k, l, N * c->G * c->D, t->k);
}

xl_status xl_model_forward(xl_ctx *ctx, const xl_config *c, const xl_params *p, xl_batch *b,
                           xl_layer_state *states, real *hidden, const xl_taps *taps,
                           void *scratch) {
    forward_work w;
    forward_plan(ctx, c, b, scratch, &w);
    real *hm = w.tape.mixer.hm, *hs = w.tape.mixer.hs;
    XL_TRY(start(ctx, c, p, b, w.rope, w.x, NULL));
    for (ptrdiff_t l = 0; l < c->layers; l++) {
        one_branch(&c->mixer[l], &w.tape.mixer, hm, hs);
        XL_TRY(xl_block_forward(ctx, c, l, &p->layer[l], b, &w.tape, w.x, w.x,
                                layer_state(states, l), layer_state(states, l), w.block));
        tap_mixer(taps, c, l, rows(b), &w.tape.mixer);
    }
    return xl_rmsnorm_forward(ctx, rows(b), c->d, hidden, w.rstd, w.x, p->norm, (real)c->eps);
}

/* ---- stage II ----------------------------------------------------------------------------- */

typedef struct {
    real *rope, *stream; /* stream [layers + 1, N, d] */
    real *xn, *rstd, *dx, *dxn;
    xl_block_tape tape[XL_MAX_LAYERS];
    void *block; /* blocks and head share it */
} train_work;

static ptrdiff_t train_plan(const xl_ctx *ctx, const xl_config *c, const xl_batch *b,
                            const xl_head *head, char *base, train_work *w) {
    xl_plan p = {.base = base, .size = PTRDIFF_MAX};
    ptrdiff_t N = rows(b), block = xl_block_scratch(ctx, c, b, 1),
              loss = xl_head_scratch(ctx, head);
    w->rope = xl_take_reals(&p, c->ropes * N * c->D);
    w->stream = xl_take_reals(&p, (c->layers + 1) * N * c->d);
    w->xn = xl_take_reals(&p, N * c->d);
    w->rstd = xl_take_reals(&p, N);
    w->dx = xl_take_reals(&p, N * c->d);
    w->dxn = xl_take_reals(&p, N * c->d);
    xl_block_tape shared;
    if (b->recompute) widest_tape(&p, c, N, &shared);
    for (ptrdiff_t l = 0; l < c->layers; l++) {
        if (b->recompute) {
            w->tape[l] = shared;
            one_branch(&c->mixer[l], &w->tape[l].mixer, shared.mixer.hm, shared.mixer.hs);
        } else {
            xl_block_tape_plan(&p, c, &c->mixer[l], N, &w->tape[l]);
        }
    }
    w->block = xl_take(&p, "", XL_ROLE_WORK, XL_DT_U8, 1, XL_SHAPE(xl_max(block, loss)));
    return p.failed || block < 0 || loss < 0 ? -1 : p.used;
}

ptrdiff_t xl_model_train_scratch(const xl_ctx *ctx, const xl_config *c, const xl_batch *b,
                                 const xl_head *head) {
    train_work w;
    return train_plan(ctx, c, b, head, NULL, &w);
}

xl_status xl_model_train(xl_ctx *ctx, const xl_config *c, const xl_params *p, const xl_params *g,
                         xl_batch *b, const xl_head *head, double *sums, const int32_t *labels,
                         const int32_t *target_ids, const real *target_logp,
                         const xl_layer_state *first, const xl_layer_state *last, void *scratch) {
    train_work w;
    train_plan(ctx, c, b, head, scratch, &w);
    ptrdiff_t N = rows(b), row = N * c->d, L = c->layers;
    XL_TRY(start(ctx, c, p, b, w.rope, w.stream, NULL));
    for (ptrdiff_t l = 0; l < L; l++)
        XL_TRY(xl_block_forward(ctx, c, l, &p->layer[l], b, &w.tape[l], w.stream + (l + 1) * row,
                                w.stream + l * row, layer_state(first, l), layer_state(last, l),
                                w.block));
    XL_TRY(
        xl_rmsnorm_forward(ctx, N, c->d, w.xn, w.rstd, w.stream + L * row, p->norm, (real)c->eps));
    XL_TRY(xl_zero(ctx, row, w.dxn));
    XL_TRY(xl_head_loss(ctx, head, sums, NULL, g ? w.dxn : NULL, g ? (real *)g->head.data : NULL,
                        w.xn, p->head, labels, target_ids, target_logp, w.block));
    if (!g) return XL_OK;
    XL_TRY(xl_zero(ctx, row, w.dx));
    XL_TRY(xl_rmsnorm_backward(ctx, N, c->d, w.dx, g->norm, w.dxn, w.stream + L * row, p->norm,
                               w.rstd));
    for (ptrdiff_t l = L; l-- > 0;) {
        const real *x = w.stream + l * row;
        if (b->recompute)
            XL_TRY(xl_block_forward(ctx, c, l, &p->layer[l], b, &w.tape[l], NULL, x,
                                    layer_state(first, l), NULL, w.block));
        XL_TRY(xl_block_backward(ctx, c, l, &p->layer[l], &g->layer[l], b, &w.tape[l], w.dx, x,
                                 layer_state(first, l), w.block));
    }
    if (!g->embed.data) return XL_OK;
    return xl_embedding_backward(ctx, N, c->V, c->d, (real *)g->embed.data, w.dx, b->ids);
}

/* ---- stage I ------------------------------------------------------------------------------ */

typedef struct {
    real *rope, *x, *dh;
    xl_block_tape tape;    /* the student's mixer and the MLP */
    xl_mixer_tape teacher; /* the teacher's attention on a copy of q, k, v */
    void *block, *sums;
} align_work;

static ptrdiff_t align_plan(const xl_ctx *ctx, const xl_config *c, const xl_batch *b, char *base,
                            align_work *w) {
    xl_plan p = {.base = base, .size = PTRDIFF_MAX};
    ptrdiff_t N = rows(b), block = xl_block_scratch(ctx, c, b, 1), q = N * c->H * c->D;
    xl_mixer attention = {.kind = XL_MIX_ATTENTION};
    w->rope = xl_take_reals(&p, c->ropes * N * c->D);
    w->x = xl_take_reals(&p, N * c->d);
    w->dh = xl_take_reals(&p, q);
    widest_tape(&p, c, N, &w->tape);
    xl_mixer_tape_plan(&p, c, &attention, N, &w->teacher);
    w->block = xl_take(&p, "", XL_ROLE_WORK, XL_DT_U8, 1, XL_SHAPE(block));
    w->sums = xl_take(&p, "", XL_ROLE_WORK, XL_DT_U8, 1, XL_SHAPE(xl_sums_scratch(q)));
    return p.failed || block < 0 ? -1 : p.used;
}

ptrdiff_t xl_model_align_scratch(const xl_ctx *ctx, const xl_config *c, const xl_batch *b) {
    align_work w;
    return align_plan(ctx, c, b, NULL, &w);
}

/* One behind the last layer that has to be gone through. */
static ptrdiff_t layers_needed(const xl_config *c, const xl_stream *s) {
    ptrdiff_t l = c->layers;
    while (!s->out && s->compared && l > 0 && !s->compared[l - 1]) l--;
    return l;
}

xl_status xl_model_align(xl_ctx *ctx, const xl_config *c, const xl_params *p, const xl_params *g,
                         xl_batch *b, const xl_stream *stream, double scale, double *sums,
                         void *scratch) {
    align_work w;
    align_plan(ctx, c, b, scratch, &w);
    ptrdiff_t N = rows(b), q = N * c->H * c->D, kv = N * c->G * c->D;
    xl_mixer_tape *t = &w.tape.mixer;
    real *hm = t->hm, *hs = t->hs;
    ptrdiff_t layers = layers_needed(c, stream);
    XL_TRY(start(ctx, c, p, b, w.rope, w.x, stream->in));
    for (ptrdiff_t l = 0; l < layers; l++) {
        const xl_mixer *m = &c->mixer[l];
        const xl_mixer attention = xl_teacher_attention(m);
        const xl_layer *layer = &p->layer[l];
        int compared = !stream->compared || stream->compared[l];
        one_branch(m, t, hm, hs);
        XL_TRY(xl_block_project(ctx, c, layer, b, &w.tape, w.x, w.block));
        XL_TRY(xl_copy(ctx, q, w.teacher.q, t->q));
        XL_TRY(xl_copy(ctx, kv, w.teacher.k, t->k));
        XL_TRY(xl_copy(ctx, kv, w.teacher.v, t->v));
        XL_TRY(xl_mixer_forward(ctx, c, &attention, layer, b, &w.teacher, w.tape.xn_attn, NULL,
                                NULL, w.block));
        if (compared) {
            XL_TRY(xl_mixer_forward(ctx, c, m, layer, b, t, w.tape.xn_attn, NULL, NULL, w.block));
            XL_TRY(xl_mse_forward(ctx, q, sums + 2 * l, t->h, w.teacher.h, w.sums));
        }
        if (g && compared && xl_has_maps(m)) {
            XL_TRY(xl_zero(ctx, q, w.dh));
            XL_TRY(xl_mse_backward(ctx, q, w.dh, t->h, w.teacher.h, (real)scale));
            XL_TRY(xl_mixer_backward(ctx, c, m, layer, &g->layer[l], b, t, NULL, NULL, NULL, NULL,
                                     w.dh, w.tape.xn_attn, NULL, w.block));
        }
        if (l + 1 < layers || stream->out)
            XL_TRY(xl_block_finish(ctx, c, layer, b, &w.tape, w.x, w.x, w.teacher.h, w.block));
    }
    return stream->out ? xl_copy(ctx, N * c->d, stream->out, w.x) : XL_OK;
}
