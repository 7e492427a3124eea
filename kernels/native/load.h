/* Brings keys and values of one KV head from a block into the form the products read, and the rows `ahead` bytes
 * further on into the cache meanwhile: they are next, and far away.
 */
#pragma once
#include "product.h"

#if defined(__AMX_BF16__)
#define FETCH_TO _MM_HINT_T1
enum { KEYS = 64, AHEAD = 64 }; /* positions in a tile; how many further on the rows to fetch are */
#else
#define FETCH_TO _MM_HINT_T0
enum { KEYS = 64, AHEAD = 32 };
#endif

/* keys [count, D] -> columns of [steps, KEYS]; count is a multiple of 16.  Neighbouring keys get neighbouring lanes. */
INLINE void load_keys(const bool is_bf16, int size, int count, const char *from, int64_t ahead, uint32_t *to) {
    const bool widen = is_bf16 && !PAIRS;
    int words = is_bf16 ? size / 2 : size;
    int64_t stride = 4 * words;
    for (int k = 0; k < count; k += VL, from += VL * stride)
        for (int w = 0; w < words; w += VL) {
            int n = smaller(VL, words - w);
            const char *row = from + 4 * w;
            bits v[VL];
            if (n == VL) {
                UNROLL for (int i = 0; i < VL; i++, row += stride) {
                    v[i] = load_bits((const uint32_t *)row);
                    if (w % 16 == 0) _mm_prefetch(row + ahead, FETCH_TO);
                }
            } else {
                UNROLL for (int i = 0; i < VL; i++, row += stride) v[i] = load_some((const uint32_t *)row, n);
            }
            transpose(v);
            uint32_t *column = to + (widen ? 2 * w : w) * KEYS + k;
            UNROLL for (int i = 0; i < VL; i++) {
                if (i >= n) break;
                if (widen) {
                    store_bits(column + 2 * i * KEYS, v[i] << 16);
                    store_bits(column + (2 * i + 1) * KEYS, v[i] & (int32_t)0xffff0000);
                } else {
                    store_bits(column + i * KEYS, v[i]);
                }
            }
        }
}

#if PAIRS
/* values [count, D] bf16 -> [count / 2, width], each word one dimension of two neighbouring keys. */
INLINE void load_value_pairs(int size, int count, int low, int high, const char *from, int64_t ahead, uint32_t *to) {
    const __m512i left = (__m512i)((IOTA + 32) << 16 | IOTA), right = (__m512i)((IOTA + 48) << 16 | (IOTA + 16));
    int width = round_up(size, VL);
    for (int k = 0; k < count; k += 2, from += 4 * size, to += width) {
        bool first = k >= low && k < high, second = k + 1 >= low && k + 1 < high;
        for (int d = 0; d < size; d += 32) {
            const char *row = from + 2 * d, *next = row + 2 * size;
            __mmask32 some = size - d >= 32 ? 0xffffffff : (1u << (size - d)) - 1;
            __m512i x = _mm512_maskz_loadu_epi16(first ? some : 0, row);
            __m512i y = _mm512_maskz_loadu_epi16(second ? some : 0, next);
            _mm_prefetch(row + ahead, FETCH_TO);
            _mm_prefetch(next + ahead, FETCH_TO);
            store_bits(to + d, (bits)_mm512_permutex2var_epi16(x, left, y));
            if (d + 16 < width) store_bits(to + d + 16, (bits)_mm512_permutex2var_epi16(x, right, y));
        }
    }
}
#endif

/* values [count, D] -> rows of [steps, width]; keys outside [low, high) become zero, because 0 * NaN is NaN. */
INLINE void load_values(const bool is_bf16, int size, int count, int low, int high, const char *from, int64_t ahead,
                        uint32_t *to) {
#if PAIRS
    if (is_bf16) return load_value_pairs(size, count, low, high, from, ahead, to);
#endif
    int width = round_up(size, VL), bytes = is_bf16 ? 2 : 4;
    for (int k = 0; k < count; k++, from += size * bytes, to += width)
        for (int d = 0; d < size; d += VL) {
            int n = k >= low && k < high ? smaller(VL, size - d) : 0;
            if (d * bytes % 64 == 0) _mm_prefetch(from + d * bytes + ahead, FETCH_TO);
            store((float *)to + d, n ? load_as_float(from + d * bytes, n, is_bf16) : splat(0));
        }
}
