/* The plan: the one memory concept.
 *
 * A plan function names the tensors of a flat buffer by calling xl_take for each, in order. It is
 * run three ways with the same code, so that sizes, lists and pointers cannot disagree:
 *     measure   base NULL, entries NULL     -> plan.used is the number of bytes needed
 *     list      entries given               -> also name, shape, role, group, offset of each
 *     place     base given                  -> xl_take returns pointers into the buffer
 * It serves parameters, tapes, states and scratch. */
#ifndef XL_PLAN_H
#define XL_PLAN_H

#include "base/real.h"
#include "base/status.h"

#define XL_PLAN_ALIGN 64 /* bytes; one cache line, one AVX-512 vector */

/* Matrices [rows, cols] of weights for inference lie in panels, as products read them: [panel of XL_PANEL
 * rows][cols / 2][XL_PANEL][2] for bf16 (XL_DT_PANELS) and [panel][cols / 4][XL_PANEL][4] for signed bytes
 * (XL_DT_I8): what one row has in a word, and the panel's rows behind one another. Rows are padded with
 * zeros to multiples of XL_PANEL, and cols to those of XL_PANEL, of signed bytes of XL_ROTATION. Signed
 * bytes are rows that were rotated and rounded (round_int8 of kernels.h); behind them, xl_scales_at
 * bytes from their start, is a real for each padded row that its entries are to be multiplied by. */
typedef enum { XL_DT_REAL = 0, XL_DT_BF16, XL_DT_I32, XL_DT_U8, XL_DT_I8, XL_DT_PANELS } xl_dtype;

#define XL_PANEL 32
#define XL_ROTATION 64 /* entries that are rotated together; the depth of a tile of bytes */

typedef enum {
    XL_ROLE_EMBEDDING,
    XL_ROLE_NORM,
    XL_ROLE_MAP,
    XL_ROLE_GATE,
    XL_ROLE_PROJECTION,
    XL_ROLE_MLP,
    XL_ROLE_HEAD,
    XL_ROLE_BIAS,
    XL_ROLE_WORK, /* tapes, states, scratch */
} xl_role;

typedef struct {
    char name[80];
    xl_role role;
    int group; /* layer, or -1 outside the layers */
    xl_dtype dtype;
    int ndim;
    ptrdiff_t shape[5];
    ptrdiff_t offset, bytes;
} xl_entry;

typedef struct {
    char *base;        /* NULL: measure or list */
    ptrdiff_t size;    /* bytes at base */
    ptrdiff_t used;    /* bytes taken so far */
    xl_entry *entries; /* NULL: do not list */
    ptrdiff_t count, capacity;
    const char *prefix; /* put before each name, NULL for none */
    int group;
    int failed; /* overflow of a size, of the buffer, or of the list */
} xl_plan;

/* Takes a tensor; returns its place (NULL while measuring). Sizes are checked products; a failure
 * is remembered in plan->failed and NULL is returned from then on. */
void *xl_take(xl_plan *plan, const char *name, xl_role role, xl_dtype dtype, int ndim,
              const ptrdiff_t *shape);

/* Shorthand for work memory: `count` reals without a name. */
real *xl_take_reals(xl_plan *plan, ptrdiff_t count);

ptrdiff_t xl_dtype_size(xl_dtype dtype);

static inline ptrdiff_t xl_int8_depth(ptrdiff_t cols) { return xl_round_up(cols, XL_ROTATION); }
static inline ptrdiff_t xl_scales_at(ptrdiff_t rows, ptrdiff_t cols) {
    return xl_round_up(rows, XL_PANEL) * xl_int8_depth(cols);
}

/* A row of bytes by itself has behind its `depth` entries what they are to be multiplied by, and their
 * sum; in all xl_int8_row bytes, an odd number of cache lines where depth is a power of two. */
typedef struct {
    real scale;
    int32_t sum;
} xl_int8_tail;
static inline ptrdiff_t xl_int8_row(ptrdiff_t depth) { return depth + XL_ROTATION; }

#define XL_SHAPE(...)                                                                              \
    (const ptrdiff_t[]) { __VA_ARGS__ }

#endif
