// Which levels this machine runs, the one in use, and what kernels need from outside. Compiled for the oldest CPU.
#include <chrono>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "../threads.h"
#include "table.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace esm {
namespace cpu {

extern const Table kernels_base;
#if defined(ESM_X86_LEVELS)
extern const Table kernels_avx2, kernels_avx512, kernels_avx512bf16;
#endif

namespace {

#if defined(ESM_X86_LEVELS)
struct Cpu {
    bool avx2 = false, avx512 = false, avx512bf16 = false;

    // A level needs the CPU's word for its instructions (CPUID) and the system's for saving its registers (XGETBV).
    Cpu() {
        unsigned a, b, c, d;
        if (!__get_cpuid(1, &a, &b, &c, &d)) return;
        const bool fma = c & bit_FMA, f16c = c & bit_F16C, saves = c & bit_OSXSAVE;
        if (!saves || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
        unsigned low, high;
        __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
        const bool ymm = (low & 0x06) == 0x06, zmm = (low & 0xe6) == 0xe6;
        const unsigned wanted = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
        avx2 = ymm && fma && f16c && (b & bit_AVX2);
        avx512 = avx2 && zmm && (b & wanted) == wanted;
        const unsigned subleafs = a;
        if (avx512 && subleafs >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) avx512bf16 = a & (1u << 5);
    }
};
const Cpu& cpu() {
    static const Cpu found;
    return found;
}
#endif

struct Level {
    const Table* table;
    bool (*runs)();
};

const Level kLevels[] = {
    {&kernels_base, [] { return true; }},
#if defined(ESM_X86_LEVELS)
    {&kernels_avx2, [] { return cpu().avx2; }},
    {&kernels_avx512, [] { return cpu().avx512; }},
    {&kernels_avx512bf16, [] { return cpu().avx512bf16; }},
#endif
};
constexpr int kCount = int(sizeof kLevels / sizeof *kLevels);

const Table* find(const std::string& name) {
    std::string known;
    for (const Level& candidate : kLevels) {
        if (name == candidate.table->name) {
            if (candidate.runs()) return candidate.table;
            throw std::invalid_argument("this machine does not run the instruction set '" + name + "'");
        }
        known += (known.empty() ? "" : ", ") + std::string(candidate.table->name);
    }
    throw std::invalid_argument("there is no instruction set '" + name + "'; choose one of " + known);
}

const Table* first_choice() {
    const char* forced = std::getenv("ESM_FAST_ISA");
    if (forced && *forced) return find(forced);
    int best = 0;
    for (int i = 0; i < kCount; ++i)
        if (kLevels[i].runs()) best = i;
    return kLevels[best].table;
}

const Table*& chosen() {
    static const Table* table = first_choice();
    return table;
}

// Grows and never shrinks: batches repeat.
class Scratch {
  public:
    ~Scratch() { std::free(memory_); }
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

  private:
    void* memory_ = nullptr;
    size_t size_ = 0;
};

}  // namespace

const Table& active() { return *chosen(); }
int levels() { return kCount; }
const char* level(int i) { return kLevels[i].table->name; }
bool runs(int i) { return kLevels[i].runs(); }
void select(const char* name) { chosen() = find(name); }

void parallel(size_t n, size_t grain, void (*body)(void*, size_t, size_t), void* context) {
    parallel_for(n, grain, [=](size_t begin, size_t end) { body(context, begin, end); });
}

int parallel_width() { return threads(); }

void* scratch(int slot, size_t bytes) {
    static thread_local Scratch slots[8];
    return slots[slot].at_least(bytes);
}

double seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace cpu
}  // namespace esm
