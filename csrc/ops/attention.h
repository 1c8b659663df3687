/* Shared by the attention files: which keys a block of queries sees, and products with them. */
#ifndef XL_ATTENTION_H
#define XL_ATTENTION_H

#include "ops/cells.h"
#include "ops/product.h"

/* Columns (keys) of a chunk: its packed keys and a block's scores stay in L2. */
#define XL_COLUMNS XL_GEMM_KC
/* Row stride of scores: no power of two, so that rows do not compete for the same cache lines.
 * Products run over whole tiles and exponentials over whole vectors: what lies behind a chunk's
 * columns is 0 or unused, and has room here. */
#define XL_SCORE_STRIDE (XL_COLUMNS + XL_GEMM_MR_MAX)
#define XL_VECTOR 16 /* reals; a multiple of the vectors of every kernel */

/* A block of queries q0 <= t < q1 of one document that starts at step `start` (negative: in the
 * cache). Its columns are the keys that at least one of them sees, in the order of their positions
 * in the document: 0 .. sinks - 1, then first, first + 1 ... up to the last query's own. */
typedef struct {
    ptrdiff_t start, q0, q1, sinks, first, columns;
} xl_block;

/* Queries of a block: 28 and 84 are whole tiles of every kernel but for one of 28 rows on AVX2. A
 * narrow window wants few queries (a block computes window + queries columns for each of them), a
 * wide one many (keys are packed once for a block). */
static inline ptrdiff_t xl_query_block(const xl_attn *a) { return a->window < 256 ? 28 : 84; }

static inline ptrdiff_t xl_attn_length(const xl_attn *a, ptrdiff_t b) {
    return a->lengths ? a->lengths[b] : a->T;
}

/* The first step >= t at which a block of row b starts: blocks restart at document starts. */
static inline ptrdiff_t xl_first_block(const xl_attn *a, ptrdiff_t b, ptrdiff_t t) {
    const int32_t *pos = a->pos + b * a->T;
    ptrdiff_t length = xl_attn_length(a, b);
    if (t >= length) return length;
    ptrdiff_t from = xl_max(t - pos[t], 0), next = from + xl_round_up(t - from, xl_query_block(a));
    while (t < next && t < length && pos[t] != 0) t++;
    return t;
}

/* The block that starts at step t of row b. */
static inline xl_block xl_block_at(const xl_attn *a, ptrdiff_t b, ptrdiff_t t) {
    const int32_t *pos = a->pos + b * a->T;
    xl_block k = {.start = t - pos[t], .q0 = t, .q1 = t + 1};
    ptrdiff_t last = xl_min(xl_attn_length(a, b), t + xl_query_block(a));
    while (k.q1 < last && pos[k.q1] != 0) k.q1++;
    k.first = xl_max(0, pos[t] - a->window + 1);
    k.sinks = xl_min(a->sinks, k.first);
    k.columns = k.sinks + (k.q1 - k.start - k.first);
    return k;
}

/* Where a cache keeps a position of the document. */
static inline ptrdiff_t xl_slot(const xl_kv *past, ptrdiff_t sinks, ptrdiff_t position) {
    return position < sinks ? position : sinks + (position - sinks) % (past->slots - sinks);
}

/* ---- attention.c, for attention_backward.c and attention_cache.c --------------------------- */

/* The position in the document of a column of a block, and the other way. */
static inline ptrdiff_t xl_column_position(const xl_block *k, ptrdiff_t column) {
    return column < k->sinks ? column : k->first + column - k->sinks;
}
static inline ptrdiff_t xl_position_column(const xl_block *k, ptrdiff_t position) {
    return position < k->sinks ? position : k->sinks + position - k->first;
}

/* Scratch of one thread. scores and grads: [query block, XL_SCORE_STRIDE]; top, sum, delta and peak:
 * [rep, query block]. */
typedef struct {
    real *scores, *grads, *top, *sum, *delta;
    int32_t *peak;         /* columns */
    real *queries;         /* [query block, D] */
    real *rows;            /* [XL_COLUMNS, D]: keys or values that do not lie together */
    real *keys_t, *values; /* packed: B(D, n) of scores, B(n, D) of outputs */
    real *values_t, *keys; /* likewise for the backward */
    real *dk, *dv;         /* [XL_SCORE_STRIDE, D] */
    real *apack;
} xl_attn_work;
xl_attn_work xl_attention_work(const xl_ctx *ctx, const xl_attn *a, void *scratch);
ptrdiff_t xl_attention_work_bytes(const xl_ctx *ctx, const xl_attn *a);

xl_status xl_attention_check(xl_ctx *ctx, const xl_attn *a, const xl_kv *past);

/* Keys (or values) of columns c0 .. c0 + n of a block, from x and from `cached`, the cache's: in
 * place where they lie at one distance, else collected in `rows`. */
const real *xl_column_rows(const xl_attn *a, const xl_block *k, ptrdiff_t c0, ptrdiff_t n,
                           xl_heads x, const xl_kv *past, const real *cached, ptrdiff_t b,
                           ptrdiff_t g, real *rows, ptrdiff_t *stride);
/* Queries t0 .. t0 + rows over sqrt(D), [rows, D]: products by one number more cost a pass. */
void xl_scaled_queries(const xl_ctx *ctx, const xl_attn *a, xl_heads q, ptrdiff_t b, ptrdiff_t h,
                       ptrdiff_t t0, ptrdiff_t rows, real *out);
/* C[m, n] = beta C + A B for a packed B; A is packed into `pack`. */
void xl_product(const xl_ctx *ctx, int mixed, ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, const real *a,
                ptrdiff_t rsa, ptrdiff_t csa, const real *packed, real beta, real *c, ptrdiff_t ldc,
                real *pack);
/* Masks with -INFINITY what query t does not see among the scores of columns c0 .. c0 + n, as far as
 * the result: whole vectors that hold all it does see. */
ptrdiff_t xl_mask_row(const xl_attn *a, const xl_block *k, ptrdiff_t t, ptrdiff_t c0, ptrdiff_t n,
                      real *row);

/* ---- scratch of the other two behind that of the threads ------------------------------------ */

/* attention_backward.c: key and value gradients that the segments of a row collect */
ptrdiff_t xl_attention_gradient_bytes(const xl_attn *a);
/* attention_cache.c: partial results of a decoding step */
ptrdiff_t xl_attention_step_bytes(const xl_attn *a, ptrdiff_t slots);

#endif
