/* x W^T + bias in bf16 on the tile unit: kernels/linear.py has the contract.
 *
 * A weight [N, K] is packed into panels of 32 outputs, [N / 32, K / 2, 32]: each word holds two neighbouring inputs of
 * one output, zeros where N or K end early.  A panel is read from front to back, so few rows stream the weight at the
 * speed of memory.  For many rows, x is cut so that a part of it stays in the L2 cache while all panels pass, and a
 * panel so that a part of it stays in L1 while the rows pass.
 *
 * Every element is summed in fp32 over K in ascending order, 32 inputs at a time, and a cut moves no addition: the
 * bits of a row depend neither on the other rows nor on the number of threads.
 */
#include "product.h"

#if defined(__AMX_BF16__)

enum { PANEL = 32, ROWS = 32 };             /* outputs and rows of one product: two tiles each */
enum { MOST_ROWS = 512, L2_BYTES = 5 << 18 }; /* of a part of x */
enum { L1_STEPS = 128 };                    /* of a part of a panel: 16 KB, and as much again of the rows that pass */
enum { AHEAD = 1 << 14 };                   /* bytes: where few rows read next, early enough for DRAM */
enum { WORTH_A_THREAD = 1 << 15 };          /* elements: below this, waking threads costs more than they save */

struct linear { /* mirrored by kernels/native/library.py */
    const uint32_t *weight; /* packed */
    const uint16_t *bias;   /* [N] or NULL */
    int64_t outputs, inputs; /* N, and K rounded up to whole tiles */
};

struct scratch { /* of one thread */
    float sums[MOST_ROWS * PANEL] __attribute__((aligned(64)));
    int height; /* rows that the tiles are configured for */
};

/* c [rows, PANEL] (+)= a [rows, steps] b [steps, PANEL] for rows in one tile or, `below`, two.  Meanwhile it brings
 * nearer what is read next of the weight: if this is the only one of `parts` of x, the bytes AHEAD; if not, its share
 * of those behind b, which are next when all parts have passed. */
INLINE void multiply_panel(const bool below, const bool fresh, int steps, const uint32_t *a, int64_t a_stride,
                           const uint32_t *b, float *c, int part, int parts) {
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
    const char *next = (const char *)(b + (int64_t)steps * PANEL);
    for (int s = 0; s < steps; s += STEP, b += STEP * PANEL, next += 4 * STEP * PANEL) {
        if (parts == 1) {
            UNROLL for (int i = 0; i < 2 * STEP; i++) _mm_prefetch((const char *)b + AHEAD + 64 * i, _MM_HINT_T0);
        } else {
            for (int i = part; i < 2 * STEP; i += parts) _mm_prefetch(next + 64 * i, _MM_HINT_T1);
        }
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
static void multiply_rows(const struct linear *w, int64_t panel, int rows, const uint16_t *x, uint16_t *out,
                          struct scratch *own) {
    int64_t first = panel * PANEL;
    int steps = w->inputs / 2, count = w->outputs - first < PANEL ? w->outputs - first : PANEL;
    int parts = round_up(rows, ROWS) / ROWS, cut = parts == 1 ? steps : smaller(L1_STEPS, steps);
    for (int begin = 0; begin < steps; begin += cut) {
        const uint32_t *b = w->weight + first * steps + begin * PANEL;
        int some = smaller(cut, steps - begin);
        for (int part = 0; part < parts; part++) {
            int64_t r = part * ROWS;
            int height = smaller(ROWS, rows - r);
            const uint32_t *a = (const uint32_t *)(x + r * w->inputs) + begin;
            float *sums = own->sums + r * PANEL;
            if (own->height != height) configure_tiles(own->height = height);
            if (parts == 1 && height <= 16) multiply_panel(false, true, some, a, steps, b, sums, 0, 1);
            else if (parts == 1) multiply_panel(true, true, some, a, steps, b, sums, 0, 1);
            else if (height <= 16) multiply_panel(false, begin == 0, some, a, steps, b, sums, part, parts);
            else multiply_panel(true, begin == 0, some, a, steps, b, sums, part, parts);
            if (begin + cut >= steps)
                finish(height, count, sums, w->bias ? w->bias + first : NULL, out + r * w->outputs + first, w->outputs);
        }
    }
}

/* x [rows, K], zeros where K is rounded up -> out [rows, N]. */
void linear(const struct linear *w, const uint16_t *x, uint16_t *out, int64_t rows, int64_t threads) {
    if (w->outputs * w->inputs < WORTH_A_THREAD) threads = 1;
    int64_t fit = L2_BYTES / (2 * w->inputs) / ROWS * ROWS;
    int64_t height = fit < ROWS ? ROWS : fit > MOST_ROWS ? MOST_ROWS : fit, parts = (rows + height - 1) / height;
    int64_t panels = (w->outputs + PANEL - 1) / PANEL, width = (panels + 4 * threads - 1) / (4 * threads);
    if (width > 16) width = 16;
    if (parts >= 2 * threads) width = panels; /* each thread has rows of its own, and pages of `out` */
    int64_t runs = (panels + width - 1) / width;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        struct scratch own;
        own.height = 0;
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < parts * runs; i++) {
            int64_t row = i / runs * height, begin = i % runs * width, end = begin + width;
            int count = rows - row < height ? rows - row : height;
            for (int64_t p = begin; p < end && p < panels; p++)
                multiply_rows(w, p, count, x + row * w->inputs, out + row * w->outputs, &own);
        }
        _tile_release();
    }
}

/* weight [N, K], rows `stride` elements apart, -> packed. */
void pack_linear(const uint16_t *weight, uint32_t *packed, int64_t outputs, int64_t inputs, int64_t stride,
                 int64_t threads) {
    const int64_t deep = 2 * STEP, steps = (inputs + deep - 1) / deep * STEP;
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
