/* Every kernel, once. Included by generic.c, avx2.c, ... after they have set the target and
 *     XL_ISA   name of the table          XL_VB   bytes of a vector
 *     XL_MR    rows of the register tile  XL_NV   vectors in a row of the tile
 *     XL_MIXED products of bf16 operands too, XL_VNNI vpdpbusd for those of bytes, XL_AMX both on
 *              tiles of AMX
 * Written in GCC/Clang vector extensions, so the same text serves every target; intrinsics only in
 * mixed.inc.h and int8.inc.h. */

#ifdef XL_REAL_F64
#define XL_LANES (XL_VB / 8)
#else
#define XL_LANES (XL_VB / 4)
#endif
#define VL ((ptrdiff_t)XL_LANES)
#define NR (XL_NV * VL)

typedef real vec __attribute__((vector_size(XL_VB)));
typedef real vec_u __attribute__((vector_size(XL_VB), aligned(sizeof(real)), may_alias));
#ifdef XL_REAL_F64
typedef int64_t ivec __attribute__((vector_size(XL_VB)));
#define SQRT __builtin_sqrt
#else
typedef int32_t ivec __attribute__((vector_size(XL_VB)));
#define SQRT __builtin_sqrtf
#endif

#define INLINE static inline __attribute__((always_inline))

INLINE vec load(const real *p) { return *(const vec_u *)p; }
INLINE void store(real *p, vec x) { *(vec_u *)p = x; }
INLINE vec splat(real x) { return x - (vec){0}; }
INLINE vec blend(ivec mask, vec a, vec b) { return (vec)((mask & (ivec)a) | (~mask & (ivec)b)); }

/* Lanes are added in halves. The order depends on the length of a vector: results may differ between
 * instruction sets, never within one. memcpy of half a register is one instruction or none. */
typedef real vec4 __attribute__((vector_size(4 * sizeof(real))));
typedef real vec8 __attribute__((vector_size(8 * sizeof(real))));
INLINE real lanes_sum4(vec4 x) { return (x[0] + x[2]) + (x[1] + x[3]); }
INLINE real lanes_sum8(vec8 x) {
    vec4 half[2];
    __builtin_memcpy(half, &x, sizeof half);
    return lanes_sum4(half[0] + half[1]);
}
INLINE real lanes_sum(vec x) {
#if XL_LANES == 16
    vec8 half[2];
    __builtin_memcpy(half, &x, sizeof half);
    return lanes_sum8(half[0] + half[1]);
#elif XL_LANES == 8
    return lanes_sum8(x);
#elif XL_LANES == 4
    return lanes_sum4(x);
#else
    return x[0] + x[1];
#endif
}

/* ---- matrix product ---------------------------------------------------------------------- */

#define PACK_K 16

static void pack_b(ptrdiff_t kc, ptrdiff_t n, const real *b, ptrdiff_t rsb, ptrdiff_t csb,
                   real *out) {
    for (ptrdiff_t j0 = 0; j0 < n; j0 += NR, out += kc * NR) {
        ptrdiff_t w = xl_min(NR, n - j0);
        const real *p = b + j0 * csb;
        if (csb == 1 && w == NR) {
            for (ptrdiff_t k = 0; k < kc; k++)
                for (ptrdiff_t j = 0; j < NR; j += VL)
                    store(out + k * NR + j, load(p + k * rsb + j));
            continue;
        }
        /* A transposition, in pieces whose reads and writes stay in the first cache. */
        for (ptrdiff_t k0 = 0; k0 < kc; k0 += PACK_K) {
            ptrdiff_t k1 = xl_min(kc, k0 + PACK_K);
            for (ptrdiff_t j = 0; j < w; j++)
                for (ptrdiff_t k = k0; k < k1; k++) out[k * NR + j] = p[k * rsb + j * csb];
        }
        for (ptrdiff_t j = w; j < NR; j++)
            for (ptrdiff_t k = 0; k < kc; k++) out[k * NR + j] = 0;
    }
}

/* A(i,k) of XL_MR rows into [k][XL_MR], rows from m on are zeros. */
INLINE void pack_a(ptrdiff_t m, ptrdiff_t kc, const real *a, ptrdiff_t rsa, ptrdiff_t csa,
                   real *out) {
    if (m == XL_MR) {
        for (ptrdiff_t k = 0; k < kc; k++)
            for (ptrdiff_t i = 0; i < XL_MR; i++) out[k * XL_MR + i] = a[i * rsa + k * csa];
        return;
    }
    for (ptrdiff_t k = 0; k < kc; k++)
        for (ptrdiff_t i = 0; i < XL_MR; i++)
            out[k * XL_MR + i] = i < m ? a[i * rsa + k * csa] : (real)0;
}

/* A(i,k) = a[i * rsa + k * csa], packed or in place. */
INLINE void tile(ptrdiff_t kc, const real *a, ptrdiff_t rsa, ptrdiff_t csa, const real *b,
                 vec acc[XL_MR][XL_NV]) {
    for (int i = 0; i < XL_MR; i++)
        for (int j = 0; j < XL_NV; j++) acc[i][j] = (vec){0};
    for (ptrdiff_t k = 0; k < kc; k++, a += csa, b += NR) {
        vec bk[XL_NV];
        for (int j = 0; j < XL_NV; j++) bk[j] = load(b + j * VL);
        for (int i = 0; i < XL_MR; i++)
            for (int j = 0; j < XL_NV; j++) acc[i][j] += a[i * rsa] * bk[j];
    }
}

static void gemm_packed(ptrdiff_t m, ptrdiff_t n, ptrdiff_t kc, real alpha, const real *a,
                        ptrdiff_t rsa, ptrdiff_t csa, const real *packed, real beta, real *c,
                        ptrdiff_t ldc, real *apack) {
    for (ptrdiff_t i0 = 0; i0 < m; i0 += XL_MR) {
        ptrdiff_t h = xl_min(XL_MR, m - i0);
        /* A whole tile is read in place, unless its rows would compete for the same cache lines. */
        int direct = h == XL_MR && rsa * (ptrdiff_t)sizeof(real) % 4096 != 0;
        if (!direct) pack_a(h, kc, a + i0 * rsa, rsa, csa, apack);
        for (ptrdiff_t j0 = 0; j0 < n; j0 += NR) {
            ptrdiff_t w = xl_min(NR, n - j0);
            vec acc[XL_MR][XL_NV];
            if (direct)
                tile(kc, a + i0 * rsa, rsa, csa, packed + j0 * kc, acc);
            else
                tile(kc, apack, 1, XL_MR, packed + j0 * kc, acc);
            real *out = c + i0 * ldc + j0;
            if (h == XL_MR && w == NR) {
                for (int i = 0; i < XL_MR; i++)
                    for (int j = 0; j < XL_NV; j++) {
                        real *p = out + i * ldc + j * VL;
                        vec r = alpha * acc[i][j];
                        store(p, beta == 0 ? r : r + beta * load(p));
                    }
                continue;
            }
            real edge[XL_MR * NR];
            for (int i = 0; i < XL_MR; i++)
                for (int j = 0; j < XL_NV; j++) store(edge + i * NR + j * VL, alpha * acc[i][j]);
            for (ptrdiff_t i = 0; i < h; i++)
                for (ptrdiff_t j = 0; j < w; j++) {
                    real *p = out + i * ldc + j, r = edge[i * NR + j];
                    *p = beta == 0 ? r : r + beta * *p;
                }
        }
    }
}

static void gemm(ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, real alpha, const real *a, ptrdiff_t rsa,
                 ptrdiff_t csa, const real *b, ptrdiff_t rsb, ptrdiff_t csb, real beta, real *c,
                 ptrdiff_t ldc, real *pack) {
    real *apack = pack + XL_GEMM_KC * XL_GEMM_NC;
    for (ptrdiff_t j0 = 0; j0 < n; j0 += XL_GEMM_NC) {
        ptrdiff_t w = xl_min(XL_GEMM_NC, n - j0);
        for (ptrdiff_t k0 = 0; k0 == 0 || k0 < k; k0 += XL_GEMM_KC) {
            ptrdiff_t kc = xl_min(XL_GEMM_KC, k - k0);
            pack_b(kc, w, b + k0 * rsb + j0 * csb, rsb, csb, pack);
            gemm_packed(m, w, kc, alpha, a + k0 * csa, rsa, csa, pack, k0 ? (real)1 : beta, c + j0,
                        ldc, apack);
        }
    }
}

/* The last, partial vector of a row, filled up with zeros. */
INLINE vec load_part(const real *p, ptrdiff_t n) {
    vec x = {0};
    for (ptrdiff_t l = 0; l < n; l++) x[l] = p[l];
    return x;
}
INLINE void store_part(real *p, ptrdiff_t n, vec x) {
    for (ptrdiff_t l = 0; l < n; l++) p[l] = x[l];
}

/* ---- dot products ------------------------------------------------------------------------- */

/* A tile of rows of x and rows of w keeps all its sums in registers; `rows` and `count` are constants
 * here. Decoding waits for memory: rows of w are asked for some tiles ahead, into the second cache (the
 * first would lose them again). */
#define DOT_AHEAD 16
#define DOT_X (XL_VB == 64 ? 4 : 2)
INLINE void dots_tile(ptrdiff_t n, const int rows, const real *x, ptrdiff_t ldx, const int count,
                      const real *w, ptrdiff_t ldw, real *y) {
    vec s[DOT_X][XL_DOTS], wi[XL_DOTS];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < count; c++) s[r][c] = (vec){0};
    ptrdiff_t i = 0;
    for (; i + VL <= n; i += VL) {
        for (int c = 0; c < count; c++) {
            __builtin_prefetch(w + (DOT_AHEAD + c) * ldw + i, 0, 2);
            wi[c] = load(w + c * ldw + i);
        }
        for (int r = 0; r < rows; r++) {
            vec xi = load(x + r * ldx + i);
            for (int c = 0; c < count; c++) s[r][c] += wi[c] * xi;
        }
    }
    if (i < n) { /* as a vector too: a scalar loop may round otherwise in another tile */
        for (int c = 0; c < count; c++) wi[c] = load_part(w + c * ldw + i, n - i);
        for (int r = 0; r < rows; r++) {
            vec xi = load_part(x + r * ldx + i, n - i);
            for (int c = 0; c < count; c++) s[r][c] += wi[c] * xi;
        }
    }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < count; c++) y[r * XL_DOTS + c] = lanes_sum(s[r][c]);
}

/* All rows of x by tiles of DOT_X, with whole tiles of w; else one by one. */
static void dots(ptrdiff_t n, ptrdiff_t rows, const real *x, ptrdiff_t ldx, ptrdiff_t count,
                 const real *w, ptrdiff_t ldw, real *y) {
    ptrdiff_t r = 0;
    if (count == XL_DOTS) {
        for (; r + DOT_X <= rows; r += DOT_X)
            dots_tile(n, DOT_X, x + r * ldx, ldx, XL_DOTS, w, ldw, y + r * XL_DOTS);
        for (; r < rows; r++) dots_tile(n, 1, x + r * ldx, ldx, XL_DOTS, w, ldw, y + r * XL_DOTS);
        return;
    }
    for (; r < rows; r++)
        for (ptrdiff_t c = 0; c < count; c++)
            dots_tile(n, 1, x + r * ldx, ldx, 1, w + c * ldw, ldw, y + r * XL_DOTS + c);
}

/* ---- matrices in panels ------------------------------------------------------------------- */

#define PANEL_VECTORS (XL_PANEL / XL_LANES)

/* What XL_LANES rows of a panel have in a word: 2 entries. */
typedef struct {
    vec at[2];
} word;

#ifdef XL_REAL_F64
INLINE word widen_bf16(const xl_bf16 *p) {
    word x;
    for (int l = 0; l < XL_LANES; l++)
        for (int k = 0; k < 2; k++) x.at[k][l] = (real)xl_bf16_widen(p[2 * l + k]);
    return x;
}
#else
typedef uint32_t uvec __attribute__((vector_size(XL_VB)));
typedef uint32_t uvec_u __attribute__((vector_size(XL_VB), aligned(1), may_alias));
INLINE word widen_bf16(const xl_bf16 *p) {
    uvec x = *(const uvec_u *)p;
    return (word){{(vec)(x << 16), (vec)(x & 0xffff0000u)}};
}
#endif

static void pack_b_panels(ptrdiff_t kc, ptrdiff_t n, const xl_bf16 *panels, ptrdiff_t depth,
                          real *out) {
    for (ptrdiff_t j0 = 0; j0 < n; j0 += NR, out += kc * NR)
        for (ptrdiff_t j = j0; j < j0 + NR; j += VL) {
            const xl_bf16 *p = panels + j / XL_PANEL * XL_PANEL * depth + j % XL_PANEL * 2;
            for (ptrdiff_t k = 0; k < kc; k += 2, p += 2 * XL_PANEL) {
                word x = widen_bf16(p);
                for (ptrdiff_t i = k; i < xl_min(kc, k + 2); i++)
                    store(out + i * NR + j - j0, x.at[i - k]);
            }
        }
}

/* Bytes of memory that are asked for ahead of their use. */
#define PANEL_AHEAD 4096

/* `rows` is a constant where this is called. */
INLINE void dots_panel_rows(ptrdiff_t n, const int rows, const real *x, ptrdiff_t ldx,
                            const xl_bf16 *w, real *y) {
    vec s[DOT_X][PANEL_VECTORS];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < PANEL_VECTORS; v++) s[r][v] = (vec){0};
    ptrdiff_t k = 0;
    for (; k + 2 <= n; k += 2, w += 2 * XL_PANEL) {
        __builtin_prefetch((const char *)w + PANEL_AHEAD, 0, 2);
        __builtin_prefetch((const char *)w + PANEL_AHEAD + 64, 0, 2);
        for (int v = 0; v < PANEL_VECTORS; v++) {
            word wk = widen_bf16(w + v * 2 * VL);
            for (int i = 0; i < 2; i++)
                for (int r = 0; r < rows; r++) s[r][v] += wk.at[i] * x[r * ldx + k + i];
        }
    }
    for (int v = 0; v < PANEL_VECTORS && k < n; v++) {
        word wk = widen_bf16(w + v * 2 * VL);
        for (int r = 0; r < rows; r++) s[r][v] += wk.at[0] * x[r * ldx + k];
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < PANEL_VECTORS; v++) store(y + r * XL_PANEL + v * VL, s[r][v]);
}

static void dots_panel(ptrdiff_t n, ptrdiff_t rows, const real *x, ptrdiff_t ldx,
                       const xl_bf16 *panel, real *y) {
    ptrdiff_t r = 0;
    for (; r + DOT_X <= rows; r += DOT_X)
        dots_panel_rows(n, DOT_X, x + r * ldx, ldx, panel, y + r * XL_PANEL);
    for (; r < rows; r++) dots_panel_rows(n, 1, x + r * ldx, ldx, panel, y + r * XL_PANEL);
}

/* ---- sums --------------------------------------------------------------------------------- */

static real dot(ptrdiff_t n, const real *x, const real *y) {
    vec s[4] = {{0}, {0}, {0}, {0}};
    ptrdiff_t i = 0;
    for (; i + 4 * VL <= n; i += 4 * VL)
        for (int j = 0; j < 4; j++) s[j] += load(x + i + j * VL) * load(y + i + j * VL);
    real r = lanes_sum((s[0] + s[1]) + (s[2] + s[3]));
    for (; i < n; i++) r += x[i] * y[i];
    return r;
}

static real sum(ptrdiff_t n, const real *x) {
    vec s[4] = {{0}, {0}, {0}, {0}};
    ptrdiff_t i = 0;
    for (; i + 4 * VL <= n; i += 4 * VL)
        for (int j = 0; j < 4; j++) s[j] += load(x + i + j * VL);
    real r = lanes_sum((s[0] + s[1]) + (s[2] + s[3]));
    for (; i < n; i++) r += x[i];
    return r;
}

/* x != x is how a NaN is found: a plain maximum would lose it. */
static real max(ptrdiff_t n, const real *x) {
    vec m = splat(-INFINITY), bad = {0};
    ptrdiff_t i = 0;
    for (; i + VL <= n; i += VL) {
        vec v = load(x + i);
        m = blend(v > m, v, m);
        bad += blend(v != v, v, (vec){0});
    }
    real r = -INFINITY, nan = lanes_sum(bad);
    for (ptrdiff_t l = 0; l < VL; l++) r = m[l] > r ? m[l] : r;
    for (; i < n; i++) {
        r = x[i] > r ? x[i] : r;
        if (x[i] != x[i]) nan = x[i];
    }
    return nan != nan ? nan : r;
}

static double sumsq(ptrdiff_t n, const real *x) {
    double s[8] = {0};
    ptrdiff_t i = 0;
    for (; i + 8 <= n; i += 8)
        for (int j = 0; j < 8; j++) s[j] += (double)x[i + j] * (double)x[i + j];
    double r = ((s[0] + s[4]) + (s[1] + s[5])) + ((s[2] + s[6]) + (s[3] + s[7]));
    for (; i < n; i++) r += (double)x[i] * (double)x[i];
    return r;
}

static void axpy(ptrdiff_t n, real a, const real *x, real *y) {
    for (ptrdiff_t i = 0; i < n; i++) y[i] += a * x[i];
}
/* y stays in registers for all rows */
static void axpys(ptrdiff_t n, ptrdiff_t rows, const real *a, const real *x, ptrdiff_t ldx,
                  real *y) {
    ptrdiff_t i = 0;
    for (; i + 4 * VL <= n; i += 4 * VL) {
        vec s[4];
        for (int j = 0; j < 4; j++) s[j] = load(y + i + j * VL);
        for (ptrdiff_t r = 0; r < rows; r++)
            for (int j = 0; j < 4; j++) s[j] += a[r] * load(x + r * ldx + i + j * VL);
        for (int j = 0; j < 4; j++) store(y + i + j * VL, s[j]);
    }
    for (; i + VL <= n; i += VL) {
        vec s = load(y + i);
        for (ptrdiff_t r = 0; r < rows; r++) s += a[r] * load(x + r * ldx + i);
        store(y + i, s);
    }
    for (; i < n; i++)
        for (ptrdiff_t r = 0; r < rows; r++) y[i] += a[r] * x[r * ldx + i];
}
static void scale(ptrdiff_t n, real a, real *x) {
    for (ptrdiff_t i = 0; i < n; i++) x[i] *= a;
}
static void add(ptrdiff_t n, const real *x, real *y) {
    for (ptrdiff_t i = 0; i < n; i++) y[i] += x[i];
}
static void mul_add(ptrdiff_t n, const real *x, const real *y, real *z) {
    for (ptrdiff_t i = 0; i < n; i++) z[i] += x[i] * y[i];
}

/* ---- exponentials ------------------------------------------------------------------------- */

/* exp(x) = 2^n e^r, |r| <= ln2/2, Taylor polynomial of e^r (its remainder is below half an ulp).
 * n is rounded by adding 1.5 * 2^mantissa; 2^(n-1) is built in the exponent bits and doubled at
 * the end, so that results up to the largest finite number come out. Below EXP_LOW the result
 * would be denormal and is 0. A NaN passes through: every comparison is false for it. */
#ifdef XL_REAL_F64
#define EXP_LOW (-707.0)
#define EXP_HIGH 710.0
#define EXP_ROUND 6755399441055744.0
#define LN2_HIGH 6.93147180369123816490e-01
#define LN2_LOW 1.90821492927058770002e-10
#define EXP_BIAS 1022
#define EXP_SHIFT 52
#define EXP_TERMS 13
#else
#define EXP_LOW (-86.5f)
#define EXP_HIGH 89.0f
#define EXP_ROUND 12582912.0f
#define LN2_HIGH 0.693359375f
#define LN2_LOW (-2.12194440e-4f)
#define EXP_BIAS 126
#define EXP_SHIFT 23
#define EXP_TERMS 7
#endif
/* 1/k! for k = 0 .. 13 */
static const real XL_EXP_COEFF[14] = {(real)1,
                                      (real)1,
                                      (real)0.5,
                                      (real)0.16666666666666666667,
                                      (real)0.041666666666666666667,
                                      (real)0.0083333333333333333333,
                                      (real)0.0013888888888888888889,
                                      (real)0.00019841269841269841270,
                                      (real)2.4801587301587301587e-05,
                                      (real)2.7557319223985890653e-06,
                                      (real)2.7557319223985890653e-07,
                                      (real)2.5052108385441718775e-08,
                                      (real)2.0876756987868098979e-09,
                                      (real)1.6059043836821614599e-10};

INLINE vec vexp(vec x) {
    ivec tiny = x < (real)EXP_LOW;
    x = blend(tiny, splat((real)EXP_LOW), x);
    x = blend(x > (real)EXP_HIGH, splat((real)EXP_HIGH), x);
    vec shifted = x * (real)1.44269504088896340736 + (real)EXP_ROUND;
    vec n = shifted - (real)EXP_ROUND;
    vec r = x - n * (real)LN2_HIGH - n * (real)LN2_LOW;
    vec p = splat(XL_EXP_COEFF[EXP_TERMS]);
    for (int j = EXP_TERMS - 1; j >= 0; j--) p = p * r + XL_EXP_COEFF[j];
    ivec bits = ((ivec)shifted - (ivec)splat((real)EXP_ROUND) + EXP_BIAS) << EXP_SHIFT;
    vec y = p * (vec)bits * (real)2;
    return blend(tiny, (vec){0}, y);
}

static real exp_sum(ptrdiff_t n, const real *x, real shift, real *y) {
    vec s = {0};
    ptrdiff_t i = 0;
    for (; i + VL <= n; i += VL) {
        vec e = vexp(load(x + i) - shift);
        store(y + i, e);
        s += e;
    }
    if (i < n) {
        vec e = vexp(load_part(x + i, n - i) - shift);
        store_part(y + i, n - i, e);
        for (ptrdiff_t l = 0; l < n - i; l++) s[l] += e[l];
    }
    return lanes_sum(s);
}

static void exp_rows(ptrdiff_t n, const real *x, real *y) {
    ptrdiff_t i = 0;
    for (; i + VL <= n; i += VL) store(y + i, vexp(load(x + i)));
    if (i < n) store_part(y + i, n - i, vexp(load_part(x + i, n - i)));
}

/* elu(x) + 1 = max(x, 0) + exp(min(x, 0)). A NaN fails the comparison, goes into exp and stays. */
INLINE vec velu_above(vec x, real above) {
    ivec positive = x > 0;
    return blend(positive, x, (vec){0}) + vexp(blend(positive, (vec){0}, x)) + above;
}

static void elu_above(ptrdiff_t n, real above, real *x) {
    ptrdiff_t i = 0;
    for (; i + VL <= n; i += VL) store(x + i, velu_above(load(x + i), above));
    if (i < n) store_part(x + i, n - i, velu_above(load_part(x + i, n - i), above));
}

INLINE vec vsigmoid(vec x) { return (real)1 / ((real)1 + vexp(-x)); }

static void sigmoid(ptrdiff_t n, const real *x, real *y) {
    ptrdiff_t i = 0;
    for (; i + VL <= n; i += VL) store(y + i, vsigmoid(load(x + i)));
    if (i < n) store_part(y + i, n - i, vsigmoid(load_part(x + i, n - i)));
}

/* min(x, 0) - log(1 + y), y = exp(-|x|), never overflows; log(1 + y) = 2 artanh z, z = y / (2 + y) at
 * most 1/3: the terms left out are below half an ulp. A NaN fails every comparison and stays. */
#ifdef XL_REAL_F64
#define ARTANH_TERMS 17
#else
#define ARTANH_TERMS 8
#endif
INLINE vec vlogsigmoid(vec x) {
    vec y = vexp(blend(x > 0, -x, x)), z = y / ((real)2 + y), p = {0};
    for (int j = ARTANH_TERMS - 1; j >= 0; j--) p = p * (z * z) + (real)1 / (real)(2 * j + 1);
    return blend(x > 0, (vec){0}, x) - (real)2 * z * p;
}

static void logsigmoid(ptrdiff_t n, const real *x, real *y) {
    ptrdiff_t i = 0;
    for (; i + VL <= n; i += VL) store(y + i, vlogsigmoid(load(x + i)));
    if (i < n) store_part(y + i, n - i, vlogsigmoid(load_part(x + i, n - i)));
}

/* ---- the mLSTM: rows of a chunk, and one step --------------------------------------------- */

#define STEP_VECTORS 4

/* Doubles that fill a vector, and the reals they become. */
#define DL (XL_VB / 8)
typedef double doubles_u __attribute__((vector_size(XL_VB), aligned(8), may_alias));
typedef double doubles __attribute__((vector_size(XL_VB)));
typedef real narrowed
    __attribute__((vector_size(DL * sizeof(real)), aligned(sizeof(real)), may_alias));

static real decay_row(ptrdiff_t n, ptrdiff_t seen, const double *c, double top, real *decay,
                      real *p) {
    vec sum = {0};
    ivec lane;
    ptrdiff_t i = 0;
    for (int l = 0; l < XL_LANES; l++) lane[l] = l;
    for (; i < seen && top != -INFINITY; i += VL) {
        ptrdiff_t w = seen - i, room = xl_min(VL, n - i);
        real exponent[XL_LANES] = {0};
        if (room == VL)
            for (ptrdiff_t l = 0; l < VL; l += DL) {
                doubles x = *(const doubles_u *)(c + i + l) - (top - (doubles){0});
                *(narrowed *)(exponent + l) = __builtin_convertvector(x, narrowed);
            }
        else
            for (ptrdiff_t l = 0; l < room; l++) exponent[l] = (real)(c[i + l] - top);
        ivec is_seen = lane < (w < VL ? (int)w : (int)VL); /* what is not may be anything */
        vec d = blend(is_seen, vexp(load(exponent)), (vec){0});
        vec x = blend(is_seen, d * (room == VL ? load(p + i) : load_part(p + i, room)), (vec){0});
        sum += x;
        if (room == VL) {
            store(decay + i, d);
            store(p + i, x);
        } else {
            store_part(decay + i, room, d);
            store_part(p + i, room, x);
        }
    }
    for (; i < n; i++) decay[i] = p[i] = 0;
    return lanes_sum(sum);
}

static real masked_dot(ptrdiff_t n, ptrdiff_t seen, const real *x, real *row) {
    for (ptrdiff_t i = seen; i < n; i++) row[i] = 0;
    return dot(seen, x, row);
}

static void add_mul(ptrdiff_t n, real a, const real *x, real *y) {
    for (ptrdiff_t i = 0; i < n; i++) y[i] = (y[i] + a) * x[i];
}

static real mlstm_step(ptrdiff_t D, ptrdiff_t E, real forget, real input, const real *k,
                       const real *v, real scale, const real *q, real *c, real *n, real *out) {
    vec along = {0};
    for (ptrdiff_t d = 0; d < D; d += VL) {
        ptrdiff_t w = xl_min(VL, D - d);
        int whole = w == VL;
        vec x = forget * (whole ? load(n + d) : load_part(n + d, w));
        x += input * (whole ? load(k + d) : load_part(k + d, w));
        along += x * (whole ? load(q + d) : load_part(q + d, w));
        if (whole)
            store(n + d, x);
        else
            store_part(n + d, w, x);
    }
    /* columns that stay in registers for all rows of c, which is read and written once */
    for (ptrdiff_t e = 0; e < E; e += STEP_VECTORS * VL) {
        ptrdiff_t width = xl_min(STEP_VECTORS * VL, E - e);
        int whole = width == STEP_VECTORS * VL;
        vec o[STEP_VECTORS], x[STEP_VECTORS];
        for (int j = 0; j < STEP_VECTORS; j++) {
            ptrdiff_t left = xl_max(0, width - j * VL);
            o[j] = (vec){0};
            x[j] = whole ? load(v + e + j * VL) : load_part(v + e + j * VL, xl_min(VL, left));
        }
        for (ptrdiff_t d = 0; d < D; d++) {
            real *row = c + d * E + e, a = input * k[d], b = scale * q[d];
            for (int j = 0; j < STEP_VECTORS; j++) {
                ptrdiff_t left = xl_min(VL, xl_max(0, width - j * VL));
                vec r = forget * (whole ? load(row + j * VL) : load_part(row + j * VL, left));
                r += a * x[j];
                o[j] += b * r;
                if (whole)
                    store(row + j * VL, r);
                else
                    store_part(row + j * VL, left, r);
            }
        }
        for (int j = 0; j < STEP_VECTORS; j++)
            store_part(out + e + j * VL, xl_min(VL, xl_max(0, width - j * VL)), o[j]);
    }
    return scale * lanes_sum(along);
}

static void scale_to(ptrdiff_t n, real a, const real *x, real *y) {
    for (ptrdiff_t i = 0; i < n; i++) y[i] = a * x[i];
}

static void combine(ptrdiff_t n, real a, const real *x, real b, const real *z, real *y) {
    ptrdiff_t i = 0;
    for (; i + VL <= n; i += VL) store(y + i, a * load(x + i) + b * load(z + i));
    if (i < n) store_part(y + i, n - i, a * load_part(x + i, n - i) + b * load_part(z + i, n - i));
}

/* ---- rows of the model -------------------------------------------------------------------- */

static real rmsnorm(ptrdiff_t n, const real *x, const real *w, real eps, real *y) {
    real rstd = 1 / SQRT(dot(n, x, x) / (real)n + eps);
    for (ptrdiff_t i = 0; i < n; i++) y[i] = x[i] * rstd * w[i];
    return rstd;
}

static void swiglu(ptrdiff_t n, const real *g, const real *u, real *y) {
    ptrdiff_t i = 0;
    for (; i + VL <= n; i += VL) {
        vec x = load(g + i);
        store(y + i, x * vsigmoid(x) * load(u + i));
    }
    if (i < n) {
        vec x = load_part(g + i, n - i);
        store_part(y + i, n - i, x * vsigmoid(x) * load_part(u + i, n - i));
    }
}

/* y = g s u, s = sigmoid(g): du = dy g s; dg = dy u s (1 + g (1 - s)) */
static void swiglu_backward(ptrdiff_t n, const real *dy, const real *g, const real *u, real *dg,
                            real *du) {
    for (ptrdiff_t i = 0; i < n; i += VL) {
        ptrdiff_t w = xl_min(VL, n - i);
        int full = w == VL;
        vec d = full ? load(dy + i) : load_part(dy + i, w);
        vec x = full ? load(g + i) : load_part(g + i, w);
        vec up = full ? load(u + i) : load_part(u + i, w);
        vec s = vsigmoid(x);
        vec a = d * up * s * ((real)1 + x * ((real)1 - s)), b = d * x * s;
        if (full) {
            store(dg + i, a);
            store(du + i, b);
        } else {
            store_part(dg + i, w, a);
            store_part(du + i, w, b);
        }
    }
}

static void adamw(ptrdiff_t n, real *p, const real *g, real *m, real *v, real lr, real beta1,
                  real beta2, real eps, real decay, real c1, real c2, real gscale) {
    real keep = 1 - lr * decay, step = lr / c1, root = 1 / c2;
    for (ptrdiff_t i = 0; i < n; i++) {
        real d = g[i] * gscale;
        m[i] = beta1 * m[i] + (1 - beta1) * d;
        v[i] = beta2 * v[i] + (1 - beta2) * d * d;
        p[i] = keep * p[i] - step * m[i] / (SQRT(v[i] * root) + eps);
    }
}

#if defined XL_MIXED && !defined XL_REAL_F64
#include "kernels/mixed.inc.h"
#define MIXED(f) f
#else
#define MIXED(f) 0
#endif
#include "kernels/int8.inc.h"

#define XL_PASTE2(a, b) a##b
#define XL_PASTE(a, b) XL_PASTE2(a, b)
#define XL_STRING2(a) #a
#define XL_STRING(a) XL_STRING2(a)

const xl_kernels XL_PASTE(xl_kernels_, XL_ISA) = {
    .name = XL_STRING(XL_ISA),
    .mr = XL_MR,
    .nr = (int)NR,
    .gemm = gemm,
    .decay_row = decay_row,
    .masked_dot = masked_dot,
    .add_mul = add_mul,
    .scale_to = scale_to,
    .combine = combine,
    .mlstm_step = mlstm_step,
    .pack_b = pack_b,
    .pack_b_panels = pack_b_panels,
    .gemm_packed = gemm_packed,
    .mixed_mr = MIXED(MIXED_MR),
    .pack_a_mixed = MIXED(pack_a_mixed),
    .pack_b_mixed = MIXED(pack_b_mixed),
    .gemm_mixed = MIXED(gemm_mixed),
    .gemm_rounded = MIXED(gemm_rounded),
    .peak_mixed = MIXED(peak_mixed),
    .dots_panel_mixed = MIXED(dots_panel_mixed),
    .round_mixed = MIXED(round_mixed),
    .dots = dots,
    .dots_panel = dots_panel,
    .round_int8 = round_int8,
    .gemm_int8 = gemm_int8,
    .peak_int8 = peak_int8,
    .rotate = rotate,
    .dot = dot,
    .sum = sum,
    .max = max,
    .sumsq = sumsq,
    .axpy = axpy,
    .axpys = axpys,
    .scale = scale,
    .add = add,
    .mul_add = mul_add,
    .exp_sum = exp_sum,
    .exp = exp_rows,
    .elu_above = elu_above,
    .sigmoid = sigmoid,
    .logsigmoid = logsigmoid,
    .rmsnorm = rmsnorm,
    .swiglu = swiglu,
    .swiglu_backward = swiglu_backward,
    .adamw = adamw,
};
