/* The recurrent cells for xlstm_distill/ops/cells.py. Letters: B batch, H heads, T steps, D head width
 * of q and k, E head width of v. Outputs come first, as in C. A state is three (mLSTM) or four (sLSTM)
 * arguments, all None where there is none. Gradients are added. */
#include "python/binding.h"

#include "ops/cells.h"

/* ---- mLSTM -------------------------------------------------------------------------------- */

static xl_heads view(real *p, ptrdiff_t H, ptrdiff_t T, ptrdiff_t D) {
    return (xl_heads){p, H * T * D, T * D, D};
}

static xl_mlstm_state mlstm_state(xl_call *c, PyObject *const *args, int writeable) {
    real *(*take)(xl_call *, PyObject *, const char *, const char *) = writeable ? xl_inout : xl_in;
    xl_mlstm_state s = {.c = take(c, args[0], "state C?", "BHDE")};
    if (!s.c) return s;
    s.n = take(c, args[1], "state n", "BHD");
    s.m = take(c, args[2], "state m", "BH");
    return s;
}

/* The arguments behind the arrays: normalizer, scale, form, chunk, reset? [B, T], lengths? [B], mixed. */
static xl_mlstm mlstm_options(xl_call *c, PyObject *const *args) {
    xl_mlstm a = {.normalizer = (xl_normalizer)xl_int(c, args[0], "normalizer", XL_RATIO, XL_MAX),
                  .scale = (real)xl_double(c, args[1], "scale"),
                  .form = (xl_form)xl_int(c, args[2], "form", XL_CHUNKWISE, XL_RECURRENT),
                  .chunk = xl_int(c, args[3], "chunk", 1, PTRDIFF_MAX),
                  .reset = xl_in_u8(c, args[4], "reset?", "BT"),
                  .lengths = xl_in_i32(c, args[5], "lengths?", "B"),
                  .mixed = (int)xl_int(c, args[6], "mixed", 0, 1),
                  .v_rep = 1};
    a.B = xl_dim(c, 'B'), a.H = xl_dim(c, 'H'), a.T = xl_dim(c, 'T');
    a.D = xl_dim(c, 'D'), a.E = xl_dim(c, 'E');
    return a;
}

/* mlstm_forward(h [B,H,T,E], last state C, n, m, q [B,H,T,D], k [B,H,T,D], v [B,H,T,E], i, f [B,H,T],
 *               state C?, n, m, normalizer, scale, form, chunk, reset? [B,T], lengths? [B],
 *               mixed, w_q?, w_k [H,D,D], map); with maps k has G heads */
static PyObject *mlstm_forward(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    xl_call c;
    if (!xl_begin(&c, module, nargs, 22)) return NULL;
    int mapped = args[19] != Py_None;
    real *q = xl_in(&c, args[4], "q", "BHTD");
    real *k = xl_in(&c, args[5], "k", mapped ? "BGTD" : "BHTD");
    real *v = xl_in(&c, args[6], "v", "BHTE");
    real *i = xl_in(&c, args[7], "i", "BHT"), *f = xl_in(&c, args[8], "f", "BHT");
    real *h = xl_inout(&c, args[0], "h", "BHTE");
    xl_mlstm_state last = mlstm_state(&c, args + 1, 1), first = mlstm_state(&c, args + 9, 0);
    xl_mlstm a = mlstm_options(&c, args + 12);
    ptrdiff_t H = a.H, T = a.T, D = a.D, E = a.E;
    xl_mlstm_maps maps = {.G = H};
    if (mapped) {
        maps.G = xl_dim(&c, 'G');
        maps.form = (xl_map_form)xl_int(&c, args[21], "map", XL_MAP_SOFTMAX, XL_MAP_ELU);
        maps.w_q = xl_in(&c, args[19], "w_q", "HDD");
        maps.w_k = xl_in(&c, args[20], "w_k", "HDD");
    }
    void *scratch = xl_scratch(&c, c.failed ? 0 : xl_mlstm_scratch(&c.ctx, &a));
    if (c.failed) return xl_end(&c, XL_OK);
    xl_heads none = {0};
    XL_RUN(&c, xl_mlstm_forward(&c.ctx, &a, mapped ? &maps : NULL, view(h, H, T, E), none, last,
                                view(q, H, T, D), view(k, maps.G, T, D), view(v, H, T, E),
                                view(i, H, T, 1), view(f, H, T, 1), first, scratch));
    return xl_end(&c, c.status);
}

/* mlstm_backward(dq?, dk?, dv?, di?, df?, gradient of the start state dC?, dn, dm, dh, q, k, v, i, f,
 *                state C?, n, m, gradient of the last state dC?, dn, dm, then as mlstm_forward) */
static PyObject *mlstm_backward(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    xl_call c;
    if (!xl_begin(&c, module, nargs, 27)) return NULL;
    real *q = xl_in(&c, args[9], "q", "BHTD"), *k = xl_in(&c, args[10], "k", "BHTD");
    real *v = xl_in(&c, args[11], "v", "BHTE");
    real *i = xl_in(&c, args[12], "i", "BHT"), *f = xl_in(&c, args[13], "f", "BHT");
    real *dh = xl_in(&c, args[8], "dh", "BHTE");
    real *dq = xl_inout(&c, args[0], "dq?", "BHTD"), *dk = xl_inout(&c, args[1], "dk?", "BHTD");
    real *dv = xl_inout(&c, args[2], "dv?", "BHTE");
    real *di = xl_inout(&c, args[3], "di?", "BHT"), *df = xl_inout(&c, args[4], "df?", "BHT");
    xl_mlstm_state dfirst = mlstm_state(&c, args + 5, 1), first = mlstm_state(&c, args + 14, 0);
    xl_mlstm_state dlast = mlstm_state(&c, args + 17, 0);
    xl_mlstm a = mlstm_options(&c, args + 20);
    ptrdiff_t H = a.H, T = a.T, D = a.D, E = a.E;
    void *scratch = xl_scratch(&c, c.failed ? 0 : xl_mlstm_scratch(&c.ctx, &a));
    if (c.failed) return xl_end(&c, XL_OK);
    xl_heads none = {0};
    XL_RUN(&c,
           xl_mlstm_backward(&c.ctx, &a, view(dq, H, T, D), view(dk, H, T, D), view(dv, H, T, E),
                             view(di, H, T, 1), view(df, H, T, 1), dfirst, view(dh, H, T, E), none,
                             view(q, H, T, D), view(k, H, T, D), view(v, H, T, E), view(i, H, T, 1),
                             view(f, H, T, 1), first, dlast, scratch));
    return xl_end(&c, c.status);
}

/* ---- sLSTM -------------------------------------------------------------------------------- */

static xl_slstm_state slstm_state(xl_call *c, PyObject *const *args, int writeable) {
    real *(*take)(xl_call *, PyObject *, const char *, const char *) = writeable ? xl_inout : xl_in;
    xl_slstm_state s = {.y = take(c, args[0], "state y?", "BHD")};
    if (!s.y) return s;
    s.c = take(c, args[1], "state c", "BHD");
    s.n = take(c, args[2], "state n", "BHD");
    s.m = take(c, args[3], "state m", "BHD");
    return s;
}

static xl_slstm slstm_sizes(const xl_call *c, const uint8_t *reset) {
    return (xl_slstm){xl_dim(c, 'B'), xl_dim(c, 'H'), xl_dim(c, 'T'), xl_dim(c, 'D'), reset};
}

/* slstm_forward(y [B,H,T,D], last state y, c, n, m [B,H,D], tape? [B,H,T,7,D], x [B,H,T,4,D],
 *               r [H,4,D,D], state y?, c, n, m, reset? [B,T]) */
static PyObject *slstm_forward(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    xl_call c;
    if (!xl_begin(&c, module, nargs, 13)) return NULL;
    real *x = xl_in(&c, args[6], "x", "BHT4D"), *r = xl_in(&c, args[7], "r", "H4DD");
    real *y = xl_inout(&c, args[0], "y", "BHTD"), *tape = xl_inout(&c, args[5], "tape?", "BHT7D");
    xl_slstm_state last = slstm_state(&c, args + 1, 1), first = slstm_state(&c, args + 8, 0);
    xl_slstm a = slstm_sizes(&c, xl_in_u8(&c, args[12], "reset?", "BT"));
    void *scratch = xl_scratch(&c, c.failed ? 0 : xl_slstm_scratch(&c.ctx, &a));
    if (c.failed) return xl_end(&c, XL_OK);
    XL_RUN(&c, xl_slstm_forward(&c.ctx, &a, y, last, x, r, first, tape, scratch));
    return xl_end(&c, c.status);
}

/* slstm_backward(dx? [B,H,T,4,D], dr? [H,4,D,D], gradient of the start state dy?, dc, dn, dm,
 *                dy [B,H,T,D], y [B,H,T,D], r, state y?, c, n, m,
 *                gradient of the last state dy?, dc, dn, dm, tape [B,H,T,7,D], reset? [B,T]) */
static PyObject *slstm_backward(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    xl_call c;
    if (!xl_begin(&c, module, nargs, 19)) return NULL;
    real *dy = xl_in(&c, args[6], "dy", "BHTD"), *y = xl_in(&c, args[7], "y", "BHTD");
    real *r = xl_in(&c, args[8], "r", "H4DD"), *tape = xl_in(&c, args[17], "tape", "BHT7D");
    real *dx = xl_inout(&c, args[0], "dx?", "BHT4D"), *dr = xl_inout(&c, args[1], "dr?", "H4DD");
    xl_slstm_state dfirst = slstm_state(&c, args + 2, 1), first = slstm_state(&c, args + 9, 0);
    xl_slstm_state dlast = slstm_state(&c, args + 13, 0);
    xl_slstm a = slstm_sizes(&c, xl_in_u8(&c, args[18], "reset?", "BT"));
    void *scratch = xl_scratch(&c, c.failed ? 0 : xl_slstm_scratch(&c.ctx, &a));
    if (c.failed) return xl_end(&c, XL_OK);
    XL_RUN(&c,
           xl_slstm_backward(&c.ctx, &a, dx, dr, dfirst, dy, y, r, first, dlast, tape, scratch));
    return xl_end(&c, c.status);
}

#define METHOD(name) {#name, (PyCFunction)(void (*)(void))name, METH_FASTCALL, NULL}

PyMethodDef xl_methods_cells[] = {
    METHOD(mlstm_forward),  METHOD(mlstm_backward), METHOD(slstm_forward),
    METHOD(slstm_backward), {NULL, NULL, 0, NULL},
};
