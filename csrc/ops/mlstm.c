/* mLSTM (paper.md 1.2, eqs. 8-10), stabilised, eps-free; docs/math/mlstm.md derives every line.
 *
 * A row is cut into segments at document starts; a segment is walked in chunks from its own start, so
 * that a document's numbers do not depend on where it lies. Inside a chunk, with b = cumsum(log f),
 * c_s = i_s - b_s and M_t = max(m, max_{s<=t} c_s), all exponents take one form:
 *     decay D_ts = exp(c_s - M_t)     carry w_t = exp(m - M_t)     stabiliser mu_t = b_t + M_t
 *     num_t = sum_s D_ts (q_t.k_s) v_s + w_t q_t C     den_t likewise with v = 1 and n
 * and the state behind the chunk is C' = w_S C + sum_s D_Ss k_s v_s^T, m' = mu_S. The parallel form
 * is one chunk as long as the segment; the recurrent form is written by itself. */
#include "kernels/kernels.h"
#include "ops/cells.h"

#include <omp.h>
#include <string.h>

/* Work of one thread. Chunk arrays have S = chunk rows. */
typedef struct {
    double *lf, *c, *top, *b; /* [T]: log f; c, M and b inside the running chunk */
    real *gate;               /* [T] */
    real *C, *n;              /* running state */
    real *q, *k, *v;          /* gathered chunk rows [S, D] [S, D] [S, E]; q is scaled */
    real *decay, *P;          /* [S, S] */
    real *w, *den;            /* [S] */
    real *num;                /* [S, E] */
    real *saved;              /* backward: states at the starts of the segment's chunks */
    double *saved_m;
    real *dC, *dn, *G, *e, *dP, *dq, *dk, *dv, *CT; /* backward */
    double *x;                                      /* [T] */
    real *pack;
} workspace;

static ptrdiff_t chunk_length(const xl_mlstm *a) {
    return a->form == XL_PARALLEL ? xl_max(1, a->T) : xl_min(a->chunk, xl_max(1, a->T));
}

static double *take_doubles(xl_plan *p, ptrdiff_t count) {
    return xl_take(p, "", XL_ROLE_WORK, XL_DT_U8, 1, XL_SHAPE(count * (ptrdiff_t)sizeof(double)));
}

static void plan_thread(xl_plan *p, const xl_mlstm *a, workspace *w) {
    ptrdiff_t S = chunk_length(a), D = a->D, E = a->E, T = a->T, chunks = xl_ceil_div(T, S) + 1;
    w->lf = take_doubles(p, T);
    w->c = take_doubles(p, S);
    w->top = take_doubles(p, S);
    w->b = take_doubles(p, S);
    w->x = take_doubles(p, T);
    w->saved_m = take_doubles(p, chunks);
    w->gate = xl_take_reals(p, xl_max(T, S));
    w->C = xl_take_reals(p, D * E);
    w->n = xl_take_reals(p, D);
    w->q = xl_take_reals(p, S * D);
    w->k = xl_take_reals(p, S * D);
    w->v = xl_take_reals(p, S * E);
    w->decay = xl_take_reals(p, S * S);
    w->P = xl_take_reals(p, S * S);
    w->w = xl_take_reals(p, S);
    w->den = xl_take_reals(p, S);
    w->num = xl_take_reals(p, S * E);
    w->saved = xl_take_reals(p, chunks * (D * E + D));
    w->dC = xl_take_reals(p, D * E);
    w->dn = xl_take_reals(p, D);
    w->G = xl_take_reals(p, S * E);
    w->e = xl_take_reals(p, S);
    w->dP = xl_take_reals(p, S * S);
    w->dq = xl_take_reals(p, S * D);
    w->dk = xl_take_reals(p, S * D);
    w->dv = xl_take_reals(p, S * E);
    w->pack = xl_take_reals(p, XL_GEMM_PACK);
}

static workspace place_thread(const xl_mlstm *a, char *base) {
    xl_plan measure = {0};
    workspace w;
    plan_thread(&measure, a, &w);
    xl_plan p = {.base = base + omp_get_thread_num() * measure.used, .size = PTRDIFF_MAX};
    plan_thread(&p, a, &w);
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
    if (a->chunk < 1) return xl_fail(ctx, XL_VALUE, "chunk is %td, expected 1 or more", a->chunk);
    if (a->v_rep < 1 || a->H % a->v_rep)
        return xl_fail(ctx, XL_VALUE, "%td heads cannot share v in groups of %td", a->H, a->v_rep);
    for (ptrdiff_t b = 0; a->lengths && b < a->B; b++)
        if (a->lengths[b] < 0 || a->lengths[b] > a->T)
            return xl_fail(ctx, XL_VALUE, "lengths[%td] is %d, T is %td", b, (int)a->lengths[b], a->T);
    return XL_OK;
}

static ptrdiff_t row_length(const xl_mlstm *a, ptrdiff_t b) {
    return a->lengths ? a->lengths[b] : a->T;
}

/* End of the segment that begins at t: the next reset. */
static ptrdiff_t segment_end(const xl_mlstm *a, ptrdiff_t b, ptrdiff_t t, ptrdiff_t T) {
    for (t++; t < T; t++)
        if (a->reset && a->reset[b * a->T + t]) break;
    return t;
}

static void log_forget(const xl_kernels *k, ptrdiff_t T, xl_heads f, ptrdiff_t b, ptrdiff_t h,
                       workspace *w) {
    for (ptrdiff_t t = 0; t < T; t++) w->gate[t] = *xl_at(f, b, h, t);
    k->logsigmoid(T, w->gate, w->gate);
    for (ptrdiff_t t = 0; t < T; t++) w->lf[t] = (double)w->gate[t];
}

/* Rows t0 .. t0+S-1 of q (scaled), k, v; then decay, carry and P = (q k^T) o decay of the chunk. */
static void chunk_scores(const xl_ctx *ctx, const xl_mlstm *a, workspace *w, xl_heads q, xl_heads k,
                         xl_heads v, xl_heads i, ptrdiff_t b, ptrdiff_t h, ptrdiff_t t0, ptrdiff_t S,
                         double m, int need_scores) {
    const xl_kernels *kn = ctx->k;
    ptrdiff_t D = a->D, E = a->E;
    double sum = 0, top = m;
    for (ptrdiff_t t = 0; t < S; t++) {
        memcpy(w->k + t * D, xl_at(k, b, h, t0 + t), (size_t)D * sizeof(real));
        memcpy(w->v + t * E, xl_at(v, b, h / a->v_rep, t0 + t), (size_t)E * sizeof(real));
        sum += t ? w->lf[t0 + t] : 0; /* the decay of the first step acts on the carry alone */
        w->b[t] = sum;
        w->c[t] = (double)*xl_at(i, b, h, t0 + t) - sum;
        top = w->c[t] > top ? w->c[t] : top;
        w->top[t] = top;
    }
    for (ptrdiff_t t = need_scores ? 0 : S - 1; t < S; t++) {
        real *row = w->decay + t * S;
        for (ptrdiff_t s = 0; s <= t; s++)
            row[s] = w->top[t] == -INFINITY ? -INFINITY : (real)(w->c[s] - w->top[t]);
        kn->exp(t + 1, row, row);
        w->w[t] = m == -INFINITY ? 0 : (real)exp(m - w->top[t]);
    }
    if (!need_scores) return;
    for (ptrdiff_t t = 0; t < S; t++) {
        const real *from = xl_at(q, b, h, t0 + t);
        for (ptrdiff_t j = 0; j < D; j++) w->q[t * D + j] = a->scale * from[j];
    }
    kn->gemm(S, S, D, 1, w->q, D, 1, w->k, 1, D, 0, w->P, S, w->pack);
    for (ptrdiff_t t = 0; t < S; t++) {
        for (ptrdiff_t s = 0; s <= t; s++) w->P[t * S + s] *= w->decay[t * S + s];
        for (ptrdiff_t s = t + 1; s < S; s++) w->P[t * S + s] = w->decay[t * S + s] = 0;
    }
}

/* num, den (before the floor) of the chunk from P and the carried state. */
static void chunk_output(const xl_ctx *ctx, const xl_mlstm *a, workspace *w, ptrdiff_t S, double m) {
    const xl_kernels *kn = ctx->k;
    ptrdiff_t D = a->D, E = a->E;
    for (ptrdiff_t t = 0; t < S; t++) w->den[t] = kn->sum(t + 1, w->P + t * S);
    int carry = m != -INFINITY;
    if (carry) {
        kn->gemm(S, E, D, 1, w->q, D, 1, w->C, E, 1, 0, w->num, E, w->pack);
        for (ptrdiff_t t = 0; t < S; t++) {
            kn->scale(E, w->w[t], w->num + t * E);
            w->den[t] += w->w[t] * kn->dot(D, w->q + t * D, w->n);
        }
    }
    kn->gemm(S, E, S, 1, w->P, S, 1, w->v, E, 1, carry ? 1 : 0, w->num, E, w->pack);
}

/* The divisor of step t of the chunk; *slope is d divisor / d den. mu: exponent of the stabiliser. */
static real divisor(const xl_mlstm *a, real den, double mu, real *slope) {
    *slope = 1;
    if (a->normalizer == XL_RATIO) return den;
    real least = (real)exp(-mu), size = den < 0 ? -den : den;
    *slope = size >= least ? (den < 0 ? (real)-1 : (real)1) : (real)0;
    return size >= least || size != size ? size : least;
}

/* C, n behind the chunk; returns m behind it. m_in already contains the first step's decay. */
static double chunk_state(const xl_ctx *ctx, const xl_mlstm *a, workspace *w, ptrdiff_t S, double m) {
    const xl_kernels *kn = ctx->k;
    ptrdiff_t D = a->D, E = a->E;
    const real *last = w->decay + (S - 1) * S;
    real carry = w->w[S - 1];
    if (m == -INFINITY) {
        memset(w->n, 0, (size_t)D * sizeof(real));
    } else {
        kn->scale(D * E, carry, w->C);
        kn->scale(D, carry, w->n);
    }
    for (ptrdiff_t s = 0; s < S; s++) {
        kn->scale(D, last[s], w->k + s * D);
        kn->add(D, w->k + s * D, w->n);
    }
    kn->gemm(D, E, S, 1, w->k, 1, D, w->v, E, 1, m == -INFINITY ? 0 : 1, w->C, E, w->pack);
    return w->b[S - 1] + w->top[S - 1];
}

static double start_state(const xl_mlstm *a, workspace *w, xl_mlstm_state s, ptrdiff_t b,
                          ptrdiff_t h, int keep) {
    ptrdiff_t D = a->D, E = a->E, at = b * a->H + h;
    double m = keep && s.c ? (double)s.m[at] : -INFINITY;
    if (m == -INFINITY) {
        memset(w->C, 0, (size_t)(D * E) * sizeof(real));
        memset(w->n, 0, (size_t)D * sizeof(real));
    } else {
        memcpy(w->C, s.c + at * D * E, (size_t)(D * E) * sizeof(real));
        memcpy(w->n, s.n + at * D, (size_t)D * sizeof(real));
    }
    return m;
}

static void keep_state(const xl_mlstm *a, const workspace *w, xl_mlstm_state s, ptrdiff_t b,
                       ptrdiff_t h, double m) {
    ptrdiff_t D = a->D, E = a->E, at = b * a->H + h;
    memcpy(s.c + at * D * E, w->C, (size_t)(D * E) * sizeof(real));
    memcpy(s.n + at * D, w->n, (size_t)D * sizeof(real));
    s.m[at] = (real)m;
}

/* ---- forward ------------------------------------------------------------------------------ */

static void write_outputs(const xl_mlstm *a, workspace *w, xl_heads out, ptrdiff_t b, ptrdiff_t h,
                          ptrdiff_t t0, ptrdiff_t S) {
    for (ptrdiff_t t = 0; t < S; t++) {
        real slope, d = divisor(a, w->den[t], w->b[t] + w->top[t], &slope);
        real *o = xl_at(out, b, h, t0 + t), inverse = d == 0 ? 0 : 1 / d;
        for (ptrdiff_t j = 0; j < a->E; j++) o[j] = w->num[t * a->E + j] * inverse;
    }
}

static double forward_chunks(const xl_ctx *ctx, const xl_mlstm *a, workspace *w, xl_heads out,
                             xl_heads q, xl_heads k, xl_heads v, xl_heads i, ptrdiff_t b,
                             ptrdiff_t h, ptrdiff_t start, ptrdiff_t end, double m) {
    for (ptrdiff_t t = start; t < end; t += chunk_length(a)) {
        ptrdiff_t S = xl_min(chunk_length(a), end - t);
        m += m == -INFINITY ? 0 : w->lf[t];
        chunk_scores(ctx, a, w, q, k, v, i, b, h, t, S, m, 1);
        chunk_output(ctx, a, w, S, m);
        write_outputs(a, w, out, b, h, t, S);
        m = chunk_state(ctx, a, w, S, m);
    }
    return m;
}

static double forward_steps(const xl_ctx *ctx, const xl_mlstm *a, workspace *w, xl_heads out,
                            xl_heads q, xl_heads k, xl_heads v, xl_heads i, ptrdiff_t b, ptrdiff_t h,
                            ptrdiff_t start, ptrdiff_t end, double m) {
    const xl_kernels *kn = ctx->k;
    ptrdiff_t D = a->D, E = a->E;
    for (ptrdiff_t t = start; t < end; t++) {
        const real *kt = xl_at(k, b, h, t), *vt = xl_at(v, b, h / a->v_rep, t);
        const real *qt = xl_at(q, b, h, t);
        double it = (double)*xl_at(i, b, h, t), old = m == -INFINITY ? m : m + w->lf[t];
        m = old > it ? old : it;
        real F = old == -INFINITY ? 0 : (real)exp(old - m), I = m == -INFINITY ? 0 : (real)exp(it - m);
        real *o = xl_at(out, b, h, t), den = 0;
        memset(o, 0, (size_t)E * sizeof(real));
        for (ptrdiff_t d = 0; d < D; d++) {
            real *row = w->C + d * E, qs = a->scale * qt[d];
            kn->scale(E, F, row);
            kn->axpy(E, I * kt[d], vt, row);
            w->n[d] = F * w->n[d] + I * kt[d];
            kn->axpy(E, qs, row, o);
            den += qs * w->n[d];
        }
        real slope, by = divisor(a, den, m, &slope);
        kn->scale(E, by == 0 ? 0 : 1 / by, o);
    }
    return m;
}

xl_status xl_mlstm_forward(xl_ctx *ctx, const xl_mlstm *a, xl_heads h, xl_mlstm_state last,
                           xl_heads q, xl_heads k, xl_heads v, xl_heads i, xl_heads f,
                           xl_mlstm_state first, void *scratch) {
    XL_TRY(check(ctx, a));
#pragma omp parallel num_threads(ctx->threads)
    {
        workspace w = place_thread(a, scratch);
#pragma omp for schedule(dynamic) collapse(2)
        for (ptrdiff_t b = 0; b < a->B; b++)
            for (ptrdiff_t n = 0; n < a->H; n++) {
                ptrdiff_t T = row_length(a, b), t = 0;
                int reset = a->reset && T > 0 && a->reset[b * a->T];
                double m = start_state(a, &w, first, b, n, !reset);
                log_forget(ctx->k, T, f, b, n, &w);
                while (t < T) {
                    ptrdiff_t end = segment_end(a, b, t, T);
                    if (t) m = start_state(a, &w, first, b, n, 0);
                    m = (a->form == XL_RECURRENT ? forward_steps : forward_chunks)(
                        ctx, a, &w, h, q, k, v, i, b, n, t, end, m);
                    t = end;
                }
                for (; t < a->T; t++)
                    memset(xl_at(h, b, n, t), 0, (size_t)a->E * sizeof(real));
                if (last.c) keep_state(a, &w, last, b, n, m);
            }
    }
    return XL_OK;
}

/* ---- backward ----------------------------------------------------------------------------- */

static void add_rows(const xl_mlstm *a, xl_heads to, const real *from, ptrdiff_t width, real scale,
                     ptrdiff_t b, ptrdiff_t h, ptrdiff_t t0, ptrdiff_t S) {
    (void)a;
    if (!to.p) return;
    for (ptrdiff_t t = 0; t < S; t++) {
        real *row = xl_at(to, b, h, t0 + t);
        for (ptrdiff_t j = 0; j < width; j++) row[j] += scale * from[t * width + j];
    }
}

/* Gradients of one chunk from dh and from dC, dn on the state behind it; leaves dC, dn on the state
 * before it and q.dq - k.dk, k.dk for the gates. C, n of w are the state before. */
static void backward_chunk(const xl_ctx *ctx, const xl_mlstm *a, workspace *w, xl_heads dh,
                           ptrdiff_t b, ptrdiff_t h, ptrdiff_t t0, ptrdiff_t S, double m) {
    const xl_kernels *kn = ctx->k;
    ptrdiff_t D = a->D, E = a->E;
    const real *last = w->decay + (S - 1) * S;
    int carry = m != -INFINITY;
    for (ptrdiff_t t = 0; t < S; t++) {
        real slope, d = divisor(a, w->den[t], w->b[t] + w->top[t], &slope);
        real inverse = d == 0 ? 0 : 1 / d;
        const real *g = xl_at(dh, b, h, t0 + t);
        for (ptrdiff_t j = 0; j < E; j++) w->G[t * E + j] = g[j] * inverse;
        w->e[t] = -slope * inverse * kn->dot(E, w->G + t * E, w->num + t * E);
    }
    kn->gemm(S, S, E, 1, w->G, E, 1, w->v, 1, E, 0, w->dP, S, w->pack);
    for (ptrdiff_t t = 0; t < S; t++) {
        for (ptrdiff_t s = 0; s <= t; s++)
            w->dP[t * S + s] = (w->dP[t * S + s] + w->e[t]) * w->decay[t * S + s];
        for (ptrdiff_t s = t + 1; s < S; s++) w->dP[t * S + s] = 0;
    }
    /* dv = P^T G + last_s k_s dC;  dk = dS^T q + last_s (dC v_s + dn);  state terms first */
    kn->gemm(S, E, D, 1, w->k, D, 1, w->dC, E, 1, 0, w->dv, E, w->pack);
    kn->gemm(S, D, E, 1, w->v, E, 1, w->dC, 1, E, 0, w->dk, D, w->pack);
    for (ptrdiff_t s = 0; s < S; s++) {
        kn->scale(E, last[s], w->dv + s * E);
        kn->add(D, w->dn, w->dk + s * D);
        kn->scale(D, last[s], w->dk + s * D);
    }
    kn->gemm(S, E, S, 1, w->P, 1, S, w->G, E, 1, 1, w->dv, E, w->pack);
    kn->gemm(S, D, S, 1, w->dP, 1, S, w->q, D, 1, 1, w->dk, D, w->pack);
    /* dq = dS k + w_t (G_t C^T + e_t n) */
    kn->gemm(S, D, S, 1, w->dP, S, 1, w->k, D, 1, 0, w->dq, D, w->pack);
    kn->scale(D * E, w->w[S - 1], w->dC);
    kn->scale(D, w->w[S - 1], w->dn);
    if (!carry) return;
    for (ptrdiff_t t = 0; t < S; t++) {
        kn->scale(E, w->w[t], w->G + t * E);
        kn->axpy(D, w->w[t] * w->e[t], w->n, w->dq + t * D);
        kn->axpy(D, w->w[t] * w->e[t], w->q + t * D, w->dn);
    }
    kn->gemm(S, D, E, 1, w->G, E, 1, w->C, 1, E, 1, w->dq, D, w->pack);
    kn->gemm(D, E, S, 1, w->q, 1, D, w->G, E, 1, 1, w->dC, E, w->pack);
}

typedef struct {
    xl_heads dq, dk, dv, di, df, dh, q, k, v, i, f;
} arrays;

/* States at the starts of the chunks of a segment, then the chunks backwards. */
static void backward_segment(const xl_ctx *ctx, const xl_mlstm *a, workspace *w, const arrays *r,
                             ptrdiff_t b, ptrdiff_t h, ptrdiff_t start, ptrdiff_t end, double m) {
    const xl_kernels *kn = ctx->k;
    ptrdiff_t S0 = chunk_length(a), D = a->D, E = a->E, size = D * E + D;
    ptrdiff_t chunks = xl_ceil_div(end - start, S0);
    for (ptrdiff_t j = 0; j < chunks; j++) {
        ptrdiff_t t = start + j * S0, S = xl_min(S0, end - t);
        memcpy(w->saved + j * size, w->C, (size_t)(D * E) * sizeof(real));
        memcpy(w->saved + j * size + D * E, w->n, (size_t)D * sizeof(real));
        m += m == -INFINITY ? 0 : w->lf[t];
        w->saved_m[j] = m;
        if (j == chunks - 1) break;
        chunk_scores(ctx, a, w, r->q, r->k, r->v, r->i, b, h, t, S, m, 0);
        m = chunk_state(ctx, a, w, S, m);
    }
    for (ptrdiff_t j = chunks; j-- > 0;) {
        ptrdiff_t t = start + j * S0, S = xl_min(S0, end - t);
        memcpy(w->C, w->saved + j * size, (size_t)(D * E) * sizeof(real));
        memcpy(w->n, w->saved + j * size + D * E, (size_t)D * sizeof(real));
        chunk_scores(ctx, a, w, r->q, r->k, r->v, r->i, b, h, t, S, w->saved_m[j], 1);
        chunk_output(ctx, a, w, S, w->saved_m[j]);
        backward_chunk(ctx, a, w, r->dh, b, h, t, S, w->saved_m[j]);
        add_rows(a, r->dq, w->dq, D, a->scale, b, h, t, S);
        add_rows(a, r->dk, w->dk, D, 1, b, h, t, S);
        add_rows(a, r->dv, w->dv, E, 1, b, h, t, S);
        for (ptrdiff_t s = 0; s < S; s++) {
            real kdk = kn->dot(D, w->k + s * D, w->dk + s * D);
            if (r->di.p) *xl_at(r->di, b, h, t + s) += kdk;
            w->x[t + s] += (double)kn->dot(D, w->q + s * D, w->dq + s * D) - (double)kdk;
        }
    }
}

xl_status xl_mlstm_backward(xl_ctx *ctx, const xl_mlstm *a, xl_heads dq, xl_heads dk, xl_heads dv,
                            xl_heads di, xl_heads df, xl_mlstm_state dfirst, xl_heads dh, xl_heads q,
                            xl_heads k, xl_heads v, xl_heads i, xl_heads f, xl_mlstm_state first,
                            xl_mlstm_state dlast, void *scratch) {
    XL_TRY(check(ctx, a));
    const arrays r = {dq, dk, dv, di, df, dh, q, k, v, i, f};
    ptrdiff_t D = a->D, E = a->E;
#pragma omp parallel num_threads(ctx->threads)
    {
        workspace w = place_thread(a, scratch);
#pragma omp for schedule(dynamic) collapse(2)
        for (ptrdiff_t b = 0; b < a->B; b++)
            for (ptrdiff_t h = 0; h < a->H; h++) {
                ptrdiff_t T = row_length(a, b), at = b * a->H + h, t = 0;
                log_forget(ctx->k, T, f, b, h, &w);
                memset(w.x, 0, (size_t)T * sizeof(double));
                /* an empty row hands the gradient of its state through */
                do {
                    ptrdiff_t end = T ? segment_end(a, b, t, T) : 0;
                    int fresh = t || !first.c || (T && a->reset && a->reset[b * a->T]);
                    memset(w.dC, 0, (size_t)(D * E) * sizeof(real));
                    memset(w.dn, 0, (size_t)D * sizeof(real));
                    if (end == T && dlast.c) {
                        memcpy(w.dC, dlast.c + at * D * E, (size_t)(D * E) * sizeof(real));
                        memcpy(w.dn, dlast.n + at * D, (size_t)D * sizeof(real));
                    }
                    double m = start_state(a, &w, first, b, h, !fresh);
                    double tail = 0;
                    if (T) {
                        backward_segment(ctx, a, &w, &r, b, h, t, end, m);
                        if (end == T && dlast.c) tail = 1;
                    }
                    if (tail != 0) { /* <dC_T, C_T> + <dn_T, n_T>: the state behind the last chunk */
                        ptrdiff_t S0 = chunk_length(a), t0 = t + (end - t - 1) / S0 * S0;
                        ptrdiff_t j = (end - t - 1) / S0, size = D * E + D;
                        ptrdiff_t S = end - t0;
                        memcpy(w.C, w.saved + j * size, (size_t)(D * E) * sizeof(real));
                        memcpy(w.n, w.saved + j * size + D * E, (size_t)D * sizeof(real));
                        chunk_scores(ctx, a, &w, q, k, v, i, b, h, t0, S, w.saved_m[j], 0);
                        chunk_state(ctx, a, &w, S, w.saved_m[j]);
                        w.x[T - 1] += (double)ctx->k->dot(D * E, w.C, dlast.c + at * D * E) +
                                      (double)ctx->k->dot(D, w.n, dlast.n + at * D);
                    }
                    double sum = 0;
                    for (ptrdiff_t s = end; df.p && s-- > t;) {
                        sum += w.x[s];
                        if (s == t && (fresh || m == -INFINITY)) break; /* no state to forget */
                        double gate = (double)*xl_at(f, b, h, s);
                        *xl_at(df, b, h, s) += (real)(sum / (1 + exp(gate)));
                    }
                    if (t == 0 && !fresh && dfirst.c) {
                        /* the carry of the first step: C enters as exp(lf + m) C */
                        for (ptrdiff_t j = 0; j < D * E; j++) dfirst.c[at * D * E + j] += w.dC[j];
                        for (ptrdiff_t j = 0; j < D; j++) dfirst.n[at * D + j] += w.dn[j];
                    }
                    t = end;
                } while (t < T);
                if (dfirst.m) dfirst.m[at] = 0;
            }
    }
    return XL_OK;
}
