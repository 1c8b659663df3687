/* 16 vector registers: 12 sums, 2 columns, 1 broadcast. */
#include "kernels/kernels.h"

#ifdef __x86_64__
#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#define XL_ISA avx2
#define XL_VB 32
#define XL_MR 6
#define XL_NV 2
#include "kernels/body.inc.h"

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
