/* The model functions for xlstm_distill/model.py. Flat buffers come as aligned uint8 or real arrays
 * whose size must be what the plan says; `work` is scratch that the caller keeps between calls, so
 * that gigabytes of tape are not mapped anew in every step. */
#include "python/binding.h"

#include "model/model.h"

#define CAPSULE "xlstm_distill.config"

static void free_config(PyObject *capsule) { PyMem_Free(PyCapsule_GetPointer(capsule, CAPSULE)); }

/* config_new(sizes i32 [11], eps, inv_freq f64 [R, D/2], attention_factor f64 [R], mixers i32 [L, 8])
 * -> capsule; R kinds of RoPE
 * sizes: d, H, G, D, F, V, tied, attention_bias, compute (0 f32, 1 mixed, 2 bf16, 3 int8), post_norm,
 * qk_norm; mixers: kind, window, sinks, gate_fixed, normalizer, map, teacher_window, rope */
static PyObject *config_new(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    xl_call c;
    if (!xl_begin(&c, module, nargs, 5)) return NULL;
    xl_set_dim(&c, 'S', 11);
    const int32_t *s = xl_in_i32(&c, args[0], "sizes", "S");
    double eps = xl_double(&c, args[1], "rms_norm_eps");
    const double *freq = xl_in_f64(&c, args[2], "inv_freq", "RF");
    const double *factor = xl_in_f64(&c, args[3], "attention_factor", "R");
    const int32_t *m = xl_in_i32(&c, args[4], "mixers", "L8");
    if (c.failed) return xl_end(&c, XL_OK);
    ptrdiff_t layers = xl_dim(&c, 'L');
    static const xl_dtype weights[] = {XL_DT_REAL, XL_DT_REAL, XL_DT_PANELS, XL_DT_I8};
    xl_config *config = PyMem_Calloc(1, sizeof *config);
    if (!config) return PyErr_NoMemory();
    *config = (xl_config){.layers = layers,
                          .d = s[0],
                          .H = s[1],
                          .G = s[2],
                          .D = s[3],
                          .F = s[4],
                          .V = s[5],
                          .tied = s[6],
                          .attention_bias = s[7],
                          .post_norm = s[9],
                          .qk_norm = s[10],
                          .weights = weights[s[8] & 3],
                          .mixed = s[8] != 0,
                          .ropes = xl_dim(&c, 'R'),
                          .eps = eps};
    for (ptrdiff_t l = 0; l < xl_min(layers, XL_MAX_LAYERS); l++, m += 8)
        config->mixer[l] = (xl_mixer){.kind = (xl_mixer_kind)m[0],
                                      .window = m[1],
                                      .sinks = m[2],
                                      .gate_fixed = m[3],
                                      .normalizer = (xl_normalizer)m[4],
                                      .map = (xl_map_form)m[5],
                                      .teacher_window = m[6],
                                      .rope = m[7]};
    xl_status status = xl_config_check(&c.ctx, config);
    if (status == XL_OK && xl_dim(&c, 'F') != config->D / 2)
        status = xl_fail(&c.ctx, XL_VALUE, "inv_freq has %td entries, expected %td",
                         xl_dim(&c, 'F'), config->D / 2);
    if (status != XL_OK) {
        PyMem_Free(config);
        return xl_end(&c, status);
    }
    for (ptrdiff_t r = 0; r < config->ropes; r++, freq += config->D / 2) {
        memcpy(config->inv_freq[r], freq, (size_t)(config->D / 2) * sizeof *freq);
        config->attention_factor[r] = factor[r];
    }
    return PyCapsule_New(config, CAPSULE, free_config);
}

static xl_config *take_config(xl_call *c, PyObject *obj) {
    if (c->failed) return NULL;
    xl_config *config = PyCapsule_GetPointer(obj, CAPSULE);
    if (!config) c->failed = 1;
    return config;
}

/* ---- plans -------------------------------------------------------------------------------- */

typedef struct {
    xl_params params;
    xl_layer_state states[XL_MAX_LAYERS];
} places;

static void run_plan(xl_plan *plan, const xl_config *config, ptrdiff_t B, ptrdiff_t capacity,
                     places *out) {
    if (B)
        xl_state_plan(plan, config, B, capacity, out->states);
    else
        xl_params_plan(plan, config, NULL, &out->params);
}

static const char *const role_names[] = {"embedding", "norm", "map",  "gate", "projection",
                                         "mlp",       "head", "bias", "work"};

static PyObject *entry_tuple(const xl_entry *e) {
    PyObject *shape = PyTuple_New(e->ndim);
    if (!shape) return NULL;
    for (int i = 0; i < e->ndim; i++) {
        PyObject *size = PyLong_FromSsize_t(e->shape[i]);
        if (!size) {
            Py_DECREF(shape);
            return NULL;
        }
        PyTuple_SET_ITEM(shape, i, size);
    }
    return Py_BuildValue("(sNsinnn)", e->name, shape, role_names[e->role], e->group,
                         (Py_ssize_t)e->dtype, (Py_ssize_t)e->offset, (Py_ssize_t)e->bytes);
}

/* plan_list(config, B, capacity) -> ([(name, shape, role, group, dtype, offset, bytes)], bytes)
 * B = 0: the parameters; else the decode state of B rows. dtype: 0 real, 4 int8, 5 bf16 (xl_dtype). */
static PyObject *plan_list(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    xl_call c;
    if (!xl_begin(&c, module, nargs, 3)) return NULL;
    const xl_config *config = take_config(&c, args[0]);
    ptrdiff_t B = xl_int(&c, args[1], "B", 0, 1 << 24);
    ptrdiff_t capacity = xl_int(&c, args[2], "capacity", 0, INT32_MAX);
    if (c.failed) return xl_end(&c, XL_OK);
    places *out = PyMem_Malloc(sizeof *out);
    xl_plan measure = {0};
    if (out) run_plan(&measure, config, B, capacity, out);
    xl_entry *entries = PyMem_Calloc((size_t)measure.count + 1, sizeof *entries);
    PyObject *list = PyList_New(0);
    if (!out || !entries || !list || measure.failed) {
        PyErr_SetString(PyExc_MemoryError, "the plan does not fit in memory");
        Py_CLEAR(list);
    } else {
        xl_plan plan = {.entries = entries, .capacity = measure.count};
        run_plan(&plan, config, B, capacity, out);
        for (ptrdiff_t i = 0; i < plan.count && list; i++) {
            PyObject *tuple = entry_tuple(&entries[i]);
            if (!tuple || PyList_Append(list, tuple) < 0) Py_CLEAR(list);
            Py_XDECREF(tuple);
        }
    }
    PyMem_Free(out);
    PyMem_Free(entries);
    return list ? Py_BuildValue("(Nn)", list, (Py_ssize_t)measure.used) : NULL;
}

/* Places parameters (or gradients) in a buffer of the planned size. */
static void place_params(xl_call *c, const xl_config *config, PyObject *obj, const char *name,
                         int writeable, const uint8_t *wanted, xl_params *out) {
    ptrdiff_t size;
    char *base = xl_bytes(c, obj, name, writeable, &size);
    if (c->failed) return;
    xl_plan plan = {.base = base, .size = size};
    xl_params_plan(&plan, config, wanted, out);
    if (!plan.failed) return;
    PyErr_Format(PyExc_ValueError, "%s has %zd bytes, too few for this configuration", name,
                 (Py_ssize_t)size);
    c->failed = 1;
}

static const uint8_t *take_wanted(xl_call *c, const xl_config *config, PyObject *obj) {
    const uint8_t *wanted = xl_in_u8(c, obj, "wanted?", "P");
    if (c->failed || !wanted) return NULL;
    xl_plan measure = {0};
    xl_params all;
    xl_params_plan(&measure, config, NULL, &all);
    if (measure.count == xl_dim(c, 'P')) return wanted;
    PyErr_Format(PyExc_ValueError, "wanted has %zd flags for %zd parameters",
                 (Py_ssize_t)xl_dim(c, 'P'), (Py_ssize_t)measure.count);
    c->failed = 1;
    return NULL;
}

/* Scratch of the caller, if it is large enough. */
static void *take_work(xl_call *c, PyObject *obj, ptrdiff_t need) {
    ptrdiff_t size;
    void *work = xl_bytes(c, obj, "work", 1, &size);
    if (c->failed) return NULL;
    if (need >= 0 && size >= need) return work;
    PyErr_Format(PyExc_MemoryError, "work has %zd bytes, this call needs %zd", (Py_ssize_t)size,
                 (Py_ssize_t)need);
    c->failed = 1;
    return NULL;
}

/* ---- scratch sizes ------------------------------------------------------------------------ */

static xl_head head_args(const xl_config *config, ptrdiff_t N, ptrdiff_t k) {
    return (xl_head){.N = N, .d = config->d, .V = config->V, .k = k};
}

/* work_bytes(what, config, B, T, k, capacity): what 0 forward, 1 train, 2 train with recomputation,
 * 3 align, 4 head; capacity > 0: with a state */
static PyObject *work_bytes(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    xl_call c;
    if (!xl_begin(&c, module, nargs, 6)) return NULL;
    ptrdiff_t what = xl_int(&c, args[0], "what", 0, 4);
    const xl_config *config = take_config(&c, args[1]);
    ptrdiff_t B = xl_int(&c, args[2], "B", 0, 1 << 24), T = xl_int(&c, args[3], "T", 0, INT32_MAX);
    ptrdiff_t k = xl_int(&c, args[4], "k", 0, INT32_MAX);
    ptrdiff_t capacity = xl_int(&c, args[5], "capacity", 0, INT32_MAX);
    if (c.failed) return xl_end(&c, XL_OK);
    static const int32_t some = 0;
    xl_batch batch = {.B = B,
                      .T = T,
                      .span = capacity ? capacity : T,
                      .gate = -1,
                      .chunk = 64,
                      .recompute = what == 2,
                      .past = capacity ? &some : NULL};
    xl_head head = head_args(config, B * T, k);
    ptrdiff_t bytes = what == 0   ? xl_model_forward_scratch(&c.ctx, config, &batch)
                      : what <= 2 ? xl_model_train_scratch(&c.ctx, config, &batch, &head)
                      : what == 3 ? xl_model_align_scratch(&c.ctx, config, &batch)
                                  : xl_head_scratch(&c.ctx, &head);
    if (bytes < 0)
        return PyErr_Format(PyExc_MemoryError, "%zd x %zd tokens need more memory than there is",
                            (Py_ssize_t)B, (Py_ssize_t)T);
    return PyLong_FromSsize_t(bytes);
}

/* ---- calls -------------------------------------------------------------------------------- */

/* ids, pos, reset, lengths: the first four arguments of every batch */
static xl_batch take_batch(xl_call *c, PyObject *const *args) {
    xl_batch b = {.gate = -1, .chunk = 64};
    b.ids = xl_in_i32(c, args[0], "ids", "BT");
    b.pos = xl_in_i32(c, args[1], "pos", "BT");
    b.reset = xl_in_u8(c, args[2], "reset?", "BT");
    b.lengths = xl_in_i32(c, args[3], "lengths?", "B");
    b.B = xl_dim(c, 'B'), b.T = b.span = xl_dim(c, 'T');
    return b;
}

/* Places the states of all layers in a buffer of the planned size; false if there is none. */
static int place_states(xl_call *c, const xl_config *config, xl_batch *b, PyObject *obj,
                        const char *name, int writeable, ptrdiff_t capacity, xl_layer_state *out) {
    ptrdiff_t size;
    char *base = xl_bytes(c, obj, name, writeable, &size);
    if (c->failed || !base) return 0;
    if (!b->past || capacity < 1) {
        PyErr_SetString(PyExc_ValueError, "a state needs past and capacity");
        c->failed = 1;
        return 0;
    }
    b->span = capacity;
    xl_plan plan = {.base = base, .size = size};
    xl_state_plan(&plan, config, b->B, capacity, out);
    if (plan.failed) {
        PyErr_Format(PyExc_ValueError, "%s has %zd bytes, too few", name, (Py_ssize_t)size);
        c->failed = 1;
    }
    return 1;
}

/* model_forward(config, params, ids, pos, reset, lengths, past, state, capacity, gate, hidden,
 *               o, f, q, k, work): the last four are what xl_taps asks for */
static PyObject *model_forward(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    xl_call c;
    if (!xl_begin(&c, module, nargs, 16)) return NULL;
    const xl_config *config = take_config(&c, args[0]);
    if (c.failed) return xl_end(&c, XL_OK);
    xl_params params;
    xl_layer_state states[XL_MAX_LAYERS];
    place_params(&c, config, args[1], "params", 0, NULL, &params);
    xl_batch b = take_batch(&c, args + 2);
    b.past = xl_in_i32(&c, args[6], "past?", "B");
    ptrdiff_t capacity = xl_int(&c, args[8], "capacity", 0, INT32_MAX);
    int state = place_states(&c, config, &b, args[7], "state?", 1, capacity, states);
    b.gate = xl_double(&c, args[9], "gate");
    xl_set_dim(&c, 'D', config->d), xl_set_dim(&c, 'L', config->layers);
    xl_set_dim(&c, 'H', config->H), xl_set_dim(&c, 'G', config->G);
    xl_set_dim(&c, 'E', config->D);
    real *hidden = xl_inout(&c, args[10], "hidden", "BTD");
    xl_taps taps = {.o = xl_inout(&c, args[11], "o?", "LBTH"),
                    .f = xl_inout(&c, args[12], "f?", "LBTH"),
                    .q = xl_inout(&c, args[13], "q?", "LBTHE"),
                    .k = xl_inout(&c, args[14], "k?", "LBTGE")};
    if (c.failed) return xl_end(&c, XL_OK);
    void *work = take_work(&c, args[15], xl_model_forward_scratch(&c.ctx, config, &b));
    if (c.failed) return xl_end(&c, XL_OK);
    XL_RUN(&c, xl_model_forward(&c.ctx, config, &params, &b, state ? states : NULL, hidden, &taps,
                                work));
    return xl_end(&c, c.status);
}

/* model_train(config, params, ids, pos, reset, lengths, past, first, last, capacity, grads, wanted,
 *             labels, target_ids, target_logp, (ce_weight, kl_weight, scale) f64 [3], form, recompute,
 *             gate, sums f64 [3], work): first, last are the states before and behind the rows */
static PyObject *model_train(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    xl_call c;
    if (!xl_begin(&c, module, nargs, 21)) return NULL;
    const xl_config *config = take_config(&c, args[0]);
    if (c.failed) return xl_end(&c, XL_OK);
    xl_params params, grads;
    xl_layer_state first[XL_MAX_LAYERS], last[XL_MAX_LAYERS];
    place_params(&c, config, args[1], "params", 0, NULL, &params);
    xl_batch b = take_batch(&c, args + 2);
    b.past = xl_in_i32(&c, args[6], "past?", "B");
    ptrdiff_t capacity = xl_int(&c, args[9], "capacity", 0, INT32_MAX);
    int goes_on = place_states(&c, config, &b, args[7], "first?", 0, capacity, first) &&
                  place_states(&c, config, &b, args[8], "last", 1, capacity, last);
    const uint8_t *wanted = take_wanted(&c, config, args[11]);
    int training = args[10] != Py_None;
    if (training) place_params(&c, config, args[10], "grads", 1, wanted, &grads);
    const int32_t *labels = xl_in_i32(&c, args[12], "labels", "BT");
    const int32_t *target_ids = xl_in_i32(&c, args[13], "target_ids?", "BTK");
    const real *target_logp = xl_in(&c, args[14], "target_logp?", "BTK");
    const double *weights = xl_in_f64(&c, args[15], "weights", "3");
    ptrdiff_t form = xl_int(&c, args[16], "form", 0, 2);
    b.recompute = (int)xl_int(&c, args[17], "recompute", 0, 1);
    b.gate = xl_double(&c, args[18], "gate");
    double *sums = xl_inout_f64(&c, args[19], "sums", "3");
    if (c.failed) return xl_end(&c, XL_OK);
    if (config->weights != XL_DT_REAL) {
        PyErr_SetString(PyExc_ValueError, "a model in bf16 or int8 cannot be trained");
        return NULL;
    }
    xl_head head = head_args(config, b.B * b.T, target_ids ? xl_dim(&c, 'K') : 0);
    head.ce_weight = weights[0], head.kl_weight = weights[1], head.scale = weights[2];
    head.form = (xl_kl_form)form;
    void *work = take_work(&c, args[20], xl_model_train_scratch(&c.ctx, config, &b, &head));
    if (c.failed) return xl_end(&c, XL_OK);
    XL_RUN(&c, xl_model_train(&c.ctx, config, &params, training ? &grads : NULL, &b, &head, sums,
                              labels, target_ids, target_logp, goes_on ? first : NULL,
                              goes_on ? last : NULL, work));
    return xl_end(&c, c.status);
}

/* model_align(config, params, ids, pos, reset, lengths, grads, wanted, hidden_in, hidden_out, compared,
 *             scale, sums f64 [L, 2], work): xl_stream says what hidden_in, hidden_out and compared are */
static PyObject *model_align(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    xl_call c;
    if (!xl_begin(&c, module, nargs, 14)) return NULL;
    const xl_config *config = take_config(&c, args[0]);
    if (c.failed) return xl_end(&c, XL_OK);
    xl_params params, grads;
    place_params(&c, config, args[1], "params", 0, NULL, &params);
    xl_batch b = take_batch(&c, args + 2);
    const uint8_t *wanted = take_wanted(&c, config, args[7]);
    int training = args[6] != Py_None;
    if (training) place_params(&c, config, args[6], "grads", 1, wanted, &grads);
    xl_set_dim(&c, 'L', config->layers), xl_set_dim(&c, 'D', config->d);
    xl_stream stream = {.in = xl_in(&c, args[8], "hidden_in?", "BTD"),
                        .out = xl_inout(&c, args[9], "hidden_out?", "BTD"),
                        .compared = xl_in_u8(&c, args[10], "compared?", "L")};
    double scale = xl_double(&c, args[11], "scale");
    double *sums = xl_inout_f64(&c, args[12], "sums", "L2");
    if (c.failed) return xl_end(&c, XL_OK);
    void *work = take_work(&c, args[13], xl_model_align_scratch(&c.ctx, config, &b));
    if (c.failed) return xl_end(&c, XL_OK);
    XL_RUN(&c, xl_model_align(&c.ctx, config, &params, training ? &grads : NULL, &b, &stream, scale,
                              sums, work));
    return xl_end(&c, c.status);
}

/* ---- reading the hidden states ------------------------------------------------------------ */

/* model_logits(config, params, x [N, d], logits [N, V]) */
static PyObject *model_logits(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    xl_call c;
    if (!xl_begin(&c, module, nargs, 4)) return NULL;
    const xl_config *config = take_config(&c, args[0]);
    if (c.failed) return xl_end(&c, XL_OK);
    xl_params params;
    place_params(&c, config, args[1], "params", 0, NULL, &params);
    xl_set_dim(&c, 'D', config->d), xl_set_dim(&c, 'V', config->V);
    const real *x = xl_in(&c, args[2], "x", "ND");
    real *logits = xl_inout(&c, args[3], "logits", "NV");
    ptrdiff_t N = xl_dim(&c, 'N');
    void *scratch = xl_scratch(&c, xl_linear_scratch(&c.ctx, xl_max(N, 0), config->d, config->V));
    if (c.failed) return xl_end(&c, XL_OK);
    XL_RUN(&c, xl_linear_forward(&c.ctx, N, config->d, config->V, logits, x, params.head, NULL,
                                 scratch));
    return xl_end(&c, c.status);
}

/* model_score(config, params, x [N, d], labels [N], nll [N], work) */
static PyObject *model_score(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    xl_call c;
    if (!xl_begin(&c, module, nargs, 6)) return NULL;
    const xl_config *config = take_config(&c, args[0]);
    if (c.failed) return xl_end(&c, XL_OK);
    xl_params params;
    place_params(&c, config, args[1], "params", 0, NULL, &params);
    xl_set_dim(&c, 'D', config->d);
    const real *x = xl_in(&c, args[2], "x", "ND");
    const int32_t *labels = xl_in_i32(&c, args[3], "labels", "N");
    real *nll = xl_inout(&c, args[4], "nll", "N");
    if (c.failed) return xl_end(&c, XL_OK);
    xl_head head = head_args(config, xl_dim(&c, 'N'), 0);
    void *work = take_work(&c, args[5], xl_head_scratch(&c.ctx, &head));
    if (c.failed) return xl_end(&c, XL_OK);
    double sums[3];
    XL_RUN(&c, xl_head_loss(&c.ctx, &head, sums, nll, NULL, NULL, x, params.head, labels, NULL,
                            NULL, work));
    return xl_end(&c, c.status);
}

/* model_topk(config, params, x [N, d], ids [N, k], logp [N, k], mass [N], work) */
static PyObject *model_topk(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    xl_call c;
    if (!xl_begin(&c, module, nargs, 7)) return NULL;
    const xl_config *config = take_config(&c, args[0]);
    if (c.failed) return xl_end(&c, XL_OK);
    xl_params params;
    place_params(&c, config, args[1], "params", 0, NULL, &params);
    xl_set_dim(&c, 'D', config->d);
    const real *x = xl_in(&c, args[2], "x", "ND");
    int32_t *ids = xl_inout_i32(&c, args[3], "ids", "NK");
    real *logp = xl_inout(&c, args[4], "logp", "NK");
    real *mass = xl_inout(&c, args[5], "mass", "N");
    if (c.failed) return xl_end(&c, XL_OK);
    xl_head head = head_args(config, xl_dim(&c, 'N'), xl_dim(&c, 'K'));
    void *work = take_work(&c, args[6], xl_head_scratch(&c.ctx, &head));
    if (c.failed) return xl_end(&c, XL_OK);
    XL_RUN(&c, xl_head_topk(&c.ctx, &head, ids, logp, mass, x, params.head, work));
    return xl_end(&c, c.status);
}

/* model_draws(config, params, x [N, d], uniform f64 [N, k], ids [N, k], counts [N, k], work) */
static PyObject *model_draws(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    xl_call c;
    if (!xl_begin(&c, module, nargs, 7)) return NULL;
    const xl_config *config = take_config(&c, args[0]);
    if (c.failed) return xl_end(&c, XL_OK);
    xl_params params;
    place_params(&c, config, args[1], "params", 0, NULL, &params);
    xl_set_dim(&c, 'D', config->d);
    const real *x = xl_in(&c, args[2], "x", "ND");
    const double *uniform = xl_in_f64(&c, args[3], "uniform", "NK");
    int32_t *ids = xl_inout_i32(&c, args[4], "ids", "NK");
    int32_t *counts = xl_inout_i32(&c, args[5], "counts", "NK");
    if (c.failed) return xl_end(&c, XL_OK);
    xl_head head = head_args(config, xl_dim(&c, 'N'), xl_dim(&c, 'K'));
    void *work = take_work(&c, args[6], xl_head_scratch(&c.ctx, &head));
    if (c.failed) return xl_end(&c, XL_OK);
    XL_RUN(&c, xl_head_draws(&c.ctx, &head, ids, counts, x, params.head, uniform, work));
    return xl_end(&c, c.status);
}

#define MAX_STUDENTS 64

/* model_divergence(config, params, x [N, d] of the teacher, [(config, params, x)] of the students,
 *                  labels [N], kl [S, N], agree [S, N], nll [S, N], teacher_nll [N], work) */
static PyObject *model_divergence(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    xl_call c;
    if (!xl_begin(&c, module, nargs, 10)) return NULL;
    const xl_config *teacher = take_config(&c, args[0]);
    if (c.failed) return xl_end(&c, XL_OK);
    xl_params params;
    place_params(&c, teacher, args[1], "teacher params", 0, NULL, &params);
    xl_mat head_of_teacher = params.head;
    xl_set_dim(&c, 'D', teacher->d);
    const real *tx = xl_in(&c, args[2], "teacher x", "ND"), *x[MAX_STUDENTS];
    xl_mat w[MAX_STUDENTS];
    PyObject *list = args[3];
    if (!PyList_Check(list) || PyList_GET_SIZE(list) > MAX_STUDENTS) {
        PyErr_Format(PyExc_ValueError, "students must be a list of at most %d", MAX_STUDENTS);
        return NULL;
    }
    ptrdiff_t students = PyList_GET_SIZE(list);
    for (ptrdiff_t m = 0; m < students && !c.failed; m++) {
        PyObject *capsule, *flat, *hidden;
        if (!PyArg_ParseTuple(PyList_GET_ITEM(list, m), "OOO", &capsule, &flat, &hidden))
            return NULL;
        const xl_config *config = take_config(&c, capsule);
        if (c.failed) break;
        if (config->V != teacher->V || config->d != teacher->d) {
            PyErr_Format(PyExc_ValueError,
                         "the models differ in vocab_size (%zd, %zd) or hidden_size (%zd, %zd)",
                         (Py_ssize_t)config->V, (Py_ssize_t)teacher->V, (Py_ssize_t)config->d,
                         (Py_ssize_t)teacher->d);
            return NULL;
        }
        place_params(&c, config, flat, "params", 0, NULL, &params);
        w[m] = params.head;
        x[m] = xl_in(&c, hidden, "x", "ND");
    }
    const int32_t *labels = xl_in_i32(&c, args[4], "labels", "N");
    xl_set_dim(&c, 'S', students);
    real *kl = xl_inout(&c, args[5], "kl", "SN"), *agree = xl_inout(&c, args[6], "agree", "SN");
    real *nll = xl_inout(&c, args[7], "nll", "SN"),
         *tnll = xl_inout(&c, args[8], "teacher nll", "N");
    if (c.failed) return xl_end(&c, XL_OK);
    xl_head head = head_args(teacher, xl_dim(&c, 'N'), 0);
    void *work = take_work(&c, args[9], xl_head_scratch(&c.ctx, &head));
    if (c.failed) return xl_end(&c, XL_OK);
    XL_RUN(&c, xl_head_divergence(&c.ctx, &head, students, kl, agree, nll, tnll, x, w, tx,
                                  head_of_teacher, labels, work));
    return xl_end(&c, c.status);
}

#define METHOD(name) {#name, (PyCFunction)(void (*)(void))name, METH_FASTCALL, NULL}
PyMethodDef xl_methods_model[] = {
    METHOD(config_new),  METHOD(plan_list),   METHOD(work_bytes),       METHOD(model_forward),
    METHOD(model_train), METHOD(model_align), METHOD(model_logits),     METHOD(model_score),
    METHOD(model_topk),  METHOD(model_draws), METHOD(model_divergence), {NULL, NULL, 0, NULL},
};
