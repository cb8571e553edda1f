// The kernels of one level. CMake compiles this file once per level, with that level's flags and ESM_LEVEL its name.
#include "table.h"
#include "work.h"

namespace esm {
namespace cpu {
namespace {

// run(ElementOf<type>) for the one type of the list that it is: the bindings have refused all others (run.h).
template <class Run, Type... known>
void choose(Types<known...>, Type type, const Run& run) {
    const bool ran = ((type == known && (run(ElementOf<known>{}), true)) || ...);
    if (!ran) __builtin_trap();
}

// The GEMM's own work, without an epilogue, on operands that stay in the first-level cache: some tiles of rows times one
// panel.
template <class W>
double peak_of() {
    typedef typename FormatOf<W>::Operand A;
    constexpr int kHeight = kTileRows<A>, kInner = sizeof(W) == 1 || kHeight == 32 ? kGroup : 64;
    constexpr int kPeakTiles = 4, kPeakRows = kPeakTiles * kHeight;
    constexpr int kRounds = (N == 16 ? 12800000 : 1280000) / kInner / kPeakTiles;  // 10 ms and more: waking threads is nothing then
    const size_t threads = size_t(parallel_width());
    const double start = seconds();
    each(threads, 1, [&](size_t begin, size_t end) {
        const size_t ld = leading<A>(kInner);
        A* a = buffer<A>(Peak::own_rows, kPeakRows, ld);
        W* panel = buffer<W>(Peak::own_panel, 1, panel_size(static_cast<W*>(nullptr), kInner));
        std::memset(a, 0, kPeakRows * ld * sizeof *a);
        std::memset(panel, 0, panel_size(panel, kInner) * sizeof *panel);
        // What it is given is looked at by nobody, but it must not be no work at all.
        const auto finish = [](const float* c, int64_t, int, int) { asm volatile("" : : "r"(c) : "memory"); };
        for (size_t i = begin; i < end; ++i)
            for (int round = 0; round < kRounds; ++round) gemm(a, ld, kPeakRows, panel, kInner, 0, 1, finish);
    });
    return 2.0 * kPeakRows * kPanel * kInner * kRounds * double(threads) / (seconds() - start) / 1e9;
}
double peak(Type type) {
    double found = 0;
    choose(AllTypes{}, type, [&](auto element) { found = peak_of<typename decltype(element)::W>(); });
    return found;
}

#define X(kernel, Call, type, types)                                                                          \
    void kernel(const Call& call) {                                                                           \
        choose(types{}, type, [&](auto element) { kernel##_of<typename decltype(element)::W>(call); });       \
    }
ESM_KERNELS(X)
#undef X

}  // namespace

#define ESM_JOIN_(a, b) a##b
#define ESM_JOIN(a, b) ESM_JOIN_(a, b)
#define ESM_TEXT_(a) #a
#define ESM_TEXT(a) ESM_TEXT_(a)
extern const Table ESM_JOIN(kernels_, ESM_LEVEL);
const Table ESM_JOIN(kernels_, ESM_LEVEL) = {
    ESM_TEXT(ESM_LEVEL),
#define X(kernel, Call, type, types) kernel,
    ESM_KERNELS(X)
#undef X
    peak,
};

}  // namespace cpu
}  // namespace esm
