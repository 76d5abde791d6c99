// Rows of floats become the input of a product: normalised, rounded, and laid out in blocks of rows.
#pragma once

#include <algorithm>
#include <utility>

#include "simd.h"
#include "step.h"

namespace ove {

#if defined(__AVX512F__)
constexpr int BLOCK_ROWS = 12;  // 24 sums, two weights, and registers to spare
#else
constexpr int BLOCK_ROWS = 2;
#endif

// Kernels are compiled for each count of rows, 1 to a block's height: a table of them is made from UpTo<that>.
template <int... R>
using Counts = std::integer_sequence<int, R...>;
template <int MOST>
using UpTo = std::make_integer_sequence<int, MOST>;

// Rows divided into blocks of almost equal height. A block holds, unit by unit, that unit of all its rows.
struct Blocks {
    int64_t count, height, taller;
    explicit Blocks(int64_t rows)
        : count((rows + BLOCK_ROWS - 1) / BLOCK_ROWS), height(count ? rows / count : 0), taller(rows - height * count) {}
    int64_t start(int64_t block) const { return block * height + std::min(block, taller); }
    int64_t rows(int64_t block) const { return height + (block < taller); }
    int64_t of(int64_t row) const {
        int64_t edge = taller * (height + 1);
        return row < edge ? row / (height + 1) : taller + (row - edge) / height;
    }
};

// A row of k floats as INT8 codes: absolute maximum of each group / 127, or one scale for all. -128 is no code: some
// instruction sets multiply by changing signs.
inline void quantize(const float* x, int64_t k, int64_t group, float fixed, int8_t* codes, float* scales, int32_t* sums) {
    for (int64_t g = 0; g * group < k; g++) {
        const float* from = x + g * group;
        int8_t* to = codes + g * group;
        int64_t count = std::min(group, k - g * group), whole = count / LANES * LANES;
        float scale = fixed;
        if (fixed == 0) {
            vf most = {};
            for (int64_t i = 0; i < whole; i += LANES) most = max(most, abs(load<vf>(from + i)));
            scale = largest(most);
            for (int64_t i = whole; i < count; i++) scale = std::max(scale, std::fabs(from[i]));
            scale /= 127.0f;
        }
        float inverse = scale > 1e-37f ? 1.0f / scale : 0.0f;  // never infinite
        vi total = {};
        for (int64_t i = 0; i < whole; i += LANES) {
            vf v = load<vf>(from + i);
            v = fixed != 0 ? v / fixed : v * inverse;
            v = max(min(v, splat(127.0f)), splat(-127.0f));
            vi code = round(v);
            total += code;
            store_codes(to + i, code);
        }
        int32_t rest = 0;
        for (int64_t i = whole; i < count; i++) {
            float v = fixed != 0 ? from[i] / fixed : from[i] * inverse;
            to[i] = (int8_t)std::nearbyint(std::min(127.0f, std::max(-127.0f, v)));
            rest += to[i];
        }
        scales[g] = scale;
        sums[g] = sum(total) + rest;
    }
}

inline void to_bf16_row(const float* x, int64_t k, uint16_t* out) {
    int64_t i = 0;
    for (; i + LANES <= k; i += LANES) store_bf16(out + i, load<vf>(x + i));
    for (; i < k; i++) out[i] = to_bf16(x[i]);
}

inline float mean_square(const float* x, int64_t k) {
    vf a = {}, b = {};
    int64_t i = 0;
    for (; i + 2 * LANES <= k; i += 2 * LANES) {
        vf u = load<vf>(x + i), v = load<vf>(x + i + LANES);
        a += u * u;
        b += v * v;
    }
    float total = sum(a + b);
    for (; i < k; i++) total += x[i] * x[i];
    return total / (float)k;
}

inline float mean(const float* x, int64_t k) {
    vf a = {};
    int64_t i = 0;
    for (; i + LANES <= k; i += LANES) a += load<vf>(x + i);
    float total = sum(a);
    for (; i < k; i++) total += x[i];
    return total / (float)k;
}

inline void rms_norm(const float* x, const float* weight, int64_t k, float eps, float* y) {
    float scale = 1.0f / std::sqrt(mean_square(x, k) + eps);
    int64_t i = 0;
    for (; i + LANES <= k; i += LANES) store(y + i, load<vf>(x + i) * scale * load<vf>(weight + i));
    for (; i < k; i++) y[i] = x[i] * scale * weight[i];
}

inline void layer_norm(const float* x, const float* weight, const float* bias, int64_t k, float eps, float* y) {
    float center = mean(x, k);
    int64_t i = 0;
    for (; i + LANES <= k; i += LANES) store(y + i, load<vf>(x + i) - center);
    for (; i < k; i++) y[i] = x[i] - center;
    float scale = 1.0f / std::sqrt(mean_square(y, k) + eps);
    for (i = 0; i + LANES <= k; i += LANES) store(y + i, load<vf>(y + i) * scale * load<vf>(weight + i) + load<vf>(bias + i));
    for (; i < k; i++) y[i] = y[i] * scale * weight[i] + bias[i];
}

inline void swiglu(const float* gate, const float* up, int64_t k, float* y) {
    int64_t i = 0;
    for (; i + LANES <= k; i += LANES) {
        vf g = load<vf>(gate + i);
        store(y + i, g * sigmoid(g) * load<vf>(up + i));
    }
    for (; i < k; i++) y[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
}

// Values of one unit, and units of a row.
inline int64_t units(int32_t kind, int64_t k) {
    return kind == INT8 ? k / 4 : kind == BF16 ? (k + 1) / 2 : k;
}

// Takes row `m` from `in`, and stores it where the next product reads it. work: 2 * k + 32 floats.
inline void prepare_row(const Step& s, const Call& c, const Blocks& blocks, int64_t m, float* work) {
    int64_t row = m;
    if (s.skip_first) row = m + m / (c.tokens - 1) + 1;
    const float* x = (const float*)c.buffers[s.in] + row * s.stride + s.column;
    const float* w = (const float*)(c.file + s.w);
    float* y = work;
    if (s.prologue == RMS_NORM)
        rms_norm(x, w, s.k, s.eps, y);
    else if (s.prologue == LAYER_NORM)
        layer_norm(x, w, (const float*)(c.file + s.b), s.k, s.eps, y);
    else if (s.prologue == SWIGLU)
        swiglu(x, x + s.k, s.k, y);
    else
        y = const_cast<float*>(x);
    if (s.out >= 0) {  // a row of floats, for a step that is no product
        std::memcpy((float*)c.buffers[s.out] + m * s.k, y, s.k * sizeof(float));
        return;
    }
    // Rows of `n` values: several rows of an image may be one row of the product.
    int64_t joined = s.n / s.k, target = m / joined, part = m % joined;
    int64_t block = blocks.of(target), start = blocks.start(block), height = blocks.rows(block);
    int64_t width = units(s.kind, s.n);
    int32_t* to = (int32_t*)c.buffers[UNITS] + start * width + (target - start);
    int64_t first = part * units(s.kind, s.k), count = units(s.kind, s.k);
    const int32_t* from = (const int32_t*)y;
    if (s.kind == INT8) {
        int8_t* codes = (int8_t*)(work + s.k);
        int64_t groups = s.n / s.group, g = target * groups + part * (s.k / s.group);
        quantize(y, s.k, s.group, s.scale, codes, (float*)c.buffers[SCALES] + g, (int32_t*)c.buffers[SUMS] + g);
        from = (const int32_t*)codes;
    } else if (s.kind == BF16) {
        uint16_t* halves = (uint16_t*)(work + s.k);
        halves[2 * count - 1] = 0;
        to_bf16_row(y, s.k, halves);
        from = (const int32_t*)halves;
    }
    for (int64_t u = 0; u < count; u++) to[(first + u) * height] = load32(from + u);
}

}  // namespace ove
