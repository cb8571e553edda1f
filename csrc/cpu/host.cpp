#include "host.h"

#include <chrono>
#include <cstdlib>
#include <new>

#include "../threads.h"
#include "workspace.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace esm {
namespace cpu {
namespace {

// Grows and never shrinks: batches repeat. Under AddressSanitizer it is of exactly the size asked for, so that a kernel
// that leaves it is found.
class Scratch {
  public:
    ~Scratch() { std::free(memory_); }
#if defined(__SANITIZE_ADDRESS__)
    void* at_least(size_t bytes) {
        if (bytes == size_ && memory_) return memory_;
        std::free(memory_);
        if (posix_memalign(&memory_, 64, bytes)) throw std::bad_alloc();
        size_ = bytes;
        return memory_;
    }
#else
    void* at_least(size_t bytes) {
        if (bytes > size_) {
            constexpr size_t kHuge = size_t(2) << 20;
            const size_t size = (bytes + kHuge - 1) / kHuge * kHuge;
            std::free(memory_);
            size_ = 0;
            memory_ = std::aligned_alloc(kHuge, size);
            if (!memory_) throw std::bad_alloc();
#if defined(__linux__)
            madvise(memory_, size, MADV_HUGEPAGE);
#endif
            size_ = size;
        }
        return memory_;
    }
#endif

  private:
    void* memory_ = nullptr;
    size_t size_ = 0;
};

}  // namespace

void parallel(size_t n, size_t grain, void (*body)(void*, size_t, size_t), void* context) {
    parallel_for(n, grain, [=](size_t begin, size_t end) { body(context, begin, end); });
}

int parallel_width() { return threads(); }

void* scratch(int slot, size_t bytes) {
    static thread_local Scratch slots[kSlots];
    return slots[slot].at_least(bytes);
}

double seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace cpu
}  // namespace esm
