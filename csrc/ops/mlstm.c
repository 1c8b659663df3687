/* mLSTM (arXiv:2603.15590, equations (8)-(10)), stabilised, eps-free; docs/math/mlstm.md derives every line.
 *
 * A row is cut into segments at document starts; a segment is walked in chunks from its own start, so
 * that a document's numbers do not depend on where it lies. Inside a chunk, with b = cumsum(log f),
 * c_s = i_s - b_s and M_t = max(m, max_{s<=t} c_s), all exponents take one form:
 *     decay D_ts = exp(c_s - M_t)     carry w_t = exp(m - M_t)     stabiliser mu_t = b_t + M_t
 *     num_t = sum_s D_ts (q_t.k_s) v_s + w_t q_t C     den_t likewise with v = 1 and n
 * and the state behind the chunk is C' = w_S C + sum_s D_Ss k_s v_s^T, m' = mu_S. The parallel form
 * is one chunk as long as the segment; the recurrent form is written by itself. Exponents are kept in
 * double: b reaches some hundreds, and what is exponentiated are differences of such sums. */
#include "ops/cells.h"
#include "ops/product.h"

#include <omp.h>
#include <string.h>

#define GATES 256 /* steps whose gates are computed at a time */

/* Work of one thread; S is the length of a chunk. */
typedef struct {
    double *lf;          /* [T]: log f */
    double *b, *c, *top; /* [S]: b, c and M of the chunk in hand */
    real *last;          /* [S]: weights of its steps in U and u */
    real keep, add;      /* C' = keep C + add U */
    real *C, *n;         /* a state */
    real *U, *u;         /* what a chunk adds to a state; backward: to its gradient */
    real *q, *k;         /* rows of the chunk times a number each [S, D] */
    real *decay, *P;     /* [S, S]: D and (q k^T) o D, zeros above the diagonal */
    real *w, *den;       /* [S] */
    real *num, *carried; /* [S, E]: P v, q C */
    real *saved;         /* backward: C, n before each chunk of the segment */
    double *saved_m, *x; /* [chunks]; [T]: x_t of the gate gradients */
    real *G, *e;         /* dh / divisor [S, E]; gradient of den [S] */
    real *dC, *dn, *dP;  /* of the state behind the chunk; [S, S] */
    real *dq, *dk, *dv;  /* [S, D] [S, D] [S, E] */
    /* packed operands: q, which serves two products, and what serves one; right: v or G, which serve two,
     * and what serves one */
    real *left_q, *left, *right_v, *right;
} workspace;

/* Rows of a chunk, st reals apart. */
typedef struct {
    const real *p;
    ptrdiff_t st;
} rows;

/* A chunk of a row and head: S steps from t0 on. */
typedef struct {
    ptrdiff_t b, h, t0, S;
    double m;          /* of the state before it with the first step's log f added; -inf: none */
    const real *C, *n; /* that state */
    rows q, k, v;      /* q is scaled */
} chunk;

/* Everything a call works on. */
typedef struct {
    xl_heads h, dh, q, k, v, i, f, dq, dk, dv, di, df;
    xl_mlstm_state first, last, dfirst, dlast;
} arrays;

static ptrdiff_t backward_chunk_length(const xl_mlstm *a) {
    return xl_min(a->chunk, xl_max(1, a->T));
}

static ptrdiff_t chunk_length(const xl_mlstm *a) {
    return a->form == XL_PARALLEL ? xl_max(1, a->T) : backward_chunk_length(a);
}

static double *take_doubles(xl_plan *p, ptrdiff_t count) {
    return xl_take(p, "", XL_ROLE_WORK, XL_DT_U8, 2, XL_SHAPE(count, (ptrdiff_t)sizeof(double)));
}

/* The parallel form needs [T, T] forward; the backward is chunkwise always and keeps one state for
 * each chunk of the longest segment: (T / S) (D E + D) reals a thread. */
static void plan_thread(xl_plan *p, const xl_ctx *ctx, const xl_mlstm *a, workspace *w) {
    ptrdiff_t S = chunk_length(a), back = backward_chunk_length(a), D = a->D, E = a->E, T = a->T;
    ptrdiff_t chunks = xl_ceil_div(T, back), wide = xl_max(D, E), most = xl_max(S, wide);
    w->lf = take_doubles(p, T);
    w->b = take_doubles(p, S);
    w->c = take_doubles(p, S);
    w->top = take_doubles(p, S);
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
    w->saved_m = take_doubles(p, chunks);
    w->x = take_doubles(p, T);
    w->G = xl_take_reals(p, back * E);
    w->e = xl_take_reals(p, back);
    w->dC = xl_take_reals(p, D * E);
    w->dn = xl_take_reals(p, D);
    w->dP = xl_take_reals(p, back * back);
    w->dq = xl_take_reals(p, back * D);
    w->dk = xl_take_reals(p, back * D);
    w->dv = xl_take_reals(p, back * E);
    w->left_q = xl_take_left(p, ctx, S, D);
    w->left = xl_take_left(p, ctx, most, most);
    w->right_v = xl_take_right(p, ctx, S, wide);
    w->right = xl_take_right(p, ctx, most, xl_round_up(wide, XL_PAIR_K));
}

static workspace place_thread(const xl_ctx *ctx, const xl_mlstm *a, char *base) {
    xl_plan measure = {0};
    workspace w;
    plan_thread(&measure, ctx, a, &w);
    xl_plan p = {.base = base + omp_get_thread_num() * measure.used, .size = PTRDIFF_MAX};
    plan_thread(&p, ctx, a, &w);
    return w;
}

ptrdiff_t xl_mlstm_scratch(const xl_ctx *ctx, const xl_mlstm *a) {
    xl_plan p = {0};
    workspace w;
    ptrdiff_t total;
    plan_thread(&p, ctx, a, &w);
    return p.failed || __builtin_mul_overflow(p.used, (ptrdiff_t)ctx->threads, &total) ? -1 : total;
}

static xl_status check(xl_ctx *ctx, const xl_mlstm *a) {
    if (a->D < 1 || a->E < 1)
        return xl_fail(ctx, XL_VALUE, "head widths are %td and %td, expected 1 or more", a->D,
                       a->E);
    if (a->chunk < 1) return xl_fail(ctx, XL_VALUE, "chunk is %td, expected 1 or more", a->chunk);
    if (a->v_rep < 1 || a->H % a->v_rep)
        return xl_fail(ctx, XL_VALUE, "%td heads cannot share v in groups of %td", a->H, a->v_rep);
    for (ptrdiff_t b = 0; a->lengths && b < a->B; b++)
        if (a->lengths[b] < 0 || a->lengths[b] > a->T)
            return xl_fail(ctx, XL_VALUE, "lengths[%td] is %d, T is %td", b, (int)a->lengths[b],
                           a->T);
    return XL_OK;
}

/* ---- a row, its segments, its chunks ------------------------------------------------------- */

static ptrdiff_t row_length(const xl_mlstm *a, ptrdiff_t b) {
    return a->lengths ? a->lengths[b] : a->T;
}

static void log_forget(const xl_ctx *ctx, const arrays *r, ptrdiff_t T, ptrdiff_t b, ptrdiff_t h,
                       workspace *w) {
    for (ptrdiff_t t0 = 0; t0 < T; t0 += GATES) {
        real f[GATES];
        ptrdiff_t n = xl_min(GATES, T - t0);
        for (ptrdiff_t t = 0; t < n; t++) f[t] = *xl_at(r->f, b, h, t0 + t);
        ctx->k->logsigmoid(n, f, f);
        for (ptrdiff_t t = 0; t < n; t++) w->lf[t0 + t] = (double)f[t];
    }
}

/* The state is forgotten before step t: a document starts there, or f = -inf. */
static int starts(const xl_mlstm *a, const workspace *w, ptrdiff_t b, ptrdiff_t t) {
    return (a->reset && a->reset[b * a->T + t]) || w->lf[t] == -INFINITY;
}

static ptrdiff_t segment_end(const xl_mlstm *a, const workspace *w, ptrdiff_t b, ptrdiff_t t,
                             ptrdiff_t T) {
    for (t++; t < T && !starts(a, w, b, t);) t++;
    return t;
}

/* Loads the start state; returns its m, -inf for none. */
static double start_state(const xl_mlstm *a, workspace *w, xl_mlstm_state s, ptrdiff_t at,
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

static rows rows_at(xl_heads x, ptrdiff_t b, ptrdiff_t h, ptrdiff_t t) {
    return (rows){xl_at(x, b, h, t), x.st};
}

static void scale_rows(const xl_ctx *ctx, ptrdiff_t S, ptrdiff_t width, const real *by, rows x,
                       real *to) {
    for (ptrdiff_t s = 0; s < S; s++)
        ctx->k->scale_to(width, by[s], x.p + s * x.st, to + s * width);
}

/* The chunk at step t0 behind the state (C, n, m), its exponents, and how the state goes on. m gets
 * the first step's log f added: that decay acts on the carry alone, so b starts at 0 and never meets
 * the mask of a document start. */
static chunk open_chunk(const xl_ctx *ctx, const xl_mlstm *a, workspace *w, const arrays *r,
                        ptrdiff_t b, ptrdiff_t h, ptrdiff_t t0, ptrdiff_t S, const real *C,
                        const real *n, double m) {
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
    chunk c = {b,
               h,
               t0,
               S,
               m,
               C,
               n,
               rows_at(r->q, b, h, t0),
               rows_at(r->k, b, h, t0),
               rows_at(r->v, b, h / a->v_rep, t0)};
    if (a->scale != 1) {
        for (ptrdiff_t t = 0; t < S; t++)
            ctx->k->scale_to(a->D, a->scale, c.q.p + t * c.q.st, w->q + t * a->D);
        c.q = (rows){w->q, a->D};
    }
    return c;
}

/* P = (q k^T) o decay, den = rowsum P + w q.n, and q packed; w where there is a state. */
static xl_left chunk_scores(const xl_ctx *ctx, const xl_mlstm *a, workspace *w, const chunk *c) {
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

/* The state behind the chunk into C, n, which may be those before it; returns its m. right_v: v
 * packed. */
static double chunk_state(const xl_ctx *ctx, const xl_mlstm *a, workspace *w, const chunk *c,
                          real *C, real *n) {
    const xl_kernels *kn = ctx->k;
    ptrdiff_t D = a->D, E = a->E, S = c->S;
    scale_rows(ctx, S, D, w->last, c->k, w->k);
    memset(w->u, 0, (size_t)D * sizeof(real));
    for (ptrdiff_t s = 0; s < S; s++) kn->add(D, w->k + s * D, w->u);
    xl_left k = xl_pack_left(ctx, a->mixed, D, S, w->k, 1, D, w->left);
    xl_packed_product(ctx, a->mixed, D, E, S, 1, k, w->right_v, 0, w->U, E);
    kn->combine(D * E, w->keep, c->C, w->add, w->U, C);
    kn->combine(D, w->keep, c->n, w->add, w->u, n);
    return w->b[S - 1] + w->top[S - 1];
}

static void pack_v(const xl_ctx *ctx, const xl_mlstm *a, workspace *w, const chunk *c) {
    xl_pack_right(ctx, a->mixed, c->S, a->E, c->v.p, c->v.st, 1, w->right_v);
}

/* 1 / divisor of a step, 0 where the divisor is 0; *slope is d divisor / d den. mu is the exponent of
 * the stabiliser: the floor 1 of the unscaled den is exp(-mu) here. */
static real inverse_divisor(const xl_mlstm *a, real den, double mu, real *slope) {
    *slope = 1;
    if (a->normalizer == XL_MAX) {
        real least = (real)exp(-mu);
        *slope = den < 0 ? -1 : 1;
        den = den < 0 ? -den : den;
        if (den < least) den = least, *slope = 0; /* a NaN is not less */
    }
    return den == 0 ? 0 : 1 / den;
}

/* ---- forward ------------------------------------------------------------------------------ */

static double forward_chunks(const xl_ctx *ctx, const xl_mlstm *a, workspace *w, const arrays *r,
                             ptrdiff_t b, ptrdiff_t h, ptrdiff_t start, ptrdiff_t end, double m) {
    const xl_kernels *kn = ctx->k;
    ptrdiff_t D = a->D, E = a->E;
    for (ptrdiff_t t0 = start; t0 < end; t0 += chunk_length(a)) {
        ptrdiff_t S = xl_min(chunk_length(a), end - t0);
        chunk c = open_chunk(ctx, a, w, r, b, h, t0, S, w->C, w->n, m);
        xl_left q = chunk_scores(ctx, a, w, &c);
        if (c.m != -INFINITY) {
            xl_pack_right(ctx, a->mixed, D, E, c.C, E, 1, w->right);
            xl_packed_product(ctx, a->mixed, S, E, D, 1, q, w->right, 0, w->carried, E);
        }
        pack_v(ctx, a, w, &c);
        xl_left P = xl_pack_left(ctx, a->mixed, S, S, w->P, S, 1, w->left);
        xl_packed_product(ctx, a->mixed, S, E, S, 1, P, w->right_v, 0, w->num, E);
        for (ptrdiff_t t = 0; t < S; t++) {
            real slope, *out = xl_at(r->h, b, h, t0 + t);
            real inverse = inverse_divisor(a, w->den[t], w->b[t] + w->top[t], &slope);
            if (c.m == -INFINITY)
                kn->scale_to(E, inverse, w->num + t * E, out);
            else
                kn->combine(E, inverse, w->num + t * E, inverse * w->w[t], w->carried + t * E, out);
        }
        m = chunk_state(ctx, a, w, &c, w->C, w->n);
    }
    return m;
}

static double forward_steps(const xl_ctx *ctx, const xl_mlstm *a, workspace *w, const arrays *r,
                            ptrdiff_t b, ptrdiff_t h, ptrdiff_t start, ptrdiff_t end, double m) {
    const xl_kernels *kn = ctx->k;
    ptrdiff_t D = a->D, E = a->E;
    for (ptrdiff_t t = start; t < end; t++) {
        const real *k = xl_at(r->k, b, h, t), *v = xl_at(r->v, b, h / a->v_rep, t);
        const real *q = xl_at(r->q, b, h, t);
        double i = (double)*xl_at(r->i, b, h, t), old = m == -INFINITY ? m : m + w->lf[t];
        m = old > i ? old : i;
        real F = old == -INFINITY ? 0 : (real)exp(old - m);
        real I = m == -INFINITY ? 0 : (real)exp(i - m);
        real *out = xl_at(r->h, b, h, t), slope;
        real den = kn->mlstm_step(D, E, F, I, k, v, a->scale, q, w->C, w->n, out);
        kn->scale(E, inverse_divisor(a, den, m, &slope), out);
    }
    return m;
}

static void forward_row(const xl_ctx *ctx, const xl_mlstm *a, workspace *own, const arrays *r,
                        ptrdiff_t b, ptrdiff_t h) {
    ptrdiff_t T = row_length(a, b), D = a->D, E = a->E, at = b * a->H + h, t = 0;
    workspace at_last = *own, *w = &at_last;
    if (r->last.c) w->C = r->last.c + at * D * E, w->n = r->last.n + at * D;
    log_forget(ctx, r, T, b, h, w);
    double m = start_state(a, w, r->first, at, T && starts(a, w, b, 0));
    while (t < T) {
        ptrdiff_t end = segment_end(a, w, b, t, T);
        if (t) m = start_state(a, w, r->first, at, 1);
        m = (a->form == XL_RECURRENT ? forward_steps : forward_chunks)(ctx, a, w, r, b, h, t, end,
                                                                       m);
        t = end;
    }
    for (; t < a->T; t++) memset(xl_at(r->h, b, h, t), 0, (size_t)E * sizeof(real));
    if (r->last.c) r->last.m[at] = (real)m;
}

/* ---- backward ----------------------------------------------------------------------------- */

/* Gradients of a chunk from dh and from dC, dn on the state behind it, which become those on the state
 * before it. With G_t = dh_t / divisor and e_t the gradient of den_t:
 *     e_t = -(d divisor / d den) / divisor * G_t.num_t,  G_t.num_t = P_t.(G v^T)_t + w_t q_t.(C G_t)
 *     dS = (G v^T + e 1^T) o decay                       on the scores q k^T
 *     dq = dS k + w (G C^T + e n^T)      dk = dS^T q + last (v dC^T + 1 dn^T)
 *     dv = P^T G + last k dC             dC' = keep dC + (w q)^T G,  dn' = keep dn + (w q)^T e
 * where last is the last row of the decay. */
static void backward_chunk(const xl_ctx *ctx, const xl_mlstm *a, workspace *w, const arrays *r,
                           const chunk *c) {
    const xl_kernels *kn = ctx->k;
    ptrdiff_t D = a->D, E = a->E, S = c->S;
    int carry = c->m != -INFINITY, mixed = a->mixed;
    chunk_scores(ctx, a, w, c);
    for (ptrdiff_t t = 0; t < S; t++) {
        real slope, inverse = inverse_divisor(a, w->den[t], w->b[t] + w->top[t], &slope);
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
        real e = w->e[t] *= along;
        kn->add_mul(t + 1, e, w->decay + t * S, row);
        if (carry) kn->combine(D, w->w[t], dq, w->w[t] * e, c->n, dq);
    }
    left = xl_pack_left(ctx, mixed, S, S, w->dP, S, 1, w->left);
    xl_pack_right(ctx, mixed, S, D, c->k.p, c->k.st, 1, w->right);
    xl_packed_product(ctx, mixed, S, D, S, 1, left, w->right, carry, w->dq, D);
    /* dk, dv: first what comes through the state behind */
    for (ptrdiff_t s = 0; s < S; s++) w->last[s] *= w->add;
    left = xl_pack_left(ctx, mixed, S, E, c->v.p, c->v.st, 1, w->left);
    xl_pack_right(ctx, mixed, E, D, w->dC, 1, E, w->right);
    xl_packed_product(ctx, mixed, S, D, E, 1, left, w->right, 0, w->dk, D);
    left = xl_pack_left(ctx, mixed, S, D, c->k.p, c->k.st, 1, w->left);
    xl_pack_right(ctx, mixed, D, E, w->dC, E, 1, w->right);
    xl_packed_product(ctx, mixed, S, E, D, 1, left, w->right, 0, w->dv, E);
    for (ptrdiff_t s = 0; s < S; s++) {
        kn->combine(D, w->last[s], w->dk + s * D, w->last[s], w->dn, w->dk + s * D);
        kn->scale(E, w->last[s], w->dv + s * E);
    }
    left = xl_pack_left(ctx, mixed, S, S, w->dP, 1, S, w->left);
    xl_pack_right(ctx, mixed, S, D, c->q.p, c->q.st, 1, w->right);
    xl_packed_product(ctx, mixed, S, D, S, 1, left, w->right, 1, w->dk, D);
    left = xl_pack_left(ctx, mixed, S, S, w->P, 1, S, w->left);
    xl_pack_right(ctx, mixed, S, E, w->G, E, 1, w->right_v);
    xl_packed_product(ctx, mixed, S, E, S, 1, left, w->right_v, 1, w->dv, E);
    if (!carry) return; /* nothing is before it: dC, dn end here */
    scale_rows(ctx, S, D, w->w, c->q, w->k);
    memset(w->u, 0, (size_t)D * sizeof(real));
    kn->axpys(D, S, w->e, w->k, D, w->u);
    left = xl_pack_left(ctx, mixed, D, S, w->k, 1, D, w->left);
    xl_packed_product(ctx, mixed, D, E, S, 1, left, w->right_v, 0, w->U, E);
    kn->combine(D * E, w->keep, w->dC, 1, w->U, w->dC);
    kn->combine(D, w->keep, w->dn, 1, w->u, w->dn);
}

static void add_rows(const xl_ctx *ctx, xl_heads to, const real *from, ptrdiff_t width, real scale,
                     const chunk *c) {
    for (ptrdiff_t t = 0; to.p && t < c->S; t++)
        ctx->k->axpy(width, scale, from + t * width, xl_at(to, c->b, c->h, c->t0 + t));
}

/* Adds the chunk's gradients, di_s = k_s.dk_s among them, and leaves x_t = q_t.dq_t - k_t.dk_t. */
static void add_chunk(const xl_ctx *ctx, const xl_mlstm *a, workspace *w, const arrays *r,
                      const chunk *c) {
    ptrdiff_t D = a->D;
    add_rows(ctx, r->dq, w->dq, D, a->scale, c);
    add_rows(ctx, r->dk, w->dk, D, 1, c);
    add_rows(ctx, r->dv, w->dv, a->E, 1, c);
    for (ptrdiff_t s = 0; s < c->S; s++) {
        real kdk = ctx->k->dot(D, c->k.p + s * c->k.st, w->dk + s * D);
        real qdq = ctx->k->dot(D, c->q.p + s * c->q.st, w->dq + s * D);
        if (r->di.p) *xl_at(r->di, c->b, c->h, c->t0 + s) += kdk;
        w->x[c->t0 + s] = (double)qdq - (double)kdk;
    }
}

/* Steps start .. end-1: the states before the chunks, then the chunks backwards. With a gradient on
 * the state behind the segment, dC and dn already hold it. */
static void backward_segment(const xl_ctx *ctx, const xl_mlstm *a, workspace *w, const arrays *r,
                             ptrdiff_t b, ptrdiff_t h, ptrdiff_t start, ptrdiff_t end, double m,
                             int has_dlast) {
    ptrdiff_t S0 = backward_chunk_length(a), D = a->D, E = a->E, size = D * (E + 1);
    ptrdiff_t chunks = xl_ceil_div(end - start, S0);
    double behind = 0; /* <dC, C> + <dn, n> on the last state */
    memcpy(w->saved, w->C, (size_t)(D * E) * sizeof(real));
    memcpy(w->saved + D * E, w->n, (size_t)D * sizeof(real));
    for (ptrdiff_t j = 0; j < chunks; j++) {
        ptrdiff_t t0 = start + j * S0, S = xl_min(S0, end - t0), final = j == chunks - 1;
        real *C = w->saved + j * size, *next = final ? w->C : C + size;
        w->saved_m[j] = m;
        if (final && !has_dlast) break;
        chunk c = open_chunk(ctx, a, w, r, b, h, t0, S, C, C + D * E, m);
        pack_v(ctx, a, w, &c);
        m = chunk_state(ctx, a, w, &c, next, final ? w->n : next + D * E);
    }
    if (has_dlast)
        behind = (double)ctx->k->dot(D * E, w->dC, w->C) + (double)ctx->k->dot(D, w->dn, w->n);
    for (ptrdiff_t j = chunks; j-- > 0;) {
        ptrdiff_t t0 = start + j * S0, S = xl_min(S0, end - t0);
        const real *C = w->saved + j * size;
        chunk c = open_chunk(ctx, a, w, r, b, h, t0, S, C, C + D * E, w->saved_m[j]);
        backward_chunk(ctx, a, w, r, &c);
        add_chunk(ctx, a, w, r, &c);
    }
    w->x[end - 1] += behind;
}

/* df_t = sigmoid(-f_t) * sum of x from t to the end of the segment; nothing at its first step when
 * no state came in. */
static void forget_gradient(const xl_ctx *ctx, const arrays *r, const workspace *w, ptrdiff_t b,
                            ptrdiff_t h, ptrdiff_t start, ptrdiff_t end, int carried) {
    double sum = 0;
    for (ptrdiff_t t1 = end; r->df.p && t1 > start + !carried; t1 -= GATES) {
        ptrdiff_t t0 = xl_max(start + !carried, t1 - GATES);
        real open[GATES]; /* sigmoid(-f) */
        for (ptrdiff_t t = t0; t < t1; t++) open[t - t0] = -*xl_at(r->f, b, h, t);
        ctx->k->sigmoid(t1 - t0, open, open);
        for (ptrdiff_t t = t1; t-- > t0;) {
            sum += w->x[t];
            *xl_at(r->df, b, h, t) += (real)(sum * (double)open[t - t0]);
        }
    }
}

static void backward_row(const xl_ctx *ctx, const xl_mlstm *a, workspace *w, const arrays *r,
                         ptrdiff_t b, ptrdiff_t h) {
    ptrdiff_t T = row_length(a, b), D = a->D, E = a->E, at = b * a->H + h, t = 0;
    log_forget(ctx, r, T, b, h, w);
    int fresh = T && starts(a, w, b, 0);
    do { /* once for an empty row, which hands the gradient on its state through */
        ptrdiff_t end = T ? segment_end(a, w, b, t, T) : 0;
        int has_dlast = end == T && r->dlast.c;
        if (has_dlast) {
            memcpy(w->dC, r->dlast.c + at * D * E, (size_t)(D * E) * sizeof(real));
            memcpy(w->dn, r->dlast.n + at * D, (size_t)D * sizeof(real));
        } else {
            memset(w->dC, 0, (size_t)(D * E) * sizeof(real));
            memset(w->dn, 0, (size_t)D * sizeof(real));
        }
        double m = start_state(a, w, r->first, at, t || fresh);
        if (T) backward_segment(ctx, a, w, r, b, h, t, end, m, has_dlast);
        forget_gradient(ctx, r, w, b, h, t, end, m != -INFINITY);
        if (!t && m != -INFINITY && r->dfirst.c) {
            ctx->k->add(D * E, w->dC, r->dfirst.c + at * D * E);
            ctx->k->add(D, w->dn, r->dfirst.n + at * D);
        }
        t = end;
    } while (t < T);
    if (r->dfirst.c) r->dfirst.m[at] = 0;
}

/* ---- rows over threads -------------------------------------------------------------------- */

typedef void (*row_function)(const xl_ctx *, const xl_mlstm *, workspace *, const arrays *,
                             ptrdiff_t, ptrdiff_t);

/* Runs every (row, head); between blocks of them the caller may stop the work. */
static xl_status run_rows(xl_ctx *ctx, const xl_mlstm *a, const arrays *r, void *scratch,
                          row_function function) {
    XL_TRY(check(ctx, a));
    ptrdiff_t tasks = a->B * a->H, block = 16 * (ptrdiff_t)ctx->threads;
    for (ptrdiff_t first = 0; first < tasks; first += block) {
        ptrdiff_t end = xl_min(tasks, first + block);
        XL_TRY(xl_poll(ctx));
#pragma omp parallel num_threads(ctx->threads)
        {
            workspace w = place_thread(ctx, a, scratch);
#pragma omp for schedule(dynamic)
            for (ptrdiff_t j = first; j < end; j++) function(ctx, a, &w, r, j / a->H, j % a->H);
        }
    }
    return XL_OK;
}

xl_status xl_mlstm_forward(xl_ctx *ctx, const xl_mlstm *a, xl_heads h, xl_mlstm_state last,
                           xl_heads q, xl_heads k, xl_heads v, xl_heads i, xl_heads f,
                           xl_mlstm_state first, void *scratch) {
    const arrays r = {.h = h, .q = q, .k = k, .v = v, .i = i, .f = f, .first = first, .last = last};
    return run_rows(ctx, a, &r, scratch, forward_row);
}

xl_status xl_mlstm_backward(xl_ctx *ctx, const xl_mlstm *a, xl_heads dq, xl_heads dk, xl_heads dv,
                            xl_heads di, xl_heads df, xl_mlstm_state dfirst, xl_heads dh,
                            xl_heads q, xl_heads k, xl_heads v, xl_heads i, xl_heads f,
                            xl_mlstm_state first, xl_mlstm_state dlast, void *scratch) {
    const arrays r = {.dh = dh,
                      .q = q,
                      .k = k,
                      .v = v,
                      .i = i,
                      .f = f,
                      .dq = dq,
                      .dk = dk,
                      .dv = dv,
                      .di = di,
                      .df = df,
                      .first = first,
                      .dfirst = dfirst,
                      .dlast = dlast};
    return run_rows(ctx, a, &r, scratch, backward_row);
}
