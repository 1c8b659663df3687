/* Weights for inference, packed once as products read them. */
#include "ops/basic.h"

#include <string.h>

static void pack_bf16(const xl_ctx *ctx, ptrdiff_t rows, ptrdiff_t cols, xl_bf16 *panels,
                      const real *w) {
    ptrdiff_t depth = xl_round_up(cols, XL_PANEL);
#pragma omp parallel for num_threads(ctx->threads) schedule(dynamic)
    for (ptrdiff_t j0 = 0; j0 < rows; j0 += XL_PANEL) {
        xl_bf16 *to = panels + j0 * depth;
        memset(to, 0, (size_t)(XL_PANEL * depth) * sizeof *to);
        for (ptrdiff_t j = 0; j < xl_min(XL_PANEL, rows - j0); j++)
            for (ptrdiff_t k = 0; k < cols; k++)
                to[k / 2 * 2 * XL_PANEL + j * 2 + k % 2] =
                    xl_bf16_round((float)w[(j0 + j) * cols + k]);
    }
}

static void pack_int8(const xl_ctx *ctx, ptrdiff_t rows, ptrdiff_t cols, int8_t *panels,
                      real *scale, const real *w) {
    ptrdiff_t depth = xl_round_up(cols, XL_PANEL);
#pragma omp parallel for num_threads(ctx->threads) schedule(dynamic)
    for (ptrdiff_t j0 = 0; j0 < rows; j0 += XL_PANEL) {
        int8_t *to = panels + j0 * depth;
        memset(to, 0, (size_t)(XL_PANEL * depth));
        for (ptrdiff_t j = 0; j < XL_PANEL; j++) {
            const real *row = w + (j0 + j) * cols;
            real most = 0;
            scale[j0 + j] = 0;
            if (j0 + j >= rows) continue;
            for (ptrdiff_t k = 0; k < cols; k++) {
                real x = row[k] < 0 ? -row[k] : row[k];
                most = x <= most || most != most ? most : x; /* a NaN stays */
            }
            scale[j0 + j] = most / 127;
            /* zeros, or a row that the scale makes NaN */
            if (!(scale[j0 + j] > 0 && scale[j0 + j] <= XL_REAL_MAX)) continue;
            for (ptrdiff_t k = 0; k < cols; k++)
                to[k / 4 * 4 * XL_PANEL + j * 4 + k % 4] = (int8_t)rint(row[k] / scale[j0 + j]);
        }
    }
}

xl_status xl_pack_weights(xl_ctx *ctx, xl_dtype dtype, ptrdiff_t rows, ptrdiff_t cols, void *to,
                          const real *w) {
    XL_TRY(xl_poll(ctx));
    if (dtype == XL_DT_I8)
        pack_int8(ctx, rows, cols, to, (real *)((char *)to + xl_scales_at(rows, cols)), w);
    else
        pack_bf16(ctx, rows, cols, to, w);
    return XL_OK;
}

void xl_mat_row(xl_mat w, ptrdiff_t row, ptrdiff_t cols, real *out) {
    ptrdiff_t at = row / XL_PANEL * XL_PANEL * xl_round_up(cols, XL_PANEL), lane = row % XL_PANEL;
    if (w.dtype == XL_DT_PANELS) {
        const xl_bf16 *p = (const xl_bf16 *)w.data + at + lane * 2;
        for (ptrdiff_t k = 0; k < cols; k++)
            out[k] = (real)xl_bf16_widen(p[k / 2 * 2 * XL_PANEL + k % 2]);
    } else if (w.dtype == XL_DT_I8) {
        const int8_t *p = (const int8_t *)w.data + at + lane * 4;
        for (ptrdiff_t k = 0; k < cols; k++)
            out[k] = w.scale[row] * (real)p[k / 4 * 4 * XL_PANEL + k % 4];
    } else {
        memcpy(out, (const real *)w.data + row * cols, (size_t)cols * sizeof(real));
    }
}

xl_status xl_unpack_weights(xl_ctx *ctx, ptrdiff_t rows, ptrdiff_t cols, real *w, xl_mat from) {
    XL_TRY(xl_poll(ctx));
#pragma omp parallel for num_threads(ctx->threads)
    for (ptrdiff_t j = 0; j < rows; j++) xl_mat_row(from, j, cols, w + j * cols);
    return XL_OK;
}
