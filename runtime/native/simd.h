// Vectors of 64 bytes: one register with AVX-512, two with AVX2, four with SSE2 and NEON, in the vector extensions of GCC
// and Clang. What these have no words for (products of bytes, BF16, reductions) is written for each instruction set.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace ove {

#if defined(__AVX512F__)
constexpr int PART_BYTES = 64;
#elif defined(__AVX2__)
constexpr int PART_BYTES = 32;
#else
constexpr int PART_BYTES = 16;
#endif
constexpr int PARTS = 64 / PART_BYTES, LANES = 16;

template <class T>
struct Wide {
    typedef T Part __attribute__((vector_size(PART_BYTES)));
    Part p[PARTS];
};

using vf = Wide<float>;
using vi = Wide<int32_t>;
using vu = Wide<uint32_t>;
using vb = Wide<uint8_t>;

#define OVE_EACH _Pragma("GCC unroll 4") for (int i = 0; i < PARTS; i++)
#define OVE_OPERATOR(op)                                                        \
    template <class T>                                                          \
    inline Wide<T> operator op(Wide<T> a, Wide<T> b) {                          \
        OVE_EACH a.p[i] = a.p[i] op b.p[i];                                     \
        return a;                                                               \
    }                                                                           \
    template <class T>                                                          \
    inline Wide<T> operator op(Wide<T> a, std::type_identity_t<T> b) {          \
        OVE_EACH a.p[i] = a.p[i] op b;                                          \
        return a;                                                               \
    }                                                                           \
    template <class T>                                                          \
    inline Wide<T> operator op(std::type_identity_t<T> a, Wide<T> b) {          \
        OVE_EACH b.p[i] = a op b.p[i];                                          \
        return b;                                                               \
    }                                                                           \
    template <class T, class U>                                                 \
    inline void operator op##=(Wide<T>& a, U b) {                               \
        a = a op b;                                                             \
    }
OVE_OPERATOR(+)
OVE_OPERATOR(-)
OVE_OPERATOR(*)
OVE_OPERATOR(/)
OVE_OPERATOR(&)
OVE_OPERATOR(|)
OVE_OPERATOR(^)
#undef OVE_OPERATOR

template <class T>
inline Wide<T> operator<<(Wide<T> a, int count) {
    OVE_EACH a.p[i] = a.p[i] << count;
    return a;
}

template <class T>
inline Wide<T> operator>>(Wide<T> a, int count) {
    OVE_EACH a.p[i] = a.p[i] >> count;
    return a;
}

template <class T>
inline vi operator<(Wide<T> a, Wide<T> b) {
    vi m;
    OVE_EACH m.p[i] = a.p[i] < b.p[i];
    return m;
}

// a where the mask is set, else b.
template <class T>
inline Wide<T> select(vi mask, Wide<T> a, Wide<T> b) {
    OVE_EACH a.p[i] = mask.p[i] ? a.p[i] : b.p[i];
    return a;
}

// The same bits as another type.
template <class To, class From>
inline To as(From x) {
    To y;
    OVE_EACH y.p[i] = (typename std::remove_reference_t<decltype(y.p[0])>)x.p[i];
    return y;
}

template <class V>
inline V load(const void* p) {
    V v;
    OVE_EACH std::memcpy(&v.p[i], (const char*)p + i * PART_BYTES, PART_BYTES);
    return v;
}

template <class T>
inline void store(void* p, Wide<T> v) {
    OVE_EACH std::memcpy((char*)p + i * PART_BYTES, &v.p[i], PART_BYTES);
}

// Sixteen floats to an aligned place, past the caches.
inline void stream(float* p, vf x) {
#if defined(__AVX512F__)
    _mm512_stream_ps(p, (__m512)x.p[0]);
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
    vf v;
    OVE_EACH v.p[i] = x - vf::Part{};
    return v;
}

inline vi splat(int32_t x) {
    vi v;
    OVE_EACH v.p[i] = x - vi::Part{};
    return v;
}

// Which of the lanes are below `count`.
inline vi first_lanes(int64_t count) {
    static constexpr int32_t numbers[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return load<vi>(numbers) < splat((int32_t)count);
}

inline vf to_float(vi x) {
    vf y;
    OVE_EACH y.p[i] = __builtin_convertvector(x.p[i], vf::Part);
    return y;
}

inline vf max(vf a, vf b) {
#if defined(__AVX512F__)
    a.p[0] = (vf::Part)_mm512_max_ps((__m512)a.p[0], (__m512)b.p[0]);
    return a;
#elif defined(__AVX2__)
    OVE_EACH a.p[i] = (vf::Part)_mm256_max_ps((__m256)a.p[i], (__m256)b.p[i]);
    return a;
#else
    return select(a < b, b, a);
#endif
}

inline vf min(vf a, vf b) {
    return select(a < b, a, b);
}

inline vf abs(vf x) {
    return as<vf>(as<vi>(x) & 0x7fffffff);
}

#if defined(__AVX512F__)
inline float sum(vf x) {
    return _mm512_reduce_add_ps((__m512)x.p[0]);
}
inline int32_t sum(vi x) {
    return _mm512_reduce_add_epi32((__m512i)x.p[0]);
}
inline float largest(vf x) {
    return _mm512_reduce_max_ps((__m512)x.p[0]);
}
inline vi round(vf x) {  // half to even
    return {(vi::Part)_mm512_cvtps_epi32((__m512)x.p[0])};
}
// Sixteen numbers, -128 to 127, as bytes.
inline void store_codes(int8_t* p, vi x) {
    _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)x.p[0]));
}
// Sixty-four floats, 0 to 255, rounded to bytes.
inline void store_bytes(uint8_t* p, const vf (&x)[4]) {
    __m512i i[4];
    for (int z = 0; z < 4; z++) i[z] = _mm512_cvtps_epi32((__m512)x[z].p[0]);
    __m512i low = _mm512_packs_epi32(i[0], i[1]), high = _mm512_packs_epi32(i[2], i[3]);
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_si512(p, _mm512_permutexvar_epi32(order, _mm512_packus_epi16(low, high)));
}
#else
template <class T>
inline T sum(Wide<T> x) {
    typename Wide<T>::Part total = x.p[0];
    for (int i = 1; i < PARTS; i++) total += x.p[i];
    T s = 0;
    for (unsigned i = 0; i < PART_BYTES / sizeof(T); i++) s += total[i];
    return s;
}
inline float largest(vf x) {
    float m = x.p[0][0];
    OVE_EACH for (unsigned j = 0; j < PART_BYTES / 4; j++) m = x.p[i][j] > m ? x.p[i][j] : m;
    return m;
}
inline vi round(vf x) {  // half to even, for |x| < 2^22
    const vf magic = splat(12582912.0f);
    return as<vi>(x + magic) - as<vi>(magic);
}
inline void store_codes(int8_t* p, vi x) {
    for (int i = 0; i < PARTS; i++)
        for (int j = 0; j < PART_BYTES / 4; j++) p[i * (PART_BYTES / 4) + j] = (int8_t)x.p[i][j];
}
inline void store_bytes(uint8_t* p, const vf (&x)[4]) {
    for (int z = 0; z < 4; z++) store_codes((int8_t*)p + LANES * z, round(x[z]));
}
#endif

// 2^x; relative error 2e-7 in [-126, 127], zero below.
inline vf exp2(vf x) {
    vf low = splat(-126.5f);
    vi below = x < low;
    x = select(below, low, x);
    vi n = round(x);
    vf f = x - to_float(n);
    vf p = splat(1.5403530393381609954e-4f);
    p = p * f + 1.3333558146428443423e-3f;
    p = p * f + 9.6181291076284771619e-3f;
    p = p * f + 5.5504108664821579953e-2f;
    p = p * f + 2.4022650695910071233e-1f;
    p = p * f + 6.9314718055994530942e-1f;
    p = p * f + 1.0f;
    return select(below, vf{}, as<vf>(as<vi>(p) + (n << 23)));
}

// 2^x for x <= 0; relative error 1e-4, zero far below.
inline vf exp2_coarse(vf x) {
    constexpr float a = 0.07802419f, b = 0.22606721f, c = 0.69583374f, d = 0.99992517f;
#if defined(__AVX512DQ__)
    vf f = {(vf::Part)_mm512_reduce_ps((__m512)x.p[0], 1)};  // x - floor(x)
    vf p = ((a * f + b) * f + c) * f + d;
    return {(vf::Part)_mm512_scalef_ps((__m512)p.p[0], (__m512)x.p[0])};
#else
    vi below = x < splat(-126.0f);
    x = select(below, splat(-126.0f), x);
    vi n = round(x - 0.5f);
    vf f = x - to_float(n);
    vf p = ((a * f + b) * f + c) * f + d;
    return select(below, vf{}, as<vf>(as<vi>(p) + (n << 23)));
#endif
}

constexpr float LOG2E = 1.44269504088896340736f;

inline vf sigmoid(vf x) {
    return 1.0f / (1.0f + exp2(min(x * -LOG2E, splat(126.0f))));
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
    return as<vf>((as<vi>(x) & (int32_t)0x80000000) | as<vi>(y));
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
// Where the instruction set multiplies signed bytes alone, U8_ZERO is already taken off w. dot_u4 is the same for w up to
// 15. dot_weights has them the other way round: four unsigned bytes, up to WEIGHT_MAX, times signed ones.
#if defined(__AVX512VNNI__)
constexpr int U8_ZERO = 128, WEIGHT_MAX = 255;
inline vi dot_u8(vi acc, vb w, int32_t x) {
    return {(vi::Part)_mm512_dpbusd_epi32((__m512i)acc.p[0], (__m512i)w.p[0], _mm512_set1_epi32(x))};
}
inline vi dot_u4(vi acc, vb w, int32_t x) {
    return dot_u8(acc, w, x);
}
inline vi dot_weights(vi acc, vb v, int32_t p) {
    return {(vi::Part)_mm512_dpbusd_epi32((__m512i)acc.p[0], _mm512_set1_epi32(p), (__m512i)v.p[0])};
}
#elif defined(__AVX2__) && !defined(__AVX512F__)
constexpr int U8_ZERO = 0, WEIGHT_MAX = 127;
// Unsigned times signed bytes whose sums in pairs stay below 2^15, so that nothing saturates.
inline void add_pairs(vi::Part& acc, __m256i u, __m256i s) {
    __m256i fours = _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1));
    acc = (vi::Part)_mm256_add_epi32((__m256i)acc, fours);
}
inline vi dot_u8(vi acc, vb w, int32_t x) {  // as |w - 128| and x with the sign of w - 128
    __m256i y = _mm256_set1_epi32(x), flip = _mm256_set1_epi8((char)0x80);
    OVE_EACH {
        __m256i s = _mm256_xor_si256((__m256i)w.p[i], flip);
        add_pairs(acc.p[i], _mm256_abs_epi8(s), _mm256_sign_epi8(y, s));
    }
    return acc;
}
inline vi dot_u4(vi acc, vb w, int32_t x) {
    OVE_EACH add_pairs(acc.p[i], (__m256i)w.p[i], _mm256_set1_epi32(x));
    return acc;
}
inline vi dot_weights(vi acc, vb v, int32_t p) {
    OVE_EACH add_pairs(acc.p[i], _mm256_set1_epi32(p), (__m256i)v.p[i]);
    return acc;
}
#elif defined(__ARM_FEATURE_DOTPROD)
constexpr int U8_ZERO = 0, WEIGHT_MAX = 127;
inline vi dot_s8(vi acc, vb w, int32_t x) {
    int8x16_t y = vreinterpretq_s8_s32(vdupq_n_s32(x));
    OVE_EACH acc.p[i] = (vi::Part)vdotq_s32((int32x4_t)acc.p[i], (int8x16_t)w.p[i], y);
    return acc;
}
inline vi dot_u8(vi acc, vb w, int32_t x) {
    return dot_s8(acc, w ^ 0x80, x);
}
inline vi dot_u4(vi acc, vb w, int32_t x) {
    return dot_s8(acc, w, x);
}
inline vi dot_weights(vi acc, vb v, int32_t p) {
    return dot_s8(acc, v, p);
}
#else
constexpr int U8_ZERO = 128, WEIGHT_MAX = 255;
inline vi dot_u8(vi acc, vb w, int32_t x) {
    for (int j = 0; j < 4; j++) acc += ((as<vi>(w) >> (8 * j)) & 0xff) * (int32_t)(int8_t)((uint32_t)x >> (8 * j));
    return acc;
}
inline vi dot_u4(vi acc, vb w, int32_t x) {
    return dot_u8(acc, w, x);
}
inline vi dot_weights(vi acc, vb v, int32_t p) {
    for (int j = 0; j < 4; j++)
        acc += (as<vi>(as<vu>(v) << (24 - 8 * j)) >> 24) * (int32_t)(uint8_t)((uint32_t)p >> (8 * j));
    return acc;
}
#endif

// BF16 in pairs, two to a lane: acc + w[2i] * x[0] + w[2i+1] * x[1].
inline vf dot_bf16(vf acc, vi w, int32_t x) {
#if defined(__AVX512BF16__)
    return {(vf::Part)_mm512_dpbf16_ps((__m512)acc.p[0], (__m512bh)w.p[0], (__m512bh)_mm512_set1_epi32(x))};
#else
    float even, odd;
    int32_t low = (int32_t)((uint32_t)x << 16), high = x & (int32_t)0xffff0000;
    std::memcpy(&even, &low, 4);
    std::memcpy(&odd, &high, 4);
    acc += as<vf>(as<vu>(w) << 16) * even;
    return acc + as<vf>(w & (int32_t)0xffff0000) * odd;
#endif
}

inline uint16_t to_bf16(float x) {  // half to even, finite values
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Sixteen floats to BF16.
inline void store_bf16(uint16_t* p, vf x) {
#if defined(__AVX512BF16__)
    __m256bh packed = _mm512_cvtneps_pbh((__m512)x.p[0]);
    std::memcpy(p, &packed, 32);
#else
    float values[LANES];
    store(values, x);
    for (int i = 0; i < LANES; i++) p[i] = to_bf16(values[i]);
#endif
}

#undef OVE_EACH

}  // namespace ove
