/* avx512bf16.c with the products of bf16 operands and of bytes on the tiles of AMX. */
#include "kernels/kernels.h"

#ifdef __x86_64__
#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(                                                                              \
    __attribute__((target(                                                                                 \
        "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,avx512bf16,avx512vnni,amx-tile,amx-bf16,amx-int8"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target(                                                                                \
    "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,avx512bf16,avx512vnni,amx-tile,amx-bf16,amx-int8")
#endif

#define XL_ISA amx
#define XL_MIXED
#define XL_VNNI
#define XL_AMX
#define XL_VB 64
#define XL_MR 14
#define XL_NV 2
#include "kernels/body.inc.h"

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
