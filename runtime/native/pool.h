// Threads that work on one call together, step by step; between calls they sleep.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <sched.h>
#include <thread>
#include <vector>

namespace ove {

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

class Pool {
  public:
    explicit Pool(int threads) : threads_(threads) {
        for (int i = 1; i < threads; i++) workers_.emplace_back([this, i] { serve(i); });
    }

    ~Pool() {
        stop_ = true;
        wake();
        for (std::thread& worker : workers_) worker.join();
    }

    int threads() const { return threads_; }

    // work(thread) in every thread; returns when all have finished.
    void run(const std::function<void(int)>& work) {
        work_ = &work;
        wake();
        work(0);
        barrier();
    }

    // Tasks of the step that the last barrier ended are all taken: count from zero again after it.
    int64_t take(int64_t count) { return next_.fetch_add(count, std::memory_order_relaxed); }

    // Waits for every thread; the last to arrive sets the task counter back.
    void barrier() {
        uint32_t phase = phase_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            next_.store(0, std::memory_order_relaxed);
            phase_.store(phase + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; spins++) {
            if (spins < 4096)
                relax();
            else
                sched_yield();
        }
    }

  private:
    void wake() {
        call_.fetch_add(1, std::memory_order_release);
        call_.notify_all();
    }

    void serve(int thread) {
        uint32_t seen = 0;
        while (true) {
            call_.wait(seen, std::memory_order_acquire);
            seen++;
            if (stop_) return;
            (*work_)(thread);
            barrier();
        }
    }

    const int threads_;
    const std::function<void(int)>* work_ = nullptr;
    bool stop_ = false;
    alignas(64) std::atomic<uint32_t> call_{0};
    alignas(64) std::atomic<uint32_t> phase_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<int64_t> next_{0};
    std::vector<std::thread> workers_;
};

}  // namespace ove
