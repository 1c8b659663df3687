/* Gradients of attention. With p = softmax(s), o = p v:
 *     dv = p^T do    ds = p o (do v^T - do.o)    dq = ds k    dk = ds^T q
 * A gradient e on log_sum, the logsumexp less the largest score, adds e p to ds and takes e from the
 * largest score's.
 * A row is cut into segments of queries. Each adds the gradients of the keys that it sees into a
 * buffer of its own; the buffers are then added up in the order of the segments. Segments depend on
 * T and the window alone: the sums are the same for any number of threads, rows and heads. */
#include "ops/attention.h"

#include <omp.h>
#include <string.h>

/* Steps of a segment: short where few keys outside of it are seen; else at most four, because the
 * buffer of one reaches back to the start of the row. */
static ptrdiff_t segment(const xl_attn *a) {
    if (a->window < 256) return 168;
    return xl_max(168, xl_round_up(xl_ceil_div(a->T, 4), 84));
}

static ptrdiff_t segments(const xl_attn *a) { return xl_ceil_div(a->T, segment(a)); }

/* Keys of a segment's buffer: its own steps, those of its last block behind its end, and the window
 * before it; in front of them the sinks of a document that started earlier. */
static ptrdiff_t first_key(const xl_attn *a, ptrdiff_t j) {
    return xl_max(0, j * segment(a) - xl_min(a->window, a->T) + 1);
}
static ptrdiff_t last_key(const xl_attn *a, ptrdiff_t j) {
    return xl_min(a->T, (j + 1) * segment(a) + xl_query_block(a));
}
static ptrdiff_t buffer_rows(const xl_attn *a) {
    ptrdiff_t most = 0;
    for (ptrdiff_t j = 0; j < segments(a); j++)
        most = xl_max(most, last_key(a, j) - first_key(a, j));
    return most + xl_min(a->sinks, a->T);
}

ptrdiff_t xl_attention_gradient_bytes(const xl_attn *a) {
    xl_plan p = {0};
    xl_take(&p, "", XL_ROLE_WORK, XL_DT_REAL, 5,
            XL_SHAPE(a->B, xl_max(a->G, 0), 2 * segments(a), buffer_rows(a), a->D));
    return p.failed ? -1 : p.used;
}

/* Adds n rows, of columns c0 .. c0 + n, into the buffer of segment j; not those of the cache. */
static void add_columns(const xl_ctx *ctx, const xl_attn *a, const xl_block *k, ptrdiff_t j,
                        ptrdiff_t c0, ptrdiff_t n, const real *rows, real *buffer) {
    ptrdiff_t sinks = xl_min(a->sinks, a->T), first = first_key(a, j), D = a->D;
    ptrdiff_t begin = xl_max(0, k->start); /* of the document in this row */
    ptrdiff_t c = xl_max(c0, xl_min(begin - k->start, k->sinks)), end = c0 + n;
    for (; c < xl_min(end, k->sinks); c++) {
        ptrdiff_t t = k->start + c, row = t < first ? t - begin : sinks + t - first;
        ctx->k->add(D, rows + (c - c0) * D, buffer + row * D);
    }
    ptrdiff_t t = k->start + k->first + c - k->sinks; /* from here on keys are neighbours */
    if (t < 0) c -= t, t = 0;
    if (c >= end) return;
    ctx->k->add((end - c) * D, rows + (c - c0) * D, buffer + (sinks + t - first) * D);
}

/* p of a head's block in w->scores, ds / sqrt(D) in w->grads; both 0 in the columns n .. whole. */
static void score_gradients(const xl_ctx *ctx, const xl_attn *a, xl_attn_work *w, const xl_block *k,
                            ptrdiff_t c0, ptrdiff_t n, ptrdiff_t whole, xl_heads dout,
                            const real *dlog_sum, xl_heads q, xl_attn_sums sums, const real *delta,
                            ptrdiff_t b, ptrdiff_t h) {
    ptrdiff_t rows = k->q1 - k->q0, D = a->D, ld = XL_SCORE_STRIDE, nr = ctx->k->nr;
    ptrdiff_t at = (b * a->H + h) * a->T + k->q0;
    real scale = (real)(1 / sqrt((double)D));
    xl_scaled_queries(ctx, a, q, b, h, k->q0, rows, w->queries);
    xl_product(ctx, a->mixed, rows, xl_round_up(n, nr), D, w->queries, D, 1, w->keys_t, 0,
               w->scores, ld, w->apack);
    xl_product(ctx, a->mixed, rows, xl_round_up(n, nr), D, xl_at(dout, b, h, k->q0), dout.st, 1,
               w->values_t, 0, w->grads, ld, w->apack);
    for (ptrdiff_t i = 0; i < rows; i++) {
        real *p = w->scores + i * ld, *ds = w->grads + i * ld, minus = delta[i];
        ptrdiff_t end = xl_mask_row(a, k, k->q0 + i, c0, n, p);
        ctx->k->exp_sum(end, p, sums.lse[at + i], p);
        for (ptrdiff_t c = 0; c < xl_min(end, n); c++) ds[c] = scale * p[c] * (ds[c] - minus);
        if (end < whole) memset(p + end, 0, (size_t)(whole - end) * sizeof(real));
        end = xl_min(end, n);
        memset(ds + end, 0, (size_t)(whole - end) * sizeof(real));
        if (!dlog_sum) continue;
        ptrdiff_t peak = xl_position_column(k, sums.peak[at + i]) - c0;
        if (peak >= 0 && peak < n) ds[peak] -= scale * dlog_sum[at + i];
    }
}

static void block_backward(const xl_ctx *ctx, const xl_attn *a, xl_attn_work *w, const xl_block *k,
                           ptrdiff_t j, xl_heads dq, real *dk, real *dv, xl_heads dout,
                           const real *dlog_sum, xl_heads q, xl_heads key, xl_heads v, xl_heads o,
                           xl_attn_sums sums, const xl_kv *past, ptrdiff_t b, ptrdiff_t g) {
    ptrdiff_t rep = a->H / a->G, D = a->D, rows = k->q1 - k->q0, t0 = k->q0, stride;
    for (ptrdiff_t r = 0; r < rep; r++)
        for (ptrdiff_t i = 0; i < rows; i++) {
            ptrdiff_t h = g * rep + r, t = t0 + i;
            real *delta = w->delta + r * rows + i;
            *delta = ctx->k->dot(D, xl_at(dout, b, h, t), xl_at(o, b, h, t));
            if (dlog_sum) *delta -= dlog_sum[(b * a->H + h) * a->T + t];
        }
    for (ptrdiff_t c0 = 0; c0 < k->columns; c0 += XL_COLUMNS) {
        ptrdiff_t n = xl_min(XL_COLUMNS, k->columns - c0), whole = xl_round_up(n, ctx->k->mr);
        const real *x =
            xl_column_rows(a, k, c0, n, key, past, past ? past->k : NULL, b, g, w->rows, &stride);
        xl_pack_right(ctx, a->mixed, D, n, x, 1, stride, w->keys_t);
        xl_pack_right(ctx, a->mixed, n, D, x, stride, 1, w->keys);
        x = xl_column_rows(a, k, c0, n, v, past, past ? past->v : NULL, b, g, w->rows, &stride);
        xl_pack_right(ctx, a->mixed, D, n, x, 1, stride, w->values_t);
        for (ptrdiff_t r = 0; r < rep; r++) {
            ptrdiff_t h = g * rep + r;
            score_gradients(ctx, a, w, k, c0, n, whole, dout, dlog_sum, q, sums,
                            w->delta + r * rows, b, h);
            if (dq.p)
                xl_product(ctx, a->mixed, rows, D, n, w->grads, XL_SCORE_STRIDE, 1, w->keys, 1,
                           xl_at(dq, b, h, t0), dq.st, w->apack);
            if (dk) {
                xl_pack_right(ctx, a->mixed, rows, D, xl_at(q, b, h, t0), q.st, 1, w->values);
                xl_product(ctx, a->mixed, whole, D, rows, w->grads, 1, XL_SCORE_STRIDE, w->values,
                           r > 0, w->dk, D, w->apack);
            }
            if (dv) {
                xl_pack_right(ctx, a->mixed, rows, D, xl_at(dout, b, h, t0), dout.st, 1, w->values);
                xl_product(ctx, a->mixed, whole, D, rows, w->scores, 1, XL_SCORE_STRIDE, w->values,
                           r > 0, w->dv, D, w->apack);
            }
        }
        if (dk) add_columns(ctx, a, k, j, c0, n, w->dk, dk);
        if (dv) add_columns(ctx, a, k, j, c0, n, w->dv, dv);
    }
}

/* Adds what the segments have collected for the keys t0 <= t < t1 of a row into its gradient;
 * buffer: the segments' of this row and key head, one after another at `distance`. */
static void add_segments(const xl_ctx *ctx, const xl_attn *a, xl_heads dx, const real *buffer,
                         ptrdiff_t distance, ptrdiff_t b, ptrdiff_t g, ptrdiff_t t0, ptrdiff_t t1) {
    ptrdiff_t sinks = xl_min(a->sinks, a->T), D = a->D, length = xl_attn_length(a, b);
    for (ptrdiff_t j = 0; j < segments(a); j++, buffer += distance) {
        ptrdiff_t q0 = xl_first_block(a, b, j * segment(a)), first = first_key(a, j);
        if (q0 >= xl_min(length, (j + 1) * segment(a))) continue; /* no block starts in it */
        ptrdiff_t start = xl_max(0, q0 - a->pos[b * a->T + q0]);
        for (ptrdiff_t t = xl_max(t0, start); t < xl_min(t1, xl_min(first, start + sinks)); t++)
            ctx->k->add(D, buffer + (t - start) * D, xl_at(dx, b, g, t));
        for (ptrdiff_t t = xl_max(t0, first); t < xl_min(t1, last_key(a, j)); t++)
            ctx->k->add(D, buffer + (sinks + t - first) * D, xl_at(dx, b, g, t));
    }
}

xl_status xl_attention_backward(xl_ctx *ctx, const xl_attn *a, xl_heads dq, xl_heads dk,
                                xl_heads dv, xl_heads dout, const real *dlog_sum, xl_heads q,
                                xl_heads k, xl_heads v, xl_heads o, xl_attn_sums sums,
                                const xl_kv *past, void *scratch) {
    XL_TRY(xl_attention_check(ctx, a, past));
    XL_TRY(xl_poll(ctx));
    ptrdiff_t count = segments(a), distance = 2 * buffer_rows(a) * a->D, steps = segment(a);
    real *buffers = (real *)((char *)scratch + ctx->threads * xl_attention_work_bytes(ctx, a));
#pragma omp parallel num_threads(ctx->threads)
    {
        xl_attn_work w = xl_attention_work(ctx, a, scratch);
        /* the last segments see the most keys: they go first */
#pragma omp for schedule(dynamic) collapse(3)
        for (ptrdiff_t j = count - 1; j >= 0; j--)
            for (ptrdiff_t b = 0; b < a->B; b++)
                for (ptrdiff_t g = 0; g < a->G; g++) {
                    real *own = buffers + ((b * a->G + g) * count + j) * distance;
                    ptrdiff_t end = xl_min(xl_attn_length(a, b), (j + 1) * steps);
                    memset(own, 0, (size_t)distance * sizeof(real));
                    xl_block block;
                    for (ptrdiff_t t = xl_first_block(a, b, j * steps); t < end; t = block.q1) {
                        block = xl_block_at(a, b, t);
                        block_backward(ctx, a, &w, &block, j, dq, dk.p ? own : NULL,
                                       dv.p ? own + distance / 2 : NULL, dout, dlog_sum, q, k, v, o,
                                       sums, past, b, g);
                    }
                }
#pragma omp for schedule(dynamic) collapse(3)
        for (ptrdiff_t b = 0; b < a->B; b++)
            for (ptrdiff_t g = 0; g < a->G; g++)
                for (ptrdiff_t t = 0; t < a->T; t += 256) {
                    const real *own = buffers + (b * a->G + g) * count * distance;
                    ptrdiff_t t1 = xl_min(a->T, t + 256);
                    if (dk.p) add_segments(ctx, a, dk, own, distance, b, g, t, t1);
                    if (dv.p) add_segments(ctx, a, dv, own + distance / 2, distance, b, g, t, t1);
                }
    }
    return XL_OK;
}
