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
#include "kernels/kernels.h"
#include "ops/cells.h"

#include <omp.h>
#include <string.h>

#define GATES 256 /* steps whose gates are computed at a time */

/* Work of one thread; S is the length of a chunk. */
typedef struct {
    double *lf;          /* [T]: log f */
    double *b, *c, *top; /* [S]: b, c and M of the chunk in hand */
    real *C, *n;         /* state before it */
    real *q, *k, *v;     /* its rows [S, D] [S, D] [S, E]; q is scaled */
    real *decay, *P;     /* [S, S]: D and (q k^T) o D, zeros above the diagonal */
    real *w, *den, *num; /* [S] [S] [S, E] */
    real *saved;         /* backward: C, n before each chunk of the segment */
    double *saved_m, *x; /* [chunks]; [T]: x_t of the gate gradients */
    real *G, *e;         /* dh / divisor [S, E]; gradient of den [S] */
    real *dC, *dn, *dP;  /* of the state behind the chunk; [S, S] */
    real *dq, *dk, *dv, *pack;
    xl_gemm gemm;
} workspace;

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
static void plan_thread(xl_plan *p, const xl_mlstm *a, workspace *w) {
    ptrdiff_t S = chunk_length(a), back = backward_chunk_length(a), D = a->D, E = a->E, T = a->T;
    ptrdiff_t chunks = xl_ceil_div(T, back);
    w->lf = take_doubles(p, T);
    w->b = take_doubles(p, S);
    w->c = take_doubles(p, S);
    w->top = take_doubles(p, S);
    w->C = xl_take_reals(p, D * E);
    w->n = xl_take_reals(p, D);
    w->q = xl_take_reals(p, S * D);
    w->k = xl_take_reals(p, S * D);
    w->v = xl_take_reals(p, S * E);
    w->decay = xl_take(p, "", XL_ROLE_WORK, XL_DT_REAL, 2, XL_SHAPE(S, S));
    w->P = xl_take(p, "", XL_ROLE_WORK, XL_DT_REAL, 2, XL_SHAPE(S, S));
    w->w = xl_take_reals(p, S);
    w->den = xl_take_reals(p, S);
    w->num = xl_take_reals(p, S * E);
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
    w->pack = xl_take_reals(p, XL_GEMM_PACK);
}

static workspace place_thread(const xl_ctx *ctx, const xl_mlstm *a, char *base) {
    xl_plan measure = {0};
    workspace w;
    plan_thread(&measure, a, &w);
    xl_plan p = {.base = base + omp_get_thread_num() * measure.used, .size = PTRDIFF_MAX};
    plan_thread(&p, a, &w);
    w.gemm = xl_gemm_of(ctx->k, a->mixed);
    return w;
}

ptrdiff_t xl_mlstm_scratch(const xl_ctx *ctx, const xl_mlstm *a) {
    xl_plan p = {0};
    workspace w;
    ptrdiff_t total;
    plan_thread(&p, a, &w);
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

/* k, v and the exponents of steps t0 .. t0+S-1, and the last row of the decay. m is the stabiliser of
 * the state with the first step's log f added: that decay acts on the carry alone, so b starts at 0
 * and never meets the mask of a document start. */
static void load_chunk(const xl_ctx *ctx, const xl_mlstm *a, workspace *w, const arrays *r,
                       ptrdiff_t b, ptrdiff_t h, ptrdiff_t t0, ptrdiff_t S, double m) {
    ptrdiff_t D = a->D, E = a->E;
    double sum = 0, top = m;
    for (ptrdiff_t t = 0; t < S; t++) {
        memcpy(w->k + t * D, xl_at(r->k, b, h, t0 + t), (size_t)D * sizeof(real));
        memcpy(w->v + t * E, xl_at(r->v, b, h / a->v_rep, t0 + t), (size_t)E * sizeof(real));
        sum += t ? w->lf[t0 + t] : 0;
        w->b[t] = sum;
        w->c[t] = (double)*xl_at(r->i, b, h, t0 + t) - sum;
        top = w->c[t] > top ? w->c[t] : top;
        w->top[t] = top;
    }
    real *last = w->decay + (S - 1) * S;
    for (ptrdiff_t s = 0; s < S; s++) last[s] = top == -INFINITY ? top : (real)(w->c[s] - top);
    ctx->k->exp(S, last, last);
    w->w[S - 1] = m == -INFINITY ? m : (real)(m - top);
    ctx->k->exp(1, w->w + S - 1, w->w + S - 1);
}

/* The rest of the decay and the carry, q, and P = (q k^T) o decay; den = rowsum P + w q.n. */
static void chunk_scores(const xl_ctx *ctx, const xl_mlstm *a, workspace *w, const arrays *r,
                         ptrdiff_t b, ptrdiff_t h, ptrdiff_t t0, ptrdiff_t S, double m) {
    const xl_kernels *kn = ctx->k;
    ptrdiff_t D = a->D;
    for (ptrdiff_t t = 0; t < S; t++) {
        kn->scale_to(D, a->scale, xl_at(r->q, b, h, t0 + t), w->q + t * D);
    }
    w->gemm(S, S, D, 1, w->q, D, 1, w->k, 1, D, 0, w->P, S, w->pack);
    for (ptrdiff_t t = 0; t < S; t++)
        w->den[t] = kn->decay_row(S, t + 1, w->c, w->top[t], w->decay + t * S, w->P + t * S);
    if (m == -INFINITY) return;
    for (ptrdiff_t t = 0; t < S; t++) w->w[t] = (real)(m - w->top[t]);
    kn->exp(S, w->w, w->w);
    for (ptrdiff_t t = 0; t < S; t++) w->den[t] += w->w[t] * kn->dot(D, w->q + t * D, w->n);
}

/* C, n behind the chunk, returns their m. Scales the rows of w->k. */
static double chunk_state(const xl_ctx *ctx, const xl_mlstm *a, workspace *w, ptrdiff_t S,
                          double m) {
    const xl_kernels *kn = ctx->k;
    ptrdiff_t D = a->D, E = a->E;
    const real *last = w->decay + (S - 1) * S;
    kn->scale(D * E, w->w[S - 1], w->C); /* zeros where there is no state */
    kn->scale(D, w->w[S - 1], w->n);
    for (ptrdiff_t s = 0; s < S; s++) {
        kn->scale(D, last[s], w->k + s * D);
        kn->add(D, w->k + s * D, w->n);
    }
    w->gemm(D, E, S, 1, w->k, 1, D, w->v, E, 1, m == -INFINITY ? 0 : 1, w->C, E, w->pack);
    return w->b[S - 1] + w->top[S - 1];
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
        if (m != -INFINITY) m += w->lf[t0];
        load_chunk(ctx, a, w, r, b, h, t0, S, m);
        chunk_scores(ctx, a, w, r, b, h, t0, S, m);
        int carry = m != -INFINITY;
        if (carry) {
            w->gemm(S, E, D, 1, w->q, D, 1, w->C, E, 1, 0, w->num, E, w->pack);
            for (ptrdiff_t t = 0; t < S; t++) kn->scale(E, w->w[t], w->num + t * E);
        }
        w->gemm(S, E, S, 1, w->P, S, 1, w->v, E, 1, carry, w->num, E, w->pack);
        for (ptrdiff_t t = 0; t < S; t++) {
            real slope, *out = xl_at(r->h, b, h, t0 + t);
            real inverse = inverse_divisor(a, w->den[t], w->b[t] + w->top[t], &slope);
            kn->scale_to(E, inverse, w->num + t * E, out);
        }
        m = chunk_state(ctx, a, w, S, m);
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
 *     dv = P^T G + last k dC             dC' = w_S dC + q^T (w G),  dn' = w_S dn + q^T (w e)
 * where last is the last row of the decay. */
static void backward_chunk(const xl_ctx *ctx, const xl_mlstm *a, workspace *w, const arrays *r,
                           ptrdiff_t b, ptrdiff_t h, ptrdiff_t t0, ptrdiff_t S, double m) {
    const xl_kernels *kn = ctx->k;
    ptrdiff_t D = a->D, E = a->E;
    const real *last = w->decay + (S - 1) * S;
    int carry = m != -INFINITY;
    for (ptrdiff_t t = 0; t < S; t++) {
        real slope, inverse = inverse_divisor(a, w->den[t], w->b[t] + w->top[t], &slope);
        kn->scale_to(E, inverse, xl_at(r->dh, b, h, t0 + t), w->G + t * E);
        w->e[t] = -slope * inverse;
    }
    w->gemm(S, S, E, 1, w->G, E, 1, w->v, 1, E, 0, w->dP, S, w->pack);
    if (carry) w->gemm(S, D, E, 1, w->G, E, 1, w->C, 1, E, 0, w->dq, D, w->pack);
    for (ptrdiff_t t = 0; t < S; t++) {
        real *row = w->dP + t * S, *dq = w->dq + t * D;
        real along = kn->masked_dot(S, t + 1, w->P + t * S, row);
        if (carry) along += w->w[t] * kn->dot(D, w->q + t * D, dq);
        real e = w->e[t] *= along;
        kn->add_mul(t + 1, e, w->decay + t * S, row);
        if (!carry) continue;
        kn->axpy(D, e, w->n, dq);
        kn->scale(D, w->w[t], dq);
    }
    w->gemm(S, D, S, 1, w->dP, S, 1, w->k, D, 1, carry, w->dq, D, w->pack);
    w->gemm(S, D, E, 1, w->v, E, 1, w->dC, 1, E, 0, w->dk, D, w->pack);
    w->gemm(S, E, D, 1, w->k, D, 1, w->dC, E, 1, 0, w->dv, E, w->pack);
    for (ptrdiff_t s = 0; s < S; s++) {
        kn->add(D, w->dn, w->dk + s * D);
        kn->scale(D, last[s], w->dk + s * D);
        kn->scale(E, last[s], w->dv + s * E);
    }
    w->gemm(S, D, S, 1, w->dP, 1, S, w->q, D, 1, 1, w->dk, D, w->pack);
    w->gemm(S, E, S, 1, w->P, 1, S, w->G, E, 1, 1, w->dv, E, w->pack);
    if (!carry) return; /* nothing is before it: dC, dn end here */
    kn->scale(D * E, w->w[S - 1], w->dC);
    kn->scale(D, w->w[S - 1], w->dn);
    for (ptrdiff_t t = 0; t < S; t++) {
        kn->scale(E, w->w[t], w->G + t * E);
        kn->axpy(D, w->w[t] * w->e[t], w->q + t * D, w->dn);
    }
    w->gemm(D, E, S, 1, w->q, 1, D, w->G, E, 1, 1, w->dC, E, w->pack);
}

static void add_rows(const xl_ctx *ctx, xl_heads to, const real *from, ptrdiff_t width, real scale,
                     ptrdiff_t b, ptrdiff_t h, ptrdiff_t t0, ptrdiff_t S) {
    for (ptrdiff_t t = 0; to.p && t < S; t++)
        ctx->k->axpy(width, scale, from + t * width, xl_at(to, b, h, t0 + t));
}

/* Adds the chunk's gradients, di_s = k_s.dk_s among them, and leaves x_t = q_t.dq_t - k_t.dk_t. */
static void add_chunk(const xl_ctx *ctx, const xl_mlstm *a, workspace *w, const arrays *r,
                      ptrdiff_t b, ptrdiff_t h, ptrdiff_t t0, ptrdiff_t S) {
    ptrdiff_t D = a->D;
    add_rows(ctx, r->dq, w->dq, D, a->scale, b, h, t0, S);
    add_rows(ctx, r->dk, w->dk, D, 1, b, h, t0, S);
    add_rows(ctx, r->dv, w->dv, a->E, 1, b, h, t0, S);
    for (ptrdiff_t s = 0; s < S; s++) {
        real kdk = ctx->k->dot(D, w->k + s * D, w->dk + s * D);
        if (r->di.p) *xl_at(r->di, b, h, t0 + s) += kdk;
        w->x[t0 + s] = (double)ctx->k->dot(D, w->q + s * D, w->dq + s * D) - (double)kdk;
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
    for (ptrdiff_t j = 0; j < chunks; j++) {
        ptrdiff_t t0 = start + j * S0, S = xl_min(S0, end - t0);
        memcpy(w->saved + j * size, w->C, (size_t)(D * E) * sizeof(real));
        memcpy(w->saved + j * size + D * E, w->n, (size_t)D * sizeof(real));
        if (m != -INFINITY) m += w->lf[t0];
        w->saved_m[j] = m;
        if (j == chunks - 1 && !has_dlast) break;
        load_chunk(ctx, a, w, r, b, h, t0, S, m);
        m = chunk_state(ctx, a, w, S, m);
    }
    if (has_dlast)
        behind = (double)ctx->k->dot(D * E, w->dC, w->C) + (double)ctx->k->dot(D, w->dn, w->n);
    for (ptrdiff_t j = chunks; j-- > 0;) {
        ptrdiff_t t0 = start + j * S0, S = xl_min(S0, end - t0);
        memcpy(w->C, w->saved + j * size, (size_t)(D * E) * sizeof(real));
        memcpy(w->n, w->saved + j * size + D * E, (size_t)D * sizeof(real));
        load_chunk(ctx, a, w, r, b, h, t0, S, w->saved_m[j]);
        chunk_scores(ctx, a, w, r, b, h, t0, S, w->saved_m[j]);
        backward_chunk(ctx, a, w, r, b, h, t0, S, w->saved_m[j]);
        add_chunk(ctx, a, w, r, b, h, t0, S);
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
