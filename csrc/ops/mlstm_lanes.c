/* The mLSTM of few rows: their chunks over threads.
 *
 * Where rows and heads leave threads idle, all their chunks are worked on side by side, and what must be
 * in order, the states, is but a sum of what the chunks add. The same functions in the same order for
 * every chunk: the same bits as row by row. */
#include "ops/mlstm.h"

#include <string.h>

#define LANES_BYTES (64 << 20) /* at most, of all lanes */

typedef struct {
    ptrdiff_t t0, S;
    double m;  /* of the state before it */
    int fresh; /* a document starts: nothing is before it */
} span;

/* A row and head. */
typedef struct {
    ptrdiff_t *count;    /* of its chunks */
    double *behind;      /* <dC, C> + <dn, n> on the last state */
    span *spans;         /* [room] */
    double *lf, *x;      /* [T] */
    real *states, *adds; /* [room + 1], [room]: [D, E] and [D]; backward: dC behind a chunk, dU */
    real *dk, *dv;       /* [T, D], [T, E] */
} lane;

/* Chunks of a lane: twice as many as one document has. */
static ptrdiff_t room(const xl_mlstm *a) { return 2 * xl_ceil_div(a->T, xl_max(1, a->chunk)); }

static void plan_lane(xl_plan *p, const xl_mlstm *a, lane *l) {
    ptrdiff_t size = a->D * (a->E + 1), T = a->T;
    l->count = xl_take(p, "", XL_ROLE_WORK, XL_DT_U8, 1, XL_SHAPE((ptrdiff_t)sizeof(ptrdiff_t)));
    l->behind = xl_mlstm_take_doubles(p, 1);
    l->spans =
        xl_take(p, "", XL_ROLE_WORK, XL_DT_U8, 2, XL_SHAPE(room(a), (ptrdiff_t)sizeof(span)));
    l->lf = xl_mlstm_take_doubles(p, T);
    l->x = xl_mlstm_take_doubles(p, T);
    l->states = xl_take(p, "", XL_ROLE_WORK, XL_DT_REAL, 2, XL_SHAPE(room(a) + 1, size));
    l->adds = xl_take(p, "", XL_ROLE_WORK, XL_DT_REAL, 2, XL_SHAPE(room(a), size));
    l->dk = xl_take(p, "", XL_ROLE_WORK, XL_DT_REAL, 2, XL_SHAPE(T, a->D));
    l->dv = xl_take(p, "", XL_ROLE_WORK, XL_DT_REAL, 2, XL_SHAPE(T, a->E));
}

/* Bytes of all lanes; 0 where rows go one by one. */
ptrdiff_t xl_mlstm_lanes_bytes(const xl_ctx *ctx, const xl_mlstm *a) {
    ptrdiff_t lanes, total;
    if (a->form != XL_CHUNKWISE || ctx->threads == 1 || a->T <= a->chunk || a->chunk < 1) return 0;
    if (__builtin_mul_overflow(a->B, a->H, &lanes) || lanes > 4096) return 0;
    /* a chunk takes 1.4 times as long: it is opened thrice, and states leave the cache */
    if (3 * lanes >= 2 * xl_round_up(lanes, ctx->threads)) return 0;
    xl_plan p = {0};
    lane l;
    plan_lane(&p, a, &l);
    if (p.failed || __builtin_mul_overflow(p.used, lanes, &total) || total > LANES_BYTES) return 0;
    return total;
}

static lane place_lane(const xl_mlstm *a, char *base, ptrdiff_t j) {
    xl_plan measure = {0};
    lane l;
    plan_lane(&measure, a, &l);
    xl_plan p = {.base = base + j * measure.used, .size = PTRDIFF_MAX};
    plan_lane(&p, a, &l);
    return l;
}

/* The chunks of a lane; false if there is no room for them. */
static int cut_lane(const xl_ctx *ctx, const xl_mlstm *a, xl_mlstm_work *w,
                    const xl_mlstm_arrays *r, lane *l, ptrdiff_t b, ptrdiff_t h) {
    ptrdiff_t T = xl_mlstm_row_length(a, b), count = 0;
    w->lf = l->lf;
    xl_mlstm_log_forget(ctx, r, T, b, h, w);
    for (ptrdiff_t start = 0, end; start < T; start = end) {
        end = xl_mlstm_segment_end(a, w, b, start, T);
        for (ptrdiff_t t0 = start; t0 < end; t0 += a->chunk, count++) {
            if (count == room(a)) return 0;
            int fresh = t0 == start && (start || xl_mlstm_starts(a, w, b, 0));
            l->spans[count] = (span){t0, xl_min(a->chunk, end - t0), -INFINITY, fresh};
        }
    }
    *l->count = count;
    return 1;
}

/* What is behind the chunks of a lane: zeros, and the last state. */
static void finish_lane(const xl_mlstm *a, const xl_mlstm_arrays *r, const lane *l, ptrdiff_t b,
                        ptrdiff_t h, double m) {
    ptrdiff_t D = a->D, E = a->E, at = b * a->H + h;
    const real *C = l->states + *l->count * D * (E + 1);
    xl_mlstm_pad(a, r, b, h, xl_mlstm_row_length(a, b));
    if (!r->last.c) return;
    memcpy(r->last.c + at * D * E, C, (size_t)(D * E) * sizeof(real));
    memcpy(r->last.n + at * D, C + D * E, (size_t)D * sizeof(real));
    r->last.m[at] = (real)m;
}

/* The states before all chunks, and behind the last, from what the chunks add; returns its m. */
static double scan_states(const xl_ctx *ctx, const xl_mlstm *a, xl_mlstm_work *w,
                          const xl_mlstm_arrays *r, lane *l, ptrdiff_t b, ptrdiff_t h) {
    ptrdiff_t D = a->D, E = a->E, size = D * (E + 1), count = *l->count, at = b * a->H + h;
    double m = xl_mlstm_start_state(a, w, r->first, at, count && l->spans[0].fresh);
    memcpy(l->states, w->C, (size_t)(D * E) * sizeof(real));
    memcpy(l->states + D * E, w->n, (size_t)D * sizeof(real));
    for (ptrdiff_t j = 0; j < count; j++) {
        span *s = &l->spans[j];
        real *C = l->states + j * size, *U = l->adds + j * size, *next = C + size;
        if (s->fresh) {
            memset(C, 0, (size_t)size * sizeof(real));
            m = -INFINITY;
        }
        s->m = m;
        xl_chunk c = xl_mlstm_open_chunk(ctx, a, w, r, b, h, s->t0, s->S, C, C + D * E, m);
        m = xl_mlstm_advance(ctx, a, w, &c, U, U + D * E, next, next + D * E);
    }
    return m;
}

/* dC behind every chunk into `states`, from what the chunks add to it; those on the first state. */
static void scan_gradients(const xl_ctx *ctx, const xl_mlstm *a, xl_mlstm_work *w,
                           const xl_mlstm_arrays *r, lane *l, ptrdiff_t b, ptrdiff_t h) {
    ptrdiff_t D = a->D, E = a->E, size = D * (E + 1), count = *l->count, at = b * a->H + h;
    const real *last = l->states + count * size;
    *l->behind = 0;
    for (ptrdiff_t j = count; j-- > 0;) {
        const span *s = &l->spans[j];
        real *dC = l->states + j * size, *dU = l->adds + j * size;
        if (j == count - 1 && r->dlast.c) {
            xl_mlstm_load_gradient(a, w, r, at);
            *l->behind = (double)ctx->k->dot(D * E, w->dC, last) +
                         (double)ctx->k->dot(D, w->dn, last + D * E);
        } else if (j == count - 1 || l->spans[j + 1].fresh) {
            memset(w->dC, 0, (size_t)(D * E) * sizeof(real));
            memset(w->dn, 0, (size_t)D * sizeof(real));
        }
        memcpy(dC, w->dC, (size_t)(D * E) * sizeof(real));
        memcpy(dC + D * E, w->dn, (size_t)D * sizeof(real));
        xl_mlstm_open_chunk(ctx, a, w, r, b, h, s->t0, s->S, dC, dC + D * E, s->m);
        if (s->m != -INFINITY) xl_mlstm_retreat(ctx, a, w, dU, dU + D * E, w->dC, w->dn);
    }
    if (!r->dfirst.c) return;
    int fresh = count && l->spans[0].fresh;
    if (!count && r->dlast.c) xl_mlstm_load_gradient(a, w, r, at);
    if (xl_mlstm_start_state(a, w, r->first, at, fresh) != -INFINITY && (count || r->dlast.c)) {
        ctx->k->add(D * E, w->dC, r->dfirst.c + at * D * E);
        ctx->k->add(D, w->dn, r->dfirst.n + at * D);
    }
    r->dfirst.m[at] = 0;
}

/* All rows; false, and nothing is done, if there is no room for their chunks. */
int xl_mlstm_run_lanes(const xl_ctx *ctx, const xl_mlstm *a, const xl_mlstm_arrays *r,
                       void *scratch, char *base, int backward) {
    ptrdiff_t lanes = a->B * a->H, D = a->D, E = a->E, size = D * (E + 1), most = 0;
    int fits = 1;
#pragma omp parallel num_threads(ctx->threads)
    {
        xl_mlstm_work w = xl_mlstm_place_thread(ctx, a, scratch);
#pragma omp for reduction(&& : fits)
        for (ptrdiff_t j = 0; j < lanes; j++) {
            lane l = place_lane(a, base, j);
            fits = cut_lane(ctx, a, &w, r, &l, j / a->H, j % a->H) && fits;
        }
    }
    if (!fits) return 0;
    for (ptrdiff_t j = 0; j < lanes; j++) most = xl_max(most, *place_lane(a, base, j).count);
#pragma omp parallel num_threads(ctx->threads)
    {
        xl_mlstm_work w = xl_mlstm_place_thread(ctx, a, scratch);
        enum { ADDS, STATES, INSIDE, GRADIENTS, THROUGH, PHASES };
        for (int phase = ADDS; phase < (backward ? PHASES : GRADIENTS); phase++) {
            int whole = phase == STATES || phase == GRADIENTS; /* a lane is a task, not a chunk */
#pragma omp for schedule(dynamic) collapse(2)
            for (ptrdiff_t i = 0; i < (whole ? 1 : most); i++)
                for (ptrdiff_t j = 0; j < lanes; j++) {
                    lane l = place_lane(a, base, j);
                    ptrdiff_t b = j / a->H, h = j % a->H;
                    w.lf = l.lf;
                    w.x = l.x;
                    if (phase == STATES) {
                        double m = scan_states(ctx, a, &w, r, &l, b, h);
                        if (!backward) finish_lane(a, r, &l, b, h, m);
                    } else if (phase == GRADIENTS) {
                        scan_gradients(ctx, a, &w, r, &l, b, h);
                    }
                    if (whole || i >= *l.count) continue;
                    const span *s = &l.spans[i];
                    real *C = l.states + i * size, *U = l.adds + i * size;
                    real *dk = l.dk + s->t0 * D, *dv = l.dv + s->t0 * E;
                    xl_chunk c =
                        xl_mlstm_open_chunk(ctx, a, &w, r, b, h, s->t0, s->S, C, C + D * E, s->m);
                    if (phase == ADDS) {
                        xl_mlstm_map_chunk(ctx, a, &w, r, &c, 0);
                        xl_mlstm_pack_v(ctx, a, &w, &c);
                        xl_mlstm_chunk_adds(ctx, a, &w, &c, U, U + D * E);
                    } else if (phase == THROUGH) {
                        xl_mlstm_backward_through(ctx, a, &w, r, &c, C, C + D * E, dk, dv);
                    } else if (backward) {
                        xl_mlstm_backward_inside(ctx, a, &w, r, &c, dk, dv, U, U + D * E);
                    } else {
                        xl_mlstm_map_chunk(ctx, a, &w, r, &c, 1);
                        xl_mlstm_forward_chunk(ctx, a, &w, r, &c);
                    }
                }
        }
#pragma omp for
        for (ptrdiff_t j = 0; j < (backward ? lanes : 0); j++) {
            lane l = place_lane(a, base, j);
            w.x = l.x;
            if (*l.count) l.x[xl_mlstm_row_length(a, j / a->H) - 1] += *l.behind;
            for (ptrdiff_t i = 0, next; i < *l.count; i = next) { /* segment by segment */
                for (next = i + 1; next < *l.count && !l.spans[next].fresh;) next++;
                const span *s = &l.spans[next - 1];
                xl_mlstm_forget_gradient(ctx, r, &w, j / a->H, j % a->H, l.spans[i].t0,
                                         s->t0 + s->S, l.spans[i].m != -INFINITY);
            }
        }
    }
    return 1;
}
