/* Softmax attention over a window and sinks (paper.md 1.1), forward. A block of queries of one
 * document meets the keys that it can see in chunks; the softmax is carried from chunk to chunk, so
 * that no row of scores is longer than a chunk and cost is linear in T for a fixed window. Keys are
 * packed once for all the query heads that share them. docs/math/attention.md. */
#include "ops/attention.h"

#include <omp.h>
#include <string.h>

#define SEGMENT 168 /* steps of a task: 6 narrow blocks, 2 wide ones */
#define PART 28     /* queries whose scores are in hand: they stay in the first cache */

/* ---- scratch ------------------------------------------------------------------------------ */

static void plan(xl_plan *p, const xl_ctx *ctx, const xl_attn *a, xl_attn_work *w) {
    ptrdiff_t rep = a->G > 0 ? a->H / a->G : 0, rows = xl_query_block(a), D = a->D;
    /* the queries, their scores, or all scores transposed */
    ptrdiff_t wide = xl_max(XL_SCORE_STRIDE, D);
    w->apack = xl_take_left(p, ctx, xl_max(rows, wide), xl_max(rows, wide));
    w->queries = xl_take_reals(p, rows * D);
    w->rows = xl_take_reals(p, XL_COLUMNS * D);
    w->keys_t = xl_take_right(p, ctx, D, XL_COLUMNS);
    w->values = xl_take_right(p, ctx, XL_COLUMNS, D);
    w->values_t = xl_take_right(p, ctx, D, XL_COLUMNS);
    w->keys = xl_take_right(p, ctx, XL_COLUMNS, D);
    w->scores = xl_take_reals(p, rows * XL_SCORE_STRIDE);
    w->grads = xl_take_reals(p, rows * XL_SCORE_STRIDE);
    w->top = xl_take_reals(p, rep * rows);
    w->sum = xl_take_reals(p, rep * rows);
    w->delta = xl_take_reals(p, rep * rows);
    w->peak = xl_take(p, "", XL_ROLE_WORK, XL_DT_I32, 2, XL_SHAPE(rep, rows));
    w->dk = xl_take_reals(p, XL_SCORE_STRIDE * D);
    w->dv = xl_take_reals(p, XL_SCORE_STRIDE * D);
}

ptrdiff_t xl_attention_work_bytes(const xl_ctx *ctx, const xl_attn *a) {
    xl_plan p = {0};
    xl_attn_work w;
    plan(&p, ctx, a, &w);
    return p.failed ? -1 : p.used;
}

xl_attn_work xl_attention_work(const xl_ctx *ctx, const xl_attn *a, void *scratch) {
    ptrdiff_t bytes = xl_attention_work_bytes(ctx, a);
    xl_plan p = {.base = (char *)scratch + omp_get_thread_num() * bytes, .size = bytes};
    xl_attn_work w;
    plan(&p, ctx, a, &w);
    return w;
}

/* Threads' work, then the backward's gradients or the step's partial results. */
ptrdiff_t xl_attention_scratch(const xl_ctx *ctx, const xl_attn *a, ptrdiff_t past_slots) {
    ptrdiff_t work = xl_attention_work_bytes(ctx, a), more, total;
    if (past_slots && a->T == 1)
        more = xl_attention_step_bytes(a, past_slots);
    else
        more = past_slots ? 0 : xl_attention_gradient_bytes(a);
    if (work < 0 || more < 0 || __builtin_mul_overflow(work, (ptrdiff_t)ctx->threads, &total))
        return -1;
    return __builtin_add_overflow(total, more, &total) ? -1 : total;
}

xl_status xl_attention_check(xl_ctx *ctx, const xl_attn *a, const xl_kv *past) {
    if (a->window < 1)
        return xl_fail(ctx, XL_VALUE, "window is %td, expected 1 or more", a->window);
    if (a->sinks < 0) return xl_fail(ctx, XL_VALUE, "sinks is %td, expected 0 or more", a->sinks);
    if (a->G < 1 || a->H % a->G)
        return xl_fail(ctx, XL_VALUE, "%td heads are no multiple of %td key heads", a->H, a->G);
    if (past && past->slots - a->sinks != a->window)
        return xl_fail(ctx, XL_VALUE, "the cache has %td slots, not window %td + sinks %td",
                       past->slots, a->window, a->sinks);
    for (ptrdiff_t b = 0; b < a->B; b++) {
        if (a->lengths && (a->lengths[b] < 0 || a->lengths[b] > a->T))
            return xl_fail(ctx, XL_VALUE, "lengths[%td] is %d, T is %td", b, (int)a->lengths[b],
                           a->T);
        const int32_t *pos = a->pos + b * a->T;
        ptrdiff_t seen = past ? past->pos[b] : 0; /* positions go on from here, or start again */
        for (ptrdiff_t t = 0; t < xl_attn_length(a, b); t++, seen++) {
            if (pos[t] == 0) seen = 0;
            if (pos[t] != seen)
                return xl_fail(ctx, XL_VALUE, "pos[%td, %td] is %d, expected 0 or %td", b, t,
                               (int)pos[t], seen);
        }
    }
    return XL_OK;
}

/* ---- columns and products, also for the backward ------------------------------------------- */

const real *xl_column_rows(const xl_attn *a, const xl_block *k, ptrdiff_t c0, ptrdiff_t n,
                           xl_heads x, const xl_kv *past, const real *cached, ptrdiff_t b,
                           ptrdiff_t g, real *rows, ptrdiff_t *stride) {
    ptrdiff_t D = a->D, from = k->start + k->first + c0 - k->sinks;
    if (c0 >= k->sinks && from >= 0) {
        *stride = x.st;
        return xl_at(x, b, g, from);
    }
    *stride = D;
    for (ptrdiff_t c = c0; c < c0 + n; c++) {
        ptrdiff_t position = xl_column_position(k, c), t = k->start + position;
        const real *row;
        if (t >= 0)
            row = xl_at(x, b, g, t);
        else
            row = cached + ((b * past->slots + xl_slot(past, a->sinks, position)) * a->G + g) * D;
        memcpy(rows + (c - c0) * D, row, (size_t)D * sizeof(real));
    }
    return rows;
}

void xl_scaled_queries(const xl_ctx *ctx, const xl_attn *a, xl_heads q, ptrdiff_t b, ptrdiff_t h,
                       ptrdiff_t t0, ptrdiff_t rows, real *out) {
    real scale = (real)(1 / sqrt((double)a->D));
    for (ptrdiff_t i = 0; i < rows; i++)
        ctx->k->scale_to(a->D, scale, xl_at(q, b, h, t0 + i), out + i * a->D);
}

void xl_product(const xl_ctx *ctx, int mixed, ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, const real *a,
                ptrdiff_t rsa, ptrdiff_t csa, const real *packed, real beta, real *c, ptrdiff_t ldc,
                real *pack) {
    xl_left left = xl_pack_left(ctx, mixed, m, k, a, rsa, csa, pack);
    xl_packed_product(ctx, mixed, m, n, k, 1, left, packed, beta, c, ldc);
}

/* Columns behind the sinks are neighbours: query at position p sees those from p - window + 1 to p,
 * and sinks among them whatever their distance. */
ptrdiff_t xl_mask_row(const xl_attn *a, const xl_block *k, ptrdiff_t t, ptrdiff_t c0, ptrdiff_t n,
                      real *row) {
    ptrdiff_t p = t - k->start, shift = k->sinks - k->first - c0; /* position -> column here */
    ptrdiff_t from = xl_max(xl_max(k->first, a->sinks) + shift, 0);
    ptrdiff_t to = xl_min(p - a->window + 1 + shift, n), end = xl_min(p + 1 + shift, n);
    if (end <= 0) return 0;
    for (ptrdiff_t c = from; c < to; c++) row[c] = -INFINITY;
    ptrdiff_t whole = xl_round_up(end, XL_VECTOR);
    for (ptrdiff_t c = end; c < whole; c++) row[c] = -INFINITY;
    return whole;
}

/* ---- forward ------------------------------------------------------------------------------ */

/* A row of n scores, masked as far as `end`, becomes exp(scores - top), with top and sum carried on from earlier chunks: what
 * those added to `out` is brought to the new top. */
static void softmax_row(const xl_kernels *kn, real *row, ptrdiff_t end, ptrdiff_t n, ptrdiff_t D,
                        int begins, real *top, real *sum, real *out) {
    real before = begins ? -INFINITY : *top, most = kn->max(end, row);
    *top = most <= before ? before : most; /* a NaN stays */
    if (end < n) memset(row + end, 0, (size_t)(n - end) * sizeof(real));
    if (*top == -INFINITY) { /* nothing seen yet */
        memset(row, 0, (size_t)end * sizeof(real));
        *sum = 0;
        return;
    }
    real now = kn->exp_sum(end, row, *top, row);
    if (begins) {
        *sum = now;
        return;
    }
    real keep = *top == before ? (real)1 : (real)exp((double)(before - *top));
    if (keep != 1) kn->scale(D, keep, out);
    *sum = *sum * keep + now;
}

/* The column of the largest score so far, in a row of columns c0 and on that is masked as far as `end`;
 * top: the largest of earlier chunks. */
static void find_peak(const xl_kernels *kn, const real *row, ptrdiff_t end, ptrdiff_t c0, real top,
                      int32_t *column) {
    real most = kn->max(end, row), before = c0 ? top : -INFINITY;
    if (c0 == 0) *column = 0; /* it stays with a NaN */
    for (ptrdiff_t c = 0; most > before && c < end; c++)
        if (row[c] == most) {
            *column = (int32_t)(c0 + c);
            return;
        }
}

static void block_forward(const xl_ctx *ctx, const xl_attn *a, xl_attn_work *w, const xl_block *k,
                          xl_heads o, xl_attn_sums sums, xl_heads q, xl_heads key, xl_heads v,
                          const xl_kv *past, ptrdiff_t b, ptrdiff_t g) {
    const xl_kernels *kn = ctx->k;
    ptrdiff_t rep = a->H / a->G, D = a->D, rows = k->q1 - k->q0, t0 = k->q0, stride;
    for (ptrdiff_t c0 = 0; c0 < k->columns; c0 += XL_COLUMNS) {
        ptrdiff_t n = xl_min(XL_COLUMNS, k->columns - c0);
        const real *x =
            xl_column_rows(a, k, c0, n, key, past, past ? past->k : NULL, b, g, w->rows, &stride);
        xl_pack_right(ctx, a->mixed, D, n, x, 1, stride, w->keys_t);
        x = xl_column_rows(a, k, c0, n, v, past, past ? past->v : NULL, b, g, w->rows, &stride);
        xl_pack_right(ctx, a->mixed, n, D, x, stride, 1, w->values);
        for (ptrdiff_t h = g * rep; h < (g + 1) * rep; h++)
            for (ptrdiff_t i0 = 0; i0 < rows; i0 += PART) {
                ptrdiff_t part = xl_min(PART, rows - i0), at = (h - g * rep) * rows + i0;
                real *out = xl_at(o, b, h, t0 + i0);
                xl_scaled_queries(ctx, a, q, b, h, t0 + i0, part, w->queries);
                xl_product(ctx, a->mixed, part, xl_round_up(n, kn->nr), D, w->queries, D, 1,
                           w->keys_t, 0, w->scores, XL_SCORE_STRIDE, w->apack);
                for (ptrdiff_t i = 0; i < part; i++) {
                    real *row = w->scores + i * XL_SCORE_STRIDE;
                    ptrdiff_t end = xl_mask_row(a, k, t0 + i0 + i, c0, n, row);
                    if (sums.peak) find_peak(kn, row, end, c0, w->top[at + i], w->peak + at + i);
                    softmax_row(kn, row, end, n, D, c0 == 0, w->top + at + i, w->sum + at + i,
                                out + i * o.st);
                }
                xl_product(ctx, a->mixed, part, D, n, w->scores, XL_SCORE_STRIDE, 1, w->values,
                           c0 > 0, out, o.st, w->apack);
            }
    }
    for (ptrdiff_t r = 0; r < rep; r++)
        for (ptrdiff_t i = 0; i < rows; i++) {
            ptrdiff_t h = g * rep + r, t = t0 + i, at = (b * a->H + h) * a->T + t;
            real sum = w->sum[r * rows + i], log_sum = (real)log((double)sum);
            kn->scale(D, 1 / sum, xl_at(o, b, h, t));
            if (sums.lse) sums.lse[at] = w->top[r * rows + i] + log_sum;
            if (sums.log_sum) sums.log_sum[at] = log_sum;
            if (sums.peak) sums.peak[at] = (int32_t)xl_column_position(k, w->peak[r * rows + i]);
        }
}

/* Zeros behind the end of a row. */
static void pad(const xl_attn *a, xl_heads o, xl_attn_sums sums, ptrdiff_t b, ptrdiff_t g,
                ptrdiff_t t0, ptrdiff_t t1) {
    ptrdiff_t rep = a->H / a->G;
    for (ptrdiff_t h = g * rep; h < (g + 1) * rep; h++)
        for (ptrdiff_t t = xl_max(t0, xl_attn_length(a, b)); t < t1; t++) {
            ptrdiff_t at = (b * a->H + h) * a->T + t;
            memset(xl_at(o, b, h, t), 0, (size_t)a->D * sizeof(real));
            if (sums.lse) sums.lse[at] = 0;
            if (sums.log_sum) sums.log_sum[at] = 0;
            if (sums.peak) sums.peak[at] = 0;
        }
}

xl_status xl_attention_forward(xl_ctx *ctx, const xl_attn *a, xl_heads o, xl_attn_sums sums,
                               xl_heads q, xl_heads k, xl_heads v, const xl_kv *past,
                               void *scratch) {
    XL_TRY(xl_attention_check(ctx, a, past));
    XL_TRY(xl_poll(ctx));
    ptrdiff_t segments = xl_ceil_div(a->T, SEGMENT);
#pragma omp parallel num_threads(ctx->threads)
    {
        xl_attn_work w = xl_attention_work(ctx, a, scratch);
        /* the last segments see the most keys: they go first */
#pragma omp for schedule(dynamic) collapse(3)
        for (ptrdiff_t j = segments - 1; j >= 0; j--)
            for (ptrdiff_t b = 0; b < a->B; b++)
                for (ptrdiff_t g = 0; g < a->G; g++) {
                    ptrdiff_t t0 = j * SEGMENT, t1 = xl_min(a->T, t0 + SEGMENT);
                    ptrdiff_t end = xl_min(t1, xl_attn_length(a, b));
                    xl_block block;
                    for (ptrdiff_t t = xl_first_block(a, b, t0); t < end; t = block.q1) {
                        block = xl_block_at(a, b, t);
                        block_forward(ctx, a, &w, &block, o, sums, q, k, v, past, b, g);
                    }
                    pad(a, o, sums, b, g, t0, t1);
                }
    }
    return XL_OK;
}
