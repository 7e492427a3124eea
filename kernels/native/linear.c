/* x W^T + bias in bf16, on the tile unit or by AVX-512's dots: kernels/linear.py has the contract.
 *
 * A weight [N, K] is packed into panels of 32 outputs, [N / 32, K / 2, 32]: each word holds two neighbouring inputs of
 * one output, zeros where N or K end early.  A panel is read from front to back, so few rows stream the weight at the
 * speed of memory.  For many rows, x is cut so that a part of it stays in the L2 cache while all panels pass, and a
 * panel so that a piece of it stays in L1 while the rows pass.
 *
 * Every element is one sum in fp32 over K in ascending order, and a cut moves no addition: the bits of a row depend
 * neither on the other rows nor on the number of threads.
 */
#include "kernels.h"
#include "product.h"

#if PAIRS

enum { PANEL = 32, DEEP = 16 };           /* outputs of a panel, and the steps that K is rounded up to: two tiles */
enum { MOST_ROWS = 512, L1_STEPS = 128 }; /* of a part of x; of a piece of a panel: 16 KB */
enum { AHEAD = 1 << 14 };                 /* bytes: where few rows read next, early enough for DRAM */
enum { SHARES = 4 };                      /* of a thread in the panels */
enum { WORTH_A_THREAD = 1 << 18 };        /* weights, once a pass: below this, threads are not worth waking */

#if defined(__AMX_BF16__)
enum { ROWS = 32, L2_BYTES = 5 << 18 }; /* of one pass: two tiles; of a part of x */
#define FETCH_TO _MM_HINT_T1
#else
enum { ROWS = 14, L2_BYTES = 1 << 19 }; /* of one pass: 28 sums in registers; of a part of x */
#define FETCH_TO _MM_HINT_T0
#endif

struct scratch { /* of one thread */
    float sums[MOST_ROWS * PANEL] __attribute__((aligned(64)));
    int height; /* rows that tiles are configured for */
};

/* What passes bring nearer of the weight: a lone one the bytes AHEAD of it, several by turns what follows the piece
 * that they all read. */
struct fetch {
    const char *next;
    int turn, turns;
};

INLINE void fetch(struct fetch *f, const int lines) {
    if (f->turns == 1) {
        UNROLL for (int i = 0; i < lines; i++) _mm_prefetch(f->next + 64 * i, _MM_HINT_T0);
    } else {
        for (int i = f->turn; i < lines; i += f->turns) _mm_prefetch(f->next + 64 * i, FETCH_TO);
    }
    f->next += 64 * lines;
}

#if defined(__AMX_BF16__)

/* c [rows, PANEL] (+)= a [rows, steps] b [steps, PANEL] for rows in one tile or, `below`, two. */
INLINE void multiply_tiled(const bool below, bool fresh, int steps, const uint32_t *a, int64_t a_stride,
                           const uint32_t *b, float *c, struct fetch next) {
    float *lower = c + 16 * PANEL;
    if (fresh) {
        _tile_zero(0);
        _tile_zero(1);
        if (below) _tile_zero(2);
        if (below) _tile_zero(3);
    } else {
        _tile_loadd(0, c, 4 * PANEL);
        _tile_loadd(1, c + 16, 4 * PANEL);
        if (below) _tile_loadd(2, lower, 4 * PANEL);
        if (below) _tile_loadd(3, lower + 16, 4 * PANEL);
    }
    for (int s = 0; s < steps; s += DEEP, b += DEEP * PANEL) {
        fetch(&next, 2 * DEEP);
        _tile_loadd(4, a + s, 4 * a_stride);
        _tile_loadd(6, b, 4 * PANEL);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + 16, 4 * PANEL);
        _tile_dpbf16ps(1, 4, 7);
        if (below) {
            _tile_loadd(5, a + 16 * a_stride + s, 4 * a_stride);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, c, 4 * PANEL);
    _tile_stored(1, c + 16, 4 * PANEL);
    if (below) _tile_stored(2, lower, 4 * PANEL);
    if (below) _tile_stored(3, lower + 16, 4 * PANEL);
}

/* One pass: the same into own->sums from row `first` on. */
static void multiply_pass(int rows, bool fresh, int steps, const uint32_t *a, int64_t a_stride, const uint32_t *b,
                          struct scratch *own, int first, struct fetch next) {
    float *c = own->sums + first * PANEL;
    if (own->height != rows) configure_tiles(own->height = rows);
    if (rows <= 16) multiply_tiled(false, fresh, steps, a, a_stride, b, c, next);
    else multiply_tiled(true, fresh, steps, a, a_stride, b, c, next);
}

/* The first row of one of several passes: all but the last are full. */
INLINE int first_row(int rows, int pass, int passes) { return pass < passes ? pass * ROWS : rows; }

#else

/* c [rows, PANEL] (+)= a [rows, steps] b [steps, PANEL]; rows is a constant. */
INLINE void multiply_fixed(const int rows, bool fresh, int steps, const uint32_t *a, int64_t a_stride,
                           const uint32_t *b, float *c, struct fetch next) {
    lanes left[ROWS], right[ROWS];
    UNROLL for (int r = 0; r < rows; r++) {
        left[r] = fresh ? splat(0) : load(c + r * PANEL);
        right[r] = fresh ? splat(0) : load(c + r * PANEL + VL);
    }
    for (int s = 0; s < steps; s += 4) {
        fetch(&next, 8);
        UNROLL for (int i = 0; i < 4; i++, a++, b += PANEL) {
            __m512bh y = (__m512bh)load_bits(b), z = (__m512bh)load_bits(b + VL);
            UNROLL for (int r = 0; r < rows; r++) {
                __m512bh x = (__m512bh)splat_bits(a[r * a_stride]);
                left[r] = (lanes)_mm512_dpbf16_ps((__m512)left[r], x, y);
                right[r] = (lanes)_mm512_dpbf16_ps((__m512)right[r], x, z);
            }
        }
    }
    UNROLL for (int r = 0; r < rows; r++) {
        store(c + r * PANEL, left[r]);
        store(c + r * PANEL + VL, right[r]);
    }
}

/* One pass: the same into own->sums from row `first` on.  Not inlined: among the caller's variables, the loops would
 * lack registers for their addresses. */
static __attribute__((noinline)) void multiply_pass(int rows, bool fresh, int steps, const uint32_t *a,
                                                    int64_t a_stride, const uint32_t *b, struct scratch *own,
                                                    int first, struct fetch next) {
    float *c = own->sums + first * PANEL;
#define CASE(n)                                                         \
    case n:                                                             \
        multiply_fixed(n, fresh, steps, a, a_stride, b, c, next);       \
        break;
    switch (rows) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7)
        CASE(8) CASE(9) CASE(10) CASE(11) CASE(12) CASE(13) CASE(14)
    }
#undef CASE
}

/* The first row of one of several passes: they are all about as high. */
INLINE int first_row(int rows, int pass, int passes) { return rows * pass / passes; }

#endif

/* out [rows, count], rows `stride` apart, = sums [rows, PANEL] + bias [count]. */
static void finish(int rows, int count, const float *sums, const uint16_t *bias, uint16_t *out, int64_t stride) {
    lanes left = bias ? load_bf16(bias, count) : splat(0);
    lanes right = bias && count > VL ? load_bf16(bias + VL, count - VL) : splat(0);
    __mmask32 some = count == PANEL ? 0xffffffff : (1u << count) - 1;
    for (int r = 0; r < rows; r++, sums += PANEL, out += stride) {
        lanes first = load(sums) + left, second = load(sums + VL) + right;
        _mm512_mask_storeu_epi16(out, some, (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
    }
}

/* The outputs of one panel for up to MOST_ROWS rows of x. */
static void multiply_panel(const struct linear *w, int64_t panel, int rows, const uint16_t *x, uint16_t *out,
                           struct scratch *own) {
    int64_t first = panel * PANEL;
    int steps = w->inputs / 2, count = w->outputs - first < PANEL ? w->outputs - first : PANEL;
    int passes = (rows + ROWS - 1) / ROWS, pieces = (steps + L1_STEPS - 1) / L1_STEPS;
    int cut = passes == 1 ? steps : round_up((steps + pieces - 1) / pieces, DEEP);
    for (int begin = 0; begin < steps; begin += cut) {
        const uint32_t *b = w->weight + first * steps + begin * PANEL;
        int some = smaller(cut, steps - begin);
        const char *next = (const char *)b + (passes == 1 ? AHEAD : 4 * PANEL * some);
        for (int pass = 0; pass < passes; pass++) {
            int64_t r = first_row(rows, pass, passes);
            int height = first_row(rows, pass + 1, passes) - r;
            const uint32_t *a = (const uint32_t *)(x + r * w->inputs) + begin;
            multiply_pass(height, begin == 0, some, a, steps, b, own, r, (struct fetch){next, pass, passes});
            if (begin + cut < steps) continue;
            finish(height, count, own->sums + r * PANEL, w->bias ? w->bias + first : NULL,
                   out + r * w->outputs + first, w->outputs);
        }
    }
}

/* The first panel of one of n shares.  Threads take the large ones first, so that they end at about the same time. */
INLINE int64_t first_panel(int64_t panels, int64_t share, int64_t n) {
    return panels - panels * (n - share) * (n - share) / (n * n);
}

/* x [rows, K], zeros where K is rounded up -> out [rows, N]. */
void team_linear(struct team *team, const struct linear *w, const uint16_t *x, uint16_t *out, int64_t rows) {
    if (!rows) return;
    int64_t fit = L2_BYTES / (2 * w->inputs) / ROWS * ROWS, most = MOST_ROWS / ROWS * ROWS;
    int64_t height = fit < ROWS ? ROWS : fit > most ? most : fit, parts = (rows + height - 1) / height;
    int64_t panels = (w->outputs + PANEL - 1) / PANEL, shares = SHARES * team->threads;
    height = round_up((rows + parts - 1) / parts, ROWS);
    struct scratch own;
    own.height = 0;
    for (int64_t i; (i = take(team)) < parts * shares;) {
        int64_t row = i / shares * height, share = i % shares, end = first_panel(panels, share + 1, shares);
        int count = rows - row < height ? rows - row : height;
        for (int64_t p = first_panel(panels, share, shares); p < end; p++)
            multiply_panel(w, p, count, x + row * w->inputs, out + row * w->outputs, &own);
    }
#if defined(__AMX_BF16__)
    _tile_release();
#endif
    meet(team);
}

INLINE bool is_worth_threads(const struct linear *w, int64_t rows) {
    return w->outputs * w->inputs * ((rows + ROWS - 1) / ROWS) >= WORTH_A_THREAD;
}

void linear(const struct linear *w, const uint16_t *x, uint16_t *out, int64_t rows, int64_t threads) {
    struct team team = {0};
#pragma omp parallel num_threads(threads) if (threads > 1 && is_worth_threads(w, rows))
    {
        enter(&team);
        team_linear(&team, w, x, out, rows);
    }
}

/* weight [N, K], rows `stride` elements apart, -> packed. */
void pack_linear(const uint16_t *weight, uint32_t *packed, int64_t outputs, int64_t inputs, int64_t stride,
                 int64_t threads) {
    const int64_t deep = 2 * DEEP, steps = (inputs + deep - 1) / deep * DEEP;
    int64_t panels = (outputs + PANEL - 1) / PANEL;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t tile = 0; tile < 2 * panels; tile++) {
        uint32_t *to = packed + tile / 2 * PANEL * steps + tile % 2 * VL;
        for (int64_t k = 0; k < inputs; k += deep) {
            __mmask32 some = inputs - k < deep ? (1u << (inputs - k)) - 1 : 0xffffffff;
            bits v[VL];
            UNROLL for (int i = 0; i < VL; i++) {
                int64_t n = tile * VL + i;
                v[i] = (bits)_mm512_maskz_loadu_epi16(n < outputs ? some : 0, weight + n * stride + k);
            }
            transpose(v);
            UNROLL for (int i = 0; i < VL; i++, to += PANEL) store_bits(to, v[i]);
        }
    }
}

#endif
