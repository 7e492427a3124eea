/* Paged attention over ragged segments: kernels/paged_attention.py has the contract and the reference.
 *
 * The work is cut by absolute position: a tile is KEYS consecutive positions, a chunk is CHUNK of them.  A row is
 * attended chunk by chunk, each from an empty state, tile by tile, and the chunks' states are joined in ascending order.  No
 * arithmetic depends on which other rows are there or on who does it, so a row's bits are the same alone, in a batch,
 * among many rows of its segment, and whether its chunks ran on one thread or on several.
 *
 * Inside a tile both products, scores = q K^T and out += p V, are the same small matrix product over 32-bit steps: a
 * step is one fp32 value, or a pair of bf16 values where the CPU multiplies such pairs (`PAIRS`).  Keys are transposed
 * while they are read, so that neighbouring keys lie in neighbouring lanes and no sum crosses lanes.
 */
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "simd.h"

enum { KEYS = 64, CHUNK = 512, ROWS = 32, GRAIN = 32, MAX_SIZE = 256 };

#if defined(__AVX512BF16__)
#define PAIRS 1
#else
#define PAIRS 0
#endif

struct attention { /* mirrored by kernels/native/__init__.py; strides in elements */
    const int32_t *q_indptr, *first_pos, *block_tables;
    int64_t segments, table_width;
    int64_t heads, kv_heads, size, slots, block_stride; /* H, G, D, P, and from one block to the next */
    int64_t window;                                     /* 0: none */
    int64_t is_bf16, threads;
    float scale;
};

struct state { /* softmax of each row over the keys seen so far, base 2: out / sum is the mean, largest + log2(sum) the lse */
    float largest[ROWS], sum[ROWS];
    float out[ROWS * MAX_SIZE] __attribute__((aligned(64))); /* [rows, padded size] */
};

struct rows { /* rows of one segment that share a KV head: folded row f is token f / group, head f % group */
    int segment, kv_head, first, count;
};

struct scratch {
    struct state chunk, total;
    uint32_t q[ROWS * MAX_SIZE] __attribute__((aligned(64)));      /* [rows, steps] */
    uint32_t keys[MAX_SIZE * KEYS] __attribute__((aligned(64)));   /* [steps, KEYS] */
    uint32_t values[KEYS * MAX_SIZE] __attribute__((aligned(64))); /* [KEYS or KEYS / 2, padded size] */
    float scores[ROWS * KEYS] __attribute__((aligned(64)));        /* [rows, KEYS]; weights take their place */
    int32_t present[KEYS] __attribute__((aligned(64)));            /* -1 where a block is there, 0 in a hole */
};

INLINE int smaller(int a, int b) { return a < b ? a : b; }
INLINE int round_up(int n, int to) { return (n + to - 1) / to * to; }
INLINE int padded(int n) { return round_up(n, VL); }
#if defined(__AMX_BF16__)
INLINE int steps_of(bool pairs, int size) { return pairs ? round_up(size / 2, 16) : size; }
#else
INLINE int steps_of(bool pairs, int size) { return pairs ? size / 2 : size; }
#endif

/* c [rows, vecs * VL] = (fresh ? 0 : c) + a [rows, steps] b [steps, vecs * VL], rows and vecs small constants. */
INLINE void multiply_block(const int rows, const int vecs, const bool pairs, const bool fresh, int steps, const uint32_t *a,
                           int a_stride, const uint32_t *b, int b_stride, float *c, int c_stride) {
    lanes sum[4][8];
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

/* Few rows take more columns at once: enough independent sums to hide the latency of one. */
#define WIDE(rows) (VL == 16 ? 4 : (rows) == 1 ? 8 : (rows) == 2 ? 4 : 2)

#if defined(__AMX_BF16__)
/* The same on the tile unit: rows are computed sixteen at a time, rows past the last one are scratch and never read. */
INLINE void multiply_tiles(const bool fresh, int rows, int columns, int steps, const uint32_t *a, int a_stride, const uint32_t *b,
                           int b_stride, float *c, int c_stride) {
    for (int x = 0; x < columns; x += 32) {
        bool right = columns - x > 16, below = rows > 16;
        float *lower = c + 16 * c_stride;
        if (fresh) {
            _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
        } else {
            _tile_loadd(0, c + x, 4 * c_stride);
            if (right) _tile_loadd(1, c + x + 16, 4 * c_stride);
            if (below) _tile_loadd(2, lower + x, 4 * c_stride);
            if (right && below) _tile_loadd(3, lower + x + 16, 4 * c_stride);
        }
        for (int s = 0; s < steps; s += 16) {
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

static void configure_tiles(void) { /* eight tiles of sixteen rows of 64 bytes */
    struct { uint8_t palette, start, reserved[14]; uint16_t row_bytes[16]; uint8_t rows[16]; } shape = {.palette = 1};
    for (int i = 0; i < 8; i++) shape.row_bytes[i] = 64, shape.rows[i] = 16;
    _tile_loadconfig(&shape);
}
#endif

INLINE void multiply(const bool pairs, const bool fresh, int rows, int columns, int steps, const uint32_t *a, int a_stride,
                     const uint32_t *b, int b_stride, float *c, int c_stride) {
#if defined(__AMX_BF16__)
    if (pairs) return multiply_tiles(fresh, rows, columns, steps, a, a_stride, b, b_stride, c, c_stride);
#endif
    for (int r = 0; r < rows; r += 4) {
        const uint32_t *ar = a + r * a_stride;
        float *cr = c + r * c_stride;
        int x = 0;
#define CASE(n)                                                                                                 \
    case n:                                                                                                     \
        for (; x + WIDE(n) * VL <= columns; x += WIDE(n) * VL)                                                  \
            multiply_block(n, WIDE(n), pairs, fresh, steps, ar, a_stride, b + x, b_stride, cr + x, c_stride);   \
        for (; x < columns; x += VL)                                                                            \
            multiply_block(n, 1, pairs, fresh, steps, ar, a_stride, b + x, b_stride, cr + x, c_stride);         \
        break;
        switch (smaller(4, rows - r)) { CASE(1) CASE(2) CASE(3) CASE(4) }
#undef CASE
    }
}

/* q [rows, D] as [rows, steps]. */
static void load_queries(const struct attention *a, struct rows rows, const char *q, uint32_t *to) {
    int group = a->heads / a->kv_heads, size = a->size, width = a->is_bf16 ? 2 : 4;
    int steps = steps_of(a->is_bf16 && PAIRS, size);
    memset(to, 0, sizeof(*to) * rows.count * steps);
    for (int r = 0; r < rows.count; r++) {
        int f = rows.first + r;
        int64_t token = a->q_indptr[rows.segment] + f / group, head = rows.kv_head * group + f % group;
        const char *from = q + (token * a->heads + head) * size * width;
        if (!a->is_bf16 || PAIRS) memcpy(to + r * steps, from, size * width);
        else
            for (int d = 0; d < size; d++) to[r * steps + d] = (uint32_t)((const uint16_t *)from)[d] << 16;
    }
}

/* keys [count, D] -> columns of [steps, KEYS]; count is a multiple of 16.  Fetches the rows `ahead` of these into the cache. */
INLINE void load_keys(const bool is_bf16, int size, int count, const char *from, int64_t ahead, uint32_t *to) {
    int words = is_bf16 ? size / 2 : size;
    int64_t stride = words * 4;
    for (int k = 0; k < count; k += VL, from += VL * stride)
        for (int w = 0; w < words; w += VL) {
            int n = smaller(VL, words - w);
            bits v[VL];
            const char *row = from + 4 * w;
            if (n == VL) {
                UNROLL for (int i = 0; i < VL; i++, row += stride) {
                    v[i] = load_bits((const uint32_t *)row);
                    if (VL == 16 || w % 16 == 0) _mm_prefetch(row + ahead, _MM_HINT_T1);
                }
            } else {
                UNROLL for (int i = 0; i < VL; i++, row += stride) v[i] = load_some((const uint32_t *)row, n);
            }
            transpose(v);
            uint32_t *column = to + (is_bf16 && !PAIRS ? 2 * w : w) * KEYS + k;
            UNROLL for (int i = 0; i < VL; i++) {
                if (i >= n) break;
                if (is_bf16 && !PAIRS) {
                    store_bits(column + 2 * i * KEYS, v[i] << 16);
                    store_bits(column + (2 * i + 1) * KEYS, v[i] & (int32_t)0xffff0000);
                } else {
                    store_bits(column + i * KEYS, v[i]);
                }
            }
        }
}

/* values [count, D] -> rows of [steps, padded D]; keys outside [low, high) become zero, for 0 * NaN is NaN. */
INLINE void load_values(const bool is_bf16, int size, int count, int low, int high, const char *from, int64_t ahead, uint32_t *to) {
    int width = padded(size), bytes = is_bf16 ? 2 : 4;
#if PAIRS
    if (is_bf16) {
        const __m512i first_half = (__m512i)((IOTA + 32) << 16 | IOTA) , second_half = (__m512i)((IOTA + 48) << 16 | (IOTA + 16));
        for (int k = 0; k < count; k += 2, from += 4 * size, to += width) {
            bool both = k >= low && k + 1 < high, first = k >= low && k < high, second = k + 1 >= low && k + 1 < high;
            for (int d = 0; d < size; d += 32) {
                const char *row = from + 2 * d;
                __m512i x, y;
                _mm_prefetch(row + ahead, _MM_HINT_T1);
                _mm_prefetch(row + 2 * size + ahead, _MM_HINT_T1);
                if (both && size - d >= 32) {
                    x = _mm512_loadu_si512(row), y = _mm512_loadu_si512(row + 2 * size);
                } else {
                    __mmask32 some = size - d >= 32 ? 0xffffffff : (1u << (size - d)) - 1;
                    x = _mm512_maskz_loadu_epi16(first ? some : 0, row), y = _mm512_maskz_loadu_epi16(second ? some : 0, row + 2 * size);
                }
                store_bits(to + d, (bits)_mm512_permutex2var_epi16(x, first_half, y));
                if (d + 16 < width) store_bits(to + d + 16, (bits)_mm512_permutex2var_epi16(x, second_half, y));
            }
        }
        return;
    }
#endif
    for (int k = 0; k < count; k++, from += size * bytes, to += width)
        for (int d = 0; d < size; d += VL) {
            int n = k >= low && k < high ? smaller(VL, size - d) : 0;
            if (d * bytes % 64 == 0) _mm_prefetch(from + d * bytes + ahead, _MM_HINT_T1);
            store((float *)to + d, n ? load_as_float(from + d * bytes, n, is_bf16) : splat(0));
        }
}

/* Where K of one block and KV head begins; V lies kv_heads * slots * size elements further.  NULL in a hole. */
INLINE const char *block_at(const struct attention *a, struct rows rows, const char *kv, int64_t position) {
    int64_t index = position / a->slots;
    if (index >= a->table_width) return NULL;
    int32_t block = a->block_tables[rows.segment * a->table_width + index];
    if (block < 0) return NULL;
    return kv + (block * a->block_stride + rows.kv_head * a->slots * a->size) * (a->is_bf16 ? 2 : 4);
}

/* Brings the positions [low, high) of the tile at `base` into scratch; says how many blocks of it are there. */
static int load_tile(const struct attention *a, struct rows rows, const char *kv, int base, int low, int high, struct scratch *w) {
    int size = a->size, slots = a->slots, columns = round_up(high - base, GRAIN), blocks = 0;
    bool pairs = a->is_bf16 && PAIRS;
    int64_t values_after = a->kv_heads * slots * size * (a->is_bf16 ? 2 : 4);
    for (int k = 0; k < columns; k += slots) {
        const char *block = base + k + slots <= low || base + k >= high ? NULL : block_at(a, rows, kv, base + k);
        uint32_t *values = w->values + (pairs ? k / 2 : k) * padded(size);
        UNROLL for (int i = 0; i < slots; i += VL) *(bits *)(w->present + k + i) = splat_bits(block ? -1 : 0);
        if (!block) {
            memset(values, 0, (pairs ? slots / 2 : slots) * padded(size) * 4);
            continue;
        }
        blocks++;
        /* The next tile is on its way to the cache while this one is computed. */
        const char *next = block_at(a, rows, kv, base + KEYS + k);
        int64_t ahead = next ? next - block : 0;
        int count = smaller(slots, columns - k);
        if (a->is_bf16) {
            load_keys(true, size, count, block, ahead, w->keys + k);
            load_values(true, size, count, low - base - k, high - base - k, block + values_after, ahead, values);
        } else {
            load_keys(false, size, count, block, ahead, w->keys + k);
            load_values(false, size, count, low - base - k, high - base - k, block + values_after, ahead, values);
        }
    }
    return blocks;
}

/* One row of scores becomes weights exp2(score - largest); the row's state is brought to the new largest. */
INLINE void weigh(const bool pairs, float factor, int columns, int low, int high, const int32_t *present, float *scores,
                  struct state *state, int r, int width) {
    lanes x[KEYS / VL], top = splat(-INFINITY);
    int vecs = columns / VL;
    for (int v = 0; v < vecs; v++) {
        bits at = IOTA + v * VL;
        bits seen = (bits)(at >= low) & (bits)(at < high) & *(const bits *)(present + v * VL);
        x[v] = choose(seen, load(scores + v * VL) * factor, splat(-INFINITY));
        top = max_(top, x[v]);
    }
    float before = state->largest[r], largest = fmaxf(before, max_of(top));
    if (largest > before) { /* also false while no key has been seen */
        lanes shrink = exp2_(splat(before - largest));
        float *out = state->out + r * width;
        for (int d = 0; d < width; d += VL) store(out + d, load(out + d) * shrink);
        state->sum[r] *= shrink[0];
        state->largest[r] = largest;
    }
    lanes base = splat(largest == -INFINITY ? 0 : largest), sum = splat(0);
    for (int v = 0; v < vecs; v++) {
        lanes p = exp2_(x[v] - base);
        sum += p;
#if PAIRS
        if (pairs) {
            _mm256_store_si256((__m256i *)((uint16_t *)scores + v * VL), (__m256i)_mm512_cvtneps_pbh(p));
            continue;
        }
#endif
        store(scores + v * VL, p);
    }
    state->sum[r] += sum_of(sum);
}

INLINE void attend_tile(const struct attention *a, const bool pairs, struct rows rows, const char *kv, int base, int low, int high,
                        struct scratch *w) {
    if (!load_tile(a, rows, kv, base, low, high, w)) return;
    int size = a->size, width = padded(size), steps = steps_of(pairs, size);
    int group = a->heads / a->kv_heads, columns = round_up(high - base, GRAIN);
    multiply(pairs, true, rows.count, columns, steps, w->q, steps, w->keys, KEYS, w->scores, KEYS);
    for (int r = 0; r < rows.count; r++) {
        int position = a->first_pos[rows.segment] + (rows.first + r) / group;
        int from = a->window ? position - (int)a->window + 1 - base : 0;
        weigh(pairs, a->scale * 1.44269504f, columns, from, position + 1 - base, w->present, w->scores + r * KEYS, &w->chunk, r, width);
    }
    multiply(pairs, false, rows.count, width, pairs ? columns / 2 : columns, (uint32_t *)w->scores, KEYS, w->values, width,
             w->chunk.out, width);
}

static void clear(struct state *state, int rows, int width) {
    for (int r = 0; r < rows; r++) state->largest[r] = -INFINITY, state->sum[r] = 0;
    memset(state->out, 0, sizeof(float) * rows * width);
}

/* The rows' state over the positions [low, high) of one chunk. */
static void attend_chunk(const struct attention *a, struct rows rows, const char *kv, int low, int high, struct scratch *w) {
    clear(&w->chunk, rows.count, padded(a->size));
    for (int base = low / KEYS * KEYS; base < high; base += KEYS)
        if (a->is_bf16 && PAIRS) attend_tile(a, true, rows, kv, base, low, smaller(high, base + KEYS), w);
        else attend_tile(a, false, rows, kv, base, low, smaller(high, base + KEYS), w);
}

/* total = total joined with the state of the next chunk. */
static void join(struct state *total, const struct state *chunk, int rows, int width) {
    for (int r = 0; r < rows; r++) {
        float largest = fmaxf(total->largest[r], chunk->largest[r]), base = largest == -INFINITY ? 0 : largest;
        lanes keep = exp2_(splat(total->largest[r] - base)), add = exp2_(splat(chunk->largest[r] - base));
        float *out = total->out + r * width;
        const float *next = chunk->out + r * width;
        for (int d = 0; d < width; d += VL) store(out + d, fma_(load(next + d), add, load(out + d) * keep));
        total->sum[r] = total->sum[r] * keep[0] + chunk->sum[r] * add[0];
        total->largest[r] = largest;
    }
}

static void finish(const struct attention *a, struct rows rows, const struct state *state, char *out, float *lse) {
    int group = a->heads / a->kv_heads, size = a->size, width = padded(size), item = a->is_bf16 ? 2 : 4;
    for (int r = 0; r < rows.count; r++) {
        int f = rows.first + r;
        int64_t at = (a->q_indptr[rows.segment] + f / group) * a->heads + rows.kv_head * group + f % group;
        bool empty = state->sum[r] == 0; /* a NaN that was attended is no empty row */
        lanes share = splat(empty ? 0 : 1 / state->sum[r]);
        lse[at] = empty ? -INFINITY : state->largest[r] * 0.693147181f + logf(state->sum[r]);
        for (int d = 0; d < size; d += VL)
            store_as(out + (at * size + d) * item, load(state->out + r * width + d) * share, smaller(VL, size - d), a->is_bf16);
    }
}

/* The positions that some of these rows see: [low, high). */
INLINE void seen_by(const struct attention *a, struct rows rows, int *low, int *high) {
    int group = a->heads / a->kv_heads, start = a->first_pos[rows.segment];
    int first = start + rows.first / group, last = start + (rows.first + rows.count - 1) / group;
    *low = a->window && first >= a->window ? first - (int)a->window + 1 : 0;
    *high = last + 1;
}

static void attend_chunk_of(const struct attention *a, struct rows rows, const char *kv, int chunk, struct scratch *w) {
    int low, high, begin = chunk * CHUNK;
    seen_by(a, rows, &low, &high);
    attend_chunk(a, rows, kv, low > begin ? low : begin, smaller(high, begin + CHUNK), w);
}

static int chunks_of(const struct attention *a, struct rows rows, int *first) {
    int low, high;
    seen_by(a, rows, &low, &high);
    *first = low / CHUNK;
    return (high + CHUNK - 1) / CHUNK - *first;
}

static void enter(const struct attention *a, struct scratch *w) {
#if defined(__AMX_BF16__)
    int steps = steps_of(true, a->size);
    configure_tiles();
    if (a->is_bf16) memset(w->keys + a->size / 2 * KEYS, 0, sizeof(*w->keys) * (steps - a->size / 2) * KEYS);
#else
    (void)a, (void)w;
#endif
}

static void leave(void) {
#if defined(__AMX_BF16__)
    _tile_release();
#endif
}

/* Whether this process may run the kernels: the kernel hands out the tile registers on request. */
int permitted(void) {
#if defined(__AMX_BF16__)
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return 1;
#endif
}

/* q [T, H, D], kv, out [T, H, D], lse [T, H].  0, or -1 when memory runs out. */
int paged_attention(const struct attention *a, const char *q, const char *kv, char *out, float *lse) {
    int group = a->heads / a->kv_heads, width = padded(a->size), count = 0;
    for (int s = 0; s < a->segments; s++) count += ((a->q_indptr[s + 1] - a->q_indptr[s]) * group + ROWS - 1) / ROWS;
    count *= a->kv_heads;
    struct rows *items = malloc(sizeof(struct rows) * (count + 1));
    int *first_part = malloc(sizeof(int) * (count + 1));
    if (!items || !first_part) return free(items), free(first_part), -1;
    int n = 0, parts = 0;
    for (int s = 0; s < a->segments; s++) /* later rows see more keys: they go first, so that no long one is left at the end */
        for (int f = ((a->q_indptr[s + 1] - a->q_indptr[s]) * group - 1) / ROWS * ROWS; f >= 0 && a->q_indptr[s] < a->q_indptr[s + 1]; f -= ROWS)
            for (int g = 0; g < a->kv_heads; g++) {
                int first, left = (a->q_indptr[s + 1] - a->q_indptr[s]) * group - f;
                items[n] = (struct rows){s, g, f, smaller(ROWS, left)};
                first_part[n] = parts;
                parts += chunks_of(a, items[n++], &first);
            }
    first_part[count] = parts;

    if (count >= 2 * a->threads || parts == count || a->threads == 1) {
#pragma omp parallel num_threads(a->threads) if (a->threads > 1)
        {
            struct scratch w;
            enter(a, &w);
#pragma omp for schedule(dynamic, 1)
            for (int i = 0; i < count; i++) {
                int first, chunks = chunks_of(a, items[i], &first);
                load_queries(a, items[i], q, w.q);
                clear(&w.total, items[i].count, width);
                for (int c = first; c < first + chunks; c++) {
                    attend_chunk_of(a, items[i], kv, c, &w);
                    join(&w.total, &w.chunk, items[i].count, width);
                }
                finish(a, items[i], &w.total, out, lse);
            }
            leave();
        }
    } else { /* too few items for the threads: every chunk is its own item, its state is kept until all are there */
        struct state *states = aligned_alloc(64, sizeof(struct state) * parts);
        if (!states) return free(items), free(first_part), -1;
#pragma omp parallel num_threads(a->threads)
        {
            struct scratch w;
            enter(a, &w);
#pragma omp for schedule(dynamic, 1)
            for (int part = 0; part < parts; part++) {
                int i = 0, first;
                while (first_part[i + 1] <= part) i++;
                chunks_of(a, items[i], &first);
                load_queries(a, items[i], q, w.q);
                attend_chunk_of(a, items[i], kv, first + part - first_part[i], &w);
                states[part] = w.chunk;
            }
#pragma omp for schedule(dynamic, 1)
            for (int i = 0; i < count; i++) {
                clear(&w.total, items[i].count, width);
                for (int part = first_part[i]; part < first_part[i + 1]; part++) join(&w.total, &states[part], items[i].count, width);
                finish(a, items[i], &w.total, out, lse);
            }
            leave();
        }
        free(states);
    }
    free(items), free(first_part);
    return 0;
}
