// Vectors of 64 bytes in GCC's and Clang's vector extensions: one register with AVX-512, two with AVX2, four with NEON.
// What the language has no words for (byte products, BF16, reductions) is written once for each instruction set.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace ove {

typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef uint8_t vb __attribute__((vector_size(64)));
typedef int8_t quarter __attribute__((vector_size(16)));

constexpr int LANES = 16;

template <class V>
inline V load(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof(V));
    return v;
}

template <class V>
inline void store(void* p, V v) {
    std::memcpy(p, &v, sizeof(V));
}

// Sixteen floats to an aligned place, past the caches.
inline void stream(float* p, vf x) {
#if defined(__AVX512F__)
    _mm512_stream_ps(p, (__m512)x);
#else
    store(p, x);
#endif
}

// What was streamed is there for other threads.
inline void finish_streams() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

inline int32_t load32(const void* p) {
    int32_t v;
    std::memcpy(&v, p, 4);
    return v;
}

inline vf splat(float x) {
    return x - vf{};
}

inline vi splat(int32_t x) {
    return x - vi{};
}

inline vf to_float(vi x) {
    return __builtin_convertvector(x, vf);
}

inline vf max(vf a, vf b) {
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return a > b ? a : b;
#endif
}

inline vf abs(vf x) {
    return (vf)((vi)x & 0x7fffffff);
}

#if defined(__AVX512F__)
inline float sum(vf x) {
    return _mm512_reduce_add_ps((__m512)x);
}
inline float largest(vf x) {
    return _mm512_reduce_max_ps((__m512)x);
}
inline vi round(vf x) {
    return (vi)_mm512_cvtps_epi32((__m512)x);
}
inline quarter narrow(vi x) {
    return (quarter)_mm512_cvtepi32_epi8((__m512i)x);
}
// Sixty-four floats, 0 to 255, rounded to bytes.
inline void store_bytes(uint8_t* p, const vf (&x)[4]) {
    __m512i i[4];
    for (int z = 0; z < 4; z++) i[z] = _mm512_cvtps_epi32((__m512)x[z]);
    __m512i low = _mm512_packs_epi32(i[0], i[1]), high = _mm512_packs_epi32(i[2], i[3]);
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_si512(p, _mm512_permutexvar_epi32(order, _mm512_packus_epi16(low, high)));
}
#else
inline float sum(vf x) {
    float s[8];
    for (int i = 0; i < 8; i++) s[i] = x[i] + x[i + 8];
    return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
}
inline float largest(vf x) {
    float m = x[0];
    for (int i = 1; i < LANES; i++) m = x[i] > m ? x[i] : m;
    return m;
}
inline vi round(vf x) {  // half to even, for |x| < 2^22
    const vf magic = splat(12582912.0f);
    vf shifted = x + magic;
    return (vi)shifted - (vi)magic;
}
inline quarter narrow(vi x) {
    return __builtin_convertvector(x, quarter);
}
inline void store_bytes(uint8_t* p, const vf (&x)[4]) {
    for (int z = 0; z < 4; z++) store(p + LANES * z, narrow(round(x[z])));
}
#endif

inline int32_t sum(vi x) {
    int32_t s = 0;
    for (int i = 0; i < LANES; i++) s += x[i];
    return s;
}

// 2^x; relative error 2e-7 in [-126, 127], zero below.
inline vf exp2(vf x) {
    vf low = splat(-126.5f);
    vi below = x < low;
    x = below ? low : x;
    vi n = round(x);
    vf f = x - to_float(n);
    vf p = splat(1.5403530393381609954e-4f);
    p = p * f + 1.3333558146428443423e-3f;
    p = p * f + 9.6181291076284771619e-3f;
    p = p * f + 5.5504108664821579953e-2f;
    p = p * f + 2.4022650695910071233e-1f;
    p = p * f + 6.9314718055994530942e-1f;
    p = p * f + 1.0f;
    vf y = (vf)((vi)p + (n << 23));
    return below ? vf{} : y;
}

// 2^x for x <= 0; relative error 1e-4, zero far below.
inline vf exp2_coarse(vf x) {
    constexpr float a = 0.07802419f, b = 0.22606721f, c = 0.69583374f, d = 0.99992517f;
#if defined(__AVX512DQ__)
    vf f = (vf)_mm512_reduce_ps((__m512)x, 1);  // x - floor(x)
    vf p = ((a * f + b) * f + c) * f + d;
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
    vi below = x < splat(-126.0f);
    x = below ? splat(-126.0f) : x;
    vi n = round(x - 0.5f);
    vf f = x - to_float(n);
    vf p = ((a * f + b) * f + c) * f + d;
    vf y = (vf)((vi)p + (n << 23));
    return below ? vf{} : y;
#endif
}

constexpr float LOG2E = 1.44269504088896340736f;

inline vf sigmoid(vf x) {
    vf t = x * -LOG2E;
    return 1.0f / (1.0f + exp2(t > splat(126.0f) ? splat(126.0f) : t));
}

// erf by Abramowitz and Stegun's 7.1.26, absolute error 1.5e-7.
inline vf erf(vf x) {
    vf a = abs(x);
    vf t = 1.0f / (1.0f + 0.3275911f * a);
    vf p = splat(1.061405429f);
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    vf y = 1.0f - p * t * exp2(a * a * -LOG2E);
    return (vf)(((vi)x & (int32_t)0x80000000) | (vi)y);
}

inline vf gelu(vf x) {
    return 0.5f * x * (1.0f + erf(x * 0.70710678118654752440f));
}

inline vf gelu_tanh(vf x) {  // 0.5 x (1 + tanh(u)) = x sigmoid(2 u)
    return x * sigmoid(2.0f * 0.79788456080286535588f * (x + 0.044715f * x * x * x));
}

inline vf quick_gelu(vf x) {
    return x * sigmoid(1.702f * x);
}

// Products of bytes, four to a lane: acc + sum of w[4i+j] * x[j], w unsigned, x four signed bytes.
// Where the instruction set multiplies signed bytes alone, U8_ZERO is already taken off w. dot_weights has them the other
// way round: four unsigned bytes, up to WEIGHT_MAX, times signed ones.
#if defined(__AVX512VNNI__)
constexpr int U8_ZERO = 128;
inline vi dot_u8(vi acc, vb w, int32_t x) {
    return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32(x));
}
inline vi dot_u4(vi acc, vb w, int32_t x) {
    return dot_u8(acc, w, x);
}
constexpr int WEIGHT_MAX = 255;
inline vi dot_weights(vi acc, vb v, int32_t p) {
    return (vi)_mm512_dpbusd_epi32((__m512i)acc, _mm512_set1_epi32(p), (__m512i)v);
}
#elif defined(__AVX2__)
constexpr int U8_ZERO = 0;
struct Halves {
    __m256i v[2];
};
// |w| and x with w's sign: their pairs' sums stay below 2^15, so that nothing saturates.
inline vi dot_u8(vi acc, vb w, int32_t x) {
    Halves a = __builtin_bit_cast(Halves, acc), b = __builtin_bit_cast(Halves, w);
    __m256i y = _mm256_set1_epi32(x), flip = _mm256_set1_epi8((char)0x80), ones = _mm256_set1_epi16(1);
    for (int i = 0; i < 2; i++) {
        __m256i s = _mm256_xor_si256(b.v[i], flip);
        __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(s), _mm256_sign_epi8(y, s));
        a.v[i] = _mm256_add_epi32(a.v[i], _mm256_madd_epi16(pairs, ones));
    }
    return __builtin_bit_cast(vi, a);
}
inline vi dot_u4(vi acc, vb w, int32_t x) {
    Halves a = __builtin_bit_cast(Halves, acc), b = __builtin_bit_cast(Halves, w);
    __m256i y = _mm256_set1_epi32(x), ones = _mm256_set1_epi16(1);
    for (int i = 0; i < 2; i++)
        a.v[i] = _mm256_add_epi32(a.v[i], _mm256_madd_epi16(_mm256_maddubs_epi16(b.v[i], y), ones));
    return __builtin_bit_cast(vi, a);
}
constexpr int WEIGHT_MAX = 127;
inline vi dot_weights(vi acc, vb v, int32_t p) {
    Halves a = __builtin_bit_cast(Halves, acc), b = __builtin_bit_cast(Halves, v);
    __m256i y = _mm256_set1_epi32(p), ones = _mm256_set1_epi16(1);
    for (int i = 0; i < 2; i++)
        a.v[i] = _mm256_add_epi32(a.v[i], _mm256_madd_epi16(_mm256_maddubs_epi16(y, b.v[i]), ones));
    return __builtin_bit_cast(vi, a);
}
#elif defined(__ARM_FEATURE_DOTPROD)
constexpr int U8_ZERO = 0;
struct Quarters {
    int32x4_t v[4];
};
inline vi dot_s8(vi acc, vb w, int32_t x) {
    Quarters a = __builtin_bit_cast(Quarters, acc), b = __builtin_bit_cast(Quarters, w);
    int8x16_t y = vreinterpretq_s8_s32(vdupq_n_s32(x));
    for (int i = 0; i < 4; i++) a.v[i] = vdotq_s32(a.v[i], vreinterpretq_s8_s32(b.v[i]), y);
    return __builtin_bit_cast(vi, a);
}
inline vi dot_u8(vi acc, vb w, int32_t x) {
    return dot_s8(acc, w ^ 0x80, x);
}
inline vi dot_u4(vi acc, vb w, int32_t x) {
    return dot_s8(acc, w, x);
}
constexpr int WEIGHT_MAX = 127;
inline vi dot_weights(vi acc, vb v, int32_t p) {
    return dot_s8(acc, v, p);
}
#else
constexpr int U8_ZERO = 128;
inline vi dot_u8(vi acc, vb w, int32_t x) {
    for (int j = 0; j < 4; j++) {
        vi lane = ((vi)w >> (8 * j)) & 0xff;
        acc += lane * (int32_t)(int8_t)(x >> (8 * j));
    }
    return acc;
}
inline vi dot_u4(vi acc, vb w, int32_t x) {
    return dot_u8(acc, w, x);
}
constexpr int WEIGHT_MAX = 255;
inline vi dot_weights(vi acc, vb v, int32_t p) {
    for (int j = 0; j < 4; j++) {
        vi lane = (vi)((vu)v << (24 - 8 * j)) >> 24;
        acc += lane * (int32_t)(uint8_t)((uint32_t)p >> (8 * j));
    }
    return acc;
}
#endif

// BF16 in pairs, two to a lane: acc + w[2i] * x[0] + w[2i+1] * x[1].
#if defined(__AVX512BF16__)
inline vf dot_bf16(vf acc, vi w, int32_t x) {
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)_mm512_set1_epi32(x));
}
#else
inline vf dot_bf16(vf acc, vi w, int32_t x) {
    float even, odd;
    int32_t low = (int32_t)((uint32_t)x << 16), high = x & (int32_t)0xffff0000;
    std::memcpy(&even, &low, 4);
    std::memcpy(&odd, &high, 4);
    acc += (vf)(vi)((vu)w << 16) * even;
    return acc + (vf)(w & (int32_t)0xffff0000) * odd;
}
#endif

// Sixteen floats to BF16, half to even (finite values).
inline void store_bf16(uint16_t* p, vf x) {
#if defined(__AVX512BF16__)
    __m256bh packed = _mm512_cvtneps_pbh((__m512)x);
    std::memcpy(p, &packed, 32);
#else
    typedef uint16_t half __attribute__((vector_size(32)));
    vu bits = (vu)x;
    store(p, __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, half));
#endif
}

inline uint16_t to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

}  // namespace ove
