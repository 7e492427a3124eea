/* The few vector operations the kernels need, for AVX-512 and for AVX2 with FMA.
 *
 * `lanes` is a vector of VL floats, `bits` the same register as VL 32-bit integers; + - * & | << >> work on both.
 * Products are fused only where fma_ says so (the build turns off contraction), so that an operation rounds the same
 * way wherever it is inlined: results may not depend on how many rows a call has.
 */
#pragma once
#include <immintrin.h>
#include <math.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

#if defined(__AVX512F__)
#define VL 16
#else
#define VL 8
#endif

typedef float lanes __attribute__((vector_size(VL * 4), may_alias));
typedef int32_t bits __attribute__((vector_size(VL * 4), may_alias));
typedef float lanes_anywhere __attribute__((vector_size(VL * 4), may_alias, aligned(4)));
typedef int32_t bits_anywhere __attribute__((vector_size(VL * 4), may_alias, aligned(4)));

INLINE lanes load(const float *p) { return *(const lanes_anywhere *)p; }
INLINE void store(float *p, lanes x) { *(lanes_anywhere *)p = x; }
INLINE bits load_bits(const uint32_t *p) { return *(const bits_anywhere *)p; }
INLINE void store_bits(uint32_t *p, bits x) { *(bits_anywhere *)p = x; }
INLINE lanes splat(float x) { return (lanes){0} + x; }
INLINE bits splat_bits(int32_t x) { return (bits){0} + x; }
INLINE lanes choose(bits mask, lanes yes, lanes no) { return (lanes)((mask & (bits)yes) | (~mask & (bits)no)); }

#if VL == 16
static const bits IOTA = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
INLINE lanes fma_(lanes a, lanes b, lanes c) { return _mm512_fmadd_ps(a, b, c); }
INLINE lanes max_(lanes a, lanes b) { return _mm512_max_ps(a, b); }
INLINE lanes round_(lanes x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE float sum_of(lanes x) { return _mm512_reduce_add_ps(x); }
INLINE float max_of(lanes x) { return _mm512_reduce_max_ps(x); }
/* The first `count` (at most VL) values, zeros after them; nothing beyond them is read. */
INLINE bits load_some(const uint32_t *p, int count) {
    return (bits)_mm512_maskz_loadu_epi32(count >= VL ? 0xffff : (1u << count) - 1, p);
}
INLINE lanes load_bf16(const uint16_t *p, int count) {
    __mmask16 some = count >= VL ? 0xffff : (1u << count) - 1;
    return (lanes)((bits)_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, p)) << 16);
}
#else
static const bits IOTA = {0, 1, 2, 3, 4, 5, 6, 7};
INLINE lanes fma_(lanes a, lanes b, lanes c) { return _mm256_fmadd_ps(a, b, c); }
INLINE lanes max_(lanes a, lanes b) { return _mm256_max_ps(a, b); }
INLINE lanes round_(lanes x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE bits to_int(lanes x) { return (bits)_mm256_cvtps_epi32(x); }
INLINE float sum_of(lanes x) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
INLINE float max_of(lanes x) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}
INLINE bits load_some(const uint32_t *p, int count) {
    if (count >= VL) return load_bits(p);
    return (bits)_mm256_maskload_epi32((const int *)p, (__m256i)(IOTA < splat_bits(count)));
}
INLINE lanes load_bf16(const uint16_t *p, int count) {
    uint16_t some[VL] = {0};
    if (count < VL) {
        for (int i = 0; i < count; i++) some[i] = p[i];
        p = some;
    }
    return (lanes)((bits)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)) << 16);
}
#endif

/* The same for `count` values of fp32 or bf16 at p. */
INLINE lanes load_as_float(const void *p, int count, int is_bf16) {
    return is_bf16 ? load_bf16(p, count) : (lanes)load_some(p, count);
}

INLINE uint16_t bf16_of(float x) { /* round to nearest even; NaN stays NaN */
    union { float f; uint32_t u; } v = {x};
    if (x != x) return (uint16_t)(v.u >> 16) | 0x40;
    return (uint16_t)((v.u + 0x7fff + ((v.u >> 16) & 1)) >> 16);
}

INLINE bits bf16_bits(lanes x) { /* as bf16_of, in the low half of each lane */
#if defined(__AVX512BF16__)
    return (bits)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x)); /* denormals become zero */
#else
    bits u = (bits)x, rounded = u + 0x7fff + ((u >> 16) & 1);
    bits nan = (bits)(x != x);
    return (((nan & (u | 0x400000)) | (~nan & rounded)) >> 16) & 0xffff;
#endif
}

INLINE void store_as(void *p, lanes x, int count, int is_bf16) {
    if (!is_bf16 && count >= VL) {
        store(p, x);
    } else if (is_bf16) {
#if VL == 16
        __mmask16 some = count >= VL ? 0xffff : (1u << count) - 1;
#if defined(__AVX512BF16__)
        _mm256_mask_storeu_epi16(p, some, (__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
        _mm256_mask_storeu_epi16(p, some, _mm512_cvtepi32_epi16((__m512i)bf16_bits(x)));
#endif
#else
        bits rounded = bf16_bits(x);
        for (int i = 0; i < count && i < VL; i++) ((uint16_t *)p)[i] = (uint16_t)rounded[i];
#endif
    } else {
        for (int i = 0; i < count; i++) ((float *)p)[i] = x[i];
    }
}

/* 2^x to about one unit in the last place; 0 below 2^-126, so 2^-inf is exactly 0 and 2^0 exactly 1. */
INLINE lanes exp2_(lanes x) {
#if VL == 16
    __mmask16 stays = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ); /* NaN stays */
#else
    bits vanished = (bits)(x < splat(-126.0f));
    x = choose(vanished, splat(0.0f), x);
#endif
    lanes whole = round_(x), f = x - whole;
    lanes y = splat(1.535920892e-4f);
    y = fma_(y, f, splat(1.339262701e-3f));
    y = fma_(y, f, splat(9.618384764e-3f));
    y = fma_(y, f, splat(5.550347269e-2f));
    y = fma_(y, f, splat(2.402264476e-1f));
    y = fma_(y, f, splat(6.931471825e-1f));
    y = fma_(y, f, splat(1.0f));
#if VL == 16
    return (lanes)_mm512_maskz_scalef_ps(stays, (__m512)y, (__m512)whole);
#else
    return choose(vanished, splat(0.0f), (lanes)((bits)y + (to_int(whole) << 23)));
#endif
}

/* tanh(x) = 1 - 2 / (e^2x + 1), to about 2^-23 of 1, not of the result. */
INLINE lanes tanh_(lanes x) {
    lanes power = x * (2 * 1.44269504f);
    power = choose((bits)(power > splat(126)), splat(126), power); /* 2^126 already makes the quotient vanish */
    return 1 - 2 / (exp2_(power) + 1);
}

/* VL x VL transpose of 32-bit values, in place. */
INLINE void transpose(bits v[VL]) {
    bits t[VL];
#if VL == 16
#define U(op, a, b) (bits) _mm512_##op((__m512i)a, (__m512i)b)
    UNROLL for (int i = 0; i < 16; i += 2) {
        t[i] = U(unpacklo_epi32, v[i], v[i + 1]), t[i + 1] = U(unpackhi_epi32, v[i], v[i + 1]);
    }
    UNROLL for (int i = 0; i < 16; i += 4) {
        v[i] = U(unpacklo_epi64, t[i], t[i + 2]), v[i + 1] = U(unpackhi_epi64, t[i], t[i + 2]);
        v[i + 2] = U(unpacklo_epi64, t[i + 1], t[i + 3]), v[i + 3] = U(unpackhi_epi64, t[i + 1], t[i + 3]);
    }
#undef U
#define Q(a, b, m) (bits) _mm512_shuffle_i32x4((__m512i)a, (__m512i)b, m)
    UNROLL for (int i = 0; i < 4; i++) {
        t[i] = Q(v[i], v[i + 4], 0x88), t[i + 4] = Q(v[i], v[i + 4], 0xdd);
        t[i + 8] = Q(v[i + 8], v[i + 12], 0x88), t[i + 12] = Q(v[i + 8], v[i + 12], 0xdd);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        v[i] = Q(t[i], t[i + 8], 0x88), v[i + 8] = Q(t[i], t[i + 8], 0xdd);
        v[i + 4] = Q(t[i + 4], t[i + 12], 0x88), v[i + 12] = Q(t[i + 4], t[i + 12], 0xdd);
    }
#undef Q
#else
#define U(op, a, b) (bits) _mm256_##op((__m256i)a, (__m256i)b)
    UNROLL for (int i = 0; i < 8; i += 2) {
        t[i] = U(unpacklo_epi32, v[i], v[i + 1]), t[i + 1] = U(unpackhi_epi32, v[i], v[i + 1]);
    }
    bits w[VL];
    UNROLL for (int i = 0; i < 8; i += 4) {
        w[i] = U(unpacklo_epi64, t[i], t[i + 2]), w[i + 1] = U(unpackhi_epi64, t[i], t[i + 2]);
        w[i + 2] = U(unpacklo_epi64, t[i + 1], t[i + 3]), w[i + 3] = U(unpackhi_epi64, t[i + 1], t[i + 3]);
    }
#undef U
    UNROLL for (int i = 0; i < 4; i++) {
        v[i] = (bits)_mm256_permute2x128_si256((__m256i)w[i], (__m256i)w[i + 4], 0x20);
        v[i + 4] = (bits)_mm256_permute2x128_si256((__m256i)w[i], (__m256i)w[i + 4], 0x31);
    }
#endif
}
