/* Softmax attention over a window and sinks (paper.md 1.1). A block of queries of one document and
 * the keys that it can see make one small matrix of scores: cost is linear in T for a fixed window,
 * and one softmax covers the union. */
#include "ops/attention.h"

#include <omp.h>
#include <string.h>

typedef struct {
    real *scores, *grads; /* [block, columns]; grads only for the backward */
    real *delta;          /* [block] */
    real *pack;
} workspace;

static void plan_thread(xl_plan *p, const xl_attn *a, ptrdiff_t past_slots, workspace *w) {
    ptrdiff_t rows = xl_query_block(a), reach = xl_min(a->T, rows + a->window);
    ptrdiff_t columns = past_slots + xl_min(a->sinks, a->T) + reach, rep = a->H / a->G;
    w->scores = xl_take_reals(p, xl_max(rows, rep) * columns);
    w->grads = xl_take_reals(p, rows * columns);
    w->delta = xl_take_reals(p, rows);
    w->pack = xl_take_reals(p, XL_GEMM_PACK);
}

static workspace place_thread(const xl_attn *a, ptrdiff_t past_slots, char *base) {
    xl_plan measure = {0};
    workspace w;
    plan_thread(&measure, a, past_slots, &w);
    xl_plan p = {.base = base + omp_get_thread_num() * measure.used, .size = PTRDIFF_MAX};
    plan_thread(&p, a, past_slots, &w);
    return w;
}

/* Behind the threads' work: key and value gradients of every query head, [2, B, H, T, D]. */
ptrdiff_t xl_attention_scratch(const xl_ctx *ctx, const xl_attn *a, ptrdiff_t past_slots) {
    xl_plan p = {0}, heads = {0};
    workspace w;
    ptrdiff_t total;
    plan_thread(&p, a, past_slots, &w);
    xl_take(&heads, "", XL_ROLE_WORK, XL_DT_REAL, 5, XL_SHAPE(2, a->B, a->H, a->T, a->D));
    if (p.failed || heads.failed || __builtin_mul_overflow(p.used, (ptrdiff_t)ctx->threads, &total))
        return -1;
    return __builtin_add_overflow(total, heads.used, &total) ? -1 : total;
}

static xl_status check(xl_ctx *ctx, const xl_attn *a) {
    if (a->window < 1) return xl_fail(ctx, XL_VALUE, "window is %td, expected 1 or more", a->window);
    if (a->sinks < 0) return xl_fail(ctx, XL_VALUE, "sinks is %td, expected 0 or more", a->sinks);
    if (a->G < 1 || a->H % a->G)
        return xl_fail(ctx, XL_VALUE, "%td heads are no multiple of %td key heads", a->H, a->G);
    for (ptrdiff_t b = 0; b < a->B; b++) {
        if (a->lengths && (a->lengths[b] < 0 || a->lengths[b] > a->T))
            return xl_fail(ctx, XL_VALUE, "lengths[%td] is %d, T is %td", b, (int)a->lengths[b], a->T);
        for (ptrdiff_t t = 0; t < a->T; t++)
            if (a->pos[b * a->T + t] < 0)
                return xl_fail(ctx, XL_VALUE, "pos[%td, %td] is negative", b, t);
    }
    return XL_OK;
}

/* Slots of a row's cache that hold something. */
static ptrdiff_t used_slots(const xl_kv *past, ptrdiff_t b) {
    return past ? xl_min(past->pos[b], past->slots) : 0;
}

static const real *cached(const xl_attn *a, const real *p, ptrdiff_t slots, ptrdiff_t b,
                          ptrdiff_t g) {
    return p + (b * slots * a->G + g) * a->D;
}

/* Scaled and masked scores of a block, [q1 - q0, columns]. */
static void block_scores(const xl_ctx *ctx, const xl_attn *a, const xl_block_keys *k, workspace *w,
                         xl_heads q, xl_heads key, const xl_kv *past, ptrdiff_t b, ptrdiff_t h) {
    const xl_kernels *kn = ctx->k;
    ptrdiff_t g = h / (a->H / a->G), D = a->D, rows = k->q1 - k->q0, n = k->columns;
    const real *rows_q = xl_at(q, b, h, k->q0);
    real scale = (real)(1 / sqrt((double)D)), *s = w->scores;
    if (k->slots)
        kn->gemm(rows, k->slots, D, scale, rows_q, q.st, 1, cached(a, past->k, past->slots, b, g), 1,
                 a->G * D, 0, s, n, w->pack);
    s += k->slots;
    if (k->s1 > k->s0)
        kn->gemm(rows, k->s1 - k->s0, D, scale, rows_q, q.st, 1, xl_at(key, b, g, k->s0), 1, key.st,
                 0, s, n, w->pack);
    s += k->s1 - k->s0;
    kn->gemm(rows, k->q1 - k->k0, D, scale, rows_q, q.st, 1, xl_at(key, b, g, k->k0), 1, key.st, 0, s,
             n, w->pack);
    for (ptrdiff_t i = 0; i < rows; i++) {
        ptrdiff_t t = k->q0 + i, position = t - k->start;
        real *row = w->scores + i * n;
        for (ptrdiff_t j = 0; j < k->slots; j++) {
            ptrdiff_t p = xl_slot_position(j, past->slots, a->sinks, past->pos[b]);
            if (position - p >= a->window && p >= a->sinks) row[j] = -INFINITY;
        }
        row = s + i * n; /* keys from k0 on */
        for (ptrdiff_t j = k->k0; j <= t - a->window; j++)
            if (j - k->start >= a->sinks) row[j - k->k0] = -INFINITY;
        for (ptrdiff_t j = t + 1; j < k->q1; j++) row[j - k->k0] = -INFINITY;
    }
}

static void head_forward(const xl_ctx *ctx, const xl_attn *a, workspace *w, xl_heads o, real *lse,
                         xl_heads q, xl_heads key, xl_heads v, const xl_kv *past, ptrdiff_t b,
                         ptrdiff_t h) {
    const xl_kernels *kn = ctx->k;
    ptrdiff_t g = h / (a->H / a->G), D = a->D, T = xl_attn_length(a, b), rows;
    for (ptrdiff_t t = 0; t < T; t += rows) {
        xl_block_keys k = xl_block_at(a, b, t, used_slots(past, b));
        rows = k.q1 - k.q0;
        block_scores(ctx, a, &k, w, q, key, past, b, h);
        for (ptrdiff_t i = 0; i < rows; i++) {
            real *row = w->scores + i * k.columns, top = kn->max(k.columns, row);
            real sum = kn->exp_sum(k.columns, row, top, row);
            kn->scale(k.columns, 1 / sum, row);
            if (lse) lse[(b * a->H + h) * a->T + t + i] = top + (real)log((double)sum);
        }
        real *p = w->scores, *out = xl_at(o, b, h, t);
        if (k.slots)
            kn->gemm(rows, D, k.slots, 1, p, k.columns, 1, cached(a, past->v, past->slots, b, g),
                     a->G * D, 1, 0, out, o.st, w->pack);
        p += k.slots;
        if (k.s1 > k.s0)
            kn->gemm(rows, D, k.s1 - k.s0, 1, p, k.columns, 1, xl_at(v, b, g, k.s0), v.st, 1,
                     k.slots > 0, out, o.st, w->pack);
        p += k.s1 - k.s0;
        kn->gemm(rows, D, k.q1 - k.k0, 1, p, k.columns, 1, xl_at(v, b, g, k.k0), v.st, 1,
                 k.slots > 0 || k.s1 > k.s0, out, o.st, w->pack);
    }
    for (ptrdiff_t t = T; t < a->T; t++) memset(xl_at(o, b, h, t), 0, (size_t)D * sizeof(real));
}

xl_status xl_attention_forward(xl_ctx *ctx, const xl_attn *a, xl_heads o, real *lse, xl_heads q,
                               xl_heads k, xl_heads v, const xl_kv *past, void *scratch) {
    XL_TRY(check(ctx, a));
#pragma omp parallel num_threads(ctx->threads)
    {
        workspace w = place_thread(a, past ? past->slots : 0, scratch);
#pragma omp for schedule(dynamic) collapse(2)
        for (ptrdiff_t b = 0; b < a->B; b++)
            for (ptrdiff_t h = 0; h < a->H; h++)
                head_forward(ctx, a, &w, o, lse, q, k, v, past, b, h);
    }
    return XL_OK;
}

/* ---- backward ----------------------------------------------------------------------------- */

/* With p = softmax(s), o = p v:  dv = p^T do;  ds = p o (do v^T - do.o);  dq = ds k;  dk = ds^T q.
 * hk, hv: this query head's own key and value gradients, [T, D]. */
static void head_backward(const xl_ctx *ctx, const xl_attn *a, workspace *w, xl_heads dq, real *hk,
                          real *hv, xl_heads dout, xl_heads q, xl_heads key, xl_heads v, xl_heads o,
                          const real *lse, ptrdiff_t b, ptrdiff_t h) {
    const xl_kernels *kn = ctx->k;
    ptrdiff_t g = h / (a->H / a->G), D = a->D, T = xl_attn_length(a, b), rows;
    real scale = (real)(1 / sqrt((double)D));
    memset(hk, 0, (size_t)(a->T * D) * sizeof(real));
    memset(hv, 0, (size_t)(a->T * D) * sizeof(real));
    for (ptrdiff_t t = 0; t < T; t += rows) {
        xl_block_keys k = xl_block_at(a, b, t, 0);
        rows = k.q1 - k.q0;
        ptrdiff_t n = k.columns, sinks = k.s1 - k.s0;
        const real *g_out = xl_at(dout, b, h, t), *q_rows = xl_at(q, b, h, t);
        block_scores(ctx, a, &k, w, q, key, NULL, b, h);
        if (sinks)
            kn->gemm(rows, sinks, D, 1, g_out, dout.st, 1, xl_at(v, b, g, k.s0), 1, v.st, 0, w->grads,
                     n, w->pack);
        kn->gemm(rows, n - sinks, D, 1, g_out, dout.st, 1, xl_at(v, b, g, k.k0), 1, v.st, 0,
                 w->grads + sinks, n, w->pack);
        for (ptrdiff_t i = 0; i < rows; i++) {
            real *p = w->scores + i * n, *ds = w->grads + i * n;
            kn->exp_sum(n, p, lse[(b * a->H + h) * a->T + t + i], p);
            real delta = kn->dot(D, xl_at(dout, b, h, t + i), xl_at(o, b, h, t + i));
            for (ptrdiff_t j = 0; j < n; j++) ds[j] = p[j] * (ds[j] - delta);
        }
        /* columns: the sinks, then the key range */
        const ptrdiff_t from[2] = {k.s0, k.k0}, at[2] = {0, sinks}, count[2] = {sinks, n - sinks};
        for (int part = 0; part < 2; part++) {
            if (!count[part]) continue;
            const real *p = w->scores + at[part], *ds = w->grads + at[part];
            if (dq.p)
                kn->gemm(rows, D, count[part], scale, ds, n, 1, xl_at(key, b, g, from[part]), key.st,
                         1, 1, xl_at(dq, b, h, t), dq.st, w->pack);
            kn->gemm(count[part], D, rows, scale, ds, 1, n, q_rows, q.st, 1, 1, hk + from[part] * D,
                     D, w->pack);
            kn->gemm(count[part], D, rows, 1, p, 1, n, g_out, dout.st, 1, 1, hv + from[part] * D, D,
                     w->pack);
        }
    }
}

xl_status xl_attention_backward(xl_ctx *ctx, const xl_attn *a, xl_heads dq, xl_heads dk, xl_heads dv,
                                xl_heads dout, xl_heads q, xl_heads k, xl_heads v, xl_heads o,
                                const real *lse, void *scratch) {
    XL_TRY(check(ctx, a));
    ptrdiff_t rep = a->H / a->G, head = a->T * a->D, all = a->B * a->H * head;
    real *hk = scratch, *hv = hk + all;
    char *threads = (char *)scratch + xl_round_up(2 * all * (ptrdiff_t)sizeof(real), XL_PLAN_ALIGN);
#pragma omp parallel num_threads(ctx->threads)
    {
        workspace w = place_thread(a, 0, threads);
#pragma omp for schedule(dynamic) collapse(2)
        for (ptrdiff_t b = 0; b < a->B; b++)
            for (ptrdiff_t h = 0; h < a->H; h++) {
                ptrdiff_t at = (b * a->H + h) * head;
                head_backward(ctx, a, &w, dq, hk + at, hv + at, dout, q, k, v, o, lse, b, h);
            }
        /* key heads collect their query heads in order */
#pragma omp for schedule(dynamic) collapse(2)
        for (ptrdiff_t b = 0; b < a->B; b++)
            for (ptrdiff_t g = 0; g < a->G; g++)
                for (ptrdiff_t h = g * rep; h < (g + 1) * rep; h++)
                    for (ptrdiff_t t = 0; t < a->T; t++) {
                        ptrdiff_t at = (b * a->H + h) * head + t * a->D;
                        if (dk.p) ctx->k->add(a->D, hk + at, xl_at(dk, b, g, t));
                        if (dv.p) ctx->k->add(a->D, hv + at, xl_at(dv, b, g, t));
                    }
    }
    return XL_OK;
}

/* ---- cache -------------------------------------------------------------------------------- */

static void put(const xl_attn *a, xl_kv *past, xl_heads k, xl_heads v, ptrdiff_t b, ptrdiff_t t,
                ptrdiff_t position) {
    ptrdiff_t ring = past->slots - a->sinks;
    ptrdiff_t slot = position < a->sinks ? position : a->sinks + (position - a->sinks) % ring;
    for (ptrdiff_t g = 0; g < a->G; g++) {
        ptrdiff_t at = ((b * past->slots + slot) * a->G + g) * a->D;
        memcpy(past->k + at, xl_at(k, b, g, t), (size_t)a->D * sizeof(real));
        memcpy(past->v + at, xl_at(v, b, g, t), (size_t)a->D * sizeof(real));
    }
}

static xl_status check_cache(xl_ctx *ctx, const xl_attn *a, const xl_kv *past) {
    if (past->slots - a->sinks == a->window) return XL_OK;
    return xl_fail(ctx, XL_VALUE, "the cache has %td slots, window %td and sinks %td need %td",
                   past->slots, a->window, a->sinks, a->window + a->sinks);
}

xl_status xl_attention_append(xl_ctx *ctx, const xl_attn *a, xl_heads k, xl_heads v, xl_kv *past) {
    XL_TRY(check_cache(ctx, a, past));
#pragma omp parallel for num_threads(ctx->threads)
    for (ptrdiff_t b = 0; b < a->B; b++) {
        ptrdiff_t T = xl_attn_length(a, b);
        if (!T) continue;
        ptrdiff_t start = T - 1 - a->pos[b * a->T + T - 1];
        for (ptrdiff_t t = xl_max(0, start); t < T; t++)
            if (t - start < a->sinks || t >= T - a->window) put(a, past, k, v, b, t, t - start);
    }
    return XL_OK;
}

static void step_group(const xl_ctx *ctx, const xl_attn *a, real *scores, xl_heads o, xl_heads q,
                       const xl_kv *past, ptrdiff_t b, ptrdiff_t g) {
    const xl_kernels *kn = ctx->k;
    ptrdiff_t D = a->D, rep = a->H / a->G, n = xl_min(past->pos[b] + 1, past->slots);
    const real *keys = cached(a, past->k, past->slots, b, g);
    const real *values = cached(a, past->v, past->slots, b, g);
    for (ptrdiff_t j = 0; j < n; j++)
        for (ptrdiff_t r = 0; r < rep; r += 8) {
            real y[8];
            ptrdiff_t rows = xl_min(8, rep - r);
            kn->dots(D, rows, xl_at(q, b, g * rep + r, 0), q.sh, keys + j * a->G * D, y);
            for (ptrdiff_t i = 0; i < rows; i++) scores[(r + i) * n + j] = y[i];
        }
    for (ptrdiff_t r = 0; r < rep; r++) {
        real *row = scores + r * n, *out = xl_at(o, b, g * rep + r, 0);
        kn->scale(n, (real)(1 / sqrt((double)D)), row);
        real sum = kn->exp_sum(n, row, kn->max(n, row), row);
        memset(out, 0, (size_t)D * sizeof(real));
        for (ptrdiff_t j = 0; j < n; j++) kn->axpy(D, row[j], values + j * a->G * D, out);
        kn->scale(D, 1 / sum, out);
    }
}

xl_status xl_attention_step(xl_ctx *ctx, const xl_attn *a, xl_heads o, xl_heads q, xl_heads k,
                            xl_heads v, xl_kv *past, void *scratch) {
    XL_TRY(check(ctx, a));
    XL_TRY(check_cache(ctx, a, past));
    if (a->T != 1) return xl_fail(ctx, XL_VALUE, "a step has one token, found %td", a->T);
#pragma omp parallel num_threads(ctx->threads)
    {
        workspace w = place_thread(a, past->slots, scratch);
#pragma omp for
        for (ptrdiff_t b = 0; b < a->B; b++)
            if (xl_attn_length(a, b)) put(a, past, k, v, b, 0, past->pos[b]);
#pragma omp for schedule(dynamic) collapse(2)
        for (ptrdiff_t b = 0; b < a->B; b++)
            for (ptrdiff_t g = 0; g < a->G; g++)
                if (xl_attn_length(a, b)) step_group(ctx, a, w.scores, o, q, past, b, g);
    }
    return XL_OK;
}
