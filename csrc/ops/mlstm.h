/* Shared by the mLSTM's files.
 *
 * mLSTM (arXiv:2603.15590, equations (8)-(10)), stabilised, eps-free; docs/math/mlstm.md derives every line.
 *
 * A row is cut into segments at document starts; a segment is walked in chunks from its own start, so
 * that a document's numbers do not depend on where it lies. Inside a chunk, with b = cumsum(log f),
 * c_s = i_s - b_s and M_t = max(m, max_{s<=t} c_s), all exponents take one form:
 *     decay D_ts = exp(c_s - M_t)     carry w_t = exp(m - M_t)     stabiliser mu_t = b_t + M_t
 *     num_t = sum_s D_ts (q_t.k_s) v_s + w_t q_t C     den_t likewise with v = 1 and n
 * and the state behind the chunk is C' = w_S C + sum_s D_Ss k_s v_s^T, m' = mu_S. The sum is made with
 * the chunk's own largest exponent: what a chunk adds depends on the chunk alone, so that chunks can be
 * worked on side by side. The parallel form is one chunk as long as the segment; the recurrent form is
 * written by itself. Exponents are kept in double: b reaches some hundreds, and what is exponentiated
 * are differences of such sums. */
#ifndef XL_MLSTM_H
#define XL_MLSTM_H

#include "ops/cells.h"
#include "ops/product.h"

#define XL_GATES 256 /* steps whose gates are computed at a time */

/* Work of one thread; S is the length of a chunk. */
typedef struct {
    double *lf;          /* [T]: log f */
    double *b, *c, *top; /* [S]: b, c and M of the chunk in hand */
    real *last;          /* [S]: weights of its steps in U and u */
    real keep, add;      /* C' = keep C + add U */
    real *C, *n;         /* a state */
    real *U, *u;         /* what a chunk adds to a state; backward: to its gradient */
    real *q, *k;         /* rows of the chunk times a number each [S, D] */
    real *decay, *P;     /* [S, S]: D and (q k^T) o D, zeros above the diagonal */
    real *w, *den;       /* [S] */
    real *num, *carried; /* [S, E]: P v, q C */
    real *saved;         /* backward: C, n before each chunk of the segment */
    double *saved_m, *x; /* [chunks]; [T]: x_t of the gate gradients */
    real *G, *e;         /* dh / divisor [S, E]; gradient of den [S] */
    real *dC, *dn, *dP;  /* of the state behind the chunk; [S, S] */
    real *dq, *dk, *dv;  /* [S, D] [S, D] [S, E] */
    real *through;       /* [S, D or E]: what comes through the state behind */
    /* packed operands: q, which serves two products, and what serves one; right: v or G, which serve two,
     * and what serves one */
    real *left_q, *left, *right_v, *right;
    real *phi_q, *phi_k, *map_q, *map_k; /* features of the chunk [S, D]; packed maps of `head` */
    ptrdiff_t head;
} xl_mlstm_work;

/* Rows of a chunk, st reals apart. */
typedef struct {
    const real *p;
    ptrdiff_t st;
} xl_rows;

/* A chunk of a row and head: S steps from t0 on. */
typedef struct {
    ptrdiff_t b, h, t0, S;
    double m;          /* of the state before it with the first step's log f added; -inf: none */
    const real *C, *n; /* that state */
    xl_rows q, k, v;   /* q is scaled */
} xl_chunk;

/* Everything a call works on. */
typedef struct {
    xl_heads h, dh, log_den, dlog_den, q, k, v, i, f, dq, dk, dv, di, df;
    xl_mlstm_state first, last, dfirst, dlast;
    const xl_mlstm_maps *maps; /* NULL: q and k are features */
} xl_mlstm_arrays;

/* ---- mlstm_chunk.c: a row, its segments, its chunks ----------------------------------------- */

ptrdiff_t xl_mlstm_backward_chunk_length(const xl_mlstm *a);
ptrdiff_t xl_mlstm_chunk_length(const xl_mlstm *a);
double *xl_mlstm_take_doubles(xl_plan *p, ptrdiff_t count);
/* Work of the calling thread in the scratch of all; bytes of all, -1 on overflow. */
xl_mlstm_work xl_mlstm_place_thread(const xl_ctx *ctx, const xl_mlstm *a, char *base);
ptrdiff_t xl_mlstm_threads_bytes(const xl_ctx *ctx, const xl_mlstm *a);

ptrdiff_t xl_mlstm_row_length(const xl_mlstm *a, ptrdiff_t b);
void xl_mlstm_log_forget(const xl_ctx *ctx, const xl_mlstm_arrays *r, ptrdiff_t T, ptrdiff_t b,
                         ptrdiff_t h, xl_mlstm_work *w);
/* The state is forgotten before step t: a document starts there, or f = -inf. */
int xl_mlstm_starts(const xl_mlstm *a, const xl_mlstm_work *w, ptrdiff_t b, ptrdiff_t t);
ptrdiff_t xl_mlstm_segment_end(const xl_mlstm *a, const xl_mlstm_work *w, ptrdiff_t b, ptrdiff_t t,
                               ptrdiff_t T);
/* Loads the start state; returns its m, -inf for none. */
double xl_mlstm_start_state(const xl_mlstm *a, xl_mlstm_work *w, xl_mlstm_state s, ptrdiff_t at,
                            int forget);
/* The chunk at step t0 behind the state (C, n, m), its exponents, and how the state goes on. m gets
 * the first step's log f added: that decay acts on the carry alone, so b starts at 0 and never meets
 * the mask of a document start. */
xl_chunk xl_mlstm_open_chunk(const xl_ctx *ctx, const xl_mlstm *a, xl_mlstm_work *w,
                             const xl_mlstm_arrays *r, ptrdiff_t b, ptrdiff_t h, ptrdiff_t t0,
                             ptrdiff_t S, const real *C, const real *n, double m);
/* Where there are maps: features of k, and of q if `both`, in place of the rows of an open chunk. */
void xl_mlstm_map_chunk(const xl_ctx *ctx, const xl_mlstm *a, xl_mlstm_work *w,
                        const xl_mlstm_arrays *r, xl_chunk *c, int both);
void xl_mlstm_pack_v(const xl_ctx *ctx, const xl_mlstm *a, xl_mlstm_work *w, const xl_chunk *c);
/* U, u: what the chunk adds to the state. It depends on the chunk alone. right_v: v packed. */
void xl_mlstm_chunk_adds(const xl_ctx *ctx, const xl_mlstm *a, xl_mlstm_work *w, const xl_chunk *c,
                         real *U, real *u);
/* The state behind the chunk that is open into C, n, which may be those before it; returns its m. */
double xl_mlstm_advance(const xl_ctx *ctx, const xl_mlstm *a, const xl_mlstm_work *w,
                        const xl_chunk *c, const real *U, const real *u, real *C, real *n);
/* 1 / divisor of a step, 0 where the divisor is 0; *slope is d divisor / d den. mu is the exponent of
 * the stabiliser: the floor 1 of the unscaled den is exp(-mu) here. */
real xl_mlstm_inverse_divisor(const xl_mlstm *a, real den, double mu, real *slope);
/* log of a step's den in true units, where it is wanted; mu: log of the units. */
void xl_mlstm_log_den(const xl_mlstm_arrays *r, ptrdiff_t b, ptrdiff_t h, ptrdiff_t t, real den,
                      double mu);
/* h of an open chunk; leaves v packed in right_v. */
void xl_mlstm_forward_chunk(const xl_ctx *ctx, const xl_mlstm *a, xl_mlstm_work *w,
                            const xl_mlstm_arrays *r, const xl_chunk *c);
void xl_mlstm_pad(const xl_mlstm *a, const xl_mlstm_arrays *r, ptrdiff_t b, ptrdiff_t h,
                  ptrdiff_t t);
/* Gradients, first all that does not ask for those on the state behind: adds dq, writes dk [S, D], dv
 * [S, E] and, where there is a state before, dU, du, what the chunk adds to dC, dn; x_t = q_t.dq_t. */
void xl_mlstm_backward_inside(const xl_ctx *ctx, const xl_mlstm *a, xl_mlstm_work *w,
                              const xl_mlstm_arrays *r, const xl_chunk *c, real *dk, real *dv,
                              real *dU, real *du);
/* Then what comes through the state behind the chunk: completes dk, dv and adds them, di_s = k_s.dk_s
 * too, and leaves x_t = q_t.dq_t - k_t.dk_t. */
void xl_mlstm_backward_through(const xl_ctx *ctx, const xl_mlstm *a, xl_mlstm_work *w,
                               const xl_mlstm_arrays *r, const xl_chunk *c, const real *dC,
                               const real *dn, real *dk, real *dv);
/* dC, dn before the open chunk from those behind it. */
void xl_mlstm_retreat(const xl_ctx *ctx, const xl_mlstm *a, const xl_mlstm_work *w, const real *dU,
                      const real *du, real *dC, real *dn);
/* dC, dn on the last state of a row and head. */
void xl_mlstm_load_gradient(const xl_mlstm *a, xl_mlstm_work *w, const xl_mlstm_arrays *r,
                            ptrdiff_t at);
/* df_t = sigmoid(-f_t) * sum of x from t to the end of the segment; nothing at its first step when
 * no state came in. */
void xl_mlstm_forget_gradient(const xl_ctx *ctx, const xl_mlstm_arrays *r, const xl_mlstm_work *w,
                              ptrdiff_t b, ptrdiff_t h, ptrdiff_t start, ptrdiff_t end,
                              int carried);

/* ---- mlstm_lanes.c --------------------------------------------------------------------------- */

/* Bytes that working on all chunks side by side takes; 0 where rows go one by one. */
ptrdiff_t xl_mlstm_lanes_bytes(const xl_ctx *ctx, const xl_mlstm *a);
/* All rows so; false, and nothing is done, if there is no room for their chunks. */
int xl_mlstm_run_lanes(const xl_ctx *ctx, const xl_mlstm *a, const xl_mlstm_arrays *r,
                       void *scratch, char *base, int backward);

#endif
