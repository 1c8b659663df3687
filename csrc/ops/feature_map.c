/* Feature maps: softmax or elu + 1 of a head-wise linear map, kept away from zero. */
#include "kernels/kernels.h"
#include "ops/cells.h"

#include <omp.h>

#define BLOCK 126          /* steps of a task: whole tiles of every kernel */
#define FLOOR ((real)1e-6) /* total of what is added to the features: phi(q).phi(k) is never 0 */
#define SHARE(D) (FLOOR / (real)(D)) /* of one feature */

typedef struct {
    real *dz; /* [BLOCK, D] */
    real *pack;
} workspace;

static void plan_thread(xl_plan *p, const xl_fmap *a, workspace *w) {
    w->dz = xl_take_reals(p, BLOCK * a->D);
    w->pack = xl_take_reals(p, XL_GEMM_PACK);
}

static workspace place_thread(const xl_fmap *a, char *base) {
    xl_plan measure = {0};
    workspace w;
    plan_thread(&measure, a, &w);
    xl_plan p = {.base = base + omp_get_thread_num() * measure.used, .size = PTRDIFF_MAX};
    plan_thread(&p, a, &w);
    return w;
}

ptrdiff_t xl_feature_map_scratch(const xl_ctx *ctx, const xl_fmap *a) {
    xl_plan p = {0};
    workspace w;
    plan_thread(&p, a, &w);
    return p.failed ? -1 : p.used * ctx->threads;
}

static xl_status check(xl_ctx *ctx, const xl_fmap *a) {
    if (a->G >= 1 && a->H % a->G == 0) return XL_OK;
    return xl_fail(ctx, XL_VALUE, "%td heads are no multiple of %td key heads", a->H, a->G);
}

void xl_features(const xl_ctx *ctx, xl_map_form form, ptrdiff_t rows, ptrdiff_t D, real *z,
                 ptrdiff_t st) {
    const xl_kernels *k = ctx->k;
    if (form == XL_MAP_ELU) {
        for (ptrdiff_t t = 0; t < rows; t++, z += st) k->elu_above(D, SHARE(D), z);
        return;
    }
    for (ptrdiff_t t = 0; t < rows; t++, z += st) {
        real by = 1 / (k->exp_sum(D, z, k->max(D, z), z) * (1 + FLOOR));
        for (ptrdiff_t j = 0; j < D; j++) z[j] = z[j] * by + FLOOR / ((real)D * (1 + FLOOR));
    }
}

xl_status xl_feature_map_forward(xl_ctx *ctx, const xl_fmap *a, xl_heads phi, xl_heads x,
                                 const real *w, void *scratch) {
    XL_TRY(check(ctx, a));
    if (a->T == 1 && a->B > 1) { /* a decoding step: its rows share one product, not one each */
        xl_fmap rows = {1, a->H, a->G, a->B, a->D, a->form, a->mixed};
        return xl_feature_map_forward(ctx, &rows, (xl_heads){phi.p, 0, phi.sh, phi.sb},
                                      (xl_heads){x.p, 0, x.sh, x.sb}, w, scratch);
    }
    xl_gemm gemm = xl_gemm_of(ctx->k, a->mixed);
    ptrdiff_t D = a->D, rep = a->H / a->G;
#pragma omp parallel num_threads(ctx->threads)
    {
        workspace s = place_thread(a, scratch);
#pragma omp for schedule(dynamic) collapse(3)
        for (ptrdiff_t b = 0; b < a->B; b++)
            for (ptrdiff_t h = 0; h < a->H; h++)
                for (ptrdiff_t t0 = 0; t0 < a->T; t0 += BLOCK) {
                    ptrdiff_t rows = xl_min(BLOCK, a->T - t0);
                    gemm(rows, D, D, 1, xl_at(x, b, h / rep, t0), x.st, 1, w + h * D * D, D, 1, 0,
                         xl_at(phi, b, h, t0), phi.st, s.pack);
                    xl_features(ctx, a->form, rows, D, xl_at(phi, b, h, t0), phi.st);
                }
    }
    return XL_OK;
}

/* phi = (p + c/D)/(1 + c), p = softmax(z): dz = p o (dp - p.dp), dp = dphi/(1 + c). */
static void softmax_backward(const xl_ctx *ctx, const xl_fmap *a, real *dz, xl_heads dphi,
                             xl_heads phi, ptrdiff_t b, ptrdiff_t h, ptrdiff_t t0, ptrdiff_t rows) {
    ptrdiff_t D = a->D;
    for (ptrdiff_t i = 0; i < rows; i++, dz += D) {
        const real *y = xl_at(phi, b, h, t0 + i), *dy = xl_at(dphi, b, h, t0 + i);
        for (ptrdiff_t j = 0; j < D; j++) dz[j] = y[j] * (1 + FLOOR) - SHARE(D);
        real dot = ctx->k->dot(D, dz, dy);
        for (ptrdiff_t j = 0; j < D; j++) dz[j] *= (dy[j] - dot) * (1 / (1 + FLOOR));
    }
}

/* phi = elu(z) + 1 + c/D: its slope is exp(z) below 0, where phi - c/D is that, and 1 above. */
static void elu_backward(const xl_fmap *a, real *dz, xl_heads dphi, xl_heads phi, ptrdiff_t b,
                         ptrdiff_t h, ptrdiff_t t0, ptrdiff_t rows) {
    ptrdiff_t D = a->D;
    for (ptrdiff_t i = 0; i < rows; i++, dz += D) {
        const real *y = xl_at(phi, b, h, t0 + i), *dy = xl_at(dphi, b, h, t0 + i);
        for (ptrdiff_t j = 0; j < D; j++) {
            real slope = y[j] - SHARE(D);
            dz[j] = dy[j] * (slope > 1 ? (real)1 : slope); /* a NaN stays */
        }
    }
}

/* dz [rows, D] of a block of steps. */
static void block_backward(const xl_ctx *ctx, const xl_fmap *a, real *dz, xl_heads dphi,
                           xl_heads phi, ptrdiff_t b, ptrdiff_t h, ptrdiff_t t0, ptrdiff_t rows) {
    if (a->form == XL_MAP_ELU)
        elu_backward(a, dz, dphi, phi, b, h, t0, rows);
    else
        softmax_backward(ctx, a, dz, dphi, phi, b, h, t0, rows);
}

xl_status xl_feature_map_backward(xl_ctx *ctx, const xl_fmap *a, xl_heads dx, real *dw,
                                  xl_heads dphi, xl_heads phi, xl_heads x, const real *w,
                                  void *scratch) {
    XL_TRY(check(ctx, a));
    xl_gemm gemm = xl_gemm_of(ctx->k, a->mixed);
    ptrdiff_t D = a->D, rep = a->H / a->G;
#pragma omp parallel num_threads(ctx->threads)
    {
        workspace s = place_thread(a, scratch);
        if (dx.p) { /* a task owns a key head's block and adds its query heads in order */
#pragma omp for schedule(dynamic) collapse(3)
            for (ptrdiff_t b = 0; b < a->B; b++)
                for (ptrdiff_t g = 0; g < a->G; g++)
                    for (ptrdiff_t t0 = 0; t0 < a->T; t0 += BLOCK)
                        for (ptrdiff_t h = g * rep; h < (g + 1) * rep; h++) {
                            ptrdiff_t rows = xl_min(BLOCK, a->T - t0);
                            block_backward(ctx, a, s.dz, dphi, phi, b, h, t0, rows);
                            gemm(rows, D, D, 1, s.dz, D, 1, w + h * D * D, 1, D, 1,
                                 xl_at(dx, b, g, t0), dx.st, s.pack);
                        }
        }
        if (dw) { /* a task owns a map and adds rows and blocks in order */
#pragma omp for schedule(dynamic)
            for (ptrdiff_t h = 0; h < a->H; h++)
                for (ptrdiff_t b = 0; b < a->B; b++)
                    for (ptrdiff_t t0 = 0; t0 < a->T; t0 += BLOCK) {
                        ptrdiff_t rows = xl_min(BLOCK, a->T - t0);
                        block_backward(ctx, a, s.dz, dphi, phi, b, h, t0, rows);
                        gemm(D, D, rows, 1, xl_at(x, b, h / rep, t0), 1, x.st, s.dz, D, 1, 1,
                             dw + h * D * D, D, s.pack);
                    }
        }
    }
    return XL_OK;
}
