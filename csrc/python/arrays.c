/* The one file that knows NumPy: checks arrays against dimension letters, maps statuses. */
#include "python/binding.h"

#define NPY_NO_DEPRECATED_API NPY_1_7_API_VERSION
#define PY_ARRAY_UNIQUE_SYMBOL xl_array_api
#include <numpy/arrayobject.h>

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/plan.h"
#include "kernels/kernels.h"
#include "python/module.h"

#ifdef XL_REAL_F64
#define XL_NPY_REAL NPY_FLOAT64
#define XL_REAL_NAME "float64"
#else
#define XL_NPY_REAL NPY_FLOAT32
#define XL_REAL_NAME "float32"
#endif

int xl_import_numpy(void) {
    import_array1(-1);
    return 0;
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Runs between blocks while the GIL is released: takes it back at most 20 times a second to see
 * whether Ctrl-C was pressed. */
static int poll_signals(void *arg) {
    xl_call *c = arg;
    if (now() < c->next_poll) return 0;
    PyEval_RestoreThread(c->thread);
    int stop = PyErr_CheckSignals() != 0;
    c->thread = PyEval_SaveThread();
    c->next_poll = now() + 0.05;
    return stop;
}

int xl_begin(xl_call *c, PyObject *module, Py_ssize_t nargs, Py_ssize_t want) {
    memset(c, 0, sizeof *c);
    for (int i = 0; i < 128; i++) c->dim[i] = -1;
    if (nargs != want) {
        PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", want, nargs);
        c->failed = 1;
        return 0;
    }
    const xl_module_state *state = PyModule_GetState(module);
    c->ctx.k = state->kernels;
    c->ctx.threads = state->threads;
    c->ctx.poll = poll_signals;
    c->ctx.poll_arg = c;
    c->next_poll = now() + 0.05;
    return 1;
}

ptrdiff_t xl_dim(const xl_call *c, char letter) { return c->dim[(unsigned char)letter & 127]; }
void xl_set_dim(xl_call *c, char letter, ptrdiff_t v) { c->dim[(unsigned char)letter & 127] = v; }

static int is_optional(const char *name) { return name[strlen(name) - 1] == '?'; }

static int fail(xl_call *c) {
    c->failed = 1;
    return 0;
}

/* Checks type, layout and shape of an array; binds the letters. */
static void *take_array(xl_call *c, PyObject *obj, const char *name, const char *letters, int type,
                        int other_type, const char *type_name, int writeable) {
    if (c->failed) return NULL;
    if (obj == Py_None && is_optional(name)) return NULL;
    char bare[64]; /* the name as messages show it, without '?' */
    snprintf(bare, sizeof bare, "%.*s", (int)strlen(name) - is_optional(name), name);
    if (!PyArray_Check(obj)) {
        PyErr_Format(PyExc_TypeError, "%s is a %s, expected a NumPy array", bare,
                     Py_TYPE(obj)->tp_name);
        return fail(c), NULL;
    }
    PyArrayObject *a = (PyArrayObject *)obj;
    if (PyArray_TYPE(a) != type && PyArray_TYPE(a) != other_type) {
        PyErr_Format(PyExc_TypeError, "%s has dtype %S, expected %s", bare,
                     (PyObject *)PyArray_DESCR(a), type_name);
        return fail(c), NULL;
    }
    if (!PyArray_IS_C_CONTIGUOUS(a) || !PyArray_ISALIGNED(a) || !PyArray_ISNOTSWAPPED(a) ||
        (writeable && !PyArray_ISWRITEABLE(a))) {
        PyErr_Format(PyExc_ValueError, "%s must be contiguous%s", bare,
                     writeable ? " and writeable" : "");
        return fail(c), NULL;
    }
    int ndim = (int)strlen(letters);
    if (PyArray_NDIM(a) != ndim) {
        PyErr_Format(PyExc_ValueError, "%s has %d dimensions, expected %d [%s]", bare,
                     PyArray_NDIM(a), ndim, letters);
        return fail(c), NULL;
    }
    for (int i = 0; i < ndim; i++) {
        unsigned char letter = (unsigned char)letters[i] & 127;
        ptrdiff_t found = PyArray_DIM(a, i);
        ptrdiff_t want = isdigit(letter) ? letter - '0' : c->dim[letter];
        if (want < 0) c->dim[letter] = want = found;
        if (want != found) {
            PyErr_Format(PyExc_ValueError,
                         "%s: size %zd in dimension %d (%c of [%s]), expected %zd", bare,
                         (Py_ssize_t)found, i, letter, letters, (Py_ssize_t)want);
            return fail(c), NULL;
        }
    }
    return PyArray_DATA(a);
}

real *xl_in(xl_call *c, PyObject *o, const char *name, const char *letters) {
    return take_array(c, o, name, letters, XL_NPY_REAL, XL_NPY_REAL, XL_REAL_NAME, 0);
}
real *xl_inout(xl_call *c, PyObject *o, const char *name, const char *letters) {
    return take_array(c, o, name, letters, XL_NPY_REAL, XL_NPY_REAL, XL_REAL_NAME, 1);
}
int32_t *xl_in_i32(xl_call *c, PyObject *o, const char *name, const char *letters) {
    return take_array(c, o, name, letters, NPY_INT32, NPY_INT32, "int32", 0);
}
int32_t *xl_inout_i32(xl_call *c, PyObject *o, const char *name, const char *letters) {
    return take_array(c, o, name, letters, NPY_INT32, NPY_INT32, "int32", 1);
}
uint8_t *xl_in_u8(xl_call *c, PyObject *o, const char *name, const char *letters) {
    return take_array(c, o, name, letters, NPY_BOOL, NPY_UINT8, "bool", 0);
}
double *xl_in_f64(xl_call *c, PyObject *o, const char *name, const char *letters) {
    return take_array(c, o, name, letters, NPY_FLOAT64, NPY_FLOAT64, "float64", 0);
}
double *xl_inout_f64(xl_call *c, PyObject *o, const char *name, const char *letters) {
    return take_array(c, o, name, letters, NPY_FLOAT64, NPY_FLOAT64, "float64", 1);
}

ptrdiff_t xl_int(xl_call *c, PyObject *obj, const char *name, ptrdiff_t low, ptrdiff_t high) {
    if (c->failed) return 0;
    Py_ssize_t v = PyNumber_AsSsize_t(obj, PyExc_OverflowError);
    if (v == -1 && PyErr_Occurred()) return fail(c);
    if (v < low || v > high) {
        PyErr_Format(PyExc_ValueError, "%s is %zd, expected %zd to %zd", name, v, (Py_ssize_t)low,
                     (Py_ssize_t)high);
        return fail(c);
    }
    return v;
}

double xl_double(xl_call *c, PyObject *obj, const char *name) {
    if (c->failed) return 0;
    double v = PyFloat_AsDouble(obj);
    if (v == -1 && PyErr_Occurred()) {
        PyErr_Format(PyExc_TypeError, "%s is a %s, expected a number", name, Py_TYPE(obj)->tp_name);
        return fail(c);
    }
    return v;
}

void *xl_bytes(xl_call *c, PyObject *obj, const char *name, int writeable, ptrdiff_t *size) {
    if (c->failed) return NULL;
    *size = 0;
    if (obj == Py_None && is_optional(name)) return NULL;
    if (!PyArray_Check(obj) || !PyArray_IS_C_CONTIGUOUS((PyArrayObject *)obj) ||
        (writeable && !PyArray_ISWRITEABLE((PyArrayObject *)obj))) {
        PyErr_Format(PyExc_TypeError, "%s must be a contiguous%s NumPy array", name,
                     writeable ? ", writeable" : "");
        return fail(c), NULL;
    }
    PyArrayObject *a = (PyArrayObject *)obj;
    if ((uintptr_t)PyArray_DATA(a) % XL_PLAN_ALIGN) {
        PyErr_Format(PyExc_ValueError, "%s is not aligned to %d bytes", name, XL_PLAN_ALIGN);
        return fail(c), NULL;
    }
    *size = PyArray_NBYTES(a);
    return PyArray_DATA(a);
}

void *xl_scratch(xl_call *c, ptrdiff_t bytes) {
    if (c->failed) return NULL;
    if (bytes >= 0 && bytes <= PTRDIFF_MAX - 2 * XL_PLAN_ALIGN)
        c->scratch = aligned_alloc(XL_PLAN_ALIGN, (size_t)xl_round_up(bytes + 1, XL_PLAN_ALIGN));
    if (!c->scratch) {
        PyErr_Format(PyExc_MemoryError, "no memory for %zd bytes of scratch", (Py_ssize_t)bytes);
        return fail(c), NULL;
    }
    return c->scratch;
}

PyObject *xl_end(xl_call *c, xl_status status) {
    free(c->scratch);
    c->scratch = NULL;
    if (c->failed) return NULL;
    switch (status) {
    case XL_OK: Py_RETURN_NONE;
    case XL_TYPE: PyErr_SetString(PyExc_TypeError, c->ctx.message); break;
    case XL_VALUE: PyErr_SetString(PyExc_ValueError, c->ctx.message); break;
    case XL_MEMORY: PyErr_SetString(PyExc_MemoryError, c->ctx.message); break;
    case XL_FLOATING: PyErr_SetString(PyExc_FloatingPointError, c->ctx.message); break;
    case XL_INTERRUPTED:
        if (!PyErr_Occurred()) PyErr_SetNone(PyExc_KeyboardInterrupt);
        break;
    }
    return NULL;
}
