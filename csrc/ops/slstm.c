/* sLSTM (arXiv:2405.04517, 2.2), stabilised; docs/math/slstm.md derives every line.
 *
 * Time is sequential, so a task is one head with all rows of the batch: its four recurrent matrices are
 * packed once and every step multiplies the B states with them. An element of that product does not
 * depend on the number of rows, hence a row's numbers do not depend on B. */
#include "kernels/kernels.h"
#include "ops/cells.h"

#include <omp.h>
#include <string.h>

#define GATES 4
#define TAPE 7        /* F, I, tanh z, sigmoid o, c, n, sigmoid(-f): each D numbers of a step */
#define GRAD_STEPS 32 /* steps whose gradients are kept for one product into dr */

enum { KEEP, WRITE, TANH_Z, SIG_O, C_NEW, N_NEW, SIG_NOT_F };
enum { GATE_I, GATE_F, GATE_Z, GATE_O };

/* Work of one thread: B rows of one head. */
typedef struct {
    real *y, *c, *n, *m;  /* [B, D] running state; in the backward dy, dc, dn of it */
    real *raw;            /* [B, 4, D] */
    real *step;           /* [TAPE, D] when the caller wants no tape */
    real *draw, *before;  /* [GRAD_STEPS, B, 4, D], [GRAD_STEPS, B, D] */
    real *packed, *apack; /* the four matrices as panels */
    real *pack;
} workspace;

static ptrdiff_t matrix_size(const xl_ctx *ctx, ptrdiff_t D) {
    return D * xl_round_up(D, ctx->k->nr);
}

static void plan_thread(const xl_ctx *ctx, xl_plan *p, const xl_slstm *a, workspace *w) {
    ptrdiff_t B = a->B, D = a->D, steps = xl_min(GRAD_STEPS, a->T);
    w->y = xl_take_reals(p, B * D);
    w->c = xl_take_reals(p, B * D);
    w->n = xl_take_reals(p, B * D);
    w->m = xl_take_reals(p, B * D);
    w->raw = xl_take_reals(p, B * GATES * D);
    w->step = xl_take_reals(p, TAPE * D);
    w->draw = xl_take_reals(p, steps * B * GATES * D);
    w->before = xl_take_reals(p, steps * B * D);
    w->packed = xl_take_reals(p, GATES * matrix_size(ctx, D));
    w->apack = xl_take_reals(p, XL_GEMM_KC * XL_GEMM_MR_MAX);
    w->pack = xl_take_reals(p, XL_GEMM_PACK);
}

static workspace place_thread(const xl_ctx *ctx, const xl_slstm *a, char *base) {
    xl_plan measure = {0};
    workspace w;
    plan_thread(ctx, &measure, a, &w);
    xl_plan p = {.base = base + omp_get_thread_num() * measure.used, .size = PTRDIFF_MAX};
    plan_thread(ctx, &p, a, &w);
    return w;
}

ptrdiff_t xl_slstm_scratch(const xl_ctx *ctx, const xl_slstm *a) {
    xl_plan p = {0};
    workspace w;
    ptrdiff_t total;
    plan_thread(ctx, &p, a, &w);
    return p.failed || __builtin_mul_overflow(p.used, (ptrdiff_t)ctx->threads, &total) ? -1 : total;
}

static xl_status check(xl_ctx *ctx, const xl_slstm *a, const xl_slstm_state *first) {
    if (a->D < 1) return xl_fail(ctx, XL_VALUE, "x has head width 0, expected 1 or more");
    if (first->y && !(first->c && first->n && first->m))
        return xl_fail(ctx, XL_VALUE, "the state is y, c, n and m together, or nothing");
    return XL_OK;
}

static int starts(const xl_slstm *a, ptrdiff_t b, ptrdiff_t t) {
    return a->reset && a->reset[b * a->T + t];
}

/* Panels of B(k, n) = r[g][k*rs + n*cs] for the four gates, in slices of XL_GEMM_KC rows. */
static void pack_gates(const xl_ctx *ctx, ptrdiff_t D, const real *r, ptrdiff_t rs, ptrdiff_t cs,
                       workspace *w) {
    ptrdiff_t width = xl_round_up(D, ctx->k->nr);
    for (ptrdiff_t g = 0; g < GATES; g++)
        for (ptrdiff_t k0 = 0; k0 < D; k0 += XL_GEMM_KC)
            ctx->k->pack_b(xl_min(XL_GEMM_KC, D - k0), D, r + g * D * D + k0 * rs, rs, cs,
                           w->packed + g * matrix_size(ctx, D) + k0 * width);
}

/* out += x (matrix of gate g), x and out with B rows. */
static void add_product(const xl_ctx *ctx, ptrdiff_t B, ptrdiff_t D, ptrdiff_t g, const real *x,
                        ptrdiff_t ldx, real *out, ptrdiff_t ldo, workspace *w) {
    ptrdiff_t width = xl_round_up(D, ctx->k->nr);
    for (ptrdiff_t k0 = 0; k0 < D; k0 += XL_GEMM_KC)
        ctx->k->gemm_packed(B, D, xl_min(XL_GEMM_KC, D - k0), 1, x + k0, ldx, 1,
                            w->packed + g * matrix_size(ctx, D) + k0 * width, 1, out, ldo,
                            w->apack);
}

static void forget(ptrdiff_t D, real *y, real *c, real *n, real *m) {
    for (ptrdiff_t j = 0; j < D; j++) y[j] = c[j] = n[j] = 0, m[j] = -INFINITY;
}

static void copy_rows(const xl_slstm *a, ptrdiff_t h, real *rows, const real *state) {
    for (ptrdiff_t b = 0; b < a->B; b++)
        memcpy(rows + b * a->D, state + (b * a->H + h) * a->D, (size_t)a->D * sizeof(real));
}

/* ---- forward ------------------------------------------------------------------------------ */

/* One step of one row: raw [4, D] to tape [TAPE, D] and the new state.
 * m' = max(lf + m, i), F = exp(lf + m - m'), I = exp(i - m'), c' = F c + I tanh z, n' = F n + I,
 * y' = sigmoid(o) c'/n'. No state is m = -inf: F = 0, I = 1. */
static void row_step(const xl_ctx *ctx, ptrdiff_t D, const real *raw, real *tape, real *y, real *c,
                     real *n, real *m) {
    const xl_kernels *k = ctx->k;
    real *keep = tape + KEEP * D, *write = tape + WRITE * D, *tz = tape + TANH_Z * D;
    real *so = tape + SIG_O * D, *nf = tape + SIG_NOT_F * D;
    const real *i = raw + GATE_I * D, *f = raw + GATE_F * D;
    const real *z = raw + GATE_Z * D, *o = raw + GATE_O * D;
    k->logsigmoid(D, f, keep);
    for (ptrdiff_t j = 0; j < D; j++) {
        real old = m[j] == -INFINITY ? m[j] : m[j] + keep[j], top = old > i[j] ? old : i[j];
        int nothing = top == -INFINITY; /* nothing kept and nothing written: F = I = 0 */
        keep[j] = nothing ? top : old - top;
        write[j] = nothing ? top : i[j] - top;
        m[j] = top;
        nf[j] = -f[j];
        tz[j] = (real)tanh((double)z[j]);
    }
    k->exp(D, keep, keep);
    k->exp(D, write, write);
    k->sigmoid(D, o, so);
    k->sigmoid(D, nf, nf);
    for (ptrdiff_t j = 0; j < D; j++) {
        c[j] = tape[C_NEW * D + j] = keep[j] * c[j] + write[j] * tz[j];
        n[j] = tape[N_NEW * D + j] = keep[j] * n[j] + write[j];
        y[j] = n[j] == 0 ? 0 : so[j] * (c[j] / n[j]);
    }
}

static void forward_head(const xl_ctx *ctx, const xl_slstm *a, real *y, xl_slstm_state last,
                         const real *x, const real *r, xl_slstm_state first, real *tape,
                         ptrdiff_t h, workspace *w) {
    ptrdiff_t B = a->B, H = a->H, T = a->T, D = a->D;
    pack_gates(ctx, D, r + h * GATES * D * D, D, 1, w);
    if (first.y) {
        copy_rows(a, h, w->y, first.y);
        copy_rows(a, h, w->c, first.c);
        copy_rows(a, h, w->n, first.n);
        copy_rows(a, h, w->m, first.m);
    } else {
        forget(B * D, w->y, w->c, w->n, w->m);
    }
    for (ptrdiff_t t = 0; t < T; t++) {
        for (ptrdiff_t b = 0; b < B; b++) {
            ptrdiff_t at = b * D;
            if (starts(a, b, t)) forget(D, w->y + at, w->c + at, w->n + at, w->m + at);
            memcpy(w->raw + b * GATES * D, x + ((b * H + h) * T + t) * GATES * D,
                   (size_t)(GATES * D) * sizeof(real));
        }
        for (ptrdiff_t g = 0; g < GATES; g++)
            add_product(ctx, B, D, g, w->y, D, w->raw + g * D, GATES * D, w);
        for (ptrdiff_t b = 0; b < B; b++) {
            ptrdiff_t at = b * D, row = (b * H + h) * T + t;
            row_step(ctx, D, w->raw + b * GATES * D, tape ? tape + row * TAPE * D : w->step,
                     w->y + at, w->c + at, w->n + at, w->m + at);
            memcpy(y + row * D, w->y + at, (size_t)D * sizeof(real));
        }
    }
    for (ptrdiff_t b = 0; last.y && b < B; b++) {
        ptrdiff_t to = (b * H + h) * D, at = b * D;
        memcpy(last.y + to, w->y + at, (size_t)D * sizeof(real));
        memcpy(last.c + to, w->c + at, (size_t)D * sizeof(real));
        memcpy(last.n + to, w->n + at, (size_t)D * sizeof(real));
        memcpy(last.m + to, w->m + at, (size_t)D * sizeof(real));
    }
}

xl_status xl_slstm_forward(xl_ctx *ctx, const xl_slstm *a, real *y, xl_slstm_state last,
                           const real *x, const real *r, xl_slstm_state first, real *tape,
                           void *scratch) {
    XL_TRY(check(ctx, a, &first));
    for (ptrdiff_t h0 = 0; h0 < a->H; h0 += 8 * ctx->threads) {
        ptrdiff_t h1 = xl_min(a->H, h0 + 8 * ctx->threads);
        XL_TRY(xl_poll(ctx));
#pragma omp parallel num_threads(ctx->threads)
        {
            workspace w = place_thread(ctx, a, scratch);
#pragma omp for schedule(dynamic)
            for (ptrdiff_t h = h0; h < h1; h++)
                forward_head(ctx, a, y, last, x, r, first, tape, h, &w);
        }
    }
    return XL_OK;
}

/* ---- backward ----------------------------------------------------------------------------- */

/* One step of one row: gradients dy (of y', whole), dc, dn (of c', n') to draw [4, D]; leaves dc, dn
 * of the state before. c0, n0: that state (NULL: zeros). m is held fixed, which is exact: y does not
 * depend on it. */
static void row_backward(ptrdiff_t D, const real *tape, const real *c0, const real *n0,
                         const real *dy, real *dc, real *dn, real *draw) {
    const real *keep = tape + KEEP * D, *write = tape + WRITE * D, *tz = tape + TANH_Z * D;
    const real *so = tape + SIG_O * D, *nf = tape + SIG_NOT_F * D;
    for (ptrdiff_t j = 0; j < D; j++) {
        real inverse = tape[N_NEW * D + j] == 0 ? 0 : 1 / tape[N_NEW * D + j];
        real ratio = tape[C_NEW * D + j] * inverse;
        /* y = sigmoid(o) c / n */
        dc[j] += dy[j] * so[j] * inverse;
        dn[j] -= dy[j] * so[j] * ratio * inverse;
        draw[GATE_O * D + j] = dy[j] * ratio * so[j] * (1 - so[j]);
        /* c = F c0 + I tanh z, n = F n0 + I */
        draw[GATE_I * D + j] = write[j] * (dc[j] * tz[j] + dn[j]);
        draw[GATE_Z * D + j] = write[j] * dc[j] * (1 - tz[j] * tz[j]);
        draw[GATE_F * D + j] = c0 ? keep[j] * (dc[j] * c0[j] + dn[j] * n0[j]) * nf[j] : 0;
        dc[j] *= keep[j];
        dn[j] *= keep[j];
    }
}

static void backward_head(const xl_ctx *ctx, const xl_slstm *a, real *dx, real *dr,
                          xl_slstm_state dfirst, const real *dy, const real *y, const real *r,
                          xl_slstm_state first, xl_slstm_state dlast, const real *tape, ptrdiff_t h,
                          workspace *w) {
    const xl_kernels *k = ctx->k;
    ptrdiff_t B = a->B, H = a->H, T = a->T, D = a->D, steps = xl_min(GRAD_STEPS, T);
    pack_gates(ctx, D, r + h * GATES * D * D, 1, D, w);
    forget(B * D, w->y, w->c, w->n, w->m);
    if (dlast.y) {
        copy_rows(a, h, w->y, dlast.y);
        copy_rows(a, h, w->c, dlast.c);
        copy_rows(a, h, w->n, dlast.n);
    }
    ptrdiff_t kept = 0;
    for (ptrdiff_t t = T; t-- > 0;) {
        real *draw_t = w->draw + kept * B * GATES * D, *before_t = w->before + kept * B * D;
        for (ptrdiff_t b = 0; b < B; b++) {
            ptrdiff_t row = (b * H + h) * T + t, state = (b * H + h) * D, at = b * D;
            const real *y0 = t ? y + (row - 1) * D : first.y ? first.y + state : NULL;
            const real *c0 = t         ? tape + ((row - 1) * TAPE + C_NEW) * D
                             : first.c ? first.c + state
                                       : NULL;
            const real *n0 = t         ? tape + ((row - 1) * TAPE + N_NEW) * D
                             : first.n ? first.n + state
                                       : NULL;
            if (starts(a, b, t)) y0 = c0 = n0 = NULL;
            k->add(D, dy + row * D, w->y + at);
            row_backward(D, tape + row * TAPE * D, c0, n0, w->y + at, w->c + at, w->n + at,
                         draw_t + b * GATES * D);
            if (dx) k->add(GATES * D, draw_t + b * GATES * D, dx + row * GATES * D);
            if (y0)
                memcpy(before_t + at, y0, (size_t)D * sizeof(real));
            else
                memset(before_t + at, 0, (size_t)D * sizeof(real));
        }
        /* raw = x + y0 r: dy0 = sum over gates of draw r^T, nothing across a document start */
        memset(w->y, 0, (size_t)(B * D) * sizeof(real));
        for (ptrdiff_t g = 0; g < GATES; g++)
            add_product(ctx, B, D, g, draw_t + g * D, GATES * D, w->y, D, w);
        for (ptrdiff_t b = 0; b < B; b++)
            if (starts(a, b, t)) memset(w->y + b * D, 0, (size_t)D * sizeof(real));
        if (++kept < steps && t) continue;
        for (ptrdiff_t g = 0; dr && g < GATES; g++)
            k->gemm(D, D, kept * B, 1, w->before, 1, D, w->draw + g * D, GATES * D, 1, 1,
                    dr + (h * GATES + g) * D * D, D, w->pack);
        kept = 0;
    }
    for (ptrdiff_t b = 0; dfirst.y && b < B; b++) {
        ptrdiff_t to = (b * H + h) * D;
        k->add(D, w->y + b * D, dfirst.y + to);
        k->add(D, w->c + b * D, dfirst.c + to);
        k->add(D, w->n + b * D, dfirst.n + to);
    }
}

xl_status xl_slstm_backward(xl_ctx *ctx, const xl_slstm *a, real *dx, real *dr,
                            xl_slstm_state dfirst, const real *dy, const real *y, const real *r,
                            xl_slstm_state first, xl_slstm_state dlast, const real *tape,
                            void *scratch) {
    XL_TRY(check(ctx, a, &first));
    for (ptrdiff_t h0 = 0; h0 < a->H; h0 += 8 * ctx->threads) {
        ptrdiff_t h1 = xl_min(a->H, h0 + 8 * ctx->threads);
        XL_TRY(xl_poll(ctx));
#pragma omp parallel num_threads(ctx->threads)
        {
            workspace w = place_thread(ctx, a, scratch);
#pragma omp for schedule(dynamic)
            for (ptrdiff_t h = h0; h < h1; h++)
                backward_head(ctx, a, dx, dr, dfirst, dy, y, r, first, dlast, tape, h, &w);
        }
    }
    return XL_OK;
}
