// Attention over keys and values kept as INT8 codes, a scale for each row of each head, in tiles of keys: the softmax
// runs along, no scores are kept, and both products are of bytes.
//
// Keys, [capacity, head_dim] of one sequence and head, and values are read from the first byte to the last, 64 rows at a
// time. Keys: unit by unit of four columns, a vector for each 16 rows, four columns to a lane, unsigned codes (128 is
// zero). Values: stretch by stretch of 64 columns (16, where fewer are left), four rows at a time, a vector for each 16
// columns, four rows to a lane. Scales follow the codes.
#pragma once

#include "rows.h"

namespace ove {

constexpr int64_t TILE = 128;      // keys whose weights share a scale; half as many where there are few queries
constexpr int64_t BLOCK = 64;      // keys, or values, that lie together
constexpr int64_t TASK_ROWS = 48;  // queries of one task
constexpr int64_t STRETCH = 64;    // columns of values together
constexpr int64_t MOST_WIDTH = 256;
#if defined(__AVX512F__)
constexpr int QUERY_ROWS = 6, VECTORS = 4;  // 24 sums in registers
#else
constexpr int QUERY_ROWS = 2, VECTORS = 2;
#endif

struct Cache {
    uint8_t* keys;
    float* key_scales;
    int8_t* values;
    float* value_scales;
};

inline Cache cache_of(const Step& s, const Call& c, int64_t sequence, int64_t head) {
    int64_t block = c.capacity * (s.head_dim + 4), place = sequence * s.kv_heads + head;
    uint8_t* k = c.keys[s.layer] + place * block;
    uint8_t* v = c.values[s.layer] + place * block;
    int64_t codes = c.capacity * s.head_dim;
    return {k, (float*)(k + codes), (int8_t*)v, (float*)(v + codes)};
}

// Columns of values that lie together, at column i.
inline int64_t stretch(int64_t i, int64_t d) {
    return i < d / STRETCH * STRETCH ? STRETCH : LANES;
}

inline void rotate(float* x, const float* cosines, const float* sines, int64_t half) {
    int64_t i = 0;
    for (; i + LANES <= half; i += LANES) {
        vf a = load<vf>(x + i), b = load<vf>(x + half + i), c = load<vf>(cosines + i), s = load<vf>(sines + i);
        store(x + i, a * c - b * s);
        store(x + half + i, b * c + a * s);
    }
    for (; i < half; i++) {
        float a = x[i], b = x[half + i];
        x[i] = a * cosines[i] - b * sines[i];
        x[half + i] = b * cosines[i] + a * sines[i];
    }
}

// Queries, keys and values of row `m` as the product left them: normalised, rotated, rounded, put in their places.
inline void split_heads(const Step& s, const Call& c, int64_t m, float* work) {
    int64_t d = s.head_dim, sequence = m / c.tokens, position = c.starts[sequence] + m % c.tokens;
    const float* x = (const float*)c.buffers[s.in] + m * s.stride;
    const float* norms = s.b >= 0 ? (const float*)(c.file + s.b) : nullptr;
    int8_t* codes = (int8_t*)(work + d);
    float* scales = (float*)c.buffers[QUERY_SCALES] + m * s.heads;
    int32_t* sums = (int32_t*)c.buffers[QUERY_SUMS] + m * s.heads;
    for (int64_t h = 0; h < s.heads + s.kv_heads; h++) {
        const float* from = x + h * d;
        bool query = h < s.heads;
        if (norms)
            rms_norm(from, norms + (query ? 0 : d), d, s.eps, work);
        else
            std::memcpy(work, from, d * sizeof(float));
        rotate(work, c.cosines + m * (d / 2), c.sines + m * (d / 2), d / 2);
        if (query) {
            quantize(work, d, d, 0, (int8_t*)c.buffers[QUERIES] + (m * s.heads + h) * d, scales + h, sums + h);
            scales[h] = std::max(scales[h] * s.scale * LOG2E, 1e-37f);  // of zeros, too: it is multiplied by infinity
            continue;
        }
        Cache to = cache_of(s, c, sequence, h - s.heads);
        int32_t unused;
        quantize(work, d, d, 0, codes, to.key_scales + position, &unused);
        uint8_t* tile = to.keys + position / BLOCK * BLOCK * d + position % BLOCK * 4;
        for (int64_t u = 0; u < d / 4; u++) {
            int32_t unit = load32(codes + 4 * u) ^ (int32_t)0x80808080;
            std::memcpy(tile + 4 * BLOCK * u, &unit, 4);
        }
    }
    for (int64_t h = 0; h < s.kv_heads; h++) {
        Cache to = cache_of(s, c, sequence, h);
        int32_t unused;
        quantize(x + (s.heads + s.kv_heads + h) * d, d, d, 0, codes, to.value_scales + position, &unused);
        int8_t* tile = to.values + position / BLOCK * BLOCK * d;
        for (int64_t i = 0; i < d; i += LANES) {
            int64_t width = stretch(i, d), row = position % BLOCK / 4;
            int8_t* lanes = tile + i / width * width * BLOCK + row * 4 * width + i % width * 4 + position % 4;
            for (int j = 0; j < LANES; j++) lanes[4 * j] = codes[i + j];
        }
    }
}

// Rows of queries that share a key head: row r is head r % group of token r / group.
struct Rows {
    int64_t sequence, head, first, count;
};

// How many keys a row of queries sees.
inline int64_t seen(const Step& s, const Call& c, const Rows& rows, int64_t r) {
    if (!s.causal) return c.tokens;
    return c.starts[rows.sequence] + (rows.first + r) / (s.heads / s.kv_heads) + 1;
}

// The index of a row's head among all heads of all rows.
inline int64_t place(const Step& s, const Call& c, const Rows& rows, int64_t r) {
    int64_t group = s.heads / s.kv_heads, row = rows.first + r;
    return (rows.sequence * c.tokens + row / group) * s.heads + rows.head * group + row % group;
}

// What a task keeps of its rows between tiles, and a tile's scores and weights.
struct Running {
    alignas(64) int32_t queries[TASK_ROWS * MOST_WIDTH / 4];
    int32_t sums[TASK_ROWS];
    float scales[TASK_ROWS], top[TASK_ROWS];
    int64_t limit[TASK_ROWS];
    alignas(64) float total[TASK_ROWS][LANES];
    alignas(64) float out[TASK_ROWS * MOST_WIDTH];
    alignas(64) float scores[QUERY_ROWS][TILE];
    alignas(64) uint8_t weights[QUERY_ROWS][TILE];
};

// Scores of R rows and some keys of a tile, without the queries' scales.
template <int R>
void scores_of(const int32_t* q, const int32_t* sums, const uint8_t* keys, const float* scales, int64_t width,
               float (*out)[TILE]) {
    vi acc[R][VECTORS];
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int z = 0; z < VECTORS; z++) acc[r][z] = splat(-U8_ZERO * sums[r]);
    for (int64_t u = 0; u < width; u++, q += R) {
        vb k[VECTORS];
#pragma GCC unroll 4
        for (int z = 0; z < VECTORS; z++) k[z] = load<vb>(keys + 4 * BLOCK * u + 64 * z);
#pragma GCC unroll 6
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int z = 0; z < VECTORS; z++) acc[r][z] = dot_u8(acc[r][z], k[z], q[r]);
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int z = 0; z < VECTORS; z++)
            store(&out[r][z * LANES], to_float(acc[r][z]) * load<vf>(scales + z * LANES));
}

// Adds a tile's weighted values to Z vectors of R rows' sums, which are multiplied by `keep` first. WIDTH: columns
// together.
template <int64_t T, int R, int Z, int64_t WIDTH>
void add_values(const uint8_t (*p)[TILE], const int8_t* values, int64_t d, const float* keep, const float* scale,
                float* out) {
    vi acc[R][Z];
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int z = 0; z < Z; z++) acc[r][z] = vi{};
    for (int64_t block = 0; block < T; block += BLOCK) {
        const int8_t* rows = values + block * d;
        for (int64_t t = 0; t < BLOCK; t += 4, rows += 4 * WIDTH) {
            vb v[Z];
#pragma GCC unroll 4
            for (int z = 0; z < Z; z++) v[z] = load<vb>(rows + 64 * z);
#pragma GCC unroll 6
            for (int r = 0; r < R; r++) {
                int32_t weights = load32(&p[r][block + t]);
#pragma GCC unroll 4
                for (int z = 0; z < Z; z++) acc[r][z] = dot_weights(acc[r][z], v[z], weights);
            }
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int z = 0; z < Z; z++) {
            float* to = out + r * d + z * LANES;
            store(to, load<vf>(to) * keep[r] + to_float(acc[r][z]) * scale[r]);
        }
}

// Weights of one row's tile: rounded to bytes under one scale, which is returned; how far the sums so far shrink, too.
template <int64_t T>
float weigh(Running& w, int r, int64_t row, int64_t visible, const vf* vs, float most_scale, float* keep) {
    float* x = w.scores[r];
    if (visible < T)
        for (int64_t t = 0; t < T; t += LANES)
            store(x + t, select(first_lanes(visible - t), load<vf>(x + t), splat(-INFINITY)));
    vf most[2] = {load<vf>(x), load<vf>(x + LANES)};
#pragma GCC unroll 8
    for (int64_t t = 2 * LANES; t < T; t += 2 * LANES) {
        most[0] = max(most[0], load<vf>(x + t));
        most[1] = max(most[1], load<vf>(x + t + LANES));
    }
    float scale = w.scales[row], here = largest(max(most[0], most[1])) * scale, top = std::max(w.top[row], here);
    *keep = 0;
    if (top == -INFINITY) top = 0;  // nothing to be seen yet
    if (w.top[row] > -INFINITY) *keep = w.top[row] == top ? 1.0f : std::exp2(w.top[row] - top);
    w.top[row] = top;
    float largest_weight = (here == top ? 1.0f : std::exp2(here - top)) * most_scale;
    float inverse = largest_weight > 0 ? WEIGHT_MAX / largest_weight : 0.0f;
    vf total = load<vf>(w.total[row]) * *keep;
    for (int64_t t = 0; t < T; t += 4 * LANES) {
        vf weights[4];
#pragma GCC unroll 4
        for (int z = 0; z < 4; z++) {
            vf e = exp2_coarse(load<vf>(x + t + z * LANES) * scale - top);
            total += e;
            weights[z] = e * (vs[t / LANES + z] * inverse);
        }
        store_bytes(&w.weights[r][t], weights);
    }
    store(w.total[row], total);
    return largest_weight / WEIGHT_MAX;
}

template <int64_t T, int R>
void attend_tile(Running& w, const Cache& cache, int64_t first, int64_t tile, int64_t d, const vf* vs, float most_scale) {
    float keep[R], scale[R];
    const int32_t* q = w.queries + first * (d / 4);
    for (int64_t t = 0; t < T; t += VECTORS * LANES) {
        int64_t place = (tile + t / BLOCK * BLOCK) * d + 4 * (t % BLOCK);
        scores_of<R>(q, w.sums + first, cache.keys + place, cache.key_scales + tile + t, d / 4,
                     (float(*)[TILE])&w.scores[0][t]);
    }
    for (int r = 0; r < R; r++)
        scale[r] = weigh<T>(w, r, first + r, w.limit[first + r] - tile, vs, most_scale, &keep[r]);
    const int8_t* values = cache.values + tile * d;
    float* out = w.out + first * d;
    int64_t i = 0;
    for (; i + STRETCH <= d; i += STRETCH)
        for (int64_t j = 0; j < STRETCH; j += VECTORS * LANES)
            add_values<T, R, VECTORS, STRETCH>(w.weights, values + i * BLOCK + 4 * j, d, keep, scale, out + i + j);
    for (; i < d; i += LANES) add_values<T, R, 1, LANES>(w.weights, values + i * BLOCK, d, keep, scale, out + i);
}

using Attend = void (*)(Running&, const Cache&, int64_t, int64_t, int64_t, const vf*, float);

template <int64_t T, int... R>
Attend attend_of(int64_t rows, Counts<R...>) {
    static constexpr Attend tiles[] = {attend_tile<T, R + 1>...};
    return tiles[rows - 1];
}

// Takes the queries of a task's rows, in blocks of QUERY_ROWS. Returns how many keys the longest of them sees.
inline int64_t begin(const Step& s, const Call& c, const Rows& rows, Running& w) {
    int64_t d = s.head_dim, longest = 0;
    for (int64_t r = 0; r < rows.count; r++) {
        int64_t at = place(s, c, rows, r), block = r / QUERY_ROWS * QUERY_ROWS;
        int64_t height = std::min<int64_t>(QUERY_ROWS, rows.count - block);
        w.limit[r] = seen(s, c, rows, r);
        longest = std::max(longest, w.limit[r]);
        w.sums[r] = ((const int32_t*)c.buffers[QUERY_SUMS])[at];
        w.scales[r] = ((const float*)c.buffers[QUERY_SCALES])[at];
        w.top[r] = -INFINITY;
        store(w.total[r], vf{});
        const int32_t* from = (const int32_t*)((const int8_t*)c.buffers[QUERIES] + at * d);
        int32_t* to = w.queries + block * (d / 4) + (r - block);
        for (int64_t u = 0; u < d / 4; u++) to[u * height] = from[u];
    }
    std::memset(w.out, 0, rows.count * d * sizeof(float));
    return longest;
}

template <int64_t T>
void attend_tiles(const Step& s, const Call& c, const Rows& rows, Running& w) {
    constexpr int COUNT = T / LANES;
    int64_t d = s.head_dim, longest = begin(s, c, rows, w);
    Cache cache = cache_of(s, c, rows.sequence, rows.head);
    for (int64_t tile = 0; tile < longest; tile += T) {
        vf vs[COUNT], most = {};
        for (int z = 0; z < COUNT; z++) {  // rows beyond the longest were never written
            vs[z] = load<vf>(cache.value_scales + tile + z * LANES);
            vs[z] = select(first_lanes(longest - tile - z * LANES), vs[z], vf{});
            most = max(most, vs[z]);
        }
        float most_scale = largest(most);
        for (int64_t first = 0; first < rows.count; first += QUERY_ROWS) {
            int64_t height = std::min<int64_t>(QUERY_ROWS, rows.count - first);
            if (w.limit[first + height - 1] > tile)
                attend_of<T>(height, UpTo<QUERY_ROWS>())(w, cache, first, tile, d, vs, most_scale);
        }
    }
    for (int64_t r = 0; r < rows.count; r++) {
        float* out = (float*)c.buffers[s.out] + place(s, c, rows, r) * d;
        float inverse = 1.0f / sum(load<vf>(w.total[r]));
        for (int64_t i = 0; i < d; i += LANES) store(out + i, load<vf>(w.out + r * d + i) * inverse);
    }
}

inline void attend(const Step& s, const Call& c, const Rows& rows, Running& w) {
    if (rows.count > QUERY_ROWS)
        attend_tiles<TILE>(s, c, rows, w);
    else
        attend_tiles<BLOCK>(s, c, rows, w);
}

}  // namespace ove
