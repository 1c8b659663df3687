#ifndef XL_OPS_PEAK_H
#define XL_OPS_PEAK_H

#include "base/plan.h"
#include "base/real.h"
#include "base/status.h"

/* Keeps all threads busy with multiply-adds in registers; *flops receives the number of
 * floating-point operations of all threads together. `rounds` rounds a thread; operands:
 * XL_DT_REAL, XL_DT_BF16 where there are instructions for it, or XL_DT_I8. */
xl_status xl_peak(xl_ctx *ctx, xl_dtype operands, ptrdiff_t rounds, double *flops);

/* Reads n reals once with all threads, as fast as memory gives them; *largest receives the largest
 * sum of a block, which depends on all of them. */
xl_status xl_stream(xl_ctx *ctx, ptrdiff_t n, const real *x, double *largest);

#endif
