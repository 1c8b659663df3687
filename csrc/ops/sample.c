/* Sampling from logits, row by row: temperature, nucleus (arXiv:1904.09751), and the inverse of the
 * distribution function. A nucleus is found without sorting the vocabulary: the bits of a positive
 * float grow with its value, so its digits, most significant first, select the least probability
 * that is kept. */
#include "kernels/kernels.h"
#include "ops/basic.h"

#include <omp.h>
#include <string.h>

#define DIGIT_BITS 11
#define DIGITS 3      /* 33 bits hold those of a float */
#define ROUNDING 1e-9 /* of a number of entries */
#define VALUES ((ptrdiff_t)1 << DIGIT_BITS)

typedef struct {
    real *p;      /* [V] exp((z - max z) / temperature) */
    double *mass; /* [VALUES] of the entries that have a value of the digit */
} workspace;

static void plan_thread(xl_plan *p, ptrdiff_t V, workspace *w) {
    w->p = xl_take_reals(p, V);
    w->mass =
        xl_take(p, "", XL_ROLE_WORK, XL_DT_U8, 2, XL_SHAPE(VALUES, (ptrdiff_t)sizeof(double)));
}

static workspace place_thread(ptrdiff_t V, char *base) {
    xl_plan measure = {0};
    workspace w;
    plan_thread(&measure, V, &w);
    xl_plan p = {.base = base + omp_get_thread_num() * measure.used, .size = PTRDIFF_MAX};
    plan_thread(&p, V, &w);
    return w;
}

ptrdiff_t xl_sample_scratch(const xl_ctx *ctx, ptrdiff_t V) {
    xl_plan p = {0};
    workspace w;
    plan_thread(&p, V, &w);
    return p.failed ? -1 : p.used * ctx->threads;
}

static uint32_t bits_of(real x) {
    float f = (float)x;
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    return bits;
}

/* Of the fewest largest entries whose mass reaches `wanted`: the bits of the least (returned), and
 * how many entries with these bits belong to them (*ties; the first ones do). */
static uint32_t least_kept(const workspace *w, ptrdiff_t V, double wanted, ptrdiff_t *ties) {
    uint32_t prefix = 0;
    double above = 0, of_least = 0; /* mass of larger entries, of those equal to the least */
    for (int digit = DIGITS - 1; digit >= 0; digit--) {
        int shift = digit * DIGIT_BITS, higher = shift + DIGIT_BITS;
        memset(w->mass, 0, (size_t)VALUES * sizeof(double));
        for (ptrdiff_t i = 0; i < V; i++) {
            uint64_t bits = bits_of(w->p[i]);
            if (bits >> higher == prefix) w->mass[bits >> shift & (VALUES - 1)] += (double)w->p[i];
        }
        ptrdiff_t value = VALUES - 1, least = 0; /* the lowest value that has any mass */
        for (ptrdiff_t j = VALUES - 1; j >= 0; j--)
            if (w->mass[j] > 0) least = j;
        while (value > least && above + w->mass[value] < wanted) above += w->mass[value--];
        of_least = w->mass[value];
        prefix = (uint32_t)((uint64_t)prefix << DIGIT_BITS | (uint64_t)value);
    }
    ptrdiff_t count = 0;
    for (ptrdiff_t i = 0; i < V; i++) count += bits_of(w->p[i]) == prefix;
    double share = (wanted - above) / of_least * (double)count;
    share = ceil(share - ROUNDING); /* three equal entries of .1 reach .3 */
    *ties = share >= (double)count ? count : xl_max(1, (ptrdiff_t)share);
    return prefix;
}

/* Entries outside the nucleus become 0. */
static void keep_nucleus(const workspace *w, ptrdiff_t V, double top_p) {
    double sum = 0;
    for (ptrdiff_t i = 0; i < V; i++) sum += (double)w->p[i];
    ptrdiff_t ties;
    uint32_t least = least_kept(w, V, top_p * sum, &ties);
    for (ptrdiff_t i = 0; i < V; i++) {
        uint32_t bits = bits_of(w->p[i]);
        if (bits < least || (bits == least && ties-- <= 0)) w->p[i] = 0;
    }
}

static int32_t choose(const real *p, ptrdiff_t V, double uniform) {
    double total = 0, sum = 0;
    for (ptrdiff_t i = 0; i < V; i++) total += (double)p[i];
    ptrdiff_t last = 0;
    for (ptrdiff_t i = 0; i < V; i++) {
        if (!(p[i] > 0)) continue;
        sum += (double)p[i];
        last = i;
        if (sum > uniform * total) break;
    }
    return (int32_t)last;
}

xl_status xl_sample(xl_ctx *ctx, ptrdiff_t N, ptrdiff_t V, int32_t *ids, const real *logits,
                    double temperature, double top_p, const double *uniform, void *scratch) {
    if (V < 1) return xl_fail(ctx, XL_VALUE, "the vocabulary is empty");
    ptrdiff_t bad = N; /* the first row that cannot be sampled from */
#pragma omp parallel num_threads(ctx->threads) reduction(min : bad)
    {
        workspace w = place_thread(V, scratch);
#pragma omp for schedule(dynamic)
        for (ptrdiff_t n = 0; n < N; n++) {
            const real *z = logits + n * V;
            real top = ctx->k->max(V, z);
            if (!isfinite(top)) {
                bad = xl_min(bad, n);
                continue;
            }
            real by = (real)(1 / temperature);
            if (isinf(by)) { /* temperature 0, or so little that only the largest logit is left */
                ptrdiff_t i = 0;
                while (z[i] != top) i++;
                ids[n] = (int32_t)i;
                continue;
            }
            for (ptrdiff_t i = 0; i < V; i++) w.p[i] = (z[i] - top) * by;
            ctx->k->exp(V, w.p, w.p);
            if (top_p < 1) keep_nucleus(&w, V, top_p);
            ids[n] = choose(w.p, V, uniform[n]);
        }
    }
    if (bad < N) return xl_fail(ctx, XL_FLOATING, "logits of row %td are not finite", bad);
    return XL_OK;
}
