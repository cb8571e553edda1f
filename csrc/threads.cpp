#include "threads.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace esm {
namespace {

using Body = std::function<void(size_t, size_t)>;

thread_local bool inside_region = false, in_session = false;

struct Job {
    const Body& body;
    size_t n, grain;
    std::atomic<size_t> next{0};
    std::mutex guard;
    std::exception_ptr error;

    Job(const Body& body_, size_t n_, size_t grain_) : body(body_), n(n_), grain(grain_) {}

    void work() {
        inside_region = true;
        for (size_t begin; (begin = next.fetch_add(grain)) < n;) {
            try {
                body(begin, std::min(n, begin + grain));
            } catch (...) {
                std::lock_guard<std::mutex> lock(guard);
                if (!error) error = std::current_exception();
            }
        }
        inside_region = false;
    }
};

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// What a thread of a session spends at most on looking for what comes next before it sleeps. Waking a sleeping thread
// takes from 5 us to 50 us (a virtual machine's idle core), as much as a small region itself. Where looking is in vain,
// because the pieces are long or other processes have the cores, a thread soon looks only a moment.
constexpr std::chrono::nanoseconds kLongLook{100000}, kShortLook{3000};

class Pool {
  public:
    explicit Pool(int size) : size_(size) {}

    int size() const { return size_; }

    void resize(int size) {
        std::lock_guard<std::mutex> region(region_);
        stop_ = true;
        ++round_;
        wake(workers_.size());
        for (auto& worker : workers_) worker.join();
        workers_.clear();
        stop_ = false;
        size_ = size;
    }

    bool enter() {
        if (size_ <= 1 || inside_region || in_session || !region_.try_lock()) return false;
        return in_session = session_ = true;
    }
    void leave() {
        in_session = session_ = false;
        region_.unlock();
    }

    void run(size_t n, size_t grain, const Body& body) {
        const size_t pieces = (n + grain - 1) / grain;
        std::unique_lock<std::mutex> region(region_, std::defer_lock);
        if (pieces <= 1 || size_ <= 1 || inside_region || !(in_session || region.try_lock())) {
            if (n) body(0, n);
            return;
        }
        while (workers_.size() + 1 < size_t(size_)) workers_.emplace_back([this, seen = round_.load()] { serve(seen); });
        Job job(body, n, grain);
        job_ = &job;
        ++round_;
        wake(std::min(pieces - 1, workers_.size()));
        job.work();
        job_ = nullptr;  // a worker that has not come yet is not waited for
        if (!look([this] { return active_ == 0; })) {
            std::unique_lock<std::mutex> lock(sleep_);
            waiting_ = true;
            done_.wait(lock, [this] { return active_ == 0; });
            waiting_ = false;
        }
        if (job.error) std::rethrow_exception(job.error);
    }

  private:
    // Serves every round after `seen`. `active_` goes up before the job is looked at, and the caller looks at it after
    // taking the job away: so a worker either finds no job, or is waited for.
    void serve(size_t seen) {
        for (;;) {
            const auto called = [&] { return stop_ || round_ != seen; };
            if (!look(called)) {
                std::unique_lock<std::mutex> lock(sleep_);
                ++sleeping_;
                wake_.wait(lock, called);
                --sleeping_;
            }
            if (stop_) return;
            seen = round_;
            ++active_;
            if (Job* job = job_) job->work();
            if (--active_ == 0 && waiting_) {
                std::lock_guard<std::mutex> lock(sleep_);
                done_.notify_one();
            }
        }
    }

    void wake(size_t count) {
        if (sleeping_ == 0) return;
        std::lock_guard<std::mutex> lock(sleep_);  // or one that has looked and not slept yet would miss the call
        for (size_t i = 0; i < count; ++i) wake_.notify_one();
    }

    // Whether it is ready, at once or, in a session, soon.
    template <class Ready>
    bool look(const Ready& ready) const {
        if (ready()) return true;
        if (!session_) return false;
        static thread_local std::chrono::nanoseconds patience = kLongLook;
        for (const auto end = std::chrono::steady_clock::now() + patience; session_;) {
            for (int i = 0; i < 32; ++i, pause())
                if (ready()) {
                    patience = std::min(2 * patience, kLongLook);
                    return true;
                }
            if (std::chrono::steady_clock::now() > end) {
                patience = std::max(patience / 2, kShortLook);
                return false;
            }
        }
        return false;
    }

    std::atomic<int> size_;
    std::mutex region_;  // held by the caller whose region or session runs
    std::vector<std::thread> workers_;

    std::atomic<Job*> job_{nullptr};
    std::atomic<size_t> round_{0};  // goes up to call the workers
    std::atomic<size_t> active_{0}, sleeping_{0};
    std::atomic<bool> stop_{false}, session_{false}, waiting_{false};
    std::mutex sleep_;
    std::condition_variable wake_, done_;
};

int default_size() {
    const char* wanted = std::getenv("ESM_FAST_THREADS");
    if (!wanted || !*wanted) return std::max(1, int(std::thread::hardware_concurrency()));
    char* end;
    const long n = std::strtol(wanted, &end, 10);
    if (*end || n < 1 || n > 4096)
        throw std::invalid_argument(std::string("ESM_FAST_THREADS is '") + wanted + "': give a number from 1 to 4096");
    return int(n);
}

Pool* current = nullptr;

// A forked child has none of the parent's threads, and a lock of the parent's pool may have been held: it starts
// afresh, and the parent's pool is left alone. No pool is ever destroyed: at exit its threads are parked.
void after_fork() { current = new Pool(current->size()); }

Pool& pool() {
    static const bool started = [] {
        current = new Pool(default_size());
        return pthread_atfork(nullptr, nullptr, after_fork) == 0;
    }();
    (void)started;
    return *current;
}

}  // namespace

int threads() { return pool().size(); }
void set_threads(int n) { pool().resize(n); }

void parallel_for(size_t n, size_t grain, const Body& body) { pool().run(n, std::max<size_t>(grain, 1), body); }

Session::Session() : entered_(pool().enter()) {}
Session::~Session() {
    if (entered_) pool().leave();
}

}  // namespace esm
