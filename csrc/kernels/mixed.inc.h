/* Products of operands rounded to bf16, sums in float: twice the rate of float where the processor
 * multiplies pairs (vdpbf16ps), far more where it multiplies tiles (AMX). Included by body.inc.h for
 * the instruction sets that have them; float only.
 *
 * Both operands are packed. Pairs of k lie side by side, and kc is padded with zeros to a multiple
 * of XL_PAIR_K, the depth of a tile of AMX:
 *     A   [tile of MIXED_MR rows][kc / 32][MIXED_MR][32]
 *     B   [panel of NR columns][kc / 2][NR][2]
 * One layout serves both kinds of instruction. */
#include "kernels/kernels.h"

#ifdef XL_AMX
#define MIXED_MR 32
#else
#define MIXED_MR XL_MR
#endif

INLINE __mmask16 first(ptrdiff_t n) {
    return n >= 16 ? 0xffff : n <= 0 ? 0 : (__mmask16)((1u << n) - 1);
}
INLINE __m512i round_pair(__m512 high, __m512 low) {
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}
/* 32 values of one row, the first n of them; the others 0 */
INLINE __m512i row_pairs(const float *p, ptrdiff_t n) {
    return round_pair(_mm512_maskz_loadu_ps(first(n - 16), p + 16),
                      _mm512_maskz_loadu_ps(first(n), p));
}
/* pairs (low_j, high_j) of the first n columns of two rows */
INLINE __m512i interleave(__m512i rows) {
    const __m512i order =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, rows);
}
INLINE __m512i column_pairs(const float *low, const float *high, ptrdiff_t n) {
    __m512 h = high ? _mm512_maskz_loadu_ps(first(n), high) : _mm512_setzero_ps();
    return interleave(round_pair(h, _mm512_maskz_loadu_ps(first(n), low)));
}
/* r[i][j] <-> r[j][i], 32-bit entries */
INLINE void transpose(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    /* now r[4 g + j] holds, in quarter q, column 4 q + j of rows 4 g to 4 g + 3 */
    for (int j = 0; j < 4; j++) {
        __m512i even = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88),
                odd = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd),
                even2 = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88),
                odd2 = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
        t[j] = _mm512_shuffle_i32x4(even, even2, 0x88);
        t[8 + j] = _mm512_shuffle_i32x4(even, even2, 0xdd);
        t[4 + j] = _mm512_shuffle_i32x4(odd, odd2, 0x88);
        t[12 + j] = _mm512_shuffle_i32x4(odd, odd2, 0xdd);
    }
    for (int i = 0; i < 16; i++) r[i] = t[i];
}

/* ---- packing ------------------------------------------------------------------------------ */

/* out: [kc / 2][NR][2] for 16 columns from one column on. One of rsb, csb is 1. */
INLINE void pack_columns(ptrdiff_t kc, ptrdiff_t n, const real *b, ptrdiff_t rsb, ptrdiff_t csb,
                         xl_bf16 *out) {
    for (ptrdiff_t k = 0; k < kc; k += XL_PAIR_K) {
        __m512i r[16];
        ptrdiff_t left = kc - k;
        if (csb == 1) {
            for (ptrdiff_t p = 0; p < 16; p++) {
                const real *low = b + (k + 2 * p) * rsb;
                r[p] = 2 * p >= left ? _mm512_setzero_si512()
                                     : column_pairs(low, 2 * p + 1 < left ? low + rsb : NULL, n);
            }
        } else {
            for (ptrdiff_t j = 0; j < 16; j++)
                r[j] = j < n ? row_pairs(b + j * csb + k, left) : _mm512_setzero_si512();
            transpose(r);
        }
        for (ptrdiff_t p = 0; p < 16; p++) _mm512_storeu_si512(out + (k / 2 + p) * 2 * NR, r[p]);
    }
}

static void pack_b_mixed(ptrdiff_t kc, ptrdiff_t n, const real *b, ptrdiff_t rsb, ptrdiff_t csb,
                         xl_bf16 *out) {
    for (ptrdiff_t j = 0; j < xl_round_up(n, NR); j += 16)
        pack_columns(kc, n - j, b + j * csb, rsb, csb,
                     out + j / NR * NR * xl_round_up(kc, XL_PAIR_K) + j % NR * 2);
}

/* One of rsa, csa is 1. */
static void pack_a_mixed(ptrdiff_t kc, ptrdiff_t m, const real *a, ptrdiff_t rsa, ptrdiff_t csa,
                         xl_bf16 *out) {
    const ptrdiff_t step = MIXED_MR * XL_PAIR_K;
    for (ptrdiff_t i0 = 0; i0 < m; i0 += MIXED_MR) {
        const real *p = a + i0 * rsa;
        ptrdiff_t h = m - i0;
        if (csa == 1) {
            for (ptrdiff_t i = 0; i < MIXED_MR; i++)
                for (ptrdiff_t k = 0, t = 0; k < kc; k += XL_PAIR_K, t += step)
                    _mm512_storeu_si512(out + t + i * XL_PAIR_K,
                                        i < h ? row_pairs(p + i * rsa + k, kc - k)
                                              : _mm512_setzero_si512());
        } else {
            for (ptrdiff_t k = 0, t = 0; k < kc; k += XL_PAIR_K, t += step)
                for (ptrdiff_t i = 0; i < MIXED_MR; i += 16) {
                    __m512i r[16];
                    for (ptrdiff_t q = 0; q < 16; q++) {
                        const real *low = p + (k + 2 * q) * csa + i;
                        ptrdiff_t left = kc - k - 2 * q;
                        r[q] = left <= 0 ? _mm512_setzero_si512()
                                         : column_pairs(low, left > 1 ? low + csa : NULL, h - i);
                    }
                    transpose(r);
                    for (ptrdiff_t l = i; l < xl_min(MIXED_MR, i + 16); l++)
                        _mm512_storeu_si512(out + t + l * XL_PAIR_K, r[l - i]);
                }
        }
        out += MIXED_MR * xl_round_up(kc, XL_PAIR_K);
    }
}

/* ---- products ----------------------------------------------------------------------------- */

/* tile_mixed: a tile of MIXED_MR x NR sums at `at`, rows ld apart; the first term is what is there
 * (start), or 0. kc is padded. */
#ifdef XL_AMX

/* rows of 64 bytes in eight tiles: 0-3 sums, 4-5 of A, 6-7 of B */
static const struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} tiles = {.palette = 1,
           .bytes = {64, 64, 64, 64, 64, 64, 64, 64},
           .rows = {16, 16, 16, 16, 16, 16, 16, 16}};

INLINE void tile_mixed(ptrdiff_t kc, const xl_bf16 *a, const xl_bf16 *b, real *at, ptrdiff_t ld,
                       int start) {
    if (start) {
        _tile_loadd(0, at, ld * 4);
        _tile_loadd(1, at + 16, ld * 4);
        _tile_loadd(2, at + 16 * ld, ld * 4);
        _tile_loadd(3, at + 16 * ld + 16, ld * 4);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (ptrdiff_t k = 0; k < kc; k += XL_PAIR_K) {
        _tile_loadd(4, a, 64);
        _tile_loadd(6, b, NR * 4);
        _tile_loadd(7, b + 32, NR * 4);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, a + 16 * XL_PAIR_K, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        a += MIXED_MR * XL_PAIR_K;
        b += XL_PAIR_K * NR;
    }
    _tile_stored(0, at, ld * 4);
    _tile_stored(1, at + 16, ld * 4);
    _tile_stored(2, at + 16 * ld, ld * 4);
    _tile_stored(3, at + 16 * ld + 16, ld * 4);
}

#else

INLINE void tile_mixed(ptrdiff_t kc, const xl_bf16 *a, const xl_bf16 *b, real *at, ptrdiff_t ld,
                       int start) {
    __m512 acc[MIXED_MR][2];
    for (int i = 0; i < MIXED_MR; i++)
        for (int j = 0; j < 2; j++)
            acc[i][j] = start ? _mm512_loadu_ps(at + i * ld + j * 16) : _mm512_setzero_ps();
    for (ptrdiff_t k = 0; k < kc; k += XL_PAIR_K, a += (MIXED_MR - 1) * XL_PAIR_K)
        for (int q = 0; q < XL_PAIR_K / 2; q++, a += 2, b += 2 * NR) {
            __m512bh b0 = (__m512bh)_mm512_loadu_si512(b),
                     b1 = (__m512bh)_mm512_loadu_si512(b + NR);
            for (int i = 0; i < MIXED_MR; i++) {
                int32_t pair;
                __builtin_memcpy(&pair, a + i * XL_PAIR_K, sizeof pair);
                __m512bh ai = (__m512bh)_mm512_set1_epi32(pair);
                acc[i][0] = _mm512_dpbf16_ps(acc[i][0], b0, ai);
                acc[i][1] = _mm512_dpbf16_ps(acc[i][1], b1, ai);
            }
        }
    for (int i = 0; i < MIXED_MR; i++)
        for (int j = 0; j < 2; j++) _mm512_storeu_ps(at + i * ld + j * 16, acc[i][j]);
}

#endif

/* c = alpha t + beta c, or back */
INLINE void add_tile(ptrdiff_t h, ptrdiff_t w, real alpha, const real *t, ptrdiff_t ldt, real beta,
                     real *c, ptrdiff_t ldc) {
    for (ptrdiff_t i = 0; i < h; i++)
        for (ptrdiff_t j = 0; j < w; j += 16) {
            __mmask16 mask = first(w - j);
            __m512 r = alpha * _mm512_maskz_loadu_ps(mask, t + i * ldt + j);
            if (beta != 0) r += beta * _mm512_maskz_loadu_ps(mask, c + i * ldc + j);
            _mm512_mask_storeu_ps(c + i * ldc + j, mask, r);
        }
}

static void gemm_mixed(ptrdiff_t m, ptrdiff_t n, ptrdiff_t kc, real alpha, const xl_bf16 *a,
                       const xl_bf16 *b, ptrdiff_t depth, real beta, real *c, ptrdiff_t ldc) {
    _Static_assert(XL_NV * XL_LANES == XL_PANEL, "a matrix in panels is a packed B");
    ptrdiff_t padded = xl_round_up(kc, XL_PAIR_K);
    /* The usual products are added where they belong. A tile at an edge goes through a copy, but by
     * the same additions: an element must not depend on the size of the matrix. */
    int plain = alpha == 1 && (beta == 0 || beta == 1), start = plain && beta != 0;
    _Alignas(64) real copy[MIXED_MR * NR] = {0};
#ifdef XL_AMX
    _tile_loadconfig(&tiles);
#endif
    /* Along the rows of C: a tile's rows lie on as many pages, and processors foresee that these go on,
     * not which come next. */
    for (ptrdiff_t i = 0; i < m; i += MIXED_MR)
        for (ptrdiff_t j = 0; j < n; j += NR) {
            ptrdiff_t h = xl_min(MIXED_MR, m - i), w = xl_min(NR, n - j);
            real *out = c + i * ldc + j;
            const xl_bf16 *ta = a + i * padded, *tb = b + j * depth;
            if (plain && h == MIXED_MR && w == NR) {
                tile_mixed(padded, ta, tb, out, ldc, start);
                continue;
            }
            if (start) add_tile(h, w, 1, out, ldc, 0, copy, NR);
            tile_mixed(padded, ta, tb, copy, NR, start);
            add_tile(h, w, plain ? 1 : alpha, copy, NR, plain ? 0 : beta, out, ldc);
        }
#ifdef XL_AMX
    _tile_release();
#endif
}

/* Blocks of a whole product: rows and columns of whole tiles whose packed forms fit into `pack`. */
#define ROUNDED_M 224
#define ROUNDED_N 256

static void gemm_rounded(ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, real alpha, const real *a,
                         ptrdiff_t rsa, ptrdiff_t csa, const real *b, ptrdiff_t rsb, ptrdiff_t csb,
                         real beta, real *c, ptrdiff_t ldc, real *pack) {
    _Static_assert((ROUNDED_M + ROUNDED_N) * XL_ROUNDED_KC * sizeof(xl_bf16) <=
                       XL_GEMM_PACK * sizeof(real),
                   "pack holds a block of either operand");
    xl_bf16 *of_b = (xl_bf16 *)pack, *of_a = of_b + ROUNDED_N * XL_ROUNDED_KC;
    for (ptrdiff_t k0 = 0; k0 == 0 || k0 < k; k0 += XL_ROUNDED_KC) {
        ptrdiff_t kc = xl_min(XL_ROUNDED_KC, k - k0);
        for (ptrdiff_t j = 0; j < n; j += ROUNDED_N) {
            ptrdiff_t w = xl_min(ROUNDED_N, n - j);
            pack_b_mixed(kc, w, b + k0 * rsb + j * csb, rsb, csb, of_b);
            for (ptrdiff_t i = 0; i < m; i += ROUNDED_M) {
                ptrdiff_t h = xl_min(ROUNDED_M, m - i);
                pack_a_mixed(kc, h, a + i * rsa + k0 * csa, rsa, csa, of_a);
                gemm_mixed(h, w, kc, alpha, of_a, of_b, xl_round_up(kc, XL_PAIR_K),
                           k0 ? (real)1 : beta, c + i * ldc + j, ldc);
            }
        }
    }
}

/* ---- dot products ------------------------------------------------------------------------- */

static void round_mixed(ptrdiff_t n, const real *x, xl_bf16 *y) {
    for (ptrdiff_t i = 0; i < n; i += 32) _mm512_storeu_si512(y + i, row_pairs(x + i, n - i));
}

#ifdef XL_AMX

/* A tile takes 16 rows in the time of one; those behind the last one are read and forgotten. */
static void dots_panel_mixed(ptrdiff_t n, ptrdiff_t rows, const xl_bf16 *x, ptrdiff_t ldx,
                             const xl_bf16 *panel, real *y) {
    _Alignas(64) real s[16 * XL_PANEL];
    _tile_loadconfig(&tiles);
    for (ptrdiff_t r = 0; r < rows; r += 16, x += 16 * ldx) {
        const xl_bf16 *w = panel;
        _tile_zero(0);
        _tile_zero(1);
        for (ptrdiff_t k = 0; k < n; k += XL_PAIR_K, w += XL_PAIR_K * XL_PANEL) {
            for (int line = 0; line < 32; line++)
                __builtin_prefetch((const char *)w + PANEL_AHEAD + 64 * line, 0, 2);
            _tile_loadd(4, x + k, ldx * 2);
            _tile_loadd(6, w, XL_PANEL * 4);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, w + 32, XL_PANEL * 4);
            _tile_dpbf16ps(1, 4, 7);
        }
        _tile_stored(0, s, XL_PANEL * 4);
        _tile_stored(1, s + 16, XL_PANEL * 4);
        __builtin_memcpy(y + r * XL_PANEL, s,
                         (size_t)(xl_min(16, rows - r) * XL_PANEL) * sizeof *y);
    }
    _tile_release();
}

#else

#define PANEL_ROWS 8 /* rows at a time: their sums fill half of the registers */

INLINE void dots_panel_mixed_rows(ptrdiff_t n, const int rows, const xl_bf16 *x, ptrdiff_t ldx,
                                  const xl_bf16 *w, real *y) {
    __m512 s[PANEL_ROWS][2];
    for (int r = 0; r < rows; r++) s[r][0] = s[r][1] = _mm512_setzero_ps();
    for (ptrdiff_t k = 0; k < n; k += 2, w += 2 * XL_PANEL) {
        __builtin_prefetch((const char *)w + PANEL_AHEAD, 0, 2);
        __builtin_prefetch((const char *)w + PANEL_AHEAD + 64, 0, 2);
        __m512bh w0 = (__m512bh)_mm512_loadu_si512(w),
                 w1 = (__m512bh)_mm512_loadu_si512(w + XL_PANEL);
        for (int r = 0; r < rows; r++) {
            int32_t pair;
            __builtin_memcpy(&pair, x + r * ldx + k, sizeof pair);
            __m512bh xk = (__m512bh)_mm512_set1_epi32(pair);
            s[r][0] = _mm512_dpbf16_ps(s[r][0], w0, xk);
            s[r][1] = _mm512_dpbf16_ps(s[r][1], w1, xk);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < 2; v++) _mm512_storeu_ps(y + r * XL_PANEL + v * 16, s[r][v]);
}

static void dots_panel_mixed(ptrdiff_t n, ptrdiff_t rows, const xl_bf16 *x, ptrdiff_t ldx,
                             const xl_bf16 *panel, real *y) {
    ptrdiff_t r = 0;
    for (; r + 8 <= rows; r += 8)
        dots_panel_mixed_rows(n, 8, x + r * ldx, ldx, panel, y + r * XL_PANEL);
    for (; r + 4 <= rows; r += 4)
        dots_panel_mixed_rows(n, 4, x + r * ldx, ldx, panel, y + r * XL_PANEL);
    for (; r < rows; r++) dots_panel_mixed_rows(n, 1, x + r * ldx, ldx, panel, y + r * XL_PANEL);
}

#endif

/* ---- the peak ----------------------------------------------------------------------------- */

#ifdef XL_AMX
/* Products of a tile of ones with itself, into four tiles of sums: four independent chains. */
#define PEAK_TILES(multiply, rounds, ones, sums, sink)                                             \
    _tile_loadconfig(&tiles);                                                                      \
    _tile_zero(0);                                                                                 \
    _tile_zero(1);                                                                                 \
    _tile_zero(2);                                                                                 \
    _tile_zero(3);                                                                                 \
    _tile_loadd(4, ones, 64);                                                                      \
    _tile_loadd(5, ones, 64);                                                                      \
    for (ptrdiff_t r = 0; r < rounds; r++) {                                                       \
        multiply(0, 4, 5);                                                                         \
        multiply(1, 4, 5);                                                                         \
        multiply(2, 4, 5);                                                                         \
        multiply(3, 4, 5);                                                                         \
    }                                                                                              \
    *sink = 0;                                                                                     \
    _tile_stored(0, sums, 64);                                                                     \
    *sink += (real)sums[0];                                                                        \
    _tile_stored(1, sums, 64);                                                                     \
    *sink += (real)sums[0];                                                                        \
    _tile_stored(2, sums, 64);                                                                     \
    *sink += (real)sums[0];                                                                        \
    _tile_stored(3, sums, 64);                                                                     \
    *sink += (real)sums[0];                                                                        \
    _tile_release();
#endif

/* As xl_peak_rounds, of operands that are ones: 12 independent chains hide the latency of vdpbf16ps,
 * 4 that of a product of tiles. */
static double peak_mixed(ptrdiff_t rounds, real *sink) {
    const xl_bf16 one = {0x3f80};
#ifdef XL_AMX
    xl_bf16 ones[16 * XL_PAIR_K];
    real sums[16 * 16];
    for (int i = 0; i < 16 * XL_PAIR_K; i++) ones[i] = one;
    PEAK_TILES(_tile_dpbf16ps, rounds, ones, sums, sink)
    return 2.0 * 4 * 16 * 16 * XL_PAIR_K * (double)rounds;
#else
    enum { CHAINS = 12 };
    int32_t pair = one.bits << 16 | one.bits;
    __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
    __m512 sum[CHAINS];
    for (int i = 0; i < CHAINS; i++) sum[i] = _mm512_set1_ps((float)i);
    for (ptrdiff_t r = 0; r < rounds; r++)
        for (int i = 0; i < CHAINS; i++) sum[i] = _mm512_dpbf16_ps(sum[i], x, x);
    for (int i = 1; i < CHAINS; i++) sum[0] += sum[i];
    *sink = sum[0][0];
    return 2.0 * 2 * 16 * CHAINS * (double)rounds;
#endif
}
