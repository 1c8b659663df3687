/* The mLSTM row by row: rows and heads over threads, or by mlstm_lanes.c where there are few. */
#include "ops/mlstm.h"

#include <string.h>

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

/* ---- forward ------------------------------------------------------------------------------- */

static double forward_chunks(const xl_ctx *ctx, const xl_mlstm *a, xl_mlstm_work *w,
                             const xl_mlstm_arrays *r, ptrdiff_t b, ptrdiff_t h, ptrdiff_t start,
                             ptrdiff_t end, double m) {
    for (ptrdiff_t t0 = start; t0 < end; t0 += xl_mlstm_chunk_length(a)) {
        ptrdiff_t S = xl_min(xl_mlstm_chunk_length(a), end - t0);
        xl_chunk c = xl_mlstm_open_chunk(ctx, a, w, r, b, h, t0, S, w->C, w->n, m);
        xl_mlstm_map_chunk(ctx, a, w, r, &c, 1);
        xl_mlstm_forward_chunk(ctx, a, w, r, &c);
        xl_mlstm_chunk_adds(ctx, a, w, &c, w->U, w->u);
        m = xl_mlstm_advance(ctx, a, w, &c, w->U, w->u, w->C, w->n);
    }
    return m;
}

static double forward_steps(const xl_ctx *ctx, const xl_mlstm *a, xl_mlstm_work *w,
                            const xl_mlstm_arrays *r, ptrdiff_t b, ptrdiff_t h, ptrdiff_t start,
                            ptrdiff_t end, double m) {
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
        kn->scale(E, xl_mlstm_inverse_divisor(a, den, m, &slope), out);
        xl_mlstm_log_den(r, b, h, t, den, m);
    }
    return m;
}

static void forward_row(const xl_ctx *ctx, const xl_mlstm *a, xl_mlstm_work *own,
                        const xl_mlstm_arrays *r, ptrdiff_t b, ptrdiff_t h) {
    ptrdiff_t T = xl_mlstm_row_length(a, b), D = a->D, E = a->E, at = b * a->H + h, t = 0;
    xl_mlstm_work at_last = *own, *w = &at_last;
    if (r->last.c) w->C = r->last.c + at * D * E, w->n = r->last.n + at * D;
    xl_mlstm_log_forget(ctx, r, T, b, h, w);
    double m = xl_mlstm_start_state(a, w, r->first, at, T && xl_mlstm_starts(a, w, b, 0));
    while (t < T) {
        ptrdiff_t end = xl_mlstm_segment_end(a, w, b, t, T);
        if (t) m = xl_mlstm_start_state(a, w, r->first, at, 1);
        m = (a->form == XL_RECURRENT ? forward_steps : forward_chunks)(ctx, a, w, r, b, h, t, end,
                                                                       m);
        t = end;
    }
    xl_mlstm_pad(a, r, b, h, T);
    if (r->last.c) r->last.m[at] = (real)m;
}

/* ---- backward ------------------------------------------------------------------------------ */

/* Steps start .. end-1: the states before the chunks, then the chunks backwards. With a gradient on
 * the state behind the segment, dC and dn already hold it. */
static void backward_segment(const xl_ctx *ctx, const xl_mlstm *a, xl_mlstm_work *w,
                             const xl_mlstm_arrays *r, ptrdiff_t b, ptrdiff_t h, ptrdiff_t start,
                             ptrdiff_t end, double m, int has_dlast) {
    ptrdiff_t S0 = xl_mlstm_backward_chunk_length(a), D = a->D, E = a->E, size = D * (E + 1);
    ptrdiff_t chunks = xl_ceil_div(end - start, S0);
    double behind = 0; /* <dC, C> + <dn, n> on the last state */
    memcpy(w->saved, w->C, (size_t)(D * E) * sizeof(real));
    memcpy(w->saved + D * E, w->n, (size_t)D * sizeof(real));
    for (ptrdiff_t j = 0; j < chunks; j++) {
        ptrdiff_t t0 = start + j * S0, S = xl_min(S0, end - t0), final = j == chunks - 1;
        real *C = w->saved + j * size, *next = final ? w->C : C + size;
        w->saved_m[j] = m;
        if (final && !has_dlast) break;
        xl_chunk c = xl_mlstm_open_chunk(ctx, a, w, r, b, h, t0, S, C, C + D * E, m);
        xl_mlstm_pack_v(ctx, a, w, &c);
        xl_mlstm_chunk_adds(ctx, a, w, &c, w->U, w->u);
        m = xl_mlstm_advance(ctx, a, w, &c, w->U, w->u, next, final ? w->n : next + D * E);
    }
    if (has_dlast)
        behind = (double)ctx->k->dot(D * E, w->dC, w->C) + (double)ctx->k->dot(D, w->dn, w->n);
    for (ptrdiff_t j = chunks; j-- > 0;) {
        ptrdiff_t t0 = start + j * S0, S = xl_min(S0, end - t0);
        const real *C = w->saved + j * size;
        xl_chunk c = xl_mlstm_open_chunk(ctx, a, w, r, b, h, t0, S, C, C + D * E, w->saved_m[j]);
        xl_mlstm_backward_inside(ctx, a, w, r, &c, w->dk, w->dv, w->U, w->u);
        xl_mlstm_backward_through(ctx, a, w, r, &c, w->dC, w->dn, w->dk, w->dv);
        if (c.m != -INFINITY) xl_mlstm_retreat(ctx, a, w, w->U, w->u, w->dC, w->dn);
    }
    w->x[end - 1] += behind;
}

static void backward_row(const xl_ctx *ctx, const xl_mlstm *a, xl_mlstm_work *w,
                         const xl_mlstm_arrays *r, ptrdiff_t b, ptrdiff_t h) {
    ptrdiff_t T = xl_mlstm_row_length(a, b), D = a->D, E = a->E, at = b * a->H + h, t = 0;
    xl_mlstm_log_forget(ctx, r, T, b, h, w);
    int fresh = T && xl_mlstm_starts(a, w, b, 0);
    do { /* once for an empty row, which hands the gradient on its state through */
        ptrdiff_t end = T ? xl_mlstm_segment_end(a, w, b, t, T) : 0;
        int has_dlast = end == T && r->dlast.c;
        if (has_dlast) {
            xl_mlstm_load_gradient(a, w, r, at);
        } else {
            memset(w->dC, 0, (size_t)(D * E) * sizeof(real));
            memset(w->dn, 0, (size_t)D * sizeof(real));
        }
        double m = xl_mlstm_start_state(a, w, r->first, at, t || fresh);
        if (T) backward_segment(ctx, a, w, r, b, h, t, end, m, has_dlast);
        xl_mlstm_forget_gradient(ctx, r, w, b, h, t, end, m != -INFINITY);
        if (!t && m != -INFINITY && r->dfirst.c) {
            ctx->k->add(D * E, w->dC, r->dfirst.c + at * D * E);
            ctx->k->add(D, w->dn, r->dfirst.n + at * D);
        }
        t = end;
    } while (t < T);
    if (r->dfirst.c) r->dfirst.m[at] = 0;
}

/* ---- rows over threads -------------------------------------------------------------------- */

ptrdiff_t xl_mlstm_scratch(const xl_ctx *ctx, const xl_mlstm *a) {
    ptrdiff_t total, bytes = xl_mlstm_threads_bytes(ctx, a);
    return bytes < 0 || __builtin_add_overflow(bytes, xl_mlstm_lanes_bytes(ctx, a), &total) ? -1
                                                                                            : total;
}

/* Runs every (row, head); between blocks of them the caller may stop the work. */
static xl_status run_rows(xl_ctx *ctx, const xl_mlstm *a, const xl_mlstm_arrays *r, void *scratch,
                          int backward) {
    XL_TRY(check(ctx, a));
    ptrdiff_t tasks = a->B * a->H, block = 16 * (ptrdiff_t)ctx->threads;
    XL_TRY(xl_poll(ctx));
    char *lanes = (char *)scratch + xl_mlstm_threads_bytes(ctx, a);
    if (xl_mlstm_lanes_bytes(ctx, a) && xl_mlstm_run_lanes(ctx, a, r, scratch, lanes, backward))
        return XL_OK;
    for (ptrdiff_t first = 0; first < tasks; first += block) {
        ptrdiff_t end = xl_min(tasks, first + block);
        XL_TRY(xl_poll(ctx));
#pragma omp parallel num_threads(ctx->threads)
        {
            xl_mlstm_work w = xl_mlstm_place_thread(ctx, a, scratch);
#pragma omp for schedule(dynamic)
            for (ptrdiff_t j = first; j < end; j++)
                (backward ? backward_row : forward_row)(ctx, a, &w, r, j / a->H, j % a->H);
        }
    }
    return XL_OK;
}

xl_status xl_mlstm_forward(xl_ctx *ctx, const xl_mlstm *a, const xl_mlstm_maps *maps, xl_heads h,
                           xl_heads log_den, xl_mlstm_state last, xl_heads q, xl_heads k,
                           xl_heads v, xl_heads i, xl_heads f, xl_mlstm_state first,
                           void *scratch) {
    const xl_mlstm_arrays r = {.h = h,
                               .log_den = log_den,
                               .q = q,
                               .k = k,
                               .v = v,
                               .i = i,
                               .f = f,
                               .first = first,
                               .last = last,
                               .maps = maps};
    if (maps && (maps->G < 1 || a->H % maps->G))
        return xl_fail(ctx, XL_VALUE, "%td heads are no multiple of %td key heads", a->H, maps->G);
    if (maps && a->form == XL_RECURRENT)
        return xl_fail(ctx, XL_VALUE, "the recurrent form takes features, not maps");
    return run_rows(ctx, a, &r, scratch, 0);
}

xl_status xl_mlstm_backward(xl_ctx *ctx, const xl_mlstm *a, xl_heads dq, xl_heads dk, xl_heads dv,
                            xl_heads di, xl_heads df, xl_mlstm_state dfirst, xl_heads dh,
                            xl_heads dlog_den, xl_heads q, xl_heads k, xl_heads v, xl_heads i,
                            xl_heads f, xl_mlstm_state first, xl_mlstm_state dlast, void *scratch) {
    const xl_mlstm_arrays r = {.dh = dh,
                               .dlog_den = dlog_den,
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
    return run_rows(ctx, a, &r, scratch, 1);
}
