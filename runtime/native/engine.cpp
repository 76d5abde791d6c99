// The steps of a program, run by a pool of threads.

#include <ctime>
#include <memory>

#include "attention.h"
#include "pool.h"
#include "product.h"

namespace ove {

constexpr int64_t L2_BYTES = 512 << 10;  // of a product's rows that stay near while panels pass by
constexpr int64_t CHUNK_UNITS = 128;      // of a panel, 16 KiB, that stay nearer still while rows pass by

// What one thread works in.
struct Workspace {
    struct alignas(64) Line {
        uint8_t bytes[64];
    };
    std::vector<Line> floats, panel;
    std::unique_ptr<Running> running{new Running};

    float* room(int64_t count) { return (float*)grown(floats, count * 4); }
    uint8_t* codes(int64_t bytes) { return grown(panel, bytes); }

    static uint8_t* grown(std::vector<Line>& lines, int64_t bytes) {
        size_t wanted = (size_t)(bytes + 63) / 64;
        if (lines.size() < wanted) lines.resize(wanted);
        return lines.data()->bytes;
    }
};

struct Engine {
    explicit Engine(int threads) : pool(threads), spaces(threads) {}
    Pool pool;
    std::vector<Workspace> spaces;
};

// Takes tasks 0 .. count - 1, `chunk` at a time.
template <class F>
void share(Pool& pool, int64_t count, int64_t chunk, const F& task) {
    for (int64_t i; (i = pool.take(chunk)) < count;)
        for (int64_t j = i; j < std::min(count, i + chunk); j++) task(j);
}

void prepare_rows(const Step& s, const Call& c, Pool& pool, Workspace& space) {
    int64_t rows = c.counts[s.rows], joined = s.n / s.k;
    if (s.skip_first) rows = c.sequences * (c.tokens - 1);
    Blocks blocks(rows / joined);
    float* work = space.room(2 * s.k + 64);
    share(pool, rows, rows > 64 ? 16 : 1, [&](int64_t m) { prepare_row(s, c, blocks, m, work); });
}

void product(const Step& s, const Call& c, Pool& pool, Workspace& space) {
    int64_t rows = c.counts[s.rows];
    if (!rows) return;
    Blocks blocks(rows);
    int64_t columns = s.epilogue == GATED ? 2 * s.n : s.n, panels = (columns + PANEL - 1) / PANEL;
    int64_t width = units(s.kind, s.k), step = s.kind == INT8 ? s.group / 4 : 1;
    int64_t chunk = blocks.count == 1 ? width : std::max<int64_t>(1, CHUNK_UNITS / step) * step;
    int64_t stretch = std::max<int64_t>(4, L2_BYTES / (4 * width * (blocks.height + 1)));
    int64_t stretches = (blocks.count + stretch - 1) / stretch;
    uint8_t* room = s.weights == CODES4 ? space.codes(chunk * UNIT) : nullptr;
    float* sums = space.room(std::min(rows, stretch * (blocks.height + 1)) * PANEL);
    int64_t together = stretches > 1 ? 1 : std::max<int64_t>(1, panels / (pool.threads() * 8));
    share(pool, panels * stretches, together, [&](int64_t task) {
        int64_t first = task / panels * stretch, last = std::min(blocks.count, first + stretch);
        product_task(s, c, blocks, first, last, task % panels, chunk, sums, room);
    });
    finish_streams();
}

void attention(const Step& s, const Call& c, Pool& pool, Workspace& space) {
    int64_t rows = c.tokens * (s.heads / s.kv_heads);
    int64_t parts = (rows + TASK_ROWS - 1) / TASK_ROWS;
    share(pool, c.sequences * s.kv_heads * parts, 1, [&](int64_t task) {
        int64_t part = parts - 1 - task % parts, block = task / parts;  // the longest first
        Rows taken{block / s.kv_heads, block % s.kv_heads, part * TASK_ROWS, std::min(TASK_ROWS, rows - part * TASK_ROWS)};
        attend(s, c, taken, *space.running);
    });
}

// Rows of floats by their index.
void gather(const Step& s, const Call& c, Pool& pool) {
    const float* in = (const float*)c.buffers[s.in];
    float* out = (float*)c.buffers[s.out];
    share(pool, c.counts[s.rows], 1, [&](int64_t m) { std::memcpy(out + m * s.k, in + c.indices[m] * s.k, s.k * 4); });
}

// Rows of images with one in front of each image's.
void prepend(const Step& s, const Call& c, Pool& pool) {
    const float *in = (const float*)c.buffers[s.in], *first = (const float*)(c.file + s.w);
    float* out = (float*)c.buffers[s.out];
    share(pool, c.counts[s.rows], 16, [&](int64_t m) {
        int64_t image = m / c.tokens, row = m % c.tokens;
        const float* from = row ? in + (image * (c.tokens - 1) + row - 1) * s.k : first;
        std::memcpy(out + m * s.k, from, s.k * 4);
    });
}

void run_step(const Step& s, const Call& c, Pool& pool, Workspace& space) {
    switch (s.op) {
        case ROWS: return prepare_rows(s, c, pool, space);
        case PRODUCT: return product(s, c, pool, space);
        case HEADS: {
            float* work = space.room(2 * s.head_dim + 64);
            return share(pool, c.counts[s.rows], 4, [&](int64_t m) { split_heads(s, c, m, work); });
        }
        case ATTENTION: return attention(s, c, pool, space);
        case GATHER: return gather(s, c, pool);
        case PREPEND: return prepend(s, c, pool);
    }
}

}  // namespace ove

#define OVE_API __attribute__((visibility("default")))

extern "C" {

// An engine of so many threads; null where there are none to be had.
OVE_API void* ove_create(int32_t threads) {
    try {
        return new ove::Engine(threads);
    } catch (...) {
        return nullptr;
    }
}

OVE_API void ove_destroy(void* engine) {
    delete (ove::Engine*)engine;
}

// Sizes of the two structures, for the caller to compare with its own.
OVE_API void ove_sizes(int32_t* out) {
    out[0] = sizeof(ove::Step);
    out[1] = sizeof(ove::Call);
}

// Runs the steps one after the other. seconds: of each step, added up; or null. Returns 0, or 1 out of memory.
OVE_API int32_t ove_run(void* handle, const ove::Step* steps, int32_t count, const ove::Call* call, double* seconds) {
    ove::Engine& engine = *(ove::Engine*)handle;
    std::atomic<int32_t> failed{0};
    engine.pool.run([&](int thread) {
        timespec before, after;
        for (int32_t i = 0; i < count; i++) {
            if (seconds && thread == 0) clock_gettime(CLOCK_MONOTONIC, &before);
            try {
                ove::run_step(steps[i], *call, engine.pool, engine.spaces[thread]);
            } catch (...) {
                failed = 1;
            }
            if (i + 1 < count) engine.pool.barrier();
            if (seconds && thread == 0) {
                clock_gettime(CLOCK_MONOTONIC, &after);
                seconds[i] += (double)(after.tv_sec - before.tv_sec) + 1e-9 * (double)(after.tv_nsec - before.tv_nsec);
            }
        }
    });
    return failed;
}

}  // extern "C"
