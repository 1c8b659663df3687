/* One chunk of the mLSTM: its exponents, outputs, what it adds to the state, gradients. */
#include "ops/mlstm.h"

#include <omp.h>
#include <string.h>

ptrdiff_t xl_mlstm_backward_chunk_length(const xl_mlstm *a) {
    return xl_min(a->chunk, xl_max(1, a->T));
}

ptrdiff_t xl_mlstm_chunk_length(const xl_mlstm *a) {
    return a->form == XL_PARALLEL ? xl_max(1, a->T) : xl_mlstm_backward_chunk_length(a);
}

double *xl_mlstm_take_doubles(xl_plan *p, ptrdiff_t count) {
    return xl_take(p, "", XL_ROLE_WORK, XL_DT_U8, 2, XL_SHAPE(count, (ptrdiff_t)sizeof(double)));
}

/* The parallel form needs [T, T] forward; the backward is chunkwise always and keeps one state for
 * each chunk of the longest segment: (T / S) (D E + D) reals a thread. */
static void plan_thread(xl_plan *p, const xl_ctx *ctx, const xl_mlstm *a, xl_mlstm_work *w) {
    ptrdiff_t S = xl_mlstm_chunk_length(a), back = xl_mlstm_backward_chunk_length(a), D = a->D,
              E = a->E, T = a->T;
    ptrdiff_t chunks = xl_ceil_div(T, back), wide = xl_max(D, E), most = xl_max(S, wide);
    w->lf = xl_mlstm_take_doubles(p, T);
    w->b = xl_mlstm_take_doubles(p, S);
    w->c = xl_mlstm_take_doubles(p, S);
    w->top = xl_mlstm_take_doubles(p, S);
    w->last = xl_take_reals(p, S);
    w->C = xl_take_reals(p, D * E);
    w->n = xl_take_reals(p, D);
    w->U = xl_take_reals(p, D * E);
    w->u = xl_take_reals(p, D);
    w->q = xl_take_reals(p, S * D);
    w->k = xl_take_reals(p, S * D);
    w->decay = xl_take(p, "", XL_ROLE_WORK, XL_DT_REAL, 2, XL_SHAPE(S, S));
    w->P = xl_take(p, "", XL_ROLE_WORK, XL_DT_REAL, 2, XL_SHAPE(S, S));
    w->w = xl_take_reals(p, S);
    w->den = xl_take_reals(p, S);
    w->num = xl_take_reals(p, S * E);
    w->carried = xl_take_reals(p, S * E);
    w->saved = xl_take(p, "", XL_ROLE_WORK, XL_DT_REAL, 3, XL_SHAPE(chunks, D, E + 1));
    w->saved_m = xl_mlstm_take_doubles(p, chunks);
    w->x = xl_mlstm_take_doubles(p, T);
    w->G = xl_take_reals(p, back * E);
    w->e = xl_take_reals(p, back);
    w->dC = xl_take_reals(p, D * E);
    w->dn = xl_take_reals(p, D);
    w->dP = xl_take_reals(p, back * back);
    w->dq = xl_take_reals(p, back * D);
    w->dk = xl_take_reals(p, back * D);
    w->dv = xl_take_reals(p, back * E);
    w->through = xl_take_reals(p, back * wide);
    w->left_q = xl_take_left(p, ctx, S, D);
    w->left = xl_take_left(p, ctx, most, most);
    w->right_v = xl_take_right(p, ctx, S, wide);
    w->right = xl_take_right(p, ctx, most, xl_round_up(wide, XL_PAIR_K));
    w->phi_q = xl_take_reals(p, S * D);
    w->phi_k = xl_take_reals(p, S * D);
    w->map_q = xl_take_right(p, ctx, D, D);
    w->map_k = xl_take_right(p, ctx, D, D);
    w->head = -1;
}

xl_mlstm_work xl_mlstm_place_thread(const xl_ctx *ctx, const xl_mlstm *a, char *base) {
    xl_plan measure = {0};
    xl_mlstm_work w;
    plan_thread(&measure, ctx, a, &w);
    xl_plan p = {.base = base + omp_get_thread_num() * measure.used, .size = PTRDIFF_MAX};
    plan_thread(&p, ctx, a, &w);
    return w;
}

ptrdiff_t xl_mlstm_threads_bytes(const xl_ctx *ctx, const xl_mlstm *a) {
    xl_plan p = {0};
    xl_mlstm_work w;
    ptrdiff_t total;
    plan_thread(&p, ctx, a, &w);
    return p.failed || __builtin_mul_overflow(p.used, (ptrdiff_t)ctx->threads, &total) ? -1 : total;
}

/* ---- a row, its segments, its chunks ------------------------------------------------------- */

ptrdiff_t xl_mlstm_row_length(const xl_mlstm *a, ptrdiff_t b) {
    return a->lengths ? a->lengths[b] : a->T;
}

void xl_mlstm_log_forget(const xl_ctx *ctx, const xl_mlstm_arrays *r, ptrdiff_t T, ptrdiff_t b,
                         ptrdiff_t h, xl_mlstm_work *w) {
    for (ptrdiff_t t0 = 0; t0 < T; t0 += XL_GATES) {
        real f[XL_GATES];
        ptrdiff_t n = xl_min(XL_GATES, T - t0);
        for (ptrdiff_t t = 0; t < n; t++) f[t] = *xl_at(r->f, b, h, t0 + t);
        ctx->k->logsigmoid(n, f, f);
        for (ptrdiff_t t = 0; t < n; t++) w->lf[t0 + t] = (double)f[t];
    }
}

/* The state is forgotten before step t: a document starts there, or f = -inf. */
int xl_mlstm_starts(const xl_mlstm *a, const xl_mlstm_work *w, ptrdiff_t b, ptrdiff_t t) {
    return (a->reset && a->reset[b * a->T + t]) || w->lf[t] == -INFINITY;
}

ptrdiff_t xl_mlstm_segment_end(const xl_mlstm *a, const xl_mlstm_work *w, ptrdiff_t b, ptrdiff_t t,
                               ptrdiff_t T) {
    for (t++; t < T && !xl_mlstm_starts(a, w, b, t);) t++;
    return t;
}

/* Loads the start state; returns its m, -inf for none. */
double xl_mlstm_start_state(const xl_mlstm *a, xl_mlstm_work *w, xl_mlstm_state s, ptrdiff_t at,
                            int forget) {
    ptrdiff_t D = a->D, E = a->E;
    double m = forget || !s.c ? -INFINITY : (double)s.m[at];
    if (m == -INFINITY) {
        memset(w->C, 0, (size_t)(D * E) * sizeof(real));
        memset(w->n, 0, (size_t)D * sizeof(real));
    } else if (w->C != s.c + at * D * E) {
        memcpy(w->C, s.c + at * D * E, (size_t)(D * E) * sizeof(real));
        memcpy(w->n, s.n + at * D, (size_t)D * sizeof(real));
    }
    return m;
}

static xl_rows rows_at(xl_heads x, ptrdiff_t b, ptrdiff_t h, ptrdiff_t t) {
    return (xl_rows){xl_at(x, b, h, t), x.st};
}

static void scale_rows(const xl_ctx *ctx, ptrdiff_t S, ptrdiff_t width, const real *by, xl_rows x,
                       real *to) {
    for (ptrdiff_t s = 0; s < S; s++)
        ctx->k->scale_to(width, by[s], x.p + s * x.st, to + s * width);
}

static void scale_q(const xl_ctx *ctx, const xl_mlstm *a, xl_mlstm_work *w, xl_chunk *c) {
    if (a->scale == 1) return;
    for (ptrdiff_t t = 0; t < c->S; t++)
        ctx->k->scale_to(a->D, a->scale, c->q.p + t * c->q.st, w->q + t * a->D);
    c->q = (xl_rows){w->q, a->D};
}

/* The chunk at step t0 behind the state (C, n, m), its exponents, and how the state goes on. m gets
 * the first step's log f added: that decay acts on the carry alone, so b starts at 0 and never meets
 * the mask of a document start. */
xl_chunk xl_mlstm_open_chunk(const xl_ctx *ctx, const xl_mlstm *a, xl_mlstm_work *w,
                             const xl_mlstm_arrays *r, ptrdiff_t b, ptrdiff_t h, ptrdiff_t t0,
                             ptrdiff_t S, const real *C, const real *n, double m) {
    if (m != -INFINITY) m += w->lf[t0];
    double sum = 0, own = -INFINITY;
    for (ptrdiff_t t = 0; t < S; t++) {
        sum += t ? w->lf[t0 + t] : 0;
        w->b[t] = sum;
        w->c[t] = (double)*xl_at(r->i, b, h, t0 + t) - sum;
        own = w->c[t] <= own ? own : w->c[t]; /* a NaN stays */
        w->top[t] = own <= m ? m : own;
    }
    double top = w->top[S - 1];
    for (ptrdiff_t s = 0; s < S; s++) w->last[s] = (real)(own == -INFINITY ? own : w->c[s] - own);
    ctx->k->exp(S, w->last, w->last);
    w->keep = m == -INFINITY ? 0 : (real)exp(m - top);
    w->add = own == -INFINITY ? 0 : (real)exp(own - top);
    xl_chunk c = {b,
                  h,
                  t0,
                  S,
                  m,
                  C,
                  n,
                  rows_at(r->q, b, h, t0),
                  rows_at(r->k, b, r->maps ? h / (a->H / r->maps->G) : h, t0),
                  rows_at(r->v, b, h / a->v_rep, t0)};
    if (!r->maps) scale_q(ctx, a, w, &c);
    return c;
}

/* Features of an open chunk's rows x into `own`, or where they are kept. */
static xl_rows map_rows(const xl_ctx *ctx, const xl_mlstm *a, xl_mlstm_work *w, const xl_chunk *c,
                        xl_map_form form, xl_rows x, const real *map, xl_heads phi, real *own) {
    ptrdiff_t D = a->D, st = phi.p ? phi.st : D;
    real *to = phi.p ? xl_at(phi, c->b, c->h, c->t0) : own;
    xl_left left = xl_pack_left(ctx, a->mixed, c->S, D, x.p, x.st, 1, w->left);
    xl_packed_product(ctx, a->mixed, c->S, D, D, 1, left, map, 0, to, st);
    xl_features(ctx, form, c->S, D, to, st);
    return (xl_rows){to, st};
}

void xl_mlstm_map_chunk(const xl_ctx *ctx, const xl_mlstm *a, xl_mlstm_work *w,
                        const xl_mlstm_arrays *r, xl_chunk *c, int both) {
    const xl_mlstm_maps *maps = r->maps;
    ptrdiff_t D = a->D;
    if (!maps) return;
    if (w->head != c->h) {
        xl_pack_right(ctx, a->mixed, D, D, maps->w_q + c->h * D * D, D, 1, w->map_q);
        xl_pack_right(ctx, a->mixed, D, D, maps->w_k + c->h * D * D, D, 1, w->map_k);
        w->head = c->h;
    }
    c->k = map_rows(ctx, a, w, c, maps->form, c->k, w->map_k, maps->phi_k, w->phi_k);
    if (!both) return;
    c->q = map_rows(ctx, a, w, c, maps->form, c->q, w->map_q, maps->phi_q, w->phi_q);
    scale_q(ctx, a, w, c);
}

/* P = (q k^T) o decay, den = rowsum P + w q.n, and q packed; w where there is a state. */
static xl_left chunk_scores(const xl_ctx *ctx, const xl_mlstm *a, xl_mlstm_work *w,
                            const xl_chunk *c) {
    const xl_kernels *kn = ctx->k;
    ptrdiff_t D = a->D, S = c->S;
    xl_left q = xl_pack_left(ctx, a->mixed, S, D, c->q.p, c->q.st, 1, w->left_q);
    xl_pack_right(ctx, a->mixed, D, S, c->k.p, 1, c->k.st, w->right);
    xl_packed_product(ctx, a->mixed, S, S, D, 1, q, w->right, 0, w->P, S);
    for (ptrdiff_t t = 0; t < S; t++)
        w->den[t] = kn->decay_row(S, t + 1, w->c, w->top[t], w->decay + t * S, w->P + t * S);
    if (c->m == -INFINITY) return q;
    for (ptrdiff_t t = 0; t < S; t++) w->w[t] = (real)(c->m - w->top[t]);
    kn->exp(S, w->w, w->w);
    for (ptrdiff_t t = 0; t < S; t++) w->den[t] += w->w[t] * kn->dot(D, c->q.p + t * c->q.st, c->n);
    return q;
}

/* U, u: what the chunk adds to the state. It depends on the chunk alone. right_v: v packed. */
void xl_mlstm_chunk_adds(const xl_ctx *ctx, const xl_mlstm *a, xl_mlstm_work *w, const xl_chunk *c,
                         real *U, real *u) {
    ptrdiff_t D = a->D, S = c->S;
    scale_rows(ctx, S, D, w->last, c->k, w->k);
    memset(u, 0, (size_t)D * sizeof(real));
    for (ptrdiff_t s = 0; s < S; s++) ctx->k->add(D, w->k + s * D, u);
    xl_left k = xl_pack_left(ctx, a->mixed, D, S, w->k, 1, D, w->left);
    xl_packed_product(ctx, a->mixed, D, a->E, S, 1, k, w->right_v, 0, U, a->E);
}

/* The state behind the chunk that is open into C, n, which may be those before it; returns its m. */
double xl_mlstm_advance(const xl_ctx *ctx, const xl_mlstm *a, const xl_mlstm_work *w,
                        const xl_chunk *c, const real *U, const real *u, real *C, real *n) {
    ctx->k->combine(a->D * a->E, w->keep, c->C, w->add, U, C);
    ctx->k->combine(a->D, w->keep, c->n, w->add, u, n);
    return w->b[c->S - 1] + w->top[c->S - 1];
}

void xl_mlstm_pack_v(const xl_ctx *ctx, const xl_mlstm *a, xl_mlstm_work *w, const xl_chunk *c) {
    xl_pack_right(ctx, a->mixed, c->S, a->E, c->v.p, c->v.st, 1, w->right_v);
}

/* 1 / divisor of a step, 0 where the divisor is 0; *slope is d divisor / d den. mu is the exponent of
 * the stabiliser: the floor 1 of the unscaled den is exp(-mu) here. */
real xl_mlstm_inverse_divisor(const xl_mlstm *a, real den, double mu, real *slope) {
    *slope = 1;
    if (a->normalizer == XL_MAX) {
        real least = (real)exp(-mu);
        *slope = den < 0 ? -1 : 1;
        den = den < 0 ? -den : den;
        if (den < least) den = least, *slope = 0; /* a NaN is not less */
    }
    return den == 0 ? 0 : 1 / den;
}

void xl_mlstm_log_den(const xl_mlstm_arrays *r, ptrdiff_t b, ptrdiff_t h, ptrdiff_t t, real den,
                      double mu) {
    if (r->log_den.p) *xl_at(r->log_den, b, h, t) = (real)(log((double)den) + mu);
}

/* ---- outputs and gradients of a chunk ------------------------------------------------------ */

/* h of an open chunk; leaves v packed in right_v. */
void xl_mlstm_forward_chunk(const xl_ctx *ctx, const xl_mlstm *a, xl_mlstm_work *w,
                            const xl_mlstm_arrays *r, const xl_chunk *c) {
    const xl_kernels *kn = ctx->k;
    ptrdiff_t D = a->D, E = a->E, S = c->S;
    xl_left q = chunk_scores(ctx, a, w, c);
    if (c->m != -INFINITY) {
        xl_pack_right(ctx, a->mixed, D, E, c->C, E, 1, w->right);
        xl_packed_product(ctx, a->mixed, S, E, D, 1, q, w->right, 0, w->carried, E);
    }
    xl_mlstm_pack_v(ctx, a, w, c);
    xl_left P = xl_pack_left(ctx, a->mixed, S, S, w->P, S, 1, w->left);
    xl_packed_product(ctx, a->mixed, S, E, S, 1, P, w->right_v, 0, w->num, E);
    for (ptrdiff_t t = 0; t < S; t++) {
        real slope, *out = xl_at(r->h, c->b, c->h, c->t0 + t);
        double mu = w->b[t] + w->top[t];
        real inverse = xl_mlstm_inverse_divisor(a, w->den[t], mu, &slope);
        xl_mlstm_log_den(r, c->b, c->h, c->t0 + t, w->den[t], mu);
        if (c->m == -INFINITY)
            kn->scale_to(E, inverse, w->num + t * E, out);
        else
            kn->combine(E, inverse, w->num + t * E, inverse * w->w[t], w->carried + t * E, out);
    }
}

void xl_mlstm_pad(const xl_mlstm *a, const xl_mlstm_arrays *r, ptrdiff_t b, ptrdiff_t h,
                  ptrdiff_t t) {
    for (; t < a->T; t++) {
        memset(xl_at(r->h, b, h, t), 0, (size_t)a->E * sizeof(real));
        xl_mlstm_log_den(r, b, h, t, 0, 0);
    }
}

static void add_rows(const xl_ctx *ctx, xl_heads to, const real *from, ptrdiff_t width, real scale,
                     const xl_chunk *c) {
    for (ptrdiff_t t = 0; to.p && t < c->S; t++)
        ctx->k->axpy(width, scale, from + t * width, xl_at(to, c->b, c->h, c->t0 + t));
}

/* Gradients of an open chunk from dh and from dC, dn on the state behind it, which become those on the
 * state before it. With G_t = dh_t / divisor and e_t the gradient of den_t:
 *     e_t = -(d divisor / d den) / divisor * G_t.num_t,  G_t.num_t = P_t.(G v^T)_t + w_t q_t.(C G_t)
 *     and with a gradient on log den, under ratio, 1 / divisor times that more
 *     dS = (G v^T + e 1^T) o decay                       on the scores q k^T
 *     dq = dS k + w (G C^T + e n^T)      dk = dS^T q + last (v dC^T + 1 dn^T)
 *     dv = P^T G + last k dC             dC' = keep dC + (w q)^T G,  dn' = keep dn + (w q)^T e
 * where last is the last row of the decay. First all that does not ask for dC: adds dq, writes dk [S, D],
 * dv [S, E] and, where there is a state before, dU, du, what the chunk adds to dC and dn; leaves x_t =
 * q_t.dq_t. */
void xl_mlstm_backward_inside(const xl_ctx *ctx, const xl_mlstm *a, xl_mlstm_work *w,
                              const xl_mlstm_arrays *r, const xl_chunk *c, real *dk, real *dv,
                              real *dU, real *du) {
    const xl_kernels *kn = ctx->k;
    ptrdiff_t D = a->D, E = a->E, S = c->S;
    int carry = c->m != -INFINITY, mixed = a->mixed;
    chunk_scores(ctx, a, w, c);
    for (ptrdiff_t t = 0; t < S; t++) {
        real slope, inverse = xl_mlstm_inverse_divisor(a, w->den[t], w->b[t] + w->top[t], &slope);
        kn->scale_to(E, inverse, xl_at(r->dh, c->b, c->h, c->t0 + t), w->G + t * E);
        w->e[t] = -slope * inverse;
    }
    xl_left left = xl_pack_left(ctx, mixed, S, E, w->G, E, 1, w->left);
    xl_pack_right(ctx, mixed, E, S, c->v.p, 1, c->v.st, w->right);
    xl_packed_product(ctx, mixed, S, S, E, 1, left, w->right, 0, w->dP, S);
    if (carry) {
        xl_pack_right(ctx, mixed, E, D, c->C, 1, E, w->right);
        xl_packed_product(ctx, mixed, S, D, E, 1, left, w->right, 0, w->dq, D);
    }
    for (ptrdiff_t t = 0; t < S; t++) {
        real *row = w->dP + t * S, *dq = w->dq + t * D;
        real along = kn->masked_dot(S, t + 1, w->P + t * S, row);
        if (carry) along += w->w[t] * kn->dot(D, c->q.p + t * c->q.st, dq);
        if (r->dlog_den.p) along -= *xl_at(r->dlog_den, c->b, c->h, c->t0 + t);
        real e = w->e[t] *= along;
        kn->add_mul(t + 1, e, w->decay + t * S, row);
        if (carry) kn->combine(D, w->w[t], dq, w->w[t] * e, c->n, dq);
    }
    left = xl_pack_left(ctx, mixed, S, S, w->dP, S, 1, w->left);
    xl_pack_right(ctx, mixed, S, D, c->k.p, c->k.st, 1, w->right);
    xl_packed_product(ctx, mixed, S, D, S, 1, left, w->right, carry, w->dq, D);
    add_rows(ctx, r->dq, w->dq, D, a->scale, c);
    for (ptrdiff_t t = 0; t < S; t++)
        w->x[c->t0 + t] = (double)kn->dot(D, c->q.p + t * c->q.st, w->dq + t * D);
    left = xl_pack_left(ctx, mixed, S, S, w->dP, 1, S, w->left);
    xl_pack_right(ctx, mixed, S, D, c->q.p, c->q.st, 1, w->right);
    xl_packed_product(ctx, mixed, S, D, S, 1, left, w->right, 0, dk, D);
    left = xl_pack_left(ctx, mixed, S, S, w->P, 1, S, w->left);
    xl_pack_right(ctx, mixed, S, E, w->G, E, 1, w->right_v);
    xl_packed_product(ctx, mixed, S, E, S, 1, left, w->right_v, 0, dv, E);
    if (!carry) return;
    scale_rows(ctx, S, D, w->w, c->q, w->k);
    memset(du, 0, (size_t)D * sizeof(real));
    kn->axpys(D, S, w->e, w->k, D, du);
    left = xl_pack_left(ctx, mixed, D, S, w->k, 1, D, w->left);
    xl_packed_product(ctx, mixed, D, E, S, 1, left, w->right_v, 0, dU, E);
}

/* Then what comes through the state behind the chunk: completes dk, dv and adds them, di_s = k_s.dk_s
 * too, and leaves x_t = q_t.dq_t - k_t.dk_t. */
void xl_mlstm_backward_through(const xl_ctx *ctx, const xl_mlstm *a, xl_mlstm_work *w,
                               const xl_mlstm_arrays *r, const xl_chunk *c, const real *dC,
                               const real *dn, real *dk, real *dv) {
    const xl_kernels *kn = ctx->k;
    ptrdiff_t D = a->D, E = a->E, S = c->S;
    for (ptrdiff_t s = 0; s < S; s++) w->last[s] *= w->add;
    xl_left left = xl_pack_left(ctx, a->mixed, S, E, c->v.p, c->v.st, 1, w->left);
    xl_pack_right(ctx, a->mixed, E, D, dC, 1, E, w->right);
    xl_packed_product(ctx, a->mixed, S, D, E, 1, left, w->right, 0, w->through, D);
    for (ptrdiff_t s = 0; s < S; s++) {
        kn->combine(D, 1, dk + s * D, w->last[s], w->through + s * D, dk + s * D);
        kn->axpy(D, w->last[s], dn, dk + s * D);
    }
    left = xl_pack_left(ctx, a->mixed, S, D, c->k.p, c->k.st, 1, w->left);
    xl_pack_right(ctx, a->mixed, D, E, dC, E, 1, w->right);
    xl_packed_product(ctx, a->mixed, S, E, D, 1, left, w->right, 0, w->through, E);
    for (ptrdiff_t s = 0; s < S; s++)
        kn->combine(E, 1, dv + s * E, w->last[s], w->through + s * E, dv + s * E);
    add_rows(ctx, r->dk, dk, D, 1, c);
    add_rows(ctx, r->dv, dv, E, 1, c);
    for (ptrdiff_t s = 0; s < S; s++) {
        real kdk = kn->dot(D, c->k.p + s * c->k.st, dk + s * D);
        if (r->di.p) *xl_at(r->di, c->b, c->h, c->t0 + s) += kdk;
        w->x[c->t0 + s] -= (double)kdk;
    }
}

/* dC, dn before the open chunk from those behind it. */
void xl_mlstm_retreat(const xl_ctx *ctx, const xl_mlstm *a, const xl_mlstm_work *w, const real *dU,
                      const real *du, real *dC, real *dn) {
    ctx->k->combine(a->D * a->E, w->keep, dC, 1, dU, dC);
    ctx->k->combine(a->D, w->keep, dn, 1, du, dn);
}

/* df_t = sigmoid(-f_t) * sum of x from t to the end of the segment; nothing at its first step when
 * no state came in. */
void xl_mlstm_forget_gradient(const xl_ctx *ctx, const xl_mlstm_arrays *r, const xl_mlstm_work *w,
                              ptrdiff_t b, ptrdiff_t h, ptrdiff_t start, ptrdiff_t end,
                              int carried) {
    double sum = 0;
    for (ptrdiff_t t1 = end; r->df.p && t1 > start + !carried; t1 -= XL_GATES) {
        ptrdiff_t t0 = xl_max(start + !carried, t1 - XL_GATES);
        real open[XL_GATES]; /* sigmoid(-f) */
        for (ptrdiff_t t = t0; t < t1; t++) open[t - t0] = -*xl_at(r->f, b, h, t);
        ctx->k->sigmoid(t1 - t0, open, open);
        for (ptrdiff_t t = t1; t-- > t0;) {
            sum += w->x[t];
            *xl_at(r->df, b, h, t) += (real)(sum * (double)open[t - t0]);
        }
    }
}

/* dC, dn on the last state of a row and head. */
void xl_mlstm_load_gradient(const xl_mlstm *a, xl_mlstm_work *w, const xl_mlstm_arrays *r,
                            ptrdiff_t at) {
    ptrdiff_t D = a->D, E = a->E;
    memcpy(w->dC, r->dlast.c + at * D * E, (size_t)(D * E) * sizeof(real));
    memcpy(w->dn, r->dlast.n + at * D, (size_t)D * sizeof(real));
}
