/* The most multiply-adds that one core does on data that never leaves registers: the peak against
 * which benchmarks state their shares. */
#ifndef XL_PEAK_H
#define XL_PEAK_H

#include "kernels/kernels.h"

/* Runs `rounds` rounds with the vectors of k's instruction set, of operands that are reals, bytes, or bf16
 * where it has such products; returns the number of floating-point operations done. *sink receives a
 * value that depends on all of them. */
double xl_peak_rounds(const xl_kernels *k, xl_dtype operands, ptrdiff_t rounds, real *sink);

#endif
