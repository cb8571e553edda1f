// Which levels this machine runs, the one in use, and what kernels need from outside. Compiled for the oldest CPU.
#include <chrono>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "../threads.h"
#include "detect.h"
#include "table.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace esm {
namespace cpu {

// CMake says which levels there are, best last: ESM_LEVELS is X(base) X(avx2) and so on.
#define X(level) extern const Table kernels_##level;
ESM_LEVELS
#undef X

namespace {

#define X(level) &kernels_##level,
const Table* const kLevels[] = {ESM_LEVELS};
#undef X
constexpr int kCount = int(sizeof kLevels / sizeof *kLevels);

const Table* find(const std::string& name) {
    std::string known;
    for (const Table* candidate : kLevels) {
        if (name == candidate->name) {
            const std::string lacks = missing(name, machine());
            if (lacks.empty()) return candidate;
            throw std::invalid_argument("this machine does not run the instruction set '" + name + "': it has no " + lacks);
        }
        known += (known.empty() ? "" : ", ") + std::string(candidate->name);
    }
    throw std::invalid_argument("there is no instruction set '" + name + "'; choose one of " + known);
}

const Table* first_choice() {
    const char* forced = std::getenv("ESM_FAST_ISA");
    if (forced && *forced) return find(forced);
    int best = 0;
    for (int i = 0; i < kCount; ++i)
        if (runs(i)) best = i;
    return kLevels[best];
}

const Table*& chosen() {
    static const Table* table = first_choice();
    return table;
}

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

const Table& active() { return *chosen(); }
int levels() { return kCount; }
const char* level(int i) { return kLevels[i]->name; }
bool runs(int i) { return missing(level(i), machine()).empty(); }
void select(const char* name) { chosen() = find(name); }

void parallel(size_t n, size_t grain, void (*body)(void*, size_t, size_t), void* context) {
    parallel_for(n, grain, [=](size_t begin, size_t end) { body(context, begin, end); });
}

int parallel_width() { return threads(); }

void* scratch(int slot, size_t bytes) {
    static thread_local Scratch slots[9];
    return slots[slot].at_least(bytes);
}

double seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace cpu
}  // namespace esm
