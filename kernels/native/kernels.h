/* What one kernel offers to the others: arguments, and the form in which a team of threads calls it.
 *
 * Every thread of the team calls such a function with the same arguments; it ends with a meeting, so its results are
 * there for all.  Structs are mirrored by kernels/native/library.py; strides are in elements; `is_bf16` says whether
 * these are bf16 or fp32.
 */
#pragma once
#include <stdint.h>

#include "team.h"

struct attention {
    const int32_t *q_indptr, *first_pos, *block_tables;
    int64_t segments, table_width;
    int64_t heads, kv_heads, size, slots; /* H, G, D, P */
    int64_t block_stride;
    int64_t window; /* 0: none */
    int64_t is_bf16, threads;
    float scale, softcap; /* 0: none */
    /* by plan_attention */
    int64_t num_items;
    struct rows *items;
    int32_t *first_state; /* of each item, where its chunks are attended one by one; or NULL */
    struct state *states;
};

struct linear {
    const uint32_t *weight; /* packed */
    const uint16_t *bias;   /* [N] or NULL */
    int64_t outputs, inputs; /* N, and K rounded up to whole tiles */
};

struct norm {
    int64_t rows, size, x_stride, residual_stride, is_bf16, weight_is_bf16, threads;
    float eps;
};

struct rope {
    const int64_t *positions, *slots;
    int64_t rows, heads, kv_heads, size, slots_per_block, block_stride;
    int64_t q_stride, k_stride, v_stride, is_bf16, threads;
};

void team_attention(struct team *, const struct attention *, const void *q, const void *kv, void *out, float *lse);
void team_linear(struct team *, const struct linear *, const uint16_t *x, uint16_t *out, int64_t rows);
void team_norm(struct team *, const struct norm *, const void *x, const void *residual, const void *weight, void *out,
               void *total);
void team_head_norm(struct team *, const struct norm *, int64_t heads, void *x, const void *weight);
void team_rope(struct team *, const struct rope *, const void *q, const void *k, const void *v, const float *cos_sin,
               void *kv, void *out);
void team_gate(struct team *, int is_gelu, const void *x, void *out, int64_t rows, int64_t size, int64_t stride,
               int64_t is_bf16);
