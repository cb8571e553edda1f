// The thread pool: one per process, started when first needed, asleep between regions (but see Session).
#pragma once

#include <cstddef>
#include <functional>

namespace esm {

// Threads a region may use, the caller included. Set to n >= 1; by default ESM_FAST_THREADS, else one per core.
int threads();
void set_threads(int n);

// Calls body(begin, end) on pieces that cover [0, n) once each, a piece being about `grain` long.
// Work of one piece, a region inside a region, and a region while another caller has the pool run on the caller alone.
// The first exception of a body is thrown again here, after every piece has ended.
void parallel_for(size_t n, size_t grain, const std::function<void(size_t, size_t)>& body);

// While it exists, the regions of its thread follow one another closely: the workers look out for the next one a moment
// before they sleep, and the pool is this thread's alone. It changes nothing inside a region, inside another session,
// and while another caller has the pool.
class Session {
  public:
    Session();
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;
    ~Session();

  private:
    const bool entered_;
};

}  // namespace esm
