// Products of rows with packed weights. A panel has 32 columns; a unit of it is two vectors of 16 columns, four bytes
// each: four unsigned codes, two BF16 values, or one float. Panels of 4-bit codes hold two units in the nibbles of one.
#pragma once

#include "rows.h"

namespace ove {

constexpr int PANEL = 32;
constexpr int64_t FAR_ROWS = 256;  // of a product whose result leaves the caches before it is read
constexpr int64_t UNIT = 128;  // bytes of a panel's unit

// Adds the product of a block's rows with some groups of a panel, a byte a code, to sums c [R][PANEL]. FOUR: codes of four
// bits, whose scales are those of groups; else of columns.
template <int R, bool FOUR>
void codes_tile(const int32_t* x, const uint8_t* w, int64_t groups, int64_t group_units, const float* xs,
                const int32_t* sums, int64_t row_groups, const float* ws, float* c) {
    constexpr int32_t ZERO = FOUR ? 8 : U8_ZERO;
    for (int64_t g = 0; g < groups; g++) {
        vi acc[R][2];
#pragma GCC unroll 12
        for (int m = 0; m < R; m++) acc[m][0] = acc[m][1] = splat(-ZERO * sums[m * row_groups + g]);
        for (int64_t u = 0; u < group_units; u++) {
            vb w0 = load<vb>(w), w1 = load<vb>(w + 64);
            w += UNIT;
#pragma GCC unroll 12
            for (int m = 0; m < R; m++) {
                acc[m][0] = FOUR ? dot_u4(acc[m][0], w0, x[m]) : dot_u8(acc[m][0], w0, x[m]);
                acc[m][1] = FOUR ? dot_u4(acc[m][1], w1, x[m]) : dot_u8(acc[m][1], w1, x[m]);
            }
            x += R;
        }
        vf s0 = load<vf>(ws), s1 = load<vf>(ws + LANES);
        if (FOUR) ws += PANEL;
#pragma GCC unroll 12
        for (int m = 0; m < R; m++) {
            float scale = xs[m * row_groups + g];
            float* to = c + m * PANEL;
            store(to, load<vf>(to) + to_float(acc[m][0]) * scale * s0);
            store(to + LANES, load<vf>(to + LANES) + to_float(acc[m][1]) * scale * s1);
        }
    }
}

inline vb high_nibbles(vb w) {
    return as<vb>(as<vu>(w) >> 4) & 15;
}

// The same for all groups of a panel, straight from 4-bit codes: for rows so few that they are not worth unpacking for.
template <int R>
void nibbles_tile(const int32_t* x, const uint8_t* w, int64_t groups, int64_t group_units, const float* xs,
                  const int32_t* sums, int64_t row_groups, const float* ws, float* c) {
    constexpr int CHAINS = R <= 2 ? 2 : 1;  // of sums, where they would wait for each other
    for (int64_t g = 0; g < groups; g++) {
        vi acc[R][2 * CHAINS];
#pragma GCC unroll 12
        for (int m = 0; m < R; m++) {
            acc[m][0] = acc[m][1] = splat(-8 * sums[m * row_groups + g]);
            if (CHAINS == 2) acc[m][CHAINS] = acc[m][CHAINS + 1] = vi{};
        }
        for (int64_t u = 0; u < group_units; u += 2) {
            __builtin_prefetch(w + 4096);
            __builtin_prefetch(w + 4096 + 64);
            vb w0 = load<vb>(w), w1 = load<vb>(w + 64);
            w += UNIT;
            vb h0 = high_nibbles(w0), h1 = high_nibbles(w1);
            w0 &= 15;
            w1 &= 15;
#pragma GCC unroll 12
            for (int m = 0; m < R; m++) {
                acc[m][0] = dot_u4(acc[m][0], w0, x[m]);
                acc[m][1] = dot_u4(acc[m][1], w1, x[m]);
                acc[m][2 * CHAINS - 2] = dot_u4(acc[m][2 * CHAINS - 2], h0, x[R + m]);
                acc[m][2 * CHAINS - 1] = dot_u4(acc[m][2 * CHAINS - 1], h1, x[R + m]);
            }
            x += 2 * R;
        }
        vf s0 = load<vf>(ws), s1 = load<vf>(ws + LANES);
        ws += PANEL;
#pragma GCC unroll 12
        for (int m = 0; m < R; m++) {
            float scale = xs[m * row_groups + g];
            float* to = c + m * PANEL;
            vi low = acc[m][0], high = acc[m][1];
            if (CHAINS == 2) low += acc[m][CHAINS], high += acc[m][CHAINS + 1];
            store(to, load<vf>(to) + to_float(low) * scale * s0);
            store(to + LANES, load<vf>(to + LANES) + to_float(high) * scale * s1);
        }
    }
}

// The same for floats: BF16 in pairs, or single.
template <int R, bool PAIRED>
void floats_tile(const int32_t* x, const uint8_t* w, int64_t count, float* c) {
    vf acc[R][2];
#pragma GCC unroll 12
    for (int m = 0; m < R; m++) {
        acc[m][0] = load<vf>(c + m * PANEL);
        acc[m][1] = load<vf>(c + m * PANEL + LANES);
    }
    for (int64_t u = 0; u < count; u++) {
        vi w0 = load<vi>(w), w1 = load<vi>(w + 64);
        w += UNIT;
#pragma GCC unroll 12
        for (int m = 0; m < R; m++) {
            if (PAIRED) {
                acc[m][0] = dot_bf16(acc[m][0], w0, x[m]);
                acc[m][1] = dot_bf16(acc[m][1], w1, x[m]);
            } else {
                float v;
                std::memcpy(&v, x + m, 4);
                acc[m][0] += as<vf>(w0) * v;
                acc[m][1] += as<vf>(w1) * v;
            }
        }
        x += R;
    }
#pragma GCC unroll 12
    for (int m = 0; m < R; m++) {
        store(c + m * PANEL, acc[m][0]);
        store(c + m * PANEL + LANES, acc[m][1]);
    }
}

// Two units of codes from each unit of nibbles.
inline void unpack(const uint8_t* w, int64_t pairs, uint8_t* out) {
    for (int64_t i = 0; i < pairs; i++, w += UNIT, out += 2 * UNIT)
        for (int half = 0; half < UNIT; half += 64) {
            vb both = load<vb>(w + half);
            store(out + half, both & 15);
            store(out + UNIT + half, high_nibbles(both));
        }
}

template <int E>
inline vf finished(vf x) {
    return E == GELU ? gelu(x) : E == GELU_TANH ? gelu_tanh(x) : E == QUICK_GELU ? quick_gelu(x) : x;
}

// far: past the caches, where they are too small for all that is written.
inline void store_some(float* to, vf x, int64_t count, bool far = false) {
    if (count < LANES)
        std::memcpy(to, &x, count * sizeof(float));
    else if (far && ((uintptr_t)to & 63) == 0)
        stream(to, x);
    else
        store(to, x);
}

inline vf load_some(const float* from, int64_t count) {
    vf x = {};
    if (count >= LANES) return load<vf>(from);
    std::memcpy(&x, from, count * sizeof(float));
    return x;
}

// Writes the sums [rows, PANEL] of a panel where they belong, from row `start` on.
template <int E>
void write_rows(const Step& s, const Call& c, int64_t start, int64_t rows, int64_t panel, const float* sums) {
    int64_t first = panel * (E == GATED ? LANES : PANEL), left = s.n - first;
    float* out = (float*)c.buffers[s.out] + start * s.stride + s.column + first;
    bool far = c.counts[s.rows] >= FAR_ROWS;
    vf bias[2] = {};
    if (s.b >= 0)
        for (int z = 0; z < 2; z++) bias[z] = load<vf>((const float*)(c.file + s.b) + first + z * LANES);
    for (int64_t m = 0; m < rows; m++, out += s.stride, sums += PANEL) {
        vf low = load<vf>(sums), high = load<vf>(sums + LANES);
        if (E == GATED) {
            store_some(out, low * sigmoid(low) * high, left, far);
            continue;
        }
        low = finished<E>(low + bias[0]);
        if (E == ADD) low += load_some(out, left);
        store_some(out, low, left, far && E != ADD);
        if (left <= LANES) continue;
        high = finished<E>(high + bias[1]);
        if (E == ADD) high += load_some(out + LANES, left - LANES);
        store_some(out + LANES, high, left - LANES, far && E != ADD);
    }
}

inline void write(const Step& s, const Call& c, int64_t start, int64_t rows, int64_t panel, const float* sums) {
    switch (s.epilogue) {
        case ADD: return write_rows<ADD>(s, c, start, rows, panel, sums);
        case GATED: return write_rows<GATED>(s, c, start, rows, panel, sums);
        case GELU: return write_rows<GELU>(s, c, start, rows, panel, sums);
        case GELU_TANH: return write_rows<GELU_TANH>(s, c, start, rows, panel, sums);
        case QUICK_GELU: return write_rows<QUICK_GELU>(s, c, start, rows, panel, sums);
        default: return write_rows<WRITE>(s, c, start, rows, panel, sums);
    }
}

// Where a product's rows and weights lie.
struct Operands {
    const int32_t* units;
    const float* scales;
    const int32_t* sums;
    const uint8_t* packed;      // the panel
    const float* panel_scales;
    int64_t width, groups;      // of a row: units, and groups of them with a scale each
    int64_t group_units;
    bool four;
};

inline Operands operands(const Step& s, const Call& c, int64_t panel) {
    Operands o;
    o.four = s.weights == CODES4;
    o.width = units(s.kind, s.k);
    o.groups = s.kind == INT8 ? s.k / s.group : 0;
    o.group_units = s.group / 4;
    o.units = (const int32_t*)c.buffers[UNITS];
    o.scales = (const float*)c.buffers[SCALES];
    o.sums = (const int32_t*)c.buffers[SUMS];
    o.packed = c.file + s.w + panel * (o.width * UNIT >> o.four);
    o.panel_scales = (const float*)(c.file + s.s) + panel * PANEL * (o.four ? o.groups : 1);
    return o;
}

// Units first .. last of R rows from row `start` by a panel, added to sums. w: the panel at unit `first`, a byte a code.
template <int R>
void add_tile(const Step& s, const Operands& o, int64_t start, int64_t first, int64_t last, const uint8_t* w, float* sums) {
    const int32_t* x = o.units + start * o.width + first * R;
    if (s.weights == PAIRS) return floats_tile<R, true>(x, w, last - first, sums);
    if (s.weights == FLOATS) return floats_tile<R, false>(x, w, last - first, sums);
    int64_t g = first / o.group_units, place = start * o.groups + g, groups = (last - first) / o.group_units;
    const float* xs = o.scales + place;
    const int32_t* xsums = o.sums + place;
    if (o.four)
        codes_tile<R, true>(x, w, groups, o.group_units, xs, xsums, o.groups, o.panel_scales + g * PANEL, sums);
    else
        codes_tile<R, false>(x, w, groups, o.group_units, xs, xsums, o.groups, o.panel_scales, sums);
}

using AddTile = void (*)(const Step&, const Operands&, int64_t, int64_t, int64_t, const uint8_t*, float*);

template <int... R>
AddTile tile_of(int64_t rows, Counts<R...>) {
    static constexpr AddTile tiles[] = {add_tile<R + 1>...};
    return tiles[rows - 1];
}

// One block of rows and a whole panel of 4-bit codes, added to sums.
template <int R>
void add_nibbles(const Operands& o, float* sums) {
    nibbles_tile<R>(o.units, o.packed, o.groups, o.group_units, o.scales, o.sums, o.groups, o.panel_scales, sums);
}

using AddNibbles = void (*)(const Operands&, float*);

template <int... R>
AddNibbles nibbles_of(int64_t rows, Counts<R...>) {
    static constexpr AddNibbles tiles[] = {add_nibbles<R + 1>...};
    return tiles[rows - 1];
}

// One task: a panel for a stretch of blocks, `chunk` units of the panel at a time, which stay in the first cache while the
// blocks pass by. sums: [rows of the stretch, PANEL]; room: for a chunk's codes, unpacked.
inline void product_task(const Step& s, const Call& c, const Blocks& blocks, int64_t first, int64_t last, int64_t panel,
                         int64_t chunk, float* sums, uint8_t* room) {
    Operands o = operands(s, c, panel);
    int64_t begin = blocks.start(first), rows = blocks.start(last) - begin;
    std::memset(sums, 0, rows * PANEL * sizeof(float));
    if (o.four && blocks.count == 1) {
        nibbles_of(rows, UpTo<BLOCK_ROWS>())(o, sums);
        return write(s, c, begin, rows, panel, sums);
    }
    for (int64_t from = 0; from < o.width; from += chunk) {
        int64_t to = std::min(o.width, from + chunk);
        const uint8_t* w = o.packed + from * UNIT;
        if (o.four) {
            unpack(o.packed + from * UNIT / 2, (to - from) / 2, room);
            w = room;
        }
        for (int64_t block = first; block < last; block++) {
            int64_t start = blocks.start(block), height = blocks.rows(block);
            float* mine = sums + (start - begin) * PANEL;
            tile_of(height, UpTo<BLOCK_ROWS>())(s, o, start, from, to, w, mine);
            if (to == o.width) write(s, c, start, height, panel, mine);
        }
    }
}

}  // namespace ove
