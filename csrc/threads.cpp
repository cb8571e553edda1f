#include "threads.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
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

thread_local bool inside_region = false;

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

class Pool {
  public:
    explicit Pool(int size) : size_(size) {}

    int size() const { return size_; }

    void resize(int size) {
        std::lock_guard<std::mutex> region(region_);
        {
            std::lock_guard<std::mutex> lock(state_);
            stop_ = true;
        }
        wake_.notify_all();
        for (auto& worker : workers_) worker.join();
        workers_.clear();
        stop_ = false;
        size_ = size;
    }

    void run(size_t n, size_t grain, const Body& body) {
        const size_t pieces = (n + grain - 1) / grain;
        std::unique_lock<std::mutex> region(region_, std::defer_lock);
        if (pieces <= 1 || size_ <= 1 || inside_region || !region.try_lock()) {
            if (n) body(0, n);
            return;
        }
        while (workers_.size() + 1 < size_t(size_)) workers_.emplace_back([this] { serve(); });
        Job job(body, n, grain);
        const size_t helpers = std::min(pieces - 1, workers_.size());
        {
            std::lock_guard<std::mutex> lock(state_);
            job_ = &job;
            tickets_ = helpers;
        }
        for (size_t i = 0; i < helpers; ++i) wake_.notify_one();
        job.work();
        std::unique_lock<std::mutex> lock(state_);
        tickets_ = 0;  // a worker that has not woken yet is not waited for
        done_.wait(lock, [this] { return active_ == 0; });
        lock.unlock();
        if (job.error) std::rethrow_exception(job.error);
    }

  private:
    void serve() {
        std::unique_lock<std::mutex> lock(state_);
        for (;;) {
            wake_.wait(lock, [this] { return stop_ || tickets_ > 0; });
            if (stop_) return;
            --tickets_;
            ++active_;
            Job* job = job_;
            lock.unlock();
            job->work();
            lock.lock();
            if (--active_ == 0) done_.notify_one();
        }
    }

    std::atomic<int> size_;
    std::mutex region_;  // held by the caller whose region runs
    std::mutex state_;   // guards the members below
    std::condition_variable wake_, done_;
    std::vector<std::thread> workers_;
    Job* job_ = nullptr;
    size_t tickets_ = 0, active_ = 0;
    bool stop_ = false;
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

}  // namespace esm
