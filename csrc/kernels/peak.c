#include "kernels/peak.h"

#include <string.h>

/* Independent chains: at least latency (4 cycles) x units (2) of them keep the units busy, and 12
 * chains, the factor and the term fit the 16 registers of AVX2. */
#define CHAINS 12

/* x <- x a + b converges to 1 for a = 1 - b: no overflow, no denormals, whatever the number of
 * rounds. The values come as arguments so that nothing can be computed in advance. */
#define PEAK(name, target, bytes)                                                                  \
    target __attribute__((noinline)) static double name(ptrdiff_t rounds, real a, real b,          \
                                                        real *sink) {                              \
        typedef real vec __attribute__((vector_size(bytes)));                                      \
        const vec factor = a - (vec){0}, term = b - (vec){0};                                      \
        vec x[CHAINS];                                                                             \
        for (int i = 0; i < CHAINS; i++) x[i] = factor * (real)i;                                  \
        for (ptrdiff_t r = 0; r < rounds; r++) {                                                   \
            for (int i = 0; i < CHAINS; i++) x[i] = x[i] * factor + term;                          \
        }                                                                                          \
        for (int i = 1; i < CHAINS; i++) x[0] += x[i];                                             \
        *sink = x[0][0];                                                                           \
        return 2.0 * (double)rounds * CHAINS * (double)(bytes / sizeof(real));                     \
    }

PEAK(peak_generic, , 16)
#ifdef __x86_64__
PEAK(peak_avx2, __attribute__((target("avx2,fma"))), 32)
PEAK(peak_avx512, __attribute__((target("avx512f,avx512vl,avx2,fma"))), 64)
#endif

double xl_peak_rounds(const xl_kernels *k, xl_dtype operands, ptrdiff_t rounds, real *sink) {
    if (operands == XL_DT_I8) return k->peak_int8(rounds, sink);
    if (operands == XL_DT_BF16 && k->peak_mixed) return k->peak_mixed(rounds, sink);
    const real b = (real)0.0009765625, a = 1 - b;
#ifdef __x86_64__
    if (!strncmp(k->name, "avx512", 6) || !strcmp(k->name, "amx"))
        return peak_avx512(rounds, a, b, sink);
    if (!strcmp(k->name, "avx2")) return peak_avx2(rounds, a, b, sink);
#endif
    return peak_generic(rounds, a, b, sink);
}
