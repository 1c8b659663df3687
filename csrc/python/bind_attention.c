/* Attention, feature map, output gate, mix and LoLCATs for xlstm_distill/ops/attention.py. Letters: B batch,
 * H query heads, G key/value heads, T steps, D head width, N slots of a cache. Outputs come first, as
 * in C. Gradients are added. */
#include "python/binding.h"

#include "ops/cells.h"

static xl_heads view(real *p, ptrdiff_t heads, ptrdiff_t T, ptrdiff_t D) {
    return (xl_heads){p, heads * T * D, T * D, D};
}

/* ---- attention ---------------------------------------------------------------------------- */

/* pos [B, T] and lengths? [B], after the arrays that bind the letters. */
static xl_attn attention_sizes(xl_call *c, PyObject *pos, PyObject *lengths) {
    xl_attn a = {.pos = xl_in_i32(c, pos, "pos", "BT"),
                 .lengths = xl_in_i32(c, lengths, "lengths?", "B")};
    a.B = xl_dim(c, 'B'), a.H = xl_dim(c, 'H'), a.G = xl_dim(c, 'G');
    a.T = xl_dim(c, 'T'), a.D = xl_dim(c, 'D');
    return a;
}

/* k?, v [B, N, G, D], tokens already seen [B]; only the append and the step write into it. */
static xl_kv cache(xl_call *c, PyObject *const *args, int writeable) {
    real *(*take)(xl_call *, PyObject *, const char *, const char *) = writeable ? xl_inout : xl_in;
    xl_kv kv = {.k = take(c, args[0], writeable ? "past k" : "past k?", "BNGD")};
    if (!kv.k) return kv;
    kv.v = take(c, args[1], "past v", "BNGD");
    kv.pos = xl_in_i32(c, args[2], "past pos", "B");
    kv.slots = xl_dim(c, 'N');
    return kv;
}

/* attention_forward(o [B,H,T,D], lse? [B,H,T], q [B,H,T,D], k, v [B,G,T,D], pos [B,T], lengths? [B],
 *                   window, sinks, past k? [B,N,G,D], v, pos [B], mixed) */
static PyObject *attention_forward(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    xl_call c;
    if (!xl_begin(&c, module, nargs, 13)) return NULL;
    real *q = xl_in(&c, args[2], "q", "BHTD");
    real *k = xl_in(&c, args[3], "k", "BGTD"), *v = xl_in(&c, args[4], "v", "BGTD");
    real *o = xl_inout(&c, args[0], "o", "BHTD"), *lse = xl_inout(&c, args[1], "lse?", "BHT");
    xl_attn a = attention_sizes(&c, args[5], args[6]);
    a.window = xl_int(&c, args[7], "window", 1, PTRDIFF_MAX);
    a.sinks = xl_int(&c, args[8], "sinks", 0, PTRDIFF_MAX);
    xl_kv past = cache(&c, args + 9, 0);
    a.mixed = (int)xl_int(&c, args[12], "mixed", 0, 1);
    void *scratch = xl_scratch(&c, c.failed ? 0 : xl_attention_scratch(&c.ctx, &a, past.slots));
    if (c.failed) return xl_end(&c, XL_OK);
    XL_RUN(&c, xl_attention_forward(&c.ctx, &a, view(o, a.H, a.T, a.D), (xl_attn_sums){.lse = lse},
                                    view(q, a.H, a.T, a.D), view(k, a.G, a.T, a.D),
                                    view(v, a.G, a.T, a.D), past.k ? &past : NULL, scratch));
    return xl_end(&c, c.status);
}

/* attention_backward(dq? [B,H,T,D], dk?, dv? [B,G,T,D], do, q [B,H,T,D], k, v [B,G,T,D], o, lse,
 *                    pos [B,T], lengths? [B], window, sinks, past k? [B,N,G,D], v, pos [B], mixed) */
static PyObject *attention_backward(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    xl_call c;
    if (!xl_begin(&c, module, nargs, 17)) return NULL;
    real *q = xl_in(&c, args[4], "q", "BHTD"), *dout = xl_in(&c, args[3], "do", "BHTD");
    real *k = xl_in(&c, args[5], "k", "BGTD"), *v = xl_in(&c, args[6], "v", "BGTD");
    real *o = xl_in(&c, args[7], "o", "BHTD"), *lse = xl_in(&c, args[8], "lse", "BHT");
    real *dq = xl_inout(&c, args[0], "dq?", "BHTD"), *dk = xl_inout(&c, args[1], "dk?", "BGTD");
    real *dv = xl_inout(&c, args[2], "dv?", "BGTD");
    xl_attn a = attention_sizes(&c, args[9], args[10]);
    a.window = xl_int(&c, args[11], "window", 1, PTRDIFF_MAX);
    a.sinks = xl_int(&c, args[12], "sinks", 0, PTRDIFF_MAX);
    xl_kv past = cache(&c, args + 13, 0);
    a.mixed = (int)xl_int(&c, args[16], "mixed", 0, 1);
    void *scratch = xl_scratch(&c, c.failed ? 0 : xl_attention_scratch(&c.ctx, &a, 0));
    if (c.failed) return xl_end(&c, XL_OK);
    ptrdiff_t H = a.H, G = a.G, T = a.T, D = a.D;
    XL_RUN(&c, xl_attention_backward(&c.ctx, &a, view(dq, H, T, D), view(dk, G, T, D),
                                     view(dv, G, T, D), view(dout, H, T, D), NULL, view(q, H, T, D),
                                     view(k, G, T, D), view(v, G, T, D), view(o, H, T, D),
                                     (xl_attn_sums){.lse = lse}, past.k ? &past : NULL, scratch));
    return xl_end(&c, c.status);
}

/* attention_append(past k, v [B,N,G,D], pos [B], k, v [B,G,T,D], pos [B,T], lengths? [B], sinks):
 * the window is what N leaves */
static PyObject *attention_append(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    xl_call c;
    if (!xl_begin(&c, module, nargs, 8)) return NULL;
    xl_kv past = cache(&c, args, 1);
    real *k = xl_in(&c, args[3], "k", "BGTD"), *v = xl_in(&c, args[4], "v", "BGTD");
    xl_attn a = attention_sizes(&c, args[5], args[6]);
    a.H = a.G;
    a.sinks = xl_int(&c, args[7], "sinks", 0, PTRDIFF_MAX);
    a.window = past.slots - a.sinks;
    if (c.failed) return xl_end(&c, XL_OK);
    XL_RUN(&c,
           xl_attention_append(&c.ctx, &a, view(k, a.G, a.T, a.D), view(v, a.G, a.T, a.D), &past));
    return xl_end(&c, c.status);
}

/* attention_step(o, q [B,H,1,D], k, v [B,G,1,D], past k, v [B,N,G,D], pos [B], pos [B,1],
 *                lengths? [B], sinks) */
static PyObject *attention_step(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    xl_call c;
    if (!xl_begin(&c, module, nargs, 10)) return NULL;
    real *q = xl_in(&c, args[1], "q", "BHTD"), *o = xl_inout(&c, args[0], "o", "BHTD");
    real *k = xl_in(&c, args[2], "k", "BGTD"), *v = xl_in(&c, args[3], "v", "BGTD");
    xl_kv past = cache(&c, args + 4, 1);
    xl_attn a = attention_sizes(&c, args[7], args[8]);
    a.sinks = xl_int(&c, args[9], "sinks", 0, PTRDIFF_MAX);
    a.window = past.slots - a.sinks;
    void *scratch = xl_scratch(&c, c.failed ? 0 : xl_attention_scratch(&c.ctx, &a, past.slots));
    if (c.failed) return xl_end(&c, XL_OK);
    XL_RUN(&c, xl_attention_step(&c.ctx, &a, view(o, a.H, a.T, a.D), NULL, view(q, a.H, a.T, a.D),
                                 view(k, a.G, a.T, a.D), view(v, a.G, a.T, a.D), &past, scratch));
    return xl_end(&c, c.status);
}

/* ---- feature map -------------------------------------------------------------------------- */

/* args: map, mixed */
static xl_fmap map_sizes(xl_call *c, PyObject *const *args) {
    return (xl_fmap){.B = xl_dim(c, 'B'),
                     .H = xl_dim(c, 'H'),
                     .G = xl_dim(c, 'G'),
                     .T = xl_dim(c, 'T'),
                     .D = xl_dim(c, 'D'),
                     .form = (xl_map_form)xl_int(c, args[0], "map", XL_MAP_SOFTMAX, XL_MAP_ELU),
                     .mixed = (int)xl_int(c, args[1], "mixed", 0, 1)};
}

/* feature_map_forward(phi [B,H,T,D], x [B,G,T,D], w [H,D,D], map, mixed) */
static PyObject *feature_map_forward(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    xl_call c;
    if (!xl_begin(&c, module, nargs, 5)) return NULL;
    real *x = xl_in(&c, args[1], "x", "BGTD"), *w = xl_in(&c, args[2], "w", "HDD");
    real *phi = xl_inout(&c, args[0], "phi", "BHTD");
    xl_fmap a = map_sizes(&c, args + 3);
    void *scratch = xl_scratch(&c, c.failed ? 0 : xl_feature_map_scratch(&c.ctx, &a));
    if (c.failed) return xl_end(&c, XL_OK);
    XL_RUN(&c, xl_feature_map_forward(&c.ctx, &a, view(phi, a.H, a.T, a.D), view(x, a.G, a.T, a.D),
                                      w, scratch));
    return xl_end(&c, c.status);
}

/* feature_map_backward(dx? [B,G,T,D], dw? [H,D,D], dphi [B,H,T,D], phi, x [B,G,T,D], w [H,D,D],
 *                      map, mixed) */
static PyObject *feature_map_backward(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    xl_call c;
    if (!xl_begin(&c, module, nargs, 8)) return NULL;
    real *x = xl_in(&c, args[4], "x", "BGTD"), *w = xl_in(&c, args[5], "w", "HDD");
    real *dphi = xl_in(&c, args[2], "dphi", "BHTD"), *phi = xl_in(&c, args[3], "phi", "BHTD");
    real *dx = xl_inout(&c, args[0], "dx?", "BGTD"), *dw = xl_inout(&c, args[1], "dw?", "HDD");
    xl_fmap a = map_sizes(&c, args + 6);
    void *scratch = xl_scratch(&c, c.failed ? 0 : xl_feature_map_scratch(&c.ctx, &a));
    if (c.failed) return xl_end(&c, XL_OK);
    XL_RUN(&c, xl_feature_map_backward(&c.ctx, &a, view(dx, a.G, a.T, a.D), dw,
                                       view(dphi, a.H, a.T, a.D), view(phi, a.H, a.T, a.D),
                                       view(x, a.G, a.T, a.D), w, scratch));
    return xl_end(&c, c.status);
}

/* ---- output gate and mix ------------------------------------------------------------------ */

static xl_gate gate_sizes(const xl_call *c) {
    return (xl_gate){xl_dim(c, 'B'), xl_dim(c, 'H'), xl_dim(c, 'G'), xl_dim(c, 'T'),
                     xl_dim(c, 'D')};
}

static real *gate_weight(xl_call *c, PyObject *obj, const char *name, int writeable) {
    xl_set_dim(c, 'W', 3 * xl_dim(c, 'D'));
    return writeable ? xl_inout(c, obj, name, "HW") : xl_in(c, obj, name, "HW");
}

/* output_gate_forward(a [B,H,T], q [B,H,T,D], k, v [B,G,T,D], w [H,3D], b [H]) */
static PyObject *output_gate_forward(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    xl_call c;
    if (!xl_begin(&c, module, nargs, 6)) return NULL;
    real *q = xl_in(&c, args[1], "q", "BHTD");
    real *k = xl_in(&c, args[2], "k", "BGTD"), *v = xl_in(&c, args[3], "v", "BGTD");
    real *out = xl_inout(&c, args[0], "a", "BHT");
    real *w = gate_weight(&c, args[4], "w", 0), *bias = xl_in(&c, args[5], "b", "H");
    xl_gate g = gate_sizes(&c);
    if (c.failed) return xl_end(&c, XL_OK);
    XL_RUN(&c, xl_output_gate_forward(&c.ctx, &g, view(out, g.H, g.T, 1), view(q, g.H, g.T, g.D),
                                      view(k, g.G, g.T, g.D), view(v, g.G, g.T, g.D), w, bias));
    return xl_end(&c, c.status);
}

/* output_gate_backward(dq? [B,H,T,D], dk?, dv? [B,G,T,D], dw? [H,3D], db? [H], da [B,H,T], q, k, v,
 *                      w) */
static PyObject *output_gate_backward(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    xl_call c;
    if (!xl_begin(&c, module, nargs, 10)) return NULL;
    real *q = xl_in(&c, args[6], "q", "BHTD");
    real *k = xl_in(&c, args[7], "k", "BGTD"), *v = xl_in(&c, args[8], "v", "BGTD");
    real *da = xl_in(&c, args[5], "da", "BHT"), *dq = xl_inout(&c, args[0], "dq?", "BHTD");
    real *dk = xl_inout(&c, args[1], "dk?", "BGTD"), *dv = xl_inout(&c, args[2], "dv?", "BGTD");
    real *w = gate_weight(&c, args[9], "w", 0), *dw = gate_weight(&c, args[3], "dw?", 1);
    real *db = xl_inout(&c, args[4], "db?", "H");
    xl_gate g = gate_sizes(&c);
    void *scratch = xl_scratch(&c, c.failed ? 0 : xl_output_gate_scratch(&c.ctx, &g));
    if (c.failed) return xl_end(&c, XL_OK);
    XL_RUN(&c, xl_output_gate_backward(&c.ctx, &g, view(dq, g.H, g.T, g.D), view(dk, g.G, g.T, g.D),
                                       view(dv, g.G, g.T, g.D), dw, db, view(da, g.H, g.T, 1),
                                       view(q, g.H, g.T, g.D), view(k, g.G, g.T, g.D),
                                       view(v, g.G, g.T, g.D), w, scratch));
    return xl_end(&c, c.status);
}

/* mix_forward(h, hm, hs [B,H,T,D], a [B,H,T]) */
static PyObject *mix_forward(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    xl_call c;
    if (!xl_begin(&c, module, nargs, 4)) return NULL;
    real *hm = xl_in(&c, args[1], "hm", "BHTD"), *hs = xl_in(&c, args[2], "hs", "BHTD");
    real *a = xl_in(&c, args[3], "a", "BHT"), *h = xl_inout(&c, args[0], "h", "BHTD");
    xl_set_dim(&c, 'G', xl_dim(&c, 'H'));
    xl_gate g = gate_sizes(&c);
    if (c.failed) return xl_end(&c, XL_OK);
    XL_RUN(&c, xl_mix_forward(&c.ctx, &g, view(h, g.H, g.T, g.D), view(hm, g.H, g.T, g.D),
                              view(hs, g.H, g.T, g.D), view(a, g.H, g.T, 1)));
    return xl_end(&c, c.status);
}

/* mix_backward(dhm?, dhs? [B,H,T,D], da? [B,H,T], dh, hm, hs [B,H,T,D], a [B,H,T]) */
static PyObject *mix_backward(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    xl_call c;
    if (!xl_begin(&c, module, nargs, 7)) return NULL;
    real *hm = xl_in(&c, args[4], "hm", "BHTD"), *hs = xl_in(&c, args[5], "hs", "BHTD");
    real *dh = xl_in(&c, args[3], "dh", "BHTD"), *a = xl_in(&c, args[6], "a", "BHT");
    real *dhm = xl_inout(&c, args[0], "dhm?", "BHTD"), *dhs = xl_inout(&c, args[1], "dhs?", "BHTD");
    real *da = xl_inout(&c, args[2], "da?", "BHT");
    xl_set_dim(&c, 'G', xl_dim(&c, 'H'));
    xl_gate g = gate_sizes(&c);
    if (c.failed) return xl_end(&c, XL_OK);
    XL_RUN(&c,
           xl_mix_backward(&c.ctx, &g, view(dhm, g.H, g.T, g.D), view(dhs, g.H, g.T, g.D),
                           view(da, g.H, g.T, 1), view(dh, g.H, g.T, g.D), view(hm, g.H, g.T, g.D),
                           view(hs, g.H, g.T, g.D), view(a, g.H, g.T, 1)));
    return xl_end(&c, c.status);
}

/* ---- LoLCATs ------------------------------------------------------------------------------ */

/* What both functions get behind their outputs, and a tape. */
typedef struct {
    xl_lolcats sizes;
    real *q, *k, *v, *w_q, *w_k, *factor;
    xl_lolcats_tape tape;
} lolcats_call;

static ptrdiff_t lolcats_tape(const xl_attn *a, char *base, xl_lolcats_tape *t) {
    xl_plan p = {.base = base, .size = PTRDIFF_MAX};
    xl_lolcats_tape_plan(&p, a->B * a->T, a->H, a->G, a->D, t);
    return p.failed ? -1 : p.used;
}

/* q [B,H,T,D], k, v [B,G,T,D], w_q, w_k [H,D,D], factor [H], pos [B,T], lengths? [B], window, sinks,
 * chunk, map, mixed; returns the scratch of the ops, behind that of the tape */
static void *lolcats_args(xl_call *c, PyObject *const *args, int training, lolcats_call *l) {
    *l = (lolcats_call){.q = xl_in(c, args[0], "q", "BHTD")};
    l->k = xl_in(c, args[1], "k", "BGTD"), l->v = xl_in(c, args[2], "v", "BGTD");
    l->w_q = xl_in(c, args[3], "w_q", "HDD"), l->w_k = xl_in(c, args[4], "w_k", "HDD");
    l->factor = xl_in(c, args[5], "factor", "H");
    xl_attn *a = &l->sizes.attn;
    *a = attention_sizes(c, args[6], args[7]);
    a->window = xl_int(c, args[8], "window", 1, PTRDIFF_MAX);
    a->sinks = xl_int(c, args[9], "sinks", 0, PTRDIFF_MAX);
    l->sizes.chunk = xl_int(c, args[10], "chunk", 1, PTRDIFF_MAX);
    l->sizes.map = (xl_map_form)xl_int(c, args[11], "map", XL_MAP_SOFTMAX, XL_MAP_ELU);
    a->mixed = (int)xl_int(c, args[12], "mixed", 0, 1);
    if (c->failed) return NULL;
    ptrdiff_t tape = lolcats_tape(a, NULL, &l->tape), total;
    ptrdiff_t op = xl_lolcats_scratch(&c->ctx, &l->sizes, 0, training);
    if (tape < 0 || op < 0 || __builtin_add_overflow(tape, op, &total)) total = -1;
    char *scratch = xl_scratch(c, total);
    if (c->failed) return NULL;
    lolcats_tape(a, scratch, &l->tape);
    return scratch + tape;
}

static xl_status lolcats_run(xl_call *c, lolcats_call *l, real *y, void *scratch) {
    const xl_attn *a = &l->sizes.attn;
    const xl_mlstm_state none = {0};
    return xl_lolcats_forward(&c->ctx, &l->sizes, view(y, a->H, a->T, a->D), &l->tape, none,
                              view(l->q, a->H, a->T, a->D), view(l->k, a->G, a->T, a->D),
                              view(l->v, a->G, a->T, a->D), l->w_q, l->w_k, l->factor, NULL, none,
                              scratch);
}

/* lolcats_forward(y [B,H,T,D], then as lolcats_args) */
static PyObject *lolcats_forward(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    xl_call c;
    if (!xl_begin(&c, module, nargs, 14)) return NULL;
    lolcats_call l;
    void *scratch = lolcats_args(&c, args + 1, 0, &l);
    real *y = xl_inout(&c, args[0], "y", "BHTD");
    if (c.failed) return xl_end(&c, XL_OK);
    XL_RUN(&c, lolcats_run(&c, &l, y, scratch));
    return xl_end(&c, c.status);
}

/* lolcats_backward(dq?, dk?, dv?, dw_q?, dw_k?, dfactor?, dy [B,H,T,D], y: receives the forward's output,
 *                  then as lolcats_args) */
static PyObject *lolcats_backward(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    xl_call c;
    if (!xl_begin(&c, module, nargs, 21)) return NULL;
    lolcats_call l;
    void *scratch = lolcats_args(&c, args + 8, 1, &l);
    real *dq = xl_inout(&c, args[0], "dq?", "BHTD"), *dk = xl_inout(&c, args[1], "dk?", "BGTD");
    real *dv = xl_inout(&c, args[2], "dv?", "BGTD"), *dw_q = xl_inout(&c, args[3], "dw_q?", "HDD");
    real *dw_k = xl_inout(&c, args[4], "dw_k?", "HDD");
    real *dfactor = xl_inout(&c, args[5], "dfactor?", "H");
    real *dy = xl_in(&c, args[6], "dy", "BHTD"), *y = xl_inout(&c, args[7], "y", "BHTD");
    if (c.failed) return xl_end(&c, XL_OK);
    ptrdiff_t H = l.sizes.attn.H, G = l.sizes.attn.G, T = l.sizes.attn.T, D = l.sizes.attn.D;
    const xl_mlstm_state none = {0};
    XL_RUN(&c, lolcats_run(&c, &l, y, scratch));
    if (c.status != XL_OK) return xl_end(&c, c.status);
    XL_RUN(&c,
           xl_lolcats_backward(&c.ctx, &l.sizes, view(dq, H, T, D), view(dk, G, T, D),
                               view(dv, G, T, D), dw_q, dw_k, dfactor, view(dy, H, T, D), &l.tape,
                               view(l.q, H, T, D), view(l.k, G, T, D), view(l.v, G, T, D), l.w_q,
                               l.w_k, l.factor, NULL, none, scratch));
    return xl_end(&c, c.status);
}

#define METHOD(name) {#name, (PyCFunction)(void (*)(void))name, METH_FASTCALL, NULL}

PyMethodDef xl_methods_attention[] = {
    METHOD(attention_forward),   METHOD(attention_backward),   METHOD(attention_append),
    METHOD(attention_step),      METHOD(feature_map_forward),  METHOD(feature_map_backward),
    METHOD(output_gate_forward), METHOD(output_gate_backward), METHOD(mix_forward),
    METHOD(mix_backward),        METHOD(lolcats_forward),      METHOD(lolcats_backward),
    {NULL, NULL, 0, NULL},
};
