/* Paged attention over ragged segments: kernels/paged_attention.py has the contract and the reference.
 *
 * The work is cut by absolute position: a tile is KEYS consecutive positions, a chunk is CHUNK of them.  A row is
 * attended chunk by chunk, each from an empty state, tile by tile; the states of the chunks are joined in ascending
 * order.  No arithmetic depends on which other rows are there or on who does it, so a row's bits are the same alone,
 * in a batch, among many rows of its segment, and whether its chunks ran on one thread or on several.
 */
#include <string.h>

#include "kernels.h"
#include "load.h"

enum { CHUNK = 512, ROWS = 32, GRAIN = 32, MAX_SIZE = 256 };
enum { WORTH_A_THREAD = 1 << 16 }; /* bytes of keys and values: below this, waking threads costs more than they save */

struct rows { /* up to ROWS of one segment and KV head: row f is token f / group, query head f % group */
    int segment, kv_head, first, count;
    int group;
    int low, high; /* positions that some of them see: [low, high) */
};

struct state { /* softmax of each row over the keys seen so far, to base 2 */
    float largest[ROWS];
    lanes sum[ROWS];
    float out[ROWS * MAX_SIZE] __attribute__((aligned(64))); /* [rows, width], not yet divided by sum */
};

struct scratch { /* of one thread */
    struct state chunk, total;
    uint32_t q[ROWS * MAX_SIZE] __attribute__((aligned(64)));      /* [rows, steps] */
    uint32_t keys[MAX_SIZE * KEYS] __attribute__((aligned(64)));   /* [steps, KEYS] */
    uint32_t values[KEYS * MAX_SIZE] __attribute__((aligned(64))); /* [KEYS, or KEYS / 2 in pairs, width] */
    float scores[ROWS * KEYS] __attribute__((aligned(64)));        /* [rows, KEYS]; weights take their place */
    int32_t present[KEYS] __attribute__((aligned(64)));            /* -1 where a block is, 0 in a hole */
    bool holes;                                                    /* whether there are any in the tile */
};

INLINE bool in_pairs(const struct attention *a) { return PAIRS && a->is_bf16; }
INLINE int steps_of(const struct attention *a) { return in_pairs(a) ? round_up(a->size / 2, STEP) : a->size; }
INLINE int width_of(const struct attention *a) { return round_up(a->size, VL); }
INLINE int item_bytes(const struct attention *a) { return a->is_bf16 ? 2 : 4; }
INLINE int position_of(const struct attention *a, struct rows rows, int r) {
    return a->first_pos[rows.segment] + (rows.first + r) / rows.group;
}

/* Where row r stands in q, out and lse: its index in [T, H]. */
INLINE int64_t place_of(const struct attention *a, struct rows rows, int r) {
    int f = rows.first + r;
    return (a->q_indptr[rows.segment] + f / rows.group) * a->heads + rows.kv_head * rows.group + f % rows.group;
}

static struct rows rows_at(const struct attention *a, int segment, int kv_head, int first) {
    int group = a->heads / a->kv_heads, all = (a->q_indptr[segment + 1] - a->q_indptr[segment]) * group;
    struct rows rows = {segment, kv_head, first, smaller(ROWS, all - first), group, 0, 0};
    int from = position_of(a, rows, 0);
    rows.low = a->window && from >= a->window ? from - (int)a->window + 1 : 0;
    rows.high = position_of(a, rows, rows.count - 1) + 1;
    return rows;
}

static void load_queries(const struct attention *a, struct rows rows, const char *q, struct scratch *w) {
    int size = a->size, steps = steps_of(a);
    memset(w->q, 0, sizeof(*w->q) * rows.count * steps);
    for (int r = 0; r < rows.count; r++) {
        const char *from = q + place_of(a, rows, r) * size * item_bytes(a);
        uint32_t *to = w->q + r * steps;
        if (!a->is_bf16 || PAIRS) memcpy(to, from, size * item_bytes(a));
        else
            for (int d = 0; d < size; d++) to[d] = (uint32_t)((const uint16_t *)from)[d] << 16;
    }
}

/* The keys of a segment's block that holds `position`; its values lie G * P * D elements further.  NULL in a hole. */
INLINE const char *keys_at(const struct attention *a, struct rows rows, const char *kv, int position) {
    int64_t index = position / a->slots;
    int32_t block = index < a->table_width ? a->block_tables[rows.segment * a->table_width + index] : -1;
    if (block < 0) return NULL;
    return kv + (block * a->block_stride + rows.kv_head * a->slots * a->size) * item_bytes(a);
}

/* Brings the positions [low, high) of the tile at `base` into scratch; how many of its blocks are there. */
static int load_tile(const struct attention *a, struct rows rows, const char *kv, int base, int low, int high,
                     struct scratch *w) {
    int size = a->size, slots = a->slots, width = width_of(a), per_step = in_pairs(a) ? 2 : 1, blocks = 0;
    w->holes = false;
    int64_t to_values = a->kv_heads * slots * size * item_bytes(a);
    for (int k = 0; k < round_up(high - base, GRAIN); k += slots) {
        int position = base + k, count = smaller(slots, round_up(high - base, GRAIN) - k);
        uint32_t *values = w->values + k / per_step * width;
        bool wanted = position + slots > low && position < high;
        const char *keys = wanted ? keys_at(a, rows, kv, position) : NULL;
        for (int i = 0; i < slots; i += VL) *(bits *)(w->present + k + i) = splat_bits(keys ? -1 : 0);
        if (!keys) {
            w->holes = true;
            memset(values, 0, sizeof(*values) * slots / per_step * width);
            continue;
        }
        blocks++;
        const char *next = keys_at(a, rows, kv, position + AHEAD);
        int64_t ahead = next ? next - keys : 0;
        if (a->is_bf16) {
            load_keys(true, size, count, keys, ahead, w->keys + k);
            load_values(true, size, count, low - position, high - position, keys + to_values, ahead, values);
        } else {
            load_keys(false, size, count, keys, ahead, w->keys + k);
            load_values(false, size, count, low - position, high - position, keys + to_values, ahead, values);
        }
    }
    return blocks;
}

/* Row r's scores become softcap * tanh(scale * score / softcap), but for the factor softcap. */
INLINE void cap(const struct attention *a, int columns, int r, struct scratch *w) {
    float *scores = w->scores + r * KEYS;
    for (int k = 0; k < columns; k += VL) store(scores + k, tanh_(load(scores + k) * (a->scale / a->softcap)));
}

/* Row r's scores become weights 2^(factor * score - largest), and its state moves to the new largest.  The row sees
 * all keys of the tile or, if `some`, those in [low, high) that are present. */
INLINE void weigh(const bool pairs, const bool some, float factor, int columns, int low, int high, int r, int width,
                  struct scratch *w) {
    (void)pairs;
    struct state *state = &w->chunk;
    float *scores = w->scores + r * KEYS;
    lanes x[KEYS / VL], top = splat(-INFINITY);
    int vecs = columns / VL;
    for (int v = 0; v < vecs; v++) {
        x[v] = load(scores + v * VL) * factor;
        if (some) {
            bits at = IOTA + v * VL;
            bits seen = (bits)(at >= low) & (bits)(at < high) & *(const bits *)(w->present + v * VL);
            x[v] = choose(seen, x[v], splat(-INFINITY));
        }
        top = max_(top, x[v]);
    }
    float before = state->largest[r], largest = max_of(top);
    if (largest > before) {
        lanes shrink = exp2_(splat(before - largest));
        float *out = state->out + r * width;
        for (int d = 0; d < width; d += VL) store(out + d, load(out + d) * shrink);
        state->sum[r] *= shrink;
        state->largest[r] = largest;
    }
    largest = state->largest[r];
    lanes base = splat(largest == -INFINITY ? 0 : largest), sum = splat(0); /* no key seen: 2^(-inf - 0) = 0, not NaN */
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
    state->sum[r] += sum;
}

/* Adds the positions [low, high) of one tile to the state of its chunk. */
INLINE void attend_tile(const bool pairs, const struct attention *a, struct rows rows, const char *kv, int low,
                        int high, struct scratch *w) {
    int base = low / KEYS * KEYS, columns = round_up(high - base, GRAIN), steps = steps_of(a), width = width_of(a);
    if (!load_tile(a, rows, kv, base, low, high, w)) return;
    multiply(pairs, true, rows.count, columns, steps, w->q, steps, w->keys, KEYS, w->scores, KEYS);
    for (int r = 0; r < rows.count; r++) {
        int end = position_of(a, rows, r) + 1, begin = a->window ? end - (int)a->window : 0;
        if (a->softcap) cap(a, columns, r, w);
        float factor = (a->softcap ? a->softcap : a->scale) * 1.44269504f;
        if (columns == KEYS && !w->holes && begin <= base && end >= base + KEYS)
            weigh(pairs, false, factor, KEYS, 0, KEYS, r, width, w);
        else weigh(pairs, true, factor, columns, begin - base, end - base, r, width, w);
    }
    const uint32_t *weights = (const uint32_t *)w->scores;
    int weight_steps = pairs ? columns / 2 : columns;
    multiply(pairs, false, rows.count, width, weight_steps, weights, KEYS, w->values, width, w->chunk.out, width);
}

static void clear(struct state *state, int rows, int width) {
    for (int r = 0; r < rows; r++) state->largest[r] = -INFINITY, state->sum[r] = splat(0);
    memset(state->out, 0, sizeof(float) * rows * width);
}

/* The state of the rows over one chunk of positions. */
static void attend_chunk(const struct attention *a, struct rows rows, const char *kv, int chunk, struct scratch *w) {
    int low = chunk * CHUNK > rows.low ? chunk * CHUNK : rows.low, high = smaller(rows.high, (chunk + 1) * CHUNK);
    clear(&w->chunk, rows.count, width_of(a));
    for (int end; low < high; low = end) {
        end = smaller(high, round_up(low + 1, KEYS));
        if (in_pairs(a)) attend_tile(true, a, rows, kv, low, end, w);
        else attend_tile(false, a, rows, kv, low, end, w);
    }
}

/* total = total joined with the chunk after it. */
static void join(struct state *total, const struct state *chunk, int rows, int width) {
    for (int r = 0; r < rows; r++) {
        float largest = chunk->largest[r] > total->largest[r] ? chunk->largest[r] : total->largest[r];
        float base = largest == -INFINITY ? 0 : largest;
        lanes keep = exp2_(splat(total->largest[r] - base)), add = exp2_(splat(chunk->largest[r] - base));
        float *out = total->out + r * width;
        const float *more = chunk->out + r * width;
        for (int d = 0; d < width; d += VL) store(out + d, fma_(load(more + d), add, load(out + d) * keep));
        total->sum[r] = fma_(chunk->sum[r], add, total->sum[r] * keep);
        total->largest[r] = largest;
    }
}

static void finish(const struct attention *a, struct rows rows, const struct state *state, char *out, float *lse) {
    int size = a->size, width = width_of(a);
    for (int r = 0; r < rows.count; r++) {
        int64_t place = place_of(a, rows, r);
        float sum = sum_of(state->sum[r]);
        bool empty = sum == 0; /* a NaN that was attended is no empty row */
        lanes share = splat(empty ? 0 : 1 / sum);
        lse[place] = empty ? -INFINITY : state->largest[r] * 0.693147181f + logf(sum);
        for (int d = 0; d < size; d += VL)
            store_as(out + (place * size + d) * item_bytes(a), load(state->out + r * width + d) * share,
                     smaller(VL, size - d), a->is_bf16);
    }
}

static int first_chunk(struct rows rows) { return rows.low / CHUNK; }
static int chunks_of(struct rows rows) { return (rows.high + CHUNK - 1) / CHUNK - first_chunk(rows); }

static void prepare(const struct attention *a, struct scratch *w) {
#if defined(__AMX_BF16__)
    configure_tiles(ROWS);
    if (in_pairs(a)) /* steps that pad D to whole tiles: zero in q, so they must not be NaN here */
        memset(w->keys + a->size / 2 * KEYS, 0, sizeof(*w->keys) * (steps_of(a) - a->size / 2) * KEYS);
#else
    (void)a, (void)w;
#endif
}

static void leave(void) {
#if defined(__AMX_BF16__)
    _tile_release();
#endif
}

/* Enough items for the threads: each is attended whole, chunk after chunk. */
static void attend_items(struct team *team, const struct attention *a, const char *q, const char *kv, char *out,
                         float *lse, struct scratch *w) {
    for (int64_t i; (i = take(team)) < a->num_items;) {
        struct rows rows = a->items[i];
        load_queries(a, rows, q, w);
        clear(&w->total, rows.count, width_of(a));
        for (int c = 0; c < chunks_of(rows); c++) {
            attend_chunk(a, rows, kv, first_chunk(rows) + c, w);
            join(&w->total, &w->chunk, rows.count, width_of(a));
        }
        finish(a, rows, &w->total, out, lse);
    }
}

/* Too few items: every chunk is taken by itself, its state kept until all are there. */
static void attend_chunks(struct team *team, const struct attention *a, const char *q, const char *kv, char *out,
                          float *lse, struct scratch *w) {
    for (int64_t s; (s = take(team)) < a->first_state[a->num_items];) {
        int i = 0;
        while (a->first_state[i + 1] <= s) i++;
        load_queries(a, a->items[i], q, w);
        attend_chunk(a, a->items[i], kv, first_chunk(a->items[i]) + s - a->first_state[i], w);
        a->states[s] = w->chunk;
    }
    meet(team);
    for (int64_t i; (i = take(team)) < a->num_items;) {
        clear(&w->total, a->items[i].count, width_of(a));
        for (int s = a->first_state[i]; s < a->first_state[i + 1]; s++)
            join(&w->total, &a->states[s], a->items[i].count, width_of(a));
        finish(a, a->items[i], &w->total, out, lse);
    }
}

/* q, out [T, H, D], kv [B, 2, G, P, D], lse [T, H]. */
void team_attention(struct team *team, const struct attention *a, const void *q, const void *kv, void *out,
                    float *lse) {
    struct scratch w;
    prepare(a, &w);
    if (a->first_state) attend_chunks(team, a, q, kv, out, lse, &w);
    else attend_items(team, a, q, kv, out, lse, &w);
    leave();
    meet(team);
}

void paged_attention(const struct attention *a, const void *q, const void *kv, void *out, float *lse) {
    struct team team = {0};
#pragma omp parallel num_threads(a->threads) if (a->threads > 1)
    {
        enter(&team);
        team_attention(&team, a, q, kv, out, lse);
    }
}

/* Cuts the work of a step into items, which hold for every layer.  Returns the bytes of `memory`, 64-byte aligned, that
 * they take; fills it and what `a` says of it unless it is NULL. */
int64_t plan_attention(struct attention *a, char *memory) {
    int group = a->heads / a->kv_heads;
    int64_t count = 0, chunks = 0, bytes = 0;
    for (int s = 0; s < a->segments; s++) {
        int tiles = round_up((a->q_indptr[s + 1] - a->q_indptr[s]) * group, ROWS) / ROWS;
        for (int tile = tiles - 1; tile >= 0; tile--) /* the last see most and go first: no long one ends alone */
            for (int g = 0; g < a->kv_heads; g++, count++) {
                struct rows rows = rows_at(a, s, g, tile * ROWS);
                if (memory) ((struct rows *)memory)[count] = rows;
                chunks += chunks_of(rows);
                bytes += (int64_t)(rows.high - rows.low) * 2 * a->size * item_bytes(a);
            }
    }
    if (bytes < WORTH_A_THREAD) a->threads = 1;
    bool by_chunks = a->threads > 1 && count < 2 * a->threads && chunks > count;
    int64_t items = round_up(count * sizeof(struct rows), 64), ends = round_up((count + 1) * sizeof(int32_t), 64);
    if (!memory) return items + (by_chunks ? ends + chunks * (int64_t)sizeof(struct state) : 0);
    a->num_items = count, a->items = (struct rows *)memory;
    if (by_chunks) {
        a->first_state = (int32_t *)(memory + items), a->states = (struct state *)(memory + items + ends);
        a->first_state[0] = 0;
        for (int64_t i = 0; i < count; i++) a->first_state[i + 1] = a->first_state[i] + chunks_of(a->items[i]);
    }
    return 0;
}

/* Whether this process may run the kernels: the operating system hands out tile registers on request only. */
int permitted(void) {
#if defined(__AMX_BF16__)
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return 1;
#endif
}
