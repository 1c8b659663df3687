#ifndef XL_OPS_PEAK_H
#define XL_OPS_PEAK_H

#include "base/real.h"
#include "base/status.h"

/* Keeps all threads busy with multiply-adds in registers; *flops receives the number of
 * floating-point operations of all threads together. `rounds` rounds a thread. */
xl_status xl_peak(xl_ctx *ctx, ptrdiff_t rounds, double *flops);

#endif
