/* One small matrix product, c (+)= a b, over 32-bit steps: a step is one fp32 value, or a pair of neighbouring bf16
 * values where the CPU multiplies such pairs (`PAIRS`).  a is [rows, steps], b [steps, columns], c [rows, columns] in
 * fp32; columns are a multiple of VL, steps in pairs one of STEP.  Every element is summed over the steps in ascending
 * order, however many rows there are.
 */
#pragma once
#include <stdbool.h>

#include "simd.h"

#if defined(__AVX512BF16__)
#define PAIRS 1
#else
#define PAIRS 0
#endif

#if defined(__AMX_BF16__)
#define STEP 16
#else
#define STEP 1
#endif

INLINE int smaller(int a, int b) { return a < b ? a : b; }
INLINE int round_up(int n, int to) { return (n + to - 1) / to * to; }

/* A block of it in registers; rows and vecs are constants, vecs counts columns in vectors. */
INLINE void multiply_block(const int rows, const int vecs, const bool pairs, const bool fresh, int steps,
                           const uint32_t *a, int a_stride, const uint32_t *b, int b_stride, float *c,
                           int c_stride) {
    lanes sum[4][8];
    (void)pairs;
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < vecs; v++) sum[r][v] = fresh ? splat(0) : load(c + r * c_stride + v * VL);
    for (int s = 0; s < steps; s++) {
        UNROLL for (int r = 0; r < rows; r++) {
            bits x = splat_bits(a[r * a_stride + s]);
            UNROLL for (int v = 0; v < vecs; v++) {
                bits y = load_bits(b + s * b_stride + v * VL);
#if PAIRS
                if (pairs) {
                    sum[r][v] = (lanes)_mm512_dpbf16_ps(sum[r][v], (__m512bh)x, (__m512bh)y);
                    continue;
                }
#endif
                sum[r][v] = fma_((lanes)x, (lanes)y, sum[r][v]);
            }
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < vecs; v++) store(c + r * c_stride + v * VL, sum[r][v]);
}

#if defined(__AMX_BF16__)

/* For products of `rows` rows, at most 32; oneDNN sets its own shapes in between.  Tiles 0 to 3 are c by quarters, 4
 * and 5 the halves of a, 6 and 7 those of b. */
INLINE void configure_tiles(int rows) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } shape = {.palette = 1};
    int upper = smaller(rows, 16), lower = rows > 16 ? rows - 16 : 1;
    const uint8_t heights[] = {upper, upper, lower, lower, upper, lower, 16, 16};
    for (int i = 0; i < 8; i++) shape.row_bytes[i] = 64, shape.rows[i] = heights[i];
    __asm__ volatile("ldtilecfg %0" ::"m"(shape)); /* GCC's intrinsic reads eight bytes of it, for all GCC knows */
}

/* The product of at most 32 rows on the tile unit.  It always computes sixteen or 32: a and c must have room. */
INLINE void multiply_tiles(const bool fresh, int rows, int columns, int steps, const uint32_t *a, int a_stride,
                           const uint32_t *b, int b_stride, float *c, int c_stride) {
    float *lower = c + 16 * c_stride;
    bool below = rows > 16;
    __asm__ volatile("" ::: "memory"); /* GCC does not know that tile loads read what was stored before them */
    for (int x = 0; x < columns; x += 32) {
        bool right = columns - x > 16;
        if (fresh) {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        } else {
            _tile_loadd(0, c + x, 4 * c_stride);
            if (right) _tile_loadd(1, c + x + 16, 4 * c_stride);
            if (below) _tile_loadd(2, lower + x, 4 * c_stride);
            if (right && below) _tile_loadd(3, lower + x + 16, 4 * c_stride);
        }
        for (int s = 0; s < steps; s += STEP) {
            const uint32_t *row = b + s * b_stride + x;
            _tile_loadd(4, a + s, 4 * a_stride);
            _tile_loadd(6, row, 4 * b_stride);
            _tile_dpbf16ps(0, 4, 6);
            if (right) {
                _tile_loadd(7, row + 16, 4 * b_stride);
                _tile_dpbf16ps(1, 4, 7);
            }
            if (below) {
                _tile_loadd(5, a + 16 * a_stride + s, 4 * a_stride);
                _tile_dpbf16ps(2, 5, 6);
                if (right) _tile_dpbf16ps(3, 5, 7);
            }
        }
        _tile_stored(0, c + x, 4 * c_stride);
        if (right) _tile_stored(1, c + x + 16, 4 * c_stride);
        if (below) _tile_stored(2, lower + x, 4 * c_stride);
        if (right && below) _tile_stored(3, lower + x + 16, 4 * c_stride);
    }
}

#endif

/* Vectors of columns at once: fewer rows take more, for enough independent sums to hide the latency of one. */
#define VECS(rows) (VL == 16 ? 4 : (rows) == 1 ? 8 : (rows) == 2 ? 4 : 2)

INLINE void multiply(const bool pairs, const bool fresh, int rows, int columns, int steps, const uint32_t *a,
                     int a_stride, const uint32_t *b, int b_stride, float *c, int c_stride) {
#if defined(__AMX_BF16__)
    if (pairs) return multiply_tiles(fresh, rows, columns, steps, a, a_stride, b, b_stride, c, c_stride);
#endif
    for (int r = 0; r < rows; r += 4, a += 4 * a_stride, c += 4 * c_stride) {
        int x = 0;
#define CASE(n)                                                                                                 \
    case n:                                                                                                     \
        for (; x + VECS(n) * VL <= columns; x += VECS(n) * VL)                                                  \
            multiply_block(n, VECS(n), pairs, fresh, steps, a, a_stride, b + x, b_stride, c + x, c_stride);     \
        for (; x < columns; x += VL)                                                                            \
            multiply_block(n, 1, pairs, fresh, steps, a, a_stride, b + x, b_stride, c + x, c_stride);           \
        break;
        switch (smaller(4, rows - r)) { CASE(1) CASE(2) CASE(3) CASE(4) }
#undef CASE
    }
}
