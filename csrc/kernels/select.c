/* Picks the kernels at run time. __builtin_cpu_supports asks processor and operating system. */
#include "kernels/kernels.h"

#include <string.h>

#ifdef __x86_64__
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Bits that compilers know by different names, or not at all: leaf 7 of cpuid. */
static int cpu_has(unsigned subleaf, int in_edx, unsigned bit) {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, subleaf, &a, &b, &c, &d)) return 0;
    return ((in_edx ? d : a) >> bit) & 1;
}

static int has_avx512(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("fma");
}
static int has_avx512bf16(void) {
    return has_avx512() && cpu_has(1, 0, 5) && __builtin_cpu_supports("avx512vnni");
}
/* Intel's vdpbf16ps does half the products a cycle that its float32 multiply-adds do: docs/speed.md */
static int pairs_pay(void) { return __builtin_cpu_is("amd"); }
/* The state of the tiles is large: Linux gives it to a process that asks once. */
static int has_amx(void) {
#ifdef __linux__
    const long request_permission = 0x1023, tile_data = 18; /* asm/prctl.h, XFEATURE_XTILEDATA */
    return has_avx512bf16() && cpu_has(0, 1, 22) && cpu_has(0, 1, 24) && cpu_has(0, 1, 25) &&
           syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return 0;
#endif
}
static int has_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
#endif
static int always(void) { return 1; }

/* best first; `pays`: whether to take it unasked */
static const struct {
    const xl_kernels *kernels;
    int (*supported)(void), (*pays)(void);
} tables[] = {
#ifdef __x86_64__
    {&xl_kernels_amx, has_amx, always},       {&xl_kernels_avx512bf16, has_avx512bf16, pairs_pay},
    {&xl_kernels_avx512, has_avx512, always}, {&xl_kernels_avx2, has_avx2, always},
#endif
    {&xl_kernels_generic, always, always},
};

const xl_kernels *xl_select_kernels(const char *name) {
    for (size_t i = 0; i < sizeof tables / sizeof *tables; i++)
        if ((name ? !strcmp(name, tables[i].kernels->name) : tables[i].pays()) &&
            tables[i].supported())
            return tables[i].kernels;
    return NULL;
}
