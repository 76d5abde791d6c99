// What Python hands over: steps, which name buffers by number and weights by their place in a file, and a call.
// runtime/cpu_library.py declares the same structures.
#pragma once

#include <cstdint>

namespace ove {

enum Op : int32_t { ROWS = 0, PRODUCT = 1, HEADS = 2, ATTENTION = 3, GATHER = 4, PREPEND = 5 };

// What the rows of a product's input are stored as, four bytes a unit: four INT8 codes, two BF16 values, one float.
enum Kind : int32_t { INT8 = 0, BF16 = 1, FP32 = 2 };

enum Weights : int32_t { CODES4 = 0, CODES8 = 1, PAIRS = 2, FLOATS = 3 };

// What happens to a row before it is stored.
enum Prologue : int32_t { AS_IS = 0, RMS_NORM = 1, LAYER_NORM = 2, SWIGLU = 3 };

// What happens to a product before it is written.
enum Epilogue : int32_t { WRITE = 0, ADD = 1, GATED = 2, GELU = 3, GELU_TANH = 4, QUICK_GELU = 5 };

struct Step {
    int32_t op;
    int32_t rows;      // index into Call::counts
    int32_t in, out;   // buffers
    int32_t kind;      // Kind of the rows that are written or read
    int32_t weights;   // Weights
    int32_t prologue, epilogue;
    int32_t n, k;      // columns written, values read in a row
    int32_t group;     // values of a row that share a scale
    int32_t stride;    // floats between rows of `out` (PRODUCT) or `in` (ROWS)
    int32_t column;    // of the first value
    int32_t skip_first; // ROWS: leave out the first row of each image
    int32_t heads, kv_heads, head_dim, layer;
    int32_t causal;
    float eps;
    float scale;       // static scale of INT8 codes (0: one for each group), or of the attention's products
    int64_t w, s, b;   // weights, scales and bias (or the norms of queries and keys), as offsets; -1: none
};

struct Call {
    int64_t counts[4];       // rows: all, of the answer, ...
    int64_t sequences;       // or images
    int64_t tokens;          // of each
    const int64_t* starts;   // the cache row of each sequence's first token
    const int64_t* indices;  // GATHER
    const float* cosines;    // [rows, head_dim / 2]
    const float* sines;
    const uint8_t* file;     // the weights
    void** buffers;
    uint8_t** keys;          // by layer: [sequences, kv_heads] blocks
    uint8_t** values;
    int64_t capacity;        // rows of a block, a multiple of 16
};

// Buffers that every program has: rows for the next product, their scales and their sums.
enum Buffers : int32_t { UNITS = 0, SCALES = 1, SUMS = 2, QUERIES = 3, QUERY_SCALES = 4, QUERY_SUMS = 5 };

}  // namespace ove
