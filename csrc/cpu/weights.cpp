#include "weights.h"

#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace esm {
namespace cpu {
namespace {

constexpr size_t kHugePage = size_t(2) << 20;
constexpr int kBlock = 64;

size_t padded(int n, int multiple) { return size_t(n + multiple - 1) / size_t(multiple) * size_t(multiple); }

// Inputs of a panel, with their padding.
size_t panel_inputs(Type type, int in) { return type == Type::kFloat32 ? size_t(in) : padded(in, kInputs); }

// Group: how many inputs of one output lie side by side, 2 for bf16. A panel has `inputs` of them with its padding.
template <class T, int Group>
void pack(const T* matrix, int out, int in, size_t inputs, size_t first, size_t last, T* packed) {
    const size_t size = inputs * kPanel;
    for (size_t panel = first; panel < last; ++panel) {
        T* to = packed + panel * size;
        std::memset(to, 0, size * sizeof(T));
        // A few inputs at a time, so that what is scattered stays in the first-level cache.
        for (int start = 0; start < in; start += kBlock)
            for (int row = 0; row < kPanel && int(panel) * kPanel + row < out; ++row) {
                const T* from = matrix + (panel * kPanel + size_t(row)) * size_t(in);
                for (int i = start; i < in && i < start + kBlock; ++i)
                    to[(size_t(i / Group) * kPanel + size_t(row)) * Group + size_t(i % Group)] = from[i];
            }
    }
}

struct Work {
    const void* matrix;
    void* packed;
    int out, in;
    Type type;

    static void run(void* context, size_t first, size_t last) {
        const Work& w = *static_cast<const Work*>(context);
        const size_t inputs = panel_inputs(w.type, w.in);
        if (w.type == Type::kFloat32)
            pack<uint32_t, 1>(static_cast<const uint32_t*>(w.matrix), w.out, w.in, inputs, first, last,
                              static_cast<uint32_t*>(w.packed));
        else
            pack<uint16_t, 2>(static_cast<const uint16_t*>(w.matrix), w.out, w.in, inputs, first, last,
                              static_cast<uint16_t*>(w.packed));
    }
};

}  // namespace

Weights::Weights(const void* matrix, int out, int in, Type type) {
    const size_t outputs = padded(out, kPanel), element = type == Type::kFloat32 ? sizeof(float) : sizeof(uint16_t);
    bytes_ = outputs * panel_inputs(type, in) * element;
    // Whole huge pages where they would be filled anyway: fewer of the TLB misses that end a prefetch.
    const size_t unit = bytes_ >= kHugePage ? kHugePage : 64;
    const size_t whole = (bytes_ + unit - 1) / unit * unit;
    void* memory = std::aligned_alloc(unit, whole ? whole : unit);
    if (!memory) throw std::bad_alloc();
#if defined(__linux__)
    if (unit == kHugePage) madvise(memory, whole, MADV_HUGEPAGE);
#endif
    packed_ = Packed{memory, out, in, type};
    Work work{matrix, memory, out, in, type};
    parallel(outputs / kPanel, 1, Work::run, &work);
}

Weights::~Weights() { std::free(const_cast<void*>(packed_.data)); }

uint64_t fingerprint(const void* data, size_t bytes) {
    constexpr size_t kSamples = 32;
    uint64_t hash = 14695981039346656037ull;
    if (bytes < 8) return hash;
    for (size_t i = 0; i < kSamples; ++i) {
        uint64_t word;
        std::memcpy(&word, static_cast<const char*>(data) + (bytes - 8) / (kSamples - 1) * i, 8);
        hash = (hash ^ word) * 1099511628211ull;
        hash ^= hash >> 29;
    }
    return hash;
}

}  // namespace cpu
}  // namespace esm
