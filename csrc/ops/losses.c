/* The head and everything that reads its logits. Logits exist for a block of rows at a time.
 *
 * Stage II loss of a row with logits z, label y, targets K (paper.md (13), numerics.md):
 *     ce           = lse(z) - z_y
 *     renormalised = sum_K t_j (log t_j - z_j + lse_K(z)),  t renormalised over K
 *     tail         = sum_K t_j (log t_j - z_j + lse(z)) + t_rest (log t_rest - lse_rest(z) + lse(z))
 *     sampled      = - sum_K w_j (z_j - lse(z)),  w_j = n_j / k given as log-probabilities */
#include "kernels/kernels.h"
#include "ops/basic.h"

#include <omp.h>
#include <string.h>

#define ROWS 512         /* rows of logits held at a time */
#define TAIL_FLOOR 1e-12 /* least teacher mass outside the targets: its logarithm stays finite */

typedef struct {
    real *logits, *other; /* [ROWS, V]; `other`: the teacher's, only for the divergence */
    real *row;            /* [threads, V] */
    real *target;         /* [threads, 2, k] */
    double *sums;         /* [N, 2] */
    void *matmul;
} workspace;

static ptrdiff_t plan(const xl_ctx *ctx, const xl_head *a, char *base, workspace *w) {
    xl_plan p = {.base = base, .size = PTRDIFF_MAX};
    ptrdiff_t rows = xl_min(ROWS, a->N), size = 0, threads = ctx->threads;
    if (__builtin_mul_overflow(rows, a->V, &size)) return -1;
    ptrdiff_t forward = xl_matmul_scratch(ctx, rows, a->V, a->d),
              dx = xl_matmul_scratch(ctx, rows, a->d, a->V),
              dw = xl_matmul_scratch(ctx, a->V, a->d, rows);
    if (forward < 0 || dx < 0 || dw < 0) return -1;
    w->logits = xl_take_reals(&p, size);
    w->other = xl_take_reals(&p, size);
    w->row = xl_take_reals(&p, threads * a->V);
    w->target = xl_take_reals(&p, threads * 2 * xl_max(1, a->k));
    w->sums = xl_take(&p, "", XL_ROLE_WORK, XL_DT_U8, 1, XL_SHAPE(a->N * 16));
    w->matmul =
        xl_take(&p, "", XL_ROLE_WORK, XL_DT_U8, 1, XL_SHAPE(xl_max(forward, xl_max(dx, dw))));
    return p.failed ? -1 : p.used;
}

ptrdiff_t xl_head_scratch(const xl_ctx *ctx, const xl_head *a) {
    workspace w;
    return plan(ctx, a, NULL, &w);
}

static xl_status make_logits(xl_ctx *ctx, const xl_head *a, real *logits, const real *x, xl_mat w,
                             ptrdiff_t start, ptrdiff_t rows, void *scratch) {
    XL_TRY(xl_poll(ctx));
    return xl_linear_forward(ctx, rows, a->d, a->V, logits, x + start * a->d, w, NULL, scratch);
}

static real log_sum_exp(const xl_kernels *k, ptrdiff_t n, const real *z, real *e) {
    real top = k->max(n, z);
    if (top == -INFINITY) return top;
    return top + (real)log((double)k->exp_sum(n, z, top, e));
}

static xl_status check_labels(xl_ctx *ctx, const xl_head *a, const int32_t *labels,
                              const int32_t *target_ids) {
    for (ptrdiff_t n = 0; n < a->N; n++)
        if (labels[n] < -1 || labels[n] >= a->V)
            return xl_fail(ctx, XL_VALUE, "label %d at row %td is outside -1..%td", (int)labels[n],
                           n, a->V - 1);
    for (ptrdiff_t i = 0; target_ids && i < a->N * a->k; i++)
        if (target_ids[i] < 0 || target_ids[i] >= a->V)
            return xl_fail(ctx, XL_VALUE, "target id %d of row %td is outside 0..%td",
                           (int)target_ids[i], i / a->k, a->V - 1);
    return XL_OK;
}

/* KL part of a row. z: logits; e = exp(z - lse), the student's probabilities. Returns the value;
 * leaves in `full` the factor of e in the gradient over the whole vocabulary, in `rest` the factor
 * of exp(z_j) in the gradient outside the targets (tail form), and in g[j] the gradient at target j
 * beyond that. */
typedef struct {
    double value, full, rest;
} kl_row;

static kl_row target_loss(const xl_head *a, const real *z, const real *e, double lse,
                          const int32_t *ids, const real *logp, real *t, real *g) {
    kl_row r = {0, 0, 0};
    double mass = 0, top = -INFINITY;
    for (ptrdiff_t j = 0; j < a->k; j++) {
        t[j] = (real)exp((double)logp[j]);
        mass += (double)t[j];
        if (logp[j] > (real)-INFINITY && (double)z[ids[j]] > top) top = (double)z[ids[j]];
    }
    if (a->form == XL_KL_RENORMALISED) {
        double sum = 0;
        for (ptrdiff_t j = 0; j < a->k; j++)
            if (t[j] > 0) sum += exp((double)z[ids[j]] - top);
        double lse_k = top + log(sum), log_mass = log(mass);
        for (ptrdiff_t j = 0; j < a->k; j++) {
            double s = (double)z[ids[j]] - lse_k, p = (double)t[j] / mass;
            g[j] = t[j] > 0 ? (real)(exp(s) - p) : 0;
            if (t[j] > 0) r.value += p * ((double)logp[j] - log_mass - s);
        }
        return r;
    }
    for (ptrdiff_t j = 0; j < a->k; j++) {
        double s = (double)z[ids[j]] - lse;
        g[j] = -t[j];
        if (t[j] > 0) r.value += (double)t[j] * (a->form == XL_KL_TAIL ? (double)logp[j] - s : -s);
    }
    r.full = mass;
    if (a->form == XL_KL_SAMPLED) return r;
    /* the complement is summed by itself: 1 - sum loses all digits where the student is peaked */
    double inside = 0, rest = 0, tail = fmax(1 - mass, TAIL_FLOOR);
    for (ptrdiff_t j = 0; j < a->V; j++) rest += (double)e[j];
    for (ptrdiff_t j = 0; j < a->k; j++)
        if (t[j] > 0) inside += (double)e[ids[j]];
    if (rest - inside > 1e-3 * rest) {
        rest -= inside;
    } else { /* cancellation: mark the targets by their sign and add the others alone */
        real *mark = (real *)e;
        for (ptrdiff_t j = 0; j < a->k; j++)
            if (t[j] > 0) mark[ids[j]] = -mark[ids[j]];
        rest = 0;
        for (ptrdiff_t j = 0; j < a->V; j++)
            if (mark[j] > 0) rest += (double)mark[j];
        for (ptrdiff_t j = 0; j < a->k; j++)
            if (t[j] > 0) mark[ids[j]] = -mark[ids[j]];
    }
    rest = fmax(rest, (double)XL_REAL_MIN);
    r.value += tail * (log(tail) - log(rest));
    r.full = mass + tail;
    r.rest = tail / rest;
    return r;
}

/* Values of one row; z becomes the gradient of scale * loss on the logits if wanted. */
static void row_loss(const xl_ctx *ctx, const xl_head *a, double *sums, real *z, real *e, real *t,
                     int32_t label, const int32_t *ids, const real *logp, int gradient) {
    const xl_kernels *k = ctx->k;
    real top = k->max(a->V, z);
    real total = k->exp_sum(a->V, z, top, e);
    double lse = (double)top + log((double)total);
    k->scale(a->V, 1 / total, e);
    sums[0] = lse - (double)z[label];
    kl_row kl = {0, 0, 0};
    real *g = t + a->k;
    if (a->k) kl = target_loss(a, z, e, lse, ids, logp, t, g);
    sums[1] = kl.value;
    if (!gradient) return;
    double wc = a->ce_weight * a->scale, wk = a->kl_weight * a->scale;
    real factor = (real)(wc + wk * (kl.full - kl.rest));
    for (ptrdiff_t j = 0; j < a->V; j++) z[j] = factor * e[j];
    /* At a target `rest` is absent. It is left out here, not added back: it grows without bound
     * where the student is sure of the targets, and the difference would be rounding noise. */
    for (ptrdiff_t j = 0; j < a->k; j++)
        if (t[j] > 0) z[ids[j]] = (real)(wc + wk * kl.full) * e[ids[j]];
    z[label] -= (real)wc;
    for (ptrdiff_t j = 0; j < a->k; j++) z[ids[j]] += (real)(wk * (double)g[j]);
}

xl_status xl_head_loss(xl_ctx *ctx, const xl_head *a, double *sums, real *row_ce, real *dx,
                       real *dw, const real *x, xl_mat w, const int32_t *labels,
                       const int32_t *target_ids, const real *target_logp, void *scratch) {
    XL_TRY(check_labels(ctx, a, labels, target_ids));
    workspace s;
    plan(ctx, a, scratch, &s);
    int gradient = dx || dw;
    memset(s.sums, 0, (size_t)a->N * 2 * sizeof(double));
    for (ptrdiff_t n0 = 0; n0 < a->N; n0 += ROWS) {
        ptrdiff_t rows = xl_min(ROWS, a->N - n0);
        XL_TRY(make_logits(ctx, a, s.logits, x, w, n0, rows, s.matmul));
#pragma omp parallel for num_threads(ctx->threads) schedule(dynamic)
        for (ptrdiff_t i = 0; i < rows; i++) {
            ptrdiff_t n = n0 + i, thread = omp_get_thread_num();
            real *z = s.logits + i * a->V;
            if (labels[n] < 0) {
                memset(z, 0, (size_t)a->V * sizeof(real));
                continue;
            }
            row_loss(ctx, a, s.sums + 2 * n, z, s.row + thread * a->V, s.target + thread * 2 * a->k,
                     labels[n], target_ids ? target_ids + n * a->k : NULL,
                     target_logp ? target_logp + n * a->k : NULL, gradient);
        }
        XL_TRY(xl_linear_backward(ctx, rows, a->d, a->V, dx ? dx + n0 * a->d : NULL, dw, NULL,
                                  s.logits, x + n0 * a->d, w, s.matmul));
    }
    sums[0] = sums[1] = sums[2] = 0;
    for (ptrdiff_t n = 0; n < a->N; n++) {
        if (row_ce) row_ce[n] = (real)s.sums[2 * n];
        if (labels[n] < 0) continue;
        sums[0] += s.sums[2 * n];
        sums[1] += s.sums[2 * n + 1];
        sums[2] += 1;
    }
    return XL_OK;
}

/* ---- top k -------------------------------------------------------------------------------- */

/* a before b: larger logit, then lower id */
static int before(const real *z, int32_t a, int32_t b) {
    return z[a] > z[b] || (z[a] == z[b] && a < b);
}

/* Moves the entry at i down a heap whose root is the last in order. */
static void sift(const real *z, int32_t *heap, ptrdiff_t n, ptrdiff_t i) {
    for (;;) {
        ptrdiff_t c = 2 * i + 1;
        if (c >= n) return;
        if (c + 1 < n && before(z, heap[c], heap[c + 1])) c++;
        if (!before(z, heap[i], heap[c])) return;
        int32_t swap = heap[i];
        heap[i] = heap[c];
        heap[c] = swap;
        i = c;
    }
}

static void top_k(ptrdiff_t V, ptrdiff_t k, const real *z, int32_t *heap) {
    for (ptrdiff_t j = 0; j < k; j++) heap[j] = (int32_t)j;
    for (ptrdiff_t i = k / 2; i-- > 0;) sift(z, heap, k, i);
    for (ptrdiff_t j = k; j < V; j++)
        if (z[j] > z[heap[0]]) {
            heap[0] = (int32_t)j;
            sift(z, heap, k, 0);
        }
    for (ptrdiff_t n = k; n-- > 1;) { /* heap sort: the last in order goes to the end */
        int32_t swap = heap[0];
        heap[0] = heap[n];
        heap[n] = swap;
        sift(z, heap, n, 0);
    }
}

xl_status xl_head_topk(xl_ctx *ctx, const xl_head *a, int32_t *ids, real *logp, real *mass,
                       const real *x, xl_mat w, void *scratch) {
    if (a->k < 1 || a->k > a->V)
        return xl_fail(ctx, XL_VALUE, "k is %td, expected 1 to %td", a->k, a->V);
    workspace s;
    plan(ctx, a, scratch, &s);
    for (ptrdiff_t n0 = 0; n0 < a->N; n0 += ROWS) {
        ptrdiff_t rows = xl_min(ROWS, a->N - n0);
        XL_TRY(make_logits(ctx, a, s.logits, x, w, n0, rows, s.matmul));
#pragma omp parallel for num_threads(ctx->threads) schedule(dynamic)
        for (ptrdiff_t i = 0; i < rows; i++) {
            const real *z = s.logits + i * a->V;
            int32_t *best = ids + (n0 + i) * a->k;
            real lse = log_sum_exp(ctx->k, a->V, z, s.row + omp_get_thread_num() * a->V);
            top_k(a->V, a->k, z, best);
            double m = 0;
            for (ptrdiff_t j = 0; j < a->k; j++) {
                real l = z[best[j]] - lse;
                logp[(n0 + i) * a->k + j] = l;
                m += exp((double)l);
            }
            mass[n0 + i] = (real)m;
        }
    }
    return XL_OK;
}

/* ---- draws -------------------------------------------------------------------------------- */

/* e = exp(z - max z) of a row */
static void draw(ptrdiff_t V, ptrdiff_t k, const real *e, const double *uniform, int32_t *ids,
                 int32_t *counts) {
    double total = 0, sum = 0;
    ptrdiff_t last = 0, drawn = 0, distinct = 0;
    for (ptrdiff_t v = 0; v < V; v++) {
        total += (double)e[v];
        if (e[v] > 0) last = v;
    }
    memset(ids, 0, (size_t)k * sizeof *ids);
    memset(counts, 0, (size_t)k * sizeof *counts);
    for (ptrdiff_t v = 0; drawn < k; v++) {
        sum += (double)e[v];
        ptrdiff_t before = drawn;
        /* at the last one the product may have been rounded up to the total */
        while (drawn < k && (v == last || uniform[drawn] * total < sum)) drawn++;
        if (drawn == before) continue;
        ids[distinct] = (int32_t)v;
        counts[distinct++] = (int32_t)(drawn - before);
    }
}

static xl_status check_uniform(xl_ctx *ctx, const xl_head *a, const double *uniform) {
    for (ptrdiff_t n = 0; n < a->N; n++)
        for (ptrdiff_t j = 0; j < a->k; j++) {
            double u = uniform[n * a->k + j], before = j ? uniform[n * a->k + j - 1] : 0;
            if (!(u >= before && u < 1))
                return xl_fail(ctx, XL_VALUE,
                               "uniform[%td] of row %td is %g behind %g, expected a rising row in "
                               "[0, 1)",
                               j, n, u, before);
        }
    return XL_OK;
}

xl_status xl_head_draws(xl_ctx *ctx, const xl_head *a, int32_t *ids, int32_t *counts, const real *x,
                        xl_mat w, const double *uniform, void *scratch) {
    if (a->V < 1) return xl_fail(ctx, XL_VALUE, "the vocabulary is empty");
    XL_TRY(check_uniform(ctx, a, uniform));
    workspace s;
    plan(ctx, a, scratch, &s);
    ptrdiff_t bad = a->N; /* the first row that cannot be drawn from */
    for (ptrdiff_t n0 = 0; n0 < a->N; n0 += ROWS) {
        ptrdiff_t rows = xl_min(ROWS, a->N - n0);
        XL_TRY(make_logits(ctx, a, s.logits, x, w, n0, rows, s.matmul));
#pragma omp parallel for num_threads(ctx->threads) schedule(dynamic) reduction(min : bad)
        for (ptrdiff_t i = 0; i < rows; i++) {
            const real *z = s.logits + i * a->V;
            real *e = s.row + omp_get_thread_num() * a->V, top = ctx->k->max(a->V, z);
            ptrdiff_t at = (n0 + i) * a->k;
            if (!isfinite(top)) {
                bad = xl_min(bad, n0 + i);
                continue;
            }
            ctx->k->exp_sum(a->V, z, top, e);
            draw(a->V, a->k, e, uniform + at, ids + at, counts + at);
        }
    }
    if (bad < a->N) return xl_fail(ctx, XL_FLOATING, "logits of row %td are not finite", bad);
    return XL_OK;
}

/* ---- divergence --------------------------------------------------------------------------- */

static ptrdiff_t arg_max(ptrdiff_t n, const real *z) {
    ptrdiff_t best = 0;
    for (ptrdiff_t j = 1; j < n; j++)
        if (z[j] > z[best]) best = j;
    return best;
}

#define LANES 8 /* partial sums of a row: one alone waits for each addition */

/* KL(softmax(t) || softmax(z)); e = exp(t - max t) */
static double row_divergence(ptrdiff_t n, const real *z, const real *t, const real *e, double lse,
                             double lse_t) {
    double total[LANES] = {0}, sum[LANES] = {0};
    ptrdiff_t j = 0;
    for (; j + LANES <= n; j += LANES)
        for (ptrdiff_t l = 0; l < LANES; l++) {
            total[l] += (double)e[j + l];
            sum[l] += (double)e[j + l] * ((double)t[j + l] - (double)z[j + l]);
        }
    for (; j < n; j++) {
        total[0] += (double)e[j];
        sum[0] += (double)e[j] * ((double)t[j] - (double)z[j]);
    }
    for (ptrdiff_t l = 1; l < LANES; l++) total[0] += total[l], sum[0] += sum[l];
    double d = sum[0] / total[0] - lse_t + lse;
    return d < 0 ? 0 : d; /* KL >= 0; rounding may leave -1e-7. NaN stays NaN */
}

xl_status xl_head_divergence(xl_ctx *ctx, const xl_head *a, ptrdiff_t students, real *kl,
                             real *agree, real *nll, real *teacher_nll, const real *const *x,
                             const xl_mat *w, const real *teacher_x, xl_mat teacher_w,
                             const int32_t *labels, void *scratch) {
    XL_TRY(check_labels(ctx, a, labels, NULL));
    workspace s;
    plan(ctx, a, scratch, &s);
    for (ptrdiff_t n0 = 0; n0 < a->N; n0 += ROWS) {
        ptrdiff_t rows = xl_min(ROWS, a->N - n0);
        XL_TRY(make_logits(ctx, a, s.other, teacher_x, teacher_w, n0, rows, s.matmul));
        for (ptrdiff_t m = 0; m < students; m++) {
            XL_TRY(make_logits(ctx, a, s.logits, x[m], w[m], n0, rows, s.matmul));
#pragma omp parallel for num_threads(ctx->threads) schedule(dynamic)
            for (ptrdiff_t i = 0; i < rows; i++) {
                ptrdiff_t n = n0 + i, at = m * a->N + n;
                const real *z = s.logits + i * a->V, *t = s.other + i * a->V;
                real *e = s.row + omp_get_thread_num() * a->V;
                real lse = log_sum_exp(ctx->k, a->V, z, e);
                real lse_t = log_sum_exp(ctx->k, a->V, t, e);
                kl[at] = (real)row_divergence(a->V, z, t, e, (double)lse, (double)lse_t);
                agree[at] = arg_max(a->V, z) == arg_max(a->V, t) ? (real)1 : (real)0;
                nll[at] = labels[n] < 0 ? 0 : lse - z[labels[n]];
                teacher_nll[n] = labels[n] < 0 ? 0 : lse_t - t[labels[n]];
            }
        }
    }
    return XL_OK;
}
