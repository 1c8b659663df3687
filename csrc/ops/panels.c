/* Weights for inference, packed once as products read them. */
#include "kernels/kernels.h"
#include "ops/basic.h"

#include <omp.h>
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
                      real *scale, const real *w, int8_t *scratch) {
    ptrdiff_t depth = xl_int8_depth(cols);
#pragma omp parallel for num_threads(ctx->threads) schedule(dynamic)
    for (ptrdiff_t j0 = 0; j0 < rows; j0 += XL_PANEL) {
        int8_t *to = panels + j0 * depth,
               *row = scratch + omp_get_thread_num() * xl_int8_row(depth);
        memset(to, 0, (size_t)(XL_PANEL * depth));
        memset(scale + j0, 0, XL_PANEL * sizeof *scale);
        for (ptrdiff_t j = 0; j < xl_min(XL_PANEL, rows - j0); j++) {
            xl_int8_tail tail;
            ctx->k->round_int8(cols, w + (j0 + j) * cols, row);
            memcpy(&tail, row + depth, sizeof tail);
            scale[j0 + j] = tail.scale;
            for (ptrdiff_t k = 0; k < depth; k += 4) memcpy(to + k * XL_PANEL + j * 4, row + k, 4);
        }
    }
}

ptrdiff_t xl_pack_scratch(const xl_ctx *ctx, ptrdiff_t cols) {
    return ctx->threads * xl_int8_row(xl_int8_depth(cols));
}

xl_status xl_pack_weights(xl_ctx *ctx, xl_dtype dtype, ptrdiff_t rows, ptrdiff_t cols, void *to,
                          const real *w, void *scratch) {
    XL_TRY(xl_poll(ctx));
    if (dtype == XL_DT_I8 && cols > XL_INT8_COLS)
        return xl_fail(ctx, XL_VALUE, "a matrix in int8 has %td columns, at most %d can be summed",
                       cols, XL_INT8_COLS);
    if (dtype == XL_DT_I8)
        pack_int8(ctx, rows, cols, to, (real *)((char *)to + xl_scales_at(rows, cols)), w, scratch);
    else
        pack_bf16(ctx, rows, cols, to, w);
    return XL_OK;
}

static void int8_row(const xl_kernels *k, xl_mat w, ptrdiff_t row, ptrdiff_t cols, real *out) {
    const int8_t *p = (const int8_t *)w.data + row / XL_PANEL * XL_PANEL * xl_int8_depth(cols) +
                      row % XL_PANEL * 4;
    for (ptrdiff_t k0 = 0; k0 < cols; k0 += XL_ROTATION, p += XL_ROTATION * XL_PANEL) {
        real block[XL_ROTATION];
        for (ptrdiff_t i = 0; i < XL_ROTATION; i++)
            block[i] = w.scale[row] * (real)p[i / 4 * 4 * XL_PANEL + i % 4];
        k->rotate(XL_ROTATION, block);
        memcpy(out + k0, block, (size_t)xl_min(XL_ROTATION, cols - k0) * sizeof(real));
    }
}

void xl_mat_row(const xl_ctx *ctx, xl_mat w, ptrdiff_t row, ptrdiff_t cols, real *out) {
    if (w.dtype == XL_DT_PANELS) {
        const xl_bf16 *p = (const xl_bf16 *)w.data +
                           row / XL_PANEL * XL_PANEL * xl_round_up(cols, XL_PANEL) +
                           row % XL_PANEL * 2;
        for (ptrdiff_t k = 0; k < cols; k++)
            out[k] = (real)xl_bf16_widen(p[k / 2 * 2 * XL_PANEL + k % 2]);
    } else if (w.dtype == XL_DT_I8) {
        int8_row(ctx->k, w, row, cols, out);
    } else {
        memcpy(out, (const real *)w.data + row * cols, (size_t)cols * sizeof(real));
    }
}

xl_status xl_unpack_weights(xl_ctx *ctx, ptrdiff_t rows, ptrdiff_t cols, real *w, xl_mat from) {
    XL_TRY(xl_poll(ctx));
#pragma omp parallel for num_threads(ctx->threads)
    for (ptrdiff_t j = 0; j < rows; j++) xl_mat_row(ctx, from, j, cols, w + j * cols);
    return XL_OK;
}
