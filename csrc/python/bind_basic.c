/* The ops on rows for xlstm_distill/ops/basic.py. Letters: N rows, K inputs, M outputs, D model
 * width, F MLP width, V vocabulary. Outputs come first, as in C. */
#include "python/binding.h"

#include "base/plan.h"
#include "ops/basic.h"
#include "ops/peak.h"

/* ---- products and rows -------------------------------------------------------------------- */

/* matmul(c [M, N], a, b, transpose_a, transpose_b, alpha, beta, mixed):
 * c = beta c + alpha op(a) op(b); mixed: xl_mat */
static PyObject *matmul(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    xl_call c;
    if (!xl_begin(&c, module, nargs, 8)) return NULL;
    int ta = (int)xl_int(&c, args[3], "transpose_a", 0, 1);
    int tb = (int)xl_int(&c, args[4], "transpose_b", 0, 1);
    real *out = xl_inout(&c, args[0], "c", "MN");
    const real *a = xl_in(&c, args[1], "a", ta ? "KM" : "MK");
    const real *b = xl_in(&c, args[2], "b", tb ? "NK" : "KN");
    real alpha = (real)xl_double(&c, args[5], "alpha"), beta = (real)xl_double(&c, args[6], "beta");
    xl_mat right = {b, XL_DT_REAL, (int)xl_int(&c, args[7], "mixed", 0, 1), NULL};
    ptrdiff_t M = xl_dim(&c, 'M'), N = xl_dim(&c, 'N'), K = xl_dim(&c, 'K');
    void *scratch = xl_scratch(&c, xl_matmul_scratch(&c.ctx, M, N, K));
    if (c.failed) return xl_end(&c, XL_OK);
    XL_RUN(&c, xl_matmul(&c.ctx, M, N, K, alpha, a, ta ? 1 : K, ta ? M : 1, right, tb ? 1 : N,
                         tb ? K : 1, beta, out, N, scratch));
    return xl_end(&c, c.status);
}

static xl_dtype packed_dtype(xl_call *c, PyObject *int8) {
    return xl_int(c, int8, "int8", 0, 1) ? XL_DT_I8 : XL_DT_PANELS;
}

static ptrdiff_t packed_bytes(xl_dtype dtype, ptrdiff_t rows, ptrdiff_t cols) {
    xl_entry e;
    xl_plan p = {.entries = &e, .capacity = 1};
    xl_take(&p, "", XL_ROLE_PROJECTION, dtype, 2, XL_SHAPE(rows, cols));
    return p.failed ? PTRDIFF_MAX : e.bytes;
}

/* The bytes of a matrix [N, K] of weights in panels. */
static void *packed(xl_call *c, PyObject *obj, int writeable, xl_dtype dtype) {
    ptrdiff_t size;
    void *data = xl_bytes(c, obj, "packed", writeable, &size);
    if (!data || c->failed) return NULL;
    ptrdiff_t want = packed_bytes(dtype, xl_dim(c, 'N'), xl_dim(c, 'K'));
    if (size == want) return data;
    PyErr_Format(PyExc_ValueError, "packed has %zd bytes, expected %zd", (Py_ssize_t)size,
                 (Py_ssize_t)want);
    c->failed = 1;
    return NULL;
}

/* packed_size(N, K, int8) -> bytes of weights [N, K] in panels (base/plan.h) */
static PyObject *packed_size(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    xl_call c;
    if (!xl_begin(&c, module, nargs, 3)) return NULL;
    ptrdiff_t N = xl_int(&c, args[0], "N", 0, INT32_MAX),
              K = xl_int(&c, args[1], "K", 0, INT32_MAX);
    xl_dtype dtype = packed_dtype(&c, args[2]);
    if (c.failed) return xl_end(&c, XL_OK);
    return PyLong_FromSsize_t(packed_bytes(dtype, N, K));
}

/* pack_weights(packed bytes, w [N, K], int8) */
static PyObject *pack_weights(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    xl_call c;
    if (!xl_begin(&c, module, nargs, 3)) return NULL;
    const real *w = xl_in(&c, args[1], "w", "NK");
    xl_dtype dtype = packed_dtype(&c, args[2]);
    void *to = packed(&c, args[0], 1, dtype);
    void *scratch = xl_scratch(&c, xl_pack_scratch(&c.ctx, xl_dim(&c, 'K')));
    if (c.failed) return xl_end(&c, XL_OK);
    XL_RUN(&c, xl_pack_weights(&c.ctx, dtype, xl_dim(&c, 'N'), xl_dim(&c, 'K'), to, w, scratch));
    return xl_end(&c, c.status);
}

/* unpack_weights(w [N, K], packed bytes, int8) */
static PyObject *unpack_weights(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    xl_call c;
    if (!xl_begin(&c, module, nargs, 3)) return NULL;
    real *w = xl_inout(&c, args[0], "w", "NK");
    xl_dtype dtype = packed_dtype(&c, args[2]);
    void *from = packed(&c, args[1], 0, dtype);
    if (c.failed) return xl_end(&c, XL_OK);
    ptrdiff_t N = xl_dim(&c, 'N'), K = xl_dim(&c, 'K');
    XL_RUN(&c, xl_unpack_weights(&c.ctx, N, K, w, xl_stored_mat(from, dtype, 0, N, K)));
    return xl_end(&c, c.status);
}

/* packed_matmul(y [M, N], x [M, K], packed bytes, int8, mixed): y = x W^T */
static PyObject *packed_matmul(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    xl_call c;
    if (!xl_begin(&c, module, nargs, 5)) return NULL;
    real *y = xl_inout(&c, args[0], "y", "MN");
    const real *x = xl_in(&c, args[1], "x", "MK");
    xl_dtype dtype = packed_dtype(&c, args[3]);
    void *from = packed(&c, args[2], 0, dtype);
    int mixed = (int)xl_int(&c, args[4], "mixed", 0, 1);
    ptrdiff_t M = xl_dim(&c, 'M'), N = xl_dim(&c, 'N'), K = xl_dim(&c, 'K');
    void *scratch = xl_scratch(&c, xl_matmul_scratch(&c.ctx, M, N, K));
    if (c.failed) return xl_end(&c, XL_OK);
    XL_RUN(&c, xl_linear_forward(&c.ctx, M, K, N, y, x, xl_stored_mat(from, dtype, mixed, N, K),
                                 NULL, scratch));
    return xl_end(&c, c.status);
}

/* linear_forward(y [N, M], x [N, K], w [M, K], bias? [M]) */
static PyObject *linear_forward(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    xl_call c;
    if (!xl_begin(&c, module, nargs, 4)) return NULL;
    real *y = xl_inout(&c, args[0], "y", "NM");
    const real *x = xl_in(&c, args[1], "x", "NK"), *w = xl_in(&c, args[2], "w", "MK");
    const real *bias = xl_in(&c, args[3], "b?", "M");
    ptrdiff_t N = xl_dim(&c, 'N'), K = xl_dim(&c, 'K'), M = xl_dim(&c, 'M');
    void *scratch = xl_scratch(&c, xl_linear_scratch(&c.ctx, N, K, M));
    if (c.failed) return xl_end(&c, XL_OK);
    XL_RUN(&c, xl_linear_forward(&c.ctx, N, K, M, y, x, xl_real_mat(w), bias, scratch));
    return xl_end(&c, c.status);
}

/* linear_backward(dx? [N, K], dw? [M, K], dbias? [M], dy [N, M], x [N, K], w [M, K]) */
static PyObject *linear_backward(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    xl_call c;
    if (!xl_begin(&c, module, nargs, 6)) return NULL;
    real *dx = xl_inout(&c, args[0], "dx?", "NK"), *dw = xl_inout(&c, args[1], "dw?", "MK");
    real *dbias = xl_inout(&c, args[2], "db?", "M");
    const real *dy = xl_in(&c, args[3], "dy", "NM"), *x = xl_in(&c, args[4], "x", "NK");
    const real *w = xl_in(&c, args[5], "w", "MK");
    ptrdiff_t N = xl_dim(&c, 'N'), K = xl_dim(&c, 'K'), M = xl_dim(&c, 'M');
    void *scratch = xl_scratch(&c, xl_linear_scratch(&c.ctx, N, K, M));
    if (c.failed) return xl_end(&c, XL_OK);
    XL_RUN(&c, xl_linear_backward(&c.ctx, N, K, M, dx, dw, dbias, dy, x, xl_real_mat(w), scratch));
    return xl_end(&c, c.status);
}

/* embedding_forward(y [N, D], ids [N], w [V, D]) */
static PyObject *embedding_forward(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    xl_call c;
    if (!xl_begin(&c, module, nargs, 3)) return NULL;
    real *y = xl_inout(&c, args[0], "y", "ND");
    const int32_t *ids = xl_in_i32(&c, args[1], "ids", "N");
    const real *w = xl_in(&c, args[2], "w", "VD");
    if (c.failed) return xl_end(&c, XL_OK);
    XL_RUN(&c, xl_embedding_forward(&c.ctx, xl_dim(&c, 'N'), xl_dim(&c, 'V'), xl_dim(&c, 'D'), y,
                                    ids, xl_real_mat(w)));
    return xl_end(&c, c.status);
}

/* embedding_backward(dw [V, D], dy [N, D], ids [N]) */
static PyObject *embedding_backward(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    xl_call c;
    if (!xl_begin(&c, module, nargs, 3)) return NULL;
    real *dw = xl_inout(&c, args[0], "dw", "VD");
    const real *dy = xl_in(&c, args[1], "dy", "ND");
    const int32_t *ids = xl_in_i32(&c, args[2], "ids", "N");
    if (c.failed) return xl_end(&c, XL_OK);
    XL_RUN(&c, xl_embedding_backward(&c.ctx, xl_dim(&c, 'N'), xl_dim(&c, 'V'), xl_dim(&c, 'D'), dw,
                                     dy, ids));
    return xl_end(&c, c.status);
}

/* rmsnorm_forward(y [N, D], rstd [N], x [N, D], w [D], eps) */
static PyObject *rmsnorm_forward(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    xl_call c;
    if (!xl_begin(&c, module, nargs, 5)) return NULL;
    real *y = xl_inout(&c, args[0], "y", "ND"), *rstd = xl_inout(&c, args[1], "rstd", "N");
    const real *x = xl_in(&c, args[2], "x", "ND"), *w = xl_in(&c, args[3], "w", "D");
    real eps = (real)xl_double(&c, args[4], "eps");
    if (c.failed) return xl_end(&c, XL_OK);
    XL_RUN(&c, xl_rmsnorm_forward(&c.ctx, xl_dim(&c, 'N'), xl_dim(&c, 'D'), y, rstd, x, w, eps));
    return xl_end(&c, c.status);
}

/* rmsnorm_backward(dx? [N, D], dw? [D], dy [N, D], x [N, D], w [D], rstd [N]) */
static PyObject *rmsnorm_backward(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    xl_call c;
    if (!xl_begin(&c, module, nargs, 6)) return NULL;
    real *dx = xl_inout(&c, args[0], "dx?", "ND"), *dw = xl_inout(&c, args[1], "dw?", "D");
    const real *dy = xl_in(&c, args[2], "dy", "ND"), *x = xl_in(&c, args[3], "x", "ND");
    const real *w = xl_in(&c, args[4], "w", "D"), *rstd = xl_in(&c, args[5], "rstd", "N");
    if (c.failed) return xl_end(&c, XL_OK);
    XL_RUN(&c,
           xl_rmsnorm_backward(&c.ctx, xl_dim(&c, 'N'), xl_dim(&c, 'D'), dx, dw, dy, x, w, rstd));
    return xl_end(&c, c.status);
}

static xl_status rope_in_place(xl_ctx *ctx, const ptrdiff_t *BHTD, real *x, const int32_t *pos,
                               const double *inv_freq, int inverse, real scale, real *table) {
    ptrdiff_t B = BHTD[0], H = BHTD[1], T = BHTD[2], D = BHTD[3];
    XL_TRY(xl_rope_table(ctx, B * T, D, table, pos, inv_freq));
    return xl_rope(ctx, B, H, T, D, (xl_heads){x, H * T * D, T * D, D}, table, scale, inverse);
}

/* rope(x [B, H, T, D] rotated in place, positions [B, T], inv_freq f64 [D/2], inverse,
 * scale) */
static PyObject *rope(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    xl_call c;
    if (!xl_begin(&c, module, nargs, 5)) return NULL;
    real *x = xl_inout(&c, args[0], "x", "BHTD");
    const int32_t *pos = xl_in_i32(&c, args[1], "positions", "BT");
    const double *freq = xl_in_f64(&c, args[2], "inv_freq", "F");
    int inverse = (int)xl_int(&c, args[3], "inverse", 0, 1);
    real scale = (real)xl_double(&c, args[4], "scale");
    if (c.failed) return xl_end(&c, XL_OK);
    const ptrdiff_t dims[4] = {xl_dim(&c, 'B'), xl_dim(&c, 'H'), xl_dim(&c, 'T'), xl_dim(&c, 'D')};
    if (xl_dim(&c, 'F') * 2 != dims[3])
        return xl_end(&c, xl_fail(&c.ctx, XL_VALUE,
                                  "inv_freq has %td entries, head width %td "
                                  "needs half as many",
                                  xl_dim(&c, 'F'), dims[3]));
    xl_plan plan = {0};
    xl_take(&plan, "", XL_ROLE_WORK, XL_DT_REAL, 3, XL_SHAPE(dims[0], dims[2], dims[3]));
    void *table = xl_scratch(&c, plan.failed ? -1 : plan.used);
    if (c.failed) return xl_end(&c, XL_OK);
    XL_RUN(&c, rope_in_place(&c.ctx, dims, x, pos, freq, inverse, scale, table));
    return xl_end(&c, c.status);
}

/* swiglu_forward(y, gate, up), all [N, F] */
static PyObject *swiglu_forward(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    xl_call c;
    if (!xl_begin(&c, module, nargs, 3)) return NULL;
    real *y = xl_inout(&c, args[0], "y", "NF");
    const real *gate = xl_in(&c, args[1], "gate", "NF"), *up = xl_in(&c, args[2], "up", "NF");
    if (c.failed) return xl_end(&c, XL_OK);
    XL_RUN(&c, xl_swiglu_forward(&c.ctx, xl_dim(&c, 'N'), xl_dim(&c, 'F'), y, gate, up));
    return xl_end(&c, c.status);
}

/* swiglu_backward(dgate, dup, dy, gate, up), all [N, F]; dgate and dup are written, not added to */
static PyObject *swiglu_backward(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    xl_call c;
    if (!xl_begin(&c, module, nargs, 5)) return NULL;
    real *dgate = xl_inout(&c, args[0], "dgate", "NF"), *dup = xl_inout(&c, args[1], "dup", "NF");
    const real *dy = xl_in(&c, args[2], "dy", "NF"), *gate = xl_in(&c, args[3], "gate", "NF");
    const real *up = xl_in(&c, args[4], "up", "NF");
    if (c.failed) return xl_end(&c, XL_OK);
    XL_RUN(&c,
           xl_swiglu_backward(&c.ctx, xl_dim(&c, 'N'), xl_dim(&c, 'F'), dgate, dup, dy, gate, up));
    return xl_end(&c, c.status);
}

/* ---- head --------------------------------------------------------------------------------- */

/* Sizes of a head call from the letters bound so far; K absent: no targets. */
static xl_head head_sizes(const xl_call *c) {
    return (xl_head){.N = xl_dim(c, 'N'),
                     .d = xl_dim(c, 'D'),
                     .V = xl_dim(c, 'V'),
                     .k = xl_max(0, xl_dim(c, 'K'))};
}

/* head_loss(sums f64 [3], row_ce? [N], dx? [N, D], dw? [V, D], x [N, D], w [V, D], labels [N],
 *           target_ids? [N, K], target_logp? [N, K], (ce_weight, kl_weight, scale) f64 [3], form) */
static PyObject *head_loss(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    xl_call c;
    if (!xl_begin(&c, module, nargs, 11)) return NULL;
    double *sums = xl_inout_f64(&c, args[0], "sums", "3");
    const real *x = xl_in(&c, args[4], "x", "ND"), *w = xl_in(&c, args[5], "w", "VD");
    real *row_ce = xl_inout(&c, args[1], "row_ce?", "N");
    real *dx = xl_inout(&c, args[2], "dx?", "ND"), *dw = xl_inout(&c, args[3], "dw?", "VD");
    const int32_t *labels = xl_in_i32(&c, args[6], "labels", "N");
    const int32_t *ids = xl_in_i32(&c, args[7], "target_ids?", "NK");
    const real *logp = xl_in(&c, args[8], "target_logp?", "NK");
    const double *weights = xl_in_f64(&c, args[9], "weights", "3");
    ptrdiff_t form = xl_int(&c, args[10], "form", XL_KL_RENORMALISED, XL_KL_SAMPLED);
    if (c.failed) return xl_end(&c, XL_OK);
    if (!ids != !logp)
        return xl_end(&c, xl_fail(&c.ctx, XL_TYPE, "target_ids and target_logp go together"));
    xl_head head = head_sizes(&c);
    head.ce_weight = weights[0], head.kl_weight = weights[1], head.scale = weights[2];
    head.form = (xl_kl_form)form;
    void *scratch = xl_scratch(&c, xl_head_scratch(&c.ctx, &head));
    if (c.failed) return xl_end(&c, XL_OK);
    XL_RUN(&c, xl_head_loss(&c.ctx, &head, sums, row_ce, dx, dw, x, xl_real_mat(w), labels, ids,
                            logp, scratch));
    return xl_end(&c, c.status);
}

/* head_topk(ids [N, K], logp [N, K], mass [N], x [N, D], w [V, D]) */
static PyObject *head_topk(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    xl_call c;
    if (!xl_begin(&c, module, nargs, 5)) return NULL;
    int32_t *ids = xl_inout_i32(&c, args[0], "ids", "NK");
    real *logp = xl_inout(&c, args[1], "logp", "NK"), *mass = xl_inout(&c, args[2], "mass", "N");
    const real *x = xl_in(&c, args[3], "x", "ND"), *w = xl_in(&c, args[4], "w", "VD");
    xl_head head = head_sizes(&c);
    void *scratch = xl_scratch(&c, xl_head_scratch(&c.ctx, &head));
    if (c.failed) return xl_end(&c, XL_OK);
    XL_RUN(&c, xl_head_topk(&c.ctx, &head, ids, logp, mass, x, xl_real_mat(w), scratch));
    return xl_end(&c, c.status);
}

/* head_draws(ids i32 [N, K], counts i32 [N, K], x [N, D], w [V, D], uniform f64 [N, K]) */
static PyObject *head_draws(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    xl_call c;
    if (!xl_begin(&c, module, nargs, 5)) return NULL;
    int32_t *ids = xl_inout_i32(&c, args[0], "ids", "NK");
    int32_t *counts = xl_inout_i32(&c, args[1], "counts", "NK");
    const real *x = xl_in(&c, args[2], "x", "ND"), *w = xl_in(&c, args[3], "w", "VD");
    const double *uniform = xl_in_f64(&c, args[4], "uniform", "NK");
    xl_head head = head_sizes(&c);
    void *scratch = xl_scratch(&c, xl_head_scratch(&c.ctx, &head));
    if (c.failed) return xl_end(&c, XL_OK);
    XL_RUN(&c, xl_head_draws(&c.ctx, &head, ids, counts, x, xl_real_mat(w), uniform, scratch));
    return xl_end(&c, c.status);
}

/* head_divergence(kl [N], agree [N], nll [N], teacher_nll [N], x [N, D], w [V, D],
 *                 teacher_x [N, D], teacher_w [V, D], labels [N]) */
static PyObject *head_divergence(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    xl_call c;
    if (!xl_begin(&c, module, nargs, 9)) return NULL;
    real *kl = xl_inout(&c, args[0], "kl", "N"), *agree = xl_inout(&c, args[1], "agree", "N");
    real *nll = xl_inout(&c, args[2], "nll", "N");
    real *teacher_nll = xl_inout(&c, args[3], "teacher_nll", "N");
    const real *x = xl_in(&c, args[4], "x", "ND");
    xl_mat w = xl_real_mat(xl_in(&c, args[5], "w", "VD"));
    const real *tx = xl_in(&c, args[6], "teacher_x", "ND");
    const real *tw = xl_in(&c, args[7], "teacher_w", "VD");
    const int32_t *labels = xl_in_i32(&c, args[8], "labels", "N");
    xl_head head = head_sizes(&c);
    void *scratch = xl_scratch(&c, xl_head_scratch(&c.ctx, &head));
    if (c.failed) return xl_end(&c, XL_OK);
    XL_RUN(&c, xl_head_divergence(&c.ctx, &head, 1, kl, agree, nll, teacher_nll, &x, &w, tx,
                                  xl_real_mat(tw), labels, scratch));
    return xl_end(&c, c.status);
}

/* sample(ids i32 [N], logits [N, V], temperature, top_p, uniform f64 [N]) */
static PyObject *sample(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    xl_call c;
    if (!xl_begin(&c, module, nargs, 5)) return NULL;
    int32_t *ids = xl_inout_i32(&c, args[0], "ids", "N");
    const real *logits = xl_in(&c, args[1], "logits", "NV");
    double temperature = xl_double(&c, args[2], "temperature");
    double top_p = xl_double(&c, args[3], "top_p");
    const double *uniform = xl_in_f64(&c, args[4], "uniform", "N");
    ptrdiff_t V = xl_dim(&c, 'V');
    void *scratch = xl_scratch(&c, xl_sample_scratch(&c.ctx, V));
    if (c.failed) return xl_end(&c, XL_OK);
    XL_RUN(&c, xl_sample(&c.ctx, xl_dim(&c, 'N'), V, ids, logits, temperature, top_p, uniform,
                         scratch));
    return xl_end(&c, c.status);
}

/* ---- flat vectors ------------------------------------------------------------------------- */

/* mse_forward(sums f64 [2], h [N], target [N]) */
static PyObject *mse_forward(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    xl_call c;
    if (!xl_begin(&c, module, nargs, 3)) return NULL;
    double *sums = xl_inout_f64(&c, args[0], "sums", "2");
    const real *h = xl_in(&c, args[1], "h", "N"), *target = xl_in(&c, args[2], "target", "N");
    void *scratch = xl_scratch(&c, xl_sums_scratch(xl_dim(&c, 'N')));
    if (c.failed) return xl_end(&c, XL_OK);
    XL_RUN(&c, xl_mse_forward(&c.ctx, xl_dim(&c, 'N'), sums, h, target, scratch));
    return xl_end(&c, c.status);
}

/* mse_backward(dh [N], h [N], target [N], scale) */
static PyObject *mse_backward(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    xl_call c;
    if (!xl_begin(&c, module, nargs, 4)) return NULL;
    real *dh = xl_inout(&c, args[0], "dh", "N");
    const real *h = xl_in(&c, args[1], "h", "N"), *target = xl_in(&c, args[2], "target", "N");
    real scale = (real)xl_double(&c, args[3], "scale");
    if (c.failed) return xl_end(&c, XL_OK);
    XL_RUN(&c, xl_mse_backward(&c.ctx, xl_dim(&c, 'N'), dh, h, target, scale));
    return xl_end(&c, c.status);
}

/* adamw_step(p, g, m, v, lr, beta1, beta2, eps, weight_decay, step, scale), vectors [N] */
static PyObject *adamw_step(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    xl_call c;
    if (!xl_begin(&c, module, nargs, 11)) return NULL;
    real *p = xl_inout(&c, args[0], "p", "N");
    const real *g = xl_in(&c, args[1], "g", "N");
    real *m = xl_inout(&c, args[2], "m", "N"), *v = xl_inout(&c, args[3], "v", "N");
    double lr = xl_double(&c, args[4], "lr"), beta1 = xl_double(&c, args[5], "beta1");
    double beta2 = xl_double(&c, args[6], "beta2"), eps = xl_double(&c, args[7], "eps");
    double decay = xl_double(&c, args[8], "weight_decay");
    ptrdiff_t step = xl_int(&c, args[9], "step", 1, PTRDIFF_MAX);
    double scale = xl_double(&c, args[10], "scale");
    if (c.failed) return xl_end(&c, XL_OK);
    XL_RUN(&c, xl_adamw_step(&c.ctx, xl_dim(&c, 'N'), p, g, m, v, lr, beta1, beta2, eps, decay,
                             step, scale));
    return xl_end(&c, c.status);
}

/* zero(x [N]) */
static PyObject *zero(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    xl_call c;
    if (!xl_begin(&c, module, nargs, 1)) return NULL;
    real *x = xl_inout(&c, args[0], "x", "N");
    if (c.failed) return xl_end(&c, XL_OK);
    XL_RUN(&c, xl_zero(&c.ctx, xl_dim(&c, 'N'), x));
    return xl_end(&c, c.status);
}

/* sumsq(x [N]) -> float */
static PyObject *sumsq(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    xl_call c;
    if (!xl_begin(&c, module, nargs, 1)) return NULL;
    const real *x = xl_in(&c, args[0], "x", "N");
    void *scratch = xl_scratch(&c, xl_sums_scratch(xl_dim(&c, 'N')));
    if (c.failed) return xl_end(&c, XL_OK);
    double sum = 0;
    XL_RUN(&c, xl_sumsq(&c.ctx, xl_dim(&c, 'N'), &sum, x, scratch));
    PyObject *none = xl_end(&c, c.status);
    if (!none) return NULL;
    Py_DECREF(none);
    return PyFloat_FromDouble(sum);
}

/* merge(out [N], list of M arrays [N], weights f64 [M]) */
static PyObject *merge(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    xl_call c;
    if (!xl_begin(&c, module, nargs, 3)) return NULL;
    real *out = xl_inout(&c, args[0], "out", "N");
    const double *weights = xl_in_f64(&c, args[2], "weights", "M");
    ptrdiff_t count = c.failed ? 0 : xl_dim(&c, 'M');
    const real **x = xl_scratch(&c, count * (ptrdiff_t)sizeof *x);
    if (!c.failed && (!PyList_Check(args[1]) || PyList_GET_SIZE(args[1]) != count)) {
        PyErr_Format(PyExc_ValueError, "arrays must be a list of %zd", (Py_ssize_t)count);
        c.failed = 1;
    }
    for (ptrdiff_t m = 0; m < count && !c.failed; m++)
        x[m] = xl_in(&c, PyList_GET_ITEM(args[1], m), "arrays", "N");
    if (c.failed) return xl_end(&c, XL_OK);
    XL_RUN(&c, xl_merge(&c.ctx, xl_dim(&c, 'N'), out, count, x, weights));
    return xl_end(&c, c.status);
}

/* peak(rounds, operands: 0 real, 1 bf16, 2 int8) -> floating-point operations done by all threads; the caller takes the time */
static PyObject *peak(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    xl_call c;
    if (!xl_begin(&c, module, nargs, 2)) return NULL;
    ptrdiff_t rounds = xl_int(&c, args[0], "rounds", 1, (ptrdiff_t)1 << 32);
    static const xl_dtype kinds[] = {XL_DT_REAL, XL_DT_BF16, XL_DT_I8};
    ptrdiff_t kind = xl_int(&c, args[1], "operands", 0, 2);
    if (c.failed) return xl_end(&c, XL_OK);
    double flops = 0;
    XL_RUN(&c, xl_peak(&c.ctx, kinds[kind], rounds, &flops));
    PyObject *none = xl_end(&c, c.status);
    if (!none) return NULL;
    Py_DECREF(none);
    return PyFloat_FromDouble(flops);
}

/* stream(x [N]) -> the largest sum of a block of x, read once by all threads: the caller takes the
 * time */
static PyObject *stream(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    xl_call c;
    if (!xl_begin(&c, module, nargs, 1)) return NULL;
    const real *x = xl_in(&c, args[0], "x", "N");
    if (c.failed) return xl_end(&c, XL_OK);
    double largest = 0;
    XL_RUN(&c, xl_stream(&c.ctx, xl_dim(&c, 'N'), x, &largest));
    PyObject *none = xl_end(&c, c.status);
    if (!none) return NULL;
    Py_DECREF(none);
    return PyFloat_FromDouble(largest);
}

#define METHOD(name) {#name, (PyCFunction)(void (*)(void))name, METH_FASTCALL, NULL}
PyMethodDef xl_methods_basic[] = {
    METHOD(matmul),
    METHOD(packed_size),
    METHOD(pack_weights),
    METHOD(unpack_weights),
    METHOD(packed_matmul),
    METHOD(linear_forward),
    METHOD(linear_backward),
    METHOD(embedding_forward),
    METHOD(embedding_backward),
    METHOD(rmsnorm_forward),
    METHOD(rmsnorm_backward),
    METHOD(rope),
    METHOD(swiglu_forward),
    METHOD(swiglu_backward),
    METHOD(head_loss),
    METHOD(head_topk),
    METHOD(head_draws),
    METHOD(head_divergence),
    METHOD(sample),
    METHOD(mse_forward),
    METHOD(mse_backward),
    METHOD(adamw_step),
    METHOD(zero),
    METHOD(sumsq),
    METHOD(merge),
    METHOD(peak),
    METHOD(stream),
    {NULL, NULL, 0, NULL},
};
