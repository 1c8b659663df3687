/* The output gate (paper.md 1.2) and the mix of the two branches (11). */
#include "kernels/kernels.h"
#include "ops/cells.h"

static xl_status check(xl_ctx *ctx, const xl_gate *g) {
    if (g->G >= 1 && g->H % g->G == 0) return XL_OK;
    return xl_fail(ctx, XL_VALUE, "%td heads are no multiple of %td key heads", g->H, g->G);
}

xl_status xl_output_gate_forward(xl_ctx *ctx, const xl_gate *g, xl_heads a, xl_heads q, xl_heads k,
                                 xl_heads v, const real *w, const real *bias) {
    XL_TRY(check(ctx, g));
    const xl_kernels *kn = ctx->k;
    ptrdiff_t D = g->D, rep = g->H / g->G;
#pragma omp parallel for num_threads(ctx->threads) collapse(2) if (g->B * g->T >= XL_FEW_ROWS)
    for (ptrdiff_t b = 0; b < g->B; b++)
        for (ptrdiff_t t = 0; t < g->T; t++)
            for (ptrdiff_t h = 0; h < g->H; h++) {
                const real *row = w + h * 3 * D;
                *xl_at(a, b, h, t) = bias[h] + kn->dot(D, xl_at(q, b, h, t), row) +
                                     kn->dot(D, xl_at(k, b, h / rep, t), row + D) +
                                     kn->dot(D, xl_at(v, b, h / rep, t), row + 2 * D);
            }
    return XL_OK;
}

ptrdiff_t xl_output_gate_scratch(const xl_ctx *ctx, const xl_gate *g) {
    (void)ctx, (void)g;
    return 0;
}

xl_status xl_output_gate_backward(xl_ctx *ctx, const xl_gate *g, xl_heads dq, xl_heads dk,
                                  xl_heads dv, real *dw, real *dbias, xl_heads da, xl_heads q,
                                  xl_heads k, xl_heads v, const real *w, void *scratch) {
    XL_TRY(check(ctx, g));
    (void)scratch;
    const xl_kernels *kn = ctx->k;
    ptrdiff_t D = g->D, rep = g->H / g->G;
#pragma omp parallel for num_threads(ctx->threads) collapse(2)
    for (ptrdiff_t b = 0; b < g->B; b++)
        for (ptrdiff_t t = 0; t < g->T; t++)
            for (ptrdiff_t h = 0; h < g->H; h++) {
                const real *row = w + h * 3 * D, d = *xl_at(da, b, h, t);
                if (dq.p) kn->axpy(D, d, row, xl_at(dq, b, h, t));
                if (dk.p) kn->axpy(D, d, row + D, xl_at(dk, b, h / rep, t));
                if (dv.p) kn->axpy(D, d, row + 2 * D, xl_at(dv, b, h / rep, t));
            }
    if (!dw && !dbias) return XL_OK;
    /* a task owns what a head has of one of its inputs and adds its steps in order */
#pragma omp parallel for num_threads(ctx->threads) schedule(dynamic) collapse(2)
    for (ptrdiff_t h = 0; h < g->H; h++)
        for (int part = 0; part < 3; part++) {
            xl_heads x = part == 0 ? q : part == 1 ? k : v;
            ptrdiff_t head = part == 0 ? h : h / rep;
            for (ptrdiff_t b = 0; b < g->B; b++)
                for (ptrdiff_t t = 0; t < g->T; t++) {
                    real d = *xl_at(da, b, h, t);
                    if (dbias && part == 0) dbias[h] += d;
                    if (dw) kn->axpy(D, d, xl_at(x, b, head, t), dw + (3 * h + part) * D);
                }
        }
    return XL_OK;
}

static real sigmoid(real x) { return (real)(1 / (1 + exp(-(double)x))); }

xl_status xl_mix_forward(xl_ctx *ctx, const xl_gate *g, xl_heads h, xl_heads hm, xl_heads hs,
                         xl_heads a) {
#pragma omp parallel for num_threads(ctx->threads) collapse(2) if (g->B * g->T >= XL_FEW_ROWS)
    for (ptrdiff_t b = 0; b < g->B; b++)
        for (ptrdiff_t t = 0; t < g->T; t++)
            for (ptrdiff_t n = 0; n < g->H; n++) {
                real o = sigmoid(*xl_at(a, b, n, t)), *out = xl_at(h, b, n, t);
                const real *m = xl_at(hm, b, n, t), *s = xl_at(hs, b, n, t);
                for (ptrdiff_t j = 0; j < g->D; j++) out[j] = o * m[j] + (1 - o) * s[j];
            }
    return XL_OK;
}

/* dhm = o dh;  dhs = (1 - o) dh;  da = o (1 - o) dh.(hm - hs) */
xl_status xl_mix_backward(xl_ctx *ctx, const xl_gate *g, xl_heads dhm, xl_heads dhs, xl_heads da,
                          xl_heads dh, xl_heads hm, xl_heads hs, xl_heads a) {
#pragma omp parallel for num_threads(ctx->threads) collapse(2)
    for (ptrdiff_t b = 0; b < g->B; b++)
        for (ptrdiff_t t = 0; t < g->T; t++)
            for (ptrdiff_t n = 0; n < g->H; n++) {
                real o = sigmoid(*xl_at(a, b, n, t)), dot = 0;
                const real *m = xl_at(hm, b, n, t), *s = xl_at(hs, b, n, t),
                           *d = xl_at(dh, b, n, t);
                for (ptrdiff_t j = 0; j < g->D; j++) dot += d[j] * (m[j] - s[j]);
                if (dhm.p) ctx->k->axpy(g->D, o, d, xl_at(dhm, b, n, t));
                if (dhs.p) ctx->k->axpy(g->D, 1 - o, d, xl_at(dhs, b, n, t));
                if (da.p) *xl_at(da, b, n, t) += o * (1 - o) * dot;
            }
    return XL_OK;
}
