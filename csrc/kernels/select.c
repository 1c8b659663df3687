/* Picks the kernels at run time. __builtin_cpu_supports asks processor and operating system. */
#include "kernels/kernels.h"

#include <string.h>

const xl_kernels *xl_select_kernels(const char *name) {
#ifdef __x86_64__
    if ((!name || !strcmp(name, "avx512")) && __builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
        return &xl_kernels_avx512;
    if ((!name || !strcmp(name, "avx2")) && __builtin_cpu_supports("avx2") &&
        __builtin_cpu_supports("fma"))
        return &xl_kernels_avx2;
#endif
    if (!name || !strcmp(name, "generic")) return &xl_kernels_generic;
    return NULL;
}
