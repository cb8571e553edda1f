#include "weights.h"

#include <cstdlib>
#include <cstring>
#include <new>

#include "quantized.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace esm {
namespace cpu {
namespace {

constexpr size_t kHugePage = size_t(2) << 20;
constexpr int kBlock = 64;

// Elements of one panel. Group: how many inputs of one output lie side by side, 2 for bf16.
template <int Group>
size_t panel_size(int in) {
    constexpr int kWhole = Group == 1 ? 1 : kInputs;
    return size_t(in + kWhole - 1) / kWhole * kWhole * kPanel;
}

size_t panels_of(int out) { return size_t(out + kPanel - 1) / kPanel; }

// visit(element of the matrix, element of the packed one) for one panel's share of the matrix, a few inputs at a time,
// so that what is scattered stays in the first-level cache.
template <int Group, class Visit>
void each_element(int out, int in, size_t panel, const Visit& visit) {
    const size_t to = panel * panel_size<Group>(in);
    for (int start = 0; start < in; start += kBlock)
        for (int row = 0; row < kPanel && int(panel) * kPanel + row < out; ++row) {
            const size_t from = (panel * kPanel + size_t(row)) * size_t(in);
            for (int i = start; i < in && i < start + kBlock; ++i)
                visit(from + size_t(i), to + (size_t(i / Group) * kPanel + size_t(row)) * Group + size_t(i % Group));
        }
}

// Packs the panels [first, last) of a matrix, or unpacks them.
struct Work {
    const void* from;
    void* to;
    int out, in;
    Type type;
    bool unpack;

    static void run(void* context, size_t first, size_t last) {
        const Work& w = *static_cast<const Work*>(context);
        w.type == Type::kFloat32 ? w.move<uint32_t, 1>(first, last) : w.move<uint16_t, 2>(first, last);
    }

    template <class T, int Group>
    void move(size_t first, size_t last) const {
        const T* source = static_cast<const T*>(from);
        T* target = static_cast<T*>(to);
        for (size_t panel = first; panel < last; ++panel) {
            if (unpack) {
                each_element<Group>(out, in, panel, [&](size_t plain, size_t packed) { target[plain] = source[packed]; });
                continue;
            }
            const size_t size = panel_size<Group>(in);
            std::memset(target + panel * size, 0, size * sizeof(T));
            each_element<Group>(out, in, panel, [&](size_t plain, size_t packed) { target[packed] = source[plain]; });
        }
    }
};

std::shared_ptr<void> allocate(size_t bytes) {
    // Huge pages as far as they are filled: fewer of the TLB misses that end a prefetch.
    const size_t huge = bytes / kHugePage * kHugePage, unit = huge ? kHugePage : kAlignment;
    std::shared_ptr<void> memory(std::aligned_alloc(unit, bytes ? (bytes + unit - 1) / unit * unit : unit), std::free);
    if (!memory) throw std::bad_alloc();
#if defined(__linux__)
    if (huge) madvise(memory.get(), huge, MADV_HUGEPAGE);
#endif
    return memory;
}

}  // namespace

size_t packed_size(Type type, int out, int in) {
    if (type == Type::kInt8) return quantized_size(out, in);
    return panels_of(out) *
           (type == Type::kFloat32 ? panel_size<1>(in) * sizeof(float) : panel_size<2>(in) * sizeof(uint16_t));
}

Weights::Weights(const void* matrix, int out, int in, Type type) {
    std::shared_ptr<void> memory = allocate(packed_size(type, out, in));
    packed_ = Packed{memory.get(), out, in, type};
    Work work{matrix, memory.get(), out, in, type, false};
    parallel(panels_of(out), 1, Work::run, &work);
    memory_ = std::move(memory);
}

Weights::Weights(std::shared_ptr<const void> packed, int out, int in, Type type)
    : memory_(std::move(packed)), packed_{memory_.get(), out, in, type} {}

Weights::Weights(const int8_t* numbers, const float* scales, int out, int in) {
    std::shared_ptr<void> memory = allocate(quantized_size(out, in));
    packed_ = Packed{memory.get(), out, in, Type::kInt8};
    pack_quantized(numbers, scales, out, in, memory.get());
    memory_ = std::move(memory);
}

void Weights::unpack(int8_t* numbers, float* scales) const {
    unpack_quantized(packed_.data, packed_.out, packed_.in, numbers, scales);
}

void Weights::unpack(void* matrix) const {
    Work work{packed_.data, matrix, packed_.out, packed_.in, packed_.type, true};
    parallel(panels_of(packed_.out), 1, Work::run, &work);
}

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
