/* The cache of keys and values, and one decoding step over it: memory-bound, so no packing. */
#include "ops/attention.h"

#include <omp.h>
#include <string.h>

#define SLOTS XL_COLUMNS /* slots of a task; a longer cache is shared by several */

static void put(const xl_attn *a, xl_kv *past, xl_heads k, xl_heads v, ptrdiff_t b, ptrdiff_t t,
                ptrdiff_t position) {
    ptrdiff_t slot = xl_slot(past, a->sinks, position);
    for (ptrdiff_t g = 0; g < a->G; g++) {
        ptrdiff_t at = ((b * past->slots + slot) * a->G + g) * a->D;
        memcpy(past->k + at, xl_at(k, b, g, t), (size_t)a->D * sizeof(real));
        memcpy(past->v + at, xl_at(v, b, g, t), (size_t)a->D * sizeof(real));
    }
}

xl_status xl_attention_append(xl_ctx *ctx, const xl_attn *a, xl_heads k, xl_heads v, xl_kv *past) {
    XL_TRY(xl_attention_check(ctx, a, past));
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

/* ---- step --------------------------------------------------------------------------------- */

/* Of each head and part of the cache: top of its scores, sum of exp(score - top), and the values
 * weighted by those, [D]. */
static ptrdiff_t parts(ptrdiff_t slots) { return xl_ceil_div(slots, SLOTS); }

ptrdiff_t xl_attention_step_bytes(const xl_attn *a, ptrdiff_t slots) {
    xl_plan p = {0};
    xl_take(&p, "", XL_ROLE_WORK, XL_DT_REAL, 4, XL_SHAPE(a->B, a->H, parts(slots), a->D + 2));
    return p.failed ? -1 : p.used;
}

/* One head over n slots, at distance ld. */
static void attend(const xl_ctx *ctx, ptrdiff_t D, ptrdiff_t n, const real *q, const real *keys,
                   const real *values, ptrdiff_t ld, real *scores, real *part) {
    const xl_kernels *kn = ctx->k;
    for (ptrdiff_t j = 0; j < n; j += XL_DOTS)
        kn->dots(D, 1, q, D, xl_min(XL_DOTS, n - j), keys + j * ld, ld, scores + j);
    kn->scale(n, (real)(1 / sqrt((double)D)), scores);
    part[0] = kn->max(n, scores);
    part[1] = kn->exp_sum(n, scores, part[0], scores);
    memset(part + 2, 0, (size_t)D * sizeof(real));
    kn->axpys(D, n, scores, values, ld, part + 2);
}

/* Adds up the parts of a head, in order; returns the sum of exp(score - largest). */
static real join(const xl_ctx *ctx, ptrdiff_t D, ptrdiff_t count, const real *part, real *o) {
    real top = -INFINITY, sum = 0;
    for (ptrdiff_t j = 0; j < count; j++) {
        real x = part[j * (D + 2)];
        top = x <= top ? top : x;
    }
    memset(o, 0, (size_t)D * sizeof(real));
    for (ptrdiff_t j = 0; j < count; j++, part += D + 2) {
        real by = (real)exp((double)(part[0] - top));
        sum += by * part[1];
        ctx->k->axpy(D, by, part + 2, o);
    }
    ctx->k->scale(D, 1 / sum, o);
    return sum;
}

xl_status xl_attention_step(xl_ctx *ctx, const xl_attn *a, xl_heads o, real *log_sum, xl_heads q,
                            xl_heads k, xl_heads v, xl_kv *past, void *scratch) {
    if (a->T != 1) return xl_fail(ctx, XL_VALUE, "a step has one token, found %td", a->T);
    XL_TRY(xl_attention_check(ctx, a, past));
    ptrdiff_t D = a->D, G = a->G, rep = a->H / G, slots = past->slots, count = parts(slots);
    real *partial = (real *)((char *)scratch + ctx->threads * xl_attention_work_bytes(ctx, a));
#pragma omp parallel num_threads(ctx->threads)
    {
        xl_attn_work w = xl_attention_work(ctx, a, scratch);
#pragma omp for
        for (ptrdiff_t b = 0; b < a->B; b++)
            if (xl_attn_length(a, b)) put(a, past, k, v, b, 0, a->pos[b]);
#pragma omp for schedule(dynamic) collapse(3)
        for (ptrdiff_t b = 0; b < a->B; b++)
            for (ptrdiff_t j = 0; j < count; j++)
                for (ptrdiff_t g = 0; g < G; g++) { /* inside: a slot holds all key heads */
                    ptrdiff_t first = j * SLOTS, seen = xl_min(slots, (ptrdiff_t)a->pos[b] + 1);
                    ptrdiff_t n = xl_min(SLOTS, seen - first), at = (b * slots + first) * G + g;
                    if (n <= 0 || !xl_attn_length(a, b)) continue;
                    for (ptrdiff_t h = g * rep; h < (g + 1) * rep; h++)
                        attend(ctx, D, n, xl_at(q, b, h, 0), past->k + at * D, past->v + at * D,
                               G * D, w.scores, partial + ((b * a->H + h) * count + j) * (D + 2));
                }
#pragma omp for
        for (ptrdiff_t b = 0; b < a->B; b++)
            for (ptrdiff_t h = 0; h < a->H; h++) {
                ptrdiff_t used = parts(xl_min(slots, (ptrdiff_t)a->pos[b] + 1));
                real sum = 1;
                if (xl_attn_length(a, b))
                    sum = join(ctx, D, used, partial + (b * a->H + h) * count * (D + 2),
                               xl_at(o, b, h, 0));
                else
                    memset(xl_at(o, b, h, 0), 0, (size_t)D * sizeof(real));
                if (log_sum) log_sum[b * a->H + h] = (real)log((double)sum);
            }
    }
    return XL_OK;
}
