/* State of a module: what a context is made from. */
#ifndef XL_MODULE_H
#define XL_MODULE_H

#include "kernels/kernels.h"

typedef struct {
    const xl_kernels *kernels;
    int threads;
} xl_module_state;

int xl_import_numpy(void); /* -1 and a Python error on failure */

#endif
