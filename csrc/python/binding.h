/* Shared by the binding files. Functions only, METH_FASTCALL, positional arguments; the public,
 * documented functions are in xlstm_distill/ops.py and model.py. arrays.c is the only file that
 * knows NumPy.
 *
 * Pattern of every function:
 *     xl_call c;                               dims and buffers of this call
 *     if (!xl_begin(&c, module, nargs, want)) return NULL;
 *     real *x = xl_in(&c, args[0], "x", "ND"); letters name dimensions: first use binds, later checks
 *     real *y = xl_inout(&c, args[1], "y", "ND");
 *     if (c.failed) return xl_end(&c, XL_OK);
 *     void *scratch = xl_scratch(&c, bytes);
 *     XL_RUN(&c, op(&c.ctx, ...));             releases the GIL around the one core call
 *     return xl_end(&c, c.status);             maps the status; None on success */
#ifndef XL_BINDING_H
#define XL_BINDING_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "base/plan.h"
#include "base/real.h"
#include "base/status.h"

typedef struct {
    xl_ctx ctx;
    ptrdiff_t dim[128]; /* size bound to a letter, -1: not bound */
    PyThreadState *thread;
    xl_status status;
    void *scratch;
    int failed; /* a Python error is set */
    double next_poll;
} xl_call;

/* Prepares the context (kernels, threads, poll); fails unless nargs == want. Returns 0 on failure. */
int xl_begin(xl_call *c, PyObject *module, Py_ssize_t nargs, Py_ssize_t want);
ptrdiff_t xl_dim(const xl_call *c, char letter);
void xl_set_dim(xl_call *c, char letter, ptrdiff_t value);

/* C-contiguous, aligned array of `real` with the shape named by letters; A digit among the letters
 * is that size. None gives NULL where the name ends in '?'. Inputs and outputs must not overlap (the caller of the module allocates). */
real *xl_in(xl_call *c, PyObject *obj, const char *name, const char *letters);
real *xl_inout(xl_call *c, PyObject *obj, const char *name, const char *letters); /* writeable */
int32_t *xl_in_i32(xl_call *c, PyObject *obj, const char *name, const char *letters);
int32_t *xl_inout_i32(xl_call *c, PyObject *obj, const char *name, const char *letters);
uint8_t *xl_in_u8(xl_call *c, PyObject *obj, const char *name, const char *letters); /* bool too */
double *xl_in_f64(xl_call *c, PyObject *obj, const char *name, const char *letters);
double *xl_inout_f64(xl_call *c, PyObject *obj, const char *name, const char *letters);
ptrdiff_t xl_int(xl_call *c, PyObject *obj, const char *name, ptrdiff_t low, ptrdiff_t high);
double xl_double(xl_call *c, PyObject *obj, const char *name);
/* raw writeable bytes of any contiguous array; *size receives the number of bytes */
void *xl_bytes(xl_call *c, PyObject *obj, const char *name, int writeable, ptrdiff_t *size);
/* 64-byte aligned memory that lives until xl_end; NULL and failed on MemoryError (or bytes < 0) */
void *xl_scratch(xl_call *c, ptrdiff_t bytes);

#define XL_RUN(c, op)                                                                              \
    do {                                                                                           \
        (c)->thread = PyEval_SaveThread();                                                         \
        (c)->status = (op);                                                                        \
        PyEval_RestoreThread((c)->thread);                                                         \
    } while (0)

/* Frees scratch, maps the status to an exception (NULL) or returns None. */
PyObject *xl_end(xl_call *c, xl_status status);

/* Method tables of the binding files, joined in module.c. */
extern PyMethodDef xl_methods_basic[];     /* bind_basic.c: linear ... merge */
extern PyMethodDef xl_methods_attention[]; /* bind_attention.c: attention, feature map, gates */
extern PyMethodDef xl_methods_cells[];     /* bind_cells.c: mLSTM, sLSTM */
extern PyMethodDef xl_methods_model[];     /* bind_model.c */

#endif
