/* Products of signed bytes, sums in whole numbers: exact, so that a result is the same with every
 * instruction set, whatever the number of rows. Included by body.inc.h.
 *
 * Rows of a matrix, and rows that meet it, are rotated before they are rounded: each XL_ROTATION
 * entries by the Hadamard matrix, which is orthogonal and symmetric. Products stay what they are,
 * and an entry far larger than its neighbours, as transformers have them, no longer sets the step of
 * a whole row (QuaRot, arXiv:2404.00456). docs/speed.md has the measured difference. */

/* ---- rotation ----------------------------------------------------------------------------- */

#define BLOCK_VECTORS (XL_ROTATION / XL_LANES)
#define LANES_2(f, s) f(0, s), f(1, s)
#define LANES_4(f, s) LANES_2(f, s), f(2, s), f(3, s)
#define LANES_8(f, s) LANES_4(f, s), f(4, s), f(5, s), f(6, s), f(7, s)
#define LANES_16(f, s)                                                                             \
    LANES_8(f, s), f(8, s), f(9, s), f(10, s), f(11, s), f(12, s), f(13, s), f(14, s), f(15, s)
#if XL_LANES == 16
#define LANES LANES_16
#elif XL_LANES == 8
#define LANES LANES_8
#elif XL_LANES == 4
#define LANES LANES_4
#else
#define LANES LANES_2
#endif
#define PARTNER(lane, s) ((lane) ^ (s))
#define SIGN(lane, s) ((lane) & (s) ? -1 : 1)
/* sums of lanes s apart in the lower, differences in the upper one */
#define WITHIN(s)                                                                                  \
    if ((s) < XL_LANES)                                                                            \
        for (int i = 0; i < BLOCK_VECTORS; i++)                                                    \
            x[i] = __builtin_shufflevector(x[i], x[i], LANES(PARTNER, (s) % XL_LANES)) +           \
                   (vec){LANES(SIGN, (s) % XL_LANES)} * x[i];

/* x: XL_ROTATION reals */
INLINE void rotate_block(vec x[BLOCK_VECTORS]) {
    for (int apart = BLOCK_VECTORS / 2; apart > 0; apart /= 2)
        for (int i = 0; i < BLOCK_VECTORS; i++)
            if (!(i & apart)) {
                vec sum = x[i] + x[i + apart];
                x[i + apart] = x[i] - x[i + apart];
                x[i] = sum;
            }
    WITHIN(8)
    WITHIN(4)
    WITHIN(2)
    WITHIN(1)
    for (int i = 0; i < BLOCK_VECTORS; i++) x[i] *= (real)0.125; /* 1 / sqrt(XL_ROTATION) */
}

/* entries from k on, of n, rotated; zeros behind the last one */
INLINE void rotated(const real *p, ptrdiff_t k, ptrdiff_t n, vec x[BLOCK_VECTORS]) {
    for (int i = 0; i < BLOCK_VECTORS; i++, k += VL)
        x[i] = k + VL <= n ? load(p + k) : k < n ? load_part(p + k, n - k) : (vec){0};
    rotate_block(x);
}

static void rotate(ptrdiff_t n, real *p) {
    for (ptrdiff_t k = 0; k < n; k += XL_ROTATION) {
        vec x[BLOCK_VECTORS];
        rotated(p, k, n, x);
        for (int i = 0; i < BLOCK_VECTORS; i++) store(p + k + i * VL, x[i]);
    }
}

/* ---- rounding ----------------------------------------------------------------------------- */

/* To the nearest whole number, ties to even, by an instruction that does nothing else: an addition
 * could be fused with the multiplication before it, and round otherwise. */
INLINE void nearest(vec x, int32_t *out) {
#if defined XL_REAL_F64 || !defined __SSE2__
    for (int l = 0; l < XL_LANES; l++) out[l] = (int32_t)rint(x[l]);
#elif XL_VB == 64
    _mm512_storeu_si512(out, _mm512_cvtps_epi32(x));
#elif XL_VB == 32
    _mm256_storeu_si256((__m256i *)out, _mm256_cvtps_epi32(x));
#else
    _mm_storeu_si128((__m128i *)out, _mm_cvtps_epi32(x));
#endif
}

static void round_int8(ptrdiff_t n, const real *p, int8_t *out) {
    ptrdiff_t depth = xl_int8_depth(n);
    vec most = {0}, bad = {0}, x[BLOCK_VECTORS];
    for (ptrdiff_t k = 0; k < n; k += XL_ROTATION) {
        rotated(p, k, n, x);
        for (int i = 0; i < BLOCK_VECTORS; i++) {
            vec size = blend(x[i] < 0, -x[i], x[i]);
            most = blend(size > most, size, most);
            bad += x[i] * 0; /* NaN where x is not finite */
        }
    }
    xl_int8_tail tail = {0, 0};
    real top = 0;
    for (int l = 0; l < XL_LANES; l++) top = most[l] > top ? most[l] : top;
    tail.scale = top / 127 + lanes_sum(bad);
    /* zeros, where every other step would be no number either, or a row that the scale makes NaN */
    int whole = tail.scale >= XL_REAL_MIN && tail.scale <= XL_REAL_MAX;
    real by = whole ? 127 / top : 0;
    if (tail.scale < XL_REAL_MIN) tail.scale = 0;
    for (ptrdiff_t k = 0; k < depth; k += XL_ROTATION) {
        int32_t at[XL_ROTATION] = {0};
        if (whole) {
            rotated(p, k, n, x);
            for (int i = 0; i < BLOCK_VECTORS; i++) nearest(x[i] * by, at + i * VL);
        }
        for (int i = 0; i < XL_ROTATION; i++) {
            out[k + i] = (int8_t)at[i];
            tail.sum += at[i];
        }
    }
    __builtin_memcpy(out + depth, &tail, sizeof tail);
}

/* ---- products ----------------------------------------------------------------------------- */

typedef int32_t sums __attribute__((vector_size(XL_VB)));
typedef int32_t sums_u __attribute__((vector_size(XL_VB), aligned(1), may_alias));
#define COLUMNS (XL_VB / 4)      /* of a vector of sums */
#define TILE_N (XL_NV * COLUMNS) /* of a tile */
#define UNSIGNED 128             /* what makes signed bytes unsigned ones */

INLINE sums four(const int8_t *x) {
    int32_t word;
    __builtin_memcpy(&word, x, sizeof word);
    return word - (sums){0};
}

/* Four bytes of each column, ready to be multiplied with four bytes of any row. */
#ifdef XL_VNNI /* vpdpbusd: unsigned times signed bytes */
#define FIRST_SUM(tail) (-UNSIGNED * (tail).sum)
typedef struct {
    sums w;
} columns;
INLINE columns widen(sums w) { return (columns){w ^ (int32_t)0x80808080}; }
INLINE sums add_four(sums s, columns c, sums x) {
    return (sums)_mm512_dpbusd_epi32((__m512i)s, (__m512i)c.w, (__m512i)x);
}
#else
#define FIRST_SUM(tail) 0
#if defined __SSE2__ &&                                                                            \
    !defined XL_REAL_F64 /* pmaddwd: pairs of 16-bit numbers, bytes 0, 2 and 1, 3 */
typedef int16_t pairs __attribute__((vector_size(XL_VB)));
typedef struct {
    pairs even, odd;
} columns;
INLINE columns widen(sums w) { return (columns){(pairs)(w << 8) >> 8, (pairs)w >> 8}; }
INLINE sums multiply(pairs a, pairs b) {
#if XL_VB == 64
    return (sums)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif XL_VB == 32
    return (sums)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    return (sums)_mm_madd_epi16((__m128i)a, (__m128i)b);
#endif
}
INLINE sums add_four(sums s, columns c, sums x) {
    columns r = widen(x);
    return s + (multiply(c.even, r.even) + multiply(c.odd, r.odd));
}
#else
typedef struct {
    sums at[4];
} columns;
INLINE columns widen(sums w) {
    return (columns){{w << 24 >> 24, w << 16 >> 24, w << 8 >> 24, w >> 24}};
}
INLINE sums add_four(sums s, columns c, sums x) {
    columns r = widen(x);
    for (int i = 0; i < 4; i++) s += c.at[i] * r.at[i];
    return s;
}
#endif
#endif

INLINE xl_int8_tail tail_of(const int8_t *row, ptrdiff_t depth) {
    xl_int8_tail tail;
    __builtin_memcpy(&tail, row + depth, sizeof tail);
    return tail;
}

/* c = alpha s (scales of row and column) + beta c, h rows of w sums, lds apart */
INLINE void scale_sums(ptrdiff_t h, ptrdiff_t w, ptrdiff_t depth, real alpha, const int8_t *x,
                       const real *scale, const int32_t *s, ptrdiff_t lds, real beta, real *c,
                       ptrdiff_t ldc) {
    for (ptrdiff_t i = 0; i < h; i++, s += lds, c += ldc) {
        real by = alpha * tail_of(x + i * xl_int8_row(depth), depth).scale;
        ptrdiff_t j = 0;
#ifndef XL_REAL_F64
        for (; j + VL <= w; j += VL) {
            vec y = by * load(scale + j) * __builtin_convertvector(*(const sums_u *)(s + j), vec);
            store(c + j, beta == 0 ? y : y + beta * load(c + j));
        }
#endif
        for (; j < w; j++) {
            real y = by * scale[j] * (real)s[j];
            c[j] = beta == 0 ? y : y + beta * c[j];
        }
    }
}

/* `rows` is a constant where this is called; out: [rows][TILE_N] */
INLINE void tile_int8(const int rows, ptrdiff_t depth, const int8_t *x, const int8_t *w,
                      int32_t *out) {
    sums s[XL_MR][XL_NV];
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < XL_NV; v++)
            s[i][v] = FIRST_SUM(tail_of(x + i * xl_int8_row(depth), depth)) - (sums){0};
    for (ptrdiff_t k = 0; k < depth; k += 4, w += 4 * XL_PANEL) {
        columns c[XL_NV];
        __builtin_prefetch((const char *)w + PANEL_AHEAD, 0, 2);
        __builtin_prefetch((const char *)w + PANEL_AHEAD + 64, 0, 2);
        for (int v = 0; v < XL_NV; v++) c[v] = widen(*(const sums_u *)(w + v * XL_VB));
        for (int i = 0; i < rows; i++) {
            sums xi = four(x + i * xl_int8_row(depth) + k);
            for (int v = 0; v < XL_NV; v++) s[i][v] = add_four(s[i][v], c[v], xi);
        }
    }
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < XL_NV; v++) *(sums_u *)(out + i * TILE_N + v * COLUMNS) = s[i][v];
}

#if defined XL_AMX && !defined XL_REAL_F64
#define TILES_M 32 /* rows of a tile of sums, which is a panel wide */

static void tiles_int8(ptrdiff_t m, ptrdiff_t n, ptrdiff_t depth, real alpha, const int8_t *x,
                       const int8_t *panels, const real *scale, real beta, real *c, ptrdiff_t ldc) {
    const ptrdiff_t row = xl_int8_row(depth);
    _Alignas(64) int32_t s[TILES_M * XL_PANEL];
    _tile_loadconfig(&tiles);
    for (ptrdiff_t i = 0; i < m; i += TILES_M)
        for (ptrdiff_t j = 0; j < n; j += XL_PANEL) {
            const int8_t *a = x + i * row, *b = panels + j * depth;
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (ptrdiff_t k = 0; k < depth; k += 64, a += 64, b += 64 * XL_PANEL) {
                _tile_loadd(4, a, row);
                _tile_loadd(6, b, 4 * XL_PANEL);
                _tile_loadd(7, b + 64, 4 * XL_PANEL);
                _tile_dpbssd(0, 4, 6);
                _tile_loadd(5, a + 16 * row, row);
                _tile_dpbssd(1, 4, 7);
                _tile_dpbssd(2, 5, 6);
                _tile_dpbssd(3, 5, 7);
            }
            _tile_stored(0, s, 4 * XL_PANEL);
            _tile_stored(1, s + 16, 4 * XL_PANEL);
            _tile_stored(2, s + 16 * XL_PANEL, 4 * XL_PANEL);
            _tile_stored(3, s + 16 * XL_PANEL + 16, 4 * XL_PANEL);
            scale_sums(xl_min(TILES_M, m - i), xl_min(XL_PANEL, n - j), depth, alpha, x + i * row,
                       scale + j, s, XL_PANEL, beta, c + i * ldc + j, ldc);
        }
    _tile_release();
}
#endif

#define HALF (XL_MR > 8 ? 8 : XL_MR) /* rows: a panel is read once where there are so few */

static void gemm_int8(ptrdiff_t m, ptrdiff_t n, ptrdiff_t depth, real alpha, const int8_t *x,
                      const int8_t *panels, const real *scale, real beta, real *c, ptrdiff_t ldc) {
#if defined XL_AMX && !defined XL_REAL_F64
    if (m > XL_MR) { /* fewer rows wait for memory, and loading the tiles' shape takes its time */
        tiles_int8(m, n, depth, alpha, x, panels, scale, beta, c, ldc);
        return;
    }
#endif
    _Alignas(64) int32_t s[XL_MR * TILE_N];
    for (ptrdiff_t i = 0, rows; i < m; i += rows) {
        const int8_t *xi = x + i * xl_int8_row(depth);
        rows = m - i >= XL_MR ? XL_MR : m - i >= HALF ? HALF : m - i >= 4 ? 4 : 1;
        for (ptrdiff_t j = 0; j < n; j += TILE_N) {
            const int8_t *w = panels + j / XL_PANEL * XL_PANEL * depth + j % XL_PANEL * 4;
            if (rows == XL_MR)
                tile_int8(XL_MR, depth, xi, w, s);
            else if (rows == HALF)
                tile_int8(HALF, depth, xi, w, s);
            else if (rows == 4)
                tile_int8(4, depth, xi, w, s);
            else
                tile_int8(1, depth, xi, w, s);
            scale_sums(rows, xl_min(TILE_N, n - j), depth, alpha, xi, scale + j, s, TILE_N, beta,
                       c + i * ldc + j, ldc);
        }
    }
}

/* As xl_peak_rounds, with bytes that are ones; the sums are the other operand, so that no product is
 * known before its round. */
static double peak_int8(ptrdiff_t rounds, real *sink) {
#if defined XL_AMX && !defined XL_REAL_F64
    int8_t ones[16 * 64];
    int32_t s[16 * 16];
    for (int i = 0; i < 16 * 64; i++) ones[i] = 1;
    PEAK_TILES(_tile_dpbssd, rounds, ones, s, sink)
    return 2.0 * 4 * 16 * 16 * 64 * (double)rounds;
#else
    enum { CHAINS = 12 };
    sums s[CHAINS];
    const columns ones = widen(0x01010101 - (sums){0});
    for (int i = 0; i < CHAINS; i++) s[i] = i - (sums){0};
    for (ptrdiff_t r = 0; r < rounds; r++)
        for (int i = 0; i < CHAINS; i++) s[i] = add_four(s[i], ones, s[i]);
    for (int i = 1; i < CHAINS; i++) s[0] += s[i];
    *sink = (real)s[0][0];
    return 2.0 * 4 * COLUMNS * CHAINS * (double)rounds;
#endif
}
