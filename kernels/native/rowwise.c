/* The operations on single rows: kernels/{rms_norm,silu_mul,rope}.py have the contracts and the references.
 *
 * Every row is computed by itself in one fixed order, so its bits do not depend on how many rows there are.  Strides
 * are in elements, `is_bf16` says what these are; arithmetic is fp32.
 */
#include "kernels.h"
#include "simd.h"

INLINE int smaller(int a, int b) { return a < b ? a : b; }
INLINE int64_t bytes(int64_t elements, int is_bf16) { return elements * (is_bf16 ? 2 : 4); }
INLINE const void *at(const void *p, int64_t element, int is_bf16) { return (const char *)p + bytes(element, is_bf16); }
INLINE void *to(void *p, int64_t element, int is_bf16) { return (char *)p + bytes(element, is_bf16); }
INLINE lanes rounded(lanes x, int is_bf16) { return is_bf16 ? (lanes)(bf16_bits(x) << 16) : x; }

enum { WORTH_A_THREAD = 1 << 15 }; /* elements: below this, waking threads costs more than they save */
enum { AT_ONCE = 4 };              /* rows that a thread takes */
#define FOR_EACH_ROW(t, rows)                                                                                          \
    for (int64_t t##_begin; (t##_begin = AT_ONCE * take(team)) < (rows);)                                              \
        for (int64_t t = t##_begin; t < t##_begin + AT_ONCE && t < (rows); t++)

INLINE void norm_row(const int is_bf16, const int weight_is_bf16, int size, float eps, const void *x,
                     const void *residual, const void *weight, void *out, void *total) {
    lanes squares[4] = {splat(0), splat(0), splat(0), splat(0)};
    for (int d = 0; d < size; d += VL) {
        int n = smaller(VL, size - d);
        lanes v = load_as_float(at(x, d, is_bf16), n, is_bf16);
        if (residual) {
            v = rounded(v + load_as_float(at(residual, d, is_bf16), n, is_bf16), is_bf16);
            store_as(to(total, d, is_bf16), v, n, is_bf16);
        }
        squares[d / VL % 4] = fma_(v, v, squares[d / VL % 4]);
    }
    float mean = sum_of((squares[0] + squares[1]) + (squares[2] + squares[3])) / size;
    lanes scale = splat(1 / sqrtf(mean + eps));
    const void *from = residual ? total : x;
    for (int d = 0; d < size; d += VL) {
        int n = smaller(VL, size - d);
        lanes v = rounded(load_as_float(at(from, d, is_bf16), n, is_bf16) * scale, weight_is_bf16);
        lanes by = load_as_float(at(weight, d, weight_is_bf16), n, weight_is_bf16);
        store_as(to(out, d, is_bf16), v * by, n, is_bf16);
    }
}

INLINE void norm_as(int is_bf16, int weight_is_bf16, int64_t size, float eps, const void *x, const void *residual,
                    const void *weight, void *out, void *total) {
    if (weight_is_bf16) norm_row(1, 1, size, eps, x, residual, weight, out, total);
    else if (is_bf16) norm_row(1, 0, size, eps, x, residual, weight, out, total);
    else norm_row(0, 0, size, eps, x, residual, weight, out, total);
}

/* out = rms_norm(x) * weight; with a residual, total = x + residual takes the place of x.  out may be x, and total the
 * residual. */
void team_norm(struct team *team, const struct norm *a, const void *x, const void *residual, const void *weight,
               void *out, void *total) {
    FOR_EACH_ROW(t, a->rows) {
        const void *row = at(x, t * a->x_stride, a->is_bf16);
        const void *add = residual ? at(residual, t * a->residual_stride, a->is_bf16) : 0;
        void *result = to(out, t * a->size, a->is_bf16), *sum = to(total, t * a->size, a->is_bf16);
        norm_as(a->is_bf16, a->weight_is_bf16, a->size, a->eps, row, add, weight, result, sum);
    }
    meet(team);
}

void rms_norm(const struct norm *a, const void *x, const void *residual, const void *weight, void *out, void *total) {
    struct team team = {0};
#pragma omp parallel num_threads(a->threads) if (a->threads > 1 && a->rows * a->size > WORTH_A_THREAD)
    {
        enter(&team);
        team_norm(&team, a, x, residual, weight, out, total);
    }
}

/* x [rows, heads, size], its rows a->x_stride apart: each head is normalised where it is. */
void team_head_norm(struct team *team, const struct norm *a, int64_t heads, void *x, const void *weight) {
    FOR_EACH_ROW(t, a->rows) {
        for (int64_t h = 0; h < heads; h++) {
            void *head = to(x, t * a->x_stride + h * a->size, a->is_bf16);
            norm_as(a->is_bf16, a->weight_is_bf16, a->size, a->eps, head, 0, weight, head, 0);
        }
    }
    meet(team);
}

/* x / (1 + e^-y) */
INLINE lanes gated(lanes x, lanes y) {
    lanes power = y * -1.44269504f;
    power = choose((bits)(power > splat(126)), splat(126), power); /* 2^126 already makes the quotient vanish */
    return x / (1 + exp2_(power));
}

INLINE lanes silu(lanes x) { return gated(x, x); }
INLINE lanes gelu_tanh(lanes x) { return gated(x, x * 1.59576912f * fma_(x * x, splat(0.044715f), splat(1))); }

INLINE void gate_row(lanes (*const activation)(lanes), const void *gate, const void *up, void *out, int64_t size,
                     int is_bf16) {
    for (int d = 0; d < size; d += VL) {
        int n = smaller(VL, size - d);
        lanes g = load_as_float(at(gate, d, is_bf16), n, is_bf16);
        lanes u = load_as_float(at(up, d, is_bf16), n, is_bf16);
        store_as(to(out, d, is_bf16), activation(g) * u, n, is_bf16);
    }
}

/* out [rows, size] = activation(x[:, :size]) * x[:, size:]. */
void team_gate(struct team *team, int is_gelu, const void *x, void *out, int64_t rows, int64_t size, int64_t stride,
               int64_t is_bf16) {
    FOR_EACH_ROW(t, rows) {
        const void *gate = at(x, t * stride, is_bf16), *up = at(x, t * stride + size, is_bf16);
        void *row = to(out, t * size, is_bf16);
        if (is_gelu) gate_row(gelu_tanh, gate, up, row, size, is_bf16);
        else gate_row(silu, gate, up, row, size, is_bf16);
    }
    meet(team);
}

void gate(int64_t is_gelu, const void *x, void *out, int64_t rows, int64_t size, int64_t stride, int64_t is_bf16,
          int64_t threads) {
    struct team team = {0};
#pragma omp parallel num_threads(threads) if (threads > 1 && rows * size > WORTH_A_THREAD)
    {
        enter(&team);
        team_gate(&team, is_gelu, x, out, rows, size, stride, is_bf16);
    }
}

INLINE void rotate(const int is_bf16, int half, const void *x, const float *cos_sin, void *out) {
    if (!cos_sin) {
        __builtin_memcpy(out, x, bytes(2 * half, is_bf16));
        return;
    }
    for (int d = 0; d < half; d += VL) {
        int n = smaller(VL, half - d);
        lanes first = load_as_float(at(x, d, is_bf16), n, is_bf16);
        lanes second = load_as_float(at(x, half + d, is_bf16), n, is_bf16);
        lanes cos = load_as_float(cos_sin + d, n, 0), sin = load_as_float(cos_sin + half + d, n, 0);
        store_as(to(out, d, is_bf16), fma_(first, cos, -(second * sin)), n, is_bf16);
        store_as(to(out, half + d, is_bf16), fma_(second, cos, first * sin), n, is_bf16);
    }
}

/* q [T, H, D] rotated into out; k rotated and v copied into their slots of kv [B, 2, G, P, D].  No cos_sin: copied. */
void team_rope(struct team *team, const struct rope *a, const void *q, const void *k, const void *v,
               const float *cos_sin, void *kv, void *out) {
    int64_t half = a->size / 2, per_block = a->slots_per_block * a->size;
    FOR_EACH_ROW(t, a->rows) {
        const float *turn = cos_sin ? cos_sin + a->positions[t] * a->size : 0;
        for (int64_t h = 0; h < a->heads; h++)
            rotate(a->is_bf16, half, at(q, t * a->q_stride + h * a->size, a->is_bf16), turn,
                   to(out, (t * a->heads + h) * a->size, a->is_bf16));
        if (a->slots[t] < 0) continue;
        int64_t slot = a->slots[t] / a->slots_per_block * a->block_stride + a->slots[t] % a->slots_per_block * a->size;
        for (int64_t g = 0; g < a->kv_heads; g++, slot += per_block) {
            rotate(a->is_bf16, half, at(k, t * a->k_stride + g * a->size, a->is_bf16), turn, to(kv, slot, a->is_bf16));
            __builtin_memcpy(to(kv, slot + a->kv_heads * per_block, a->is_bf16),
                             at(v, t * a->v_stride + g * a->size, a->is_bf16), bytes(a->size, a->is_bf16));
        }
    }
    meet(team);
}

void rope_kv_write(const struct rope *a, const void *q, const void *k, const void *v, const float *cos_sin, void *kv,
                   void *out) {
    struct team team = {0};
#pragma omp parallel num_threads(a->threads) if (a->threads > 1 && a->rows * a->heads * a->size > WORTH_A_THREAD)
    {
        enter(&team);
        team_rope(&team, a, q, k, v, cos_sin, kv, out);
    }
}
