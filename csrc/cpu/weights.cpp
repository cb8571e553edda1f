#include "weights.h"

#include <cstdlib>
#include <cstring>
#include <new>

#include "../checksum.h"
#include "host.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#define ESM_FILES
#include "formats.def"
#undef ESM_FILES

namespace esm {
namespace cpu {
namespace {

constexpr size_t kHugePage = size_t(2) << 20;

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

// body(panel, where it is) for every panel of a matrix, on all threads.
template <class Byte, class Body>
void each_panel(const Prepacked& matrix, Byte* data, const Body& body) {
    struct Work {
        const Body& body;
        Byte* data;
        size_t size;

        static void run(void* context, size_t first, size_t last) {
            const Work& work = *static_cast<const Work*>(context);
            for (size_t panel = first; panel < last; ++panel) work.body(int(panel), work.data + panel * work.size);
        }
    } work{body, data, layout_of(matrix.type).panel_size(matrix.in)};
    parallel(size_t(panels_of(matrix.out)), 1, Work::run, &work);
}

}  // namespace

const Layout& layout_of(Type type) {
    static constexpr Layout kLayouts[] = {
#define X(name, Element)                                                                    \
    {LayoutOf<Type::name>::plain, LayoutOf<Type::name>::parts, LayoutOf<Type::name>::panel_size, \
     LayoutOf<Type::name>::pack, LayoutOf<Type::name>::unpack},
        ESM_FORMATS(X)
#undef X
    };
    return kLayouts[int(type)];
}

size_t prepacked_size(Type type, int out, int in) {
    return size_t(panels_of(out)) * layout_of(type).panel_size(in);
}

Weights::Weights(Type type, const void* const* parts, int out, int in) : Weights(type, out, in) { pack(parts, 0, out); }

Weights::Weights(Type type, int out, int in)
    : memory_(allocate(prepacked_size(type, out, in))), prepacked_{memory_.get(), out, in, type} {}

void Weights::pack(const void* const* parts, int first, int last) {
    const int in = prepacked_.in, rows = last - first;
    const Layout& layout = layout_of(prepacked_.type);
    char* begin = static_cast<char*>(const_cast<void*>(prepacked_.data)) + size_t(first / kPanel) * layout.panel_size(in);
    each_panel(Prepacked{begin, rows, in, prepacked_.type}, begin,
               [&](int panel, char* to) { layout.pack(parts, rows, in, panel, to); });
}

Weights::Weights(std::shared_ptr<const void> prepacked, int out, int in, Type type)
    : memory_(std::move(prepacked)), prepacked_{memory_.get(), out, in, type} {}

void Weights::unpack(void* const* parts) const {
    const Prepacked& from = prepacked_;
    each_panel(from, static_cast<const char*>(from.data), [&](int panel, const char* data) {
        layout_of(from.type).unpack(data, from.out, from.in, panel, parts);
    });
}

namespace {

constexpr size_t kStretch = size_t(1) << 18;  // bytes that one thread takes at once

}  // namespace

std::vector<uint64_t> checksums(const std::vector<Bytes>& all) {
    struct Stretch {
        const char* data;
        size_t size;
        uint64_t sum;
    };
    std::vector<Stretch> stretches;
    for (const Bytes& bytes : all)
        for (size_t at = 0; at < bytes.size; at += kStretch) {
            const size_t left = bytes.size - at;
            stretches.push_back({static_cast<const char*>(bytes.data) + at, left < kStretch ? left : kStretch, 0});
        }
    const auto run = [](void* context, size_t first, size_t last) {
        for (Stretch* s = static_cast<Stretch*>(context) + first; first < last; ++first, ++s)
            s->sum = checksum(s->data, s->size);
    };
    parallel(stretches.size(), 1, run, stretches.data());
    std::vector<uint64_t> sums;
    const Stretch* next = stretches.data();
    for (const Bytes& bytes : all) {
        uint64_t whole = bytes.size;
        for (size_t at = 0; at < bytes.size; at += kStretch, ++next) whole = (whole ^ next->sum) * kChecksumFactor;
        sums.push_back(whole);
    }
    return sums;
}

}  // namespace cpu
}  // namespace esm
