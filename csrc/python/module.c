/* Assembles _core_f32 and _core_f64 (the same source, see real.h). */
#include "python/binding.h"
#include "python/module.h"

#include <omp.h>

static PyObject *set_threads(PyObject *module, PyObject *arg) {
    long n = PyLong_AsLong(arg);
    if (n == -1 && PyErr_Occurred()) return NULL;
    if (n < 1 || n > 4096)
        return PyErr_Format(PyExc_ValueError, "threads is %ld, expected 1 to 4096", n);
    ((xl_module_state *)PyModule_GetState(module))->threads = (int)n;
    Py_RETURN_NONE;
}

static PyObject *get_threads(PyObject *module, PyObject *Py_UNUSED(unused)) {
    return PyLong_FromLong(((xl_module_state *)PyModule_GetState(module))->threads);
}

static PyObject *set_isa(PyObject *module, PyObject *arg) {
    const char *name = PyUnicode_AsUTF8(arg);
    if (!name) return NULL;
    const xl_kernels *k = xl_select_kernels(name);
    if (!k)
        return PyErr_Format(PyExc_ValueError,
                            "instruction set '%s' is unknown or not supported by this processor",
                            name);
    ((xl_module_state *)PyModule_GetState(module))->kernels = k;
    Py_RETURN_NONE;
}

static PyObject *get_isa(PyObject *module, PyObject *Py_UNUSED(unused)) {
    return PyUnicode_FromString(((xl_module_state *)PyModule_GetState(module))->kernels->name);
}

static PyMethodDef own_methods[] = {
    {"set_threads", set_threads, METH_O, NULL},
    {"threads", get_threads, METH_NOARGS, NULL},
    {"set_isa", set_isa, METH_O, NULL},
    {"isa", get_isa, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static int exec_module(PyObject *module) {
    xl_module_state *state = PyModule_GetState(module);
    state->kernels = xl_select_kernels(NULL);
    state->threads = omp_get_max_threads();
    if (xl_import_numpy() < 0) return -1;
    PyMethodDef *tables[] = {xl_methods_basic, xl_methods_attention, xl_methods_cells,
                             xl_methods_model};
    for (size_t i = 0; i < sizeof tables / sizeof *tables; i++)
        if (PyModule_AddFunctions(module, tables[i]) < 0) return -1;
    return 0;
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, exec_module}, {0, NULL}};

#ifdef XL_REAL_F64
#define MODULE_NAME "_core_f64"
#define MODULE_INIT PyInit__core_f64
#else
#define MODULE_NAME "_core_f32"
#define MODULE_INIT PyInit__core_f32
#endif

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,    .m_name = MODULE_NAME, .m_size = sizeof(xl_module_state),
    .m_methods = own_methods, .m_slots = slots,
};

PyMODINIT_FUNC MODULE_INIT(void) { return PyModuleDef_Init(&definition); }
