/* The baseline of the platform (SSE2 on x86-64): runs everywhere, tested everywhere. */
#include "kernels/kernels.h"

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#define XL_ISA generic
#define XL_VB 16
#define XL_MR 4
#define XL_NV 2
#include "kernels/body.inc.h"
