/* Consecutive layers of a decoder for the rows of one step: kernels/decoder_layers.py has the contract.
 *
 * The threads stay together from the first linear to the last norm, so what lies between two parts is one meeting, not
 * a call from Python, a new tensor and threads to wake.  The parts are those that are there one by one; bits are the
 * same.
 */
#include <string.h>
#include <time.h>

#include "kernels.h"

#if defined(__AVX512BF16__) /* where linear.c has products of its own */

struct layer { /* mirrored by kernels/native/library.py, as all structs here; NULL: the model has none */
    const struct linear *qkv, *attention_out, *gate_up, *down;
    const void *q_norm, *k_norm, *attention_post_norm, *mlp_norm, *mlp_post_norm, *next_norm;
};

struct decoder {
    const struct layer *layers;
    int64_t num_layers, heads, kv_heads, size, hidden, ffn; /* H, G, D, N, F */
    int64_t norm_weights_are_bf16, is_gelu, threads;
    float eps;
};

enum part { LINEARS, ATTENTION, PARTS, REST = PARTS };

struct step {
    int64_t rows, slots_per_block, block_stride; /* T, P */
    const int64_t *positions, *slots;
    const int64_t *chosen; /* [R], ascending: what the last layer goes on with behind its attention */
    int64_t num_chosen;
    const struct attention *const *attention; /* of each layer, as are the next two */
    const float *const *cos_sin;
    void *const *kv;
    void *x, *residual;                       /* [T, N]: in and out; x [R, N] behind the last layer */
    void *wide, *q, *attended, *gated, *made; /* [T, (H + 2G) D or 2F], [T, H D], [T, H D], [T, F], [T, N] */
    float *lse;                               /* [T, H] */
    double *seconds;                          /* [PARTS], added to */
};

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

/* What was computed since `last` belongs to `part`; the first thread keeps the time of all. */
static void lap(const struct step *s, double *last, enum part part) {
    if (omp_get_thread_num()) return;
    double at = now();
    if (part != REST) s->seconds[part] += at - *last;
    *last = at;
}

/* The chosen rows of x [T, N], bf16, to the front of x.  They ascend, so none is written before it is read. */
static void keep_chosen(const struct step *s, uint16_t *x, int64_t size) {
    for (int64_t r = 0; r < s->num_chosen; r++)
        if (s->chosen[r] != r) memcpy(x + r * size, x + s->chosen[r] * size, sizeof(*x) * size);
}

static void run_layer(struct team *team, const struct decoder *m, const struct step *s, int64_t i) {
    double last = now();
    const struct layer *layer = &m->layers[i];
    int64_t q_size = m->heads * m->size, kv_size = m->kv_heads * m->size, width = q_size + 2 * kv_size, rows = s->rows;
    struct norm norm = {rows, m->hidden, m->hidden, m->hidden, 1, m->norm_weights_are_bf16, 0, m->eps};
    struct norm head_norm = {rows, m->size, width, 0, 1, m->norm_weights_are_bf16, 0, m->eps};
    struct rope rope = {s->positions, s->slots, rows, m->heads, m->kv_heads, m->size, s->slots_per_block,
                        s->block_stride, width, width, width, 1, 0};
    uint16_t *q = s->wide, *k = q + q_size, *v = k + kv_size;

    team_linear(team, layer->qkv, s->x, s->wide, rows);
    lap(s, &last, LINEARS);
    if (layer->q_norm) team_head_norm(team, &head_norm, m->heads, q, layer->q_norm);
    if (layer->k_norm) team_head_norm(team, &head_norm, m->kv_heads, k, layer->k_norm);
    team_rope(team, &rope, q, k, v, s->cos_sin[i], s->kv[i], s->q);
    lap(s, &last, REST);
    team_attention(team, s->attention[i], s->q, s->kv[i], s->attended, s->lse);
    if (i == m->num_layers - 1) { /* the other rows have left their K and V; nothing else of them is needed */
        if (take(team) == 0) keep_chosen(s, s->attended, q_size), keep_chosen(s, s->residual, m->hidden);
        rows = norm.rows = s->num_chosen;
        meet(team);
    }
    lap(s, &last, ATTENTION);
    team_linear(team, layer->attention_out, s->attended, s->made, rows);
    lap(s, &last, LINEARS);
    if (layer->attention_post_norm) team_norm(team, &norm, s->made, 0, layer->attention_post_norm, s->made, 0);
    team_norm(team, &norm, s->made, s->residual, layer->mlp_norm, s->x, s->residual);
    lap(s, &last, REST);
    team_linear(team, layer->gate_up, s->x, s->wide, rows);
    lap(s, &last, LINEARS);
    team_gate(team, m->is_gelu, s->wide, s->gated, rows, m->ffn, 2 * m->ffn, 1);
    lap(s, &last, REST);
    team_linear(team, layer->down, s->gated, s->made, rows);
    lap(s, &last, LINEARS);
    if (layer->mlp_post_norm) team_norm(team, &norm, s->made, 0, layer->mlp_post_norm, s->made, 0);
    team_norm(team, &norm, s->made, s->residual, layer->next_norm, s->x, s->residual);
    lap(s, &last, REST);
}

/* Layers [begin, end). */
void decoder_layers(const struct decoder *m, const struct step *s, int64_t begin, int64_t end) {
    struct team team = {0};
#pragma omp parallel num_threads(m->threads) if (m->threads > 1)
    {
        enter(&team);
        for (int64_t i = begin; i < end; i++) run_layer(&team, m, s, i);
    }
}

#endif
