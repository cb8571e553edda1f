// A matrix prepacked for the GEMM (see Prepacked in types.h), in memory of its own or of a mapped file.
#pragma once

#include <memory>

#include "layout.h"

namespace esm {
namespace cpu {

// Raised whenever prepacked bytes change their meaning: files hold it.
constexpr int kLayout = 1;
// What prepacked bytes are aligned to.
constexpr size_t kAlignment = 64;

// Bytes of a prepacked (out, in) matrix, both at most kMostColumns.
size_t prepacked_size(Type type, int out, int in);

class Weights {
  public:
    // Packs a matrix from the parts that its layout names. Throws std::bad_alloc.
    Weights(Type type, const void* const* parts, int out, int in);
    // A matrix whose rows are packed in turns, as many at once as do not take much beside what is kept:
    // rows(first, last) -> the parts of these rows, which need to be there until the next call.
    template <class Rows>
    static std::unique_ptr<Weights> in_turns(Type type, int out, int in, const Rows& rows) {
        std::unique_ptr<Weights> weights(new Weights(type, out, in));
        const int panels = int(kAtOnce / ((size_t(in) + 1) * kPanel)), step = (panels < 1 ? 1 : panels) * kPanel;
        for (int first = 0; first < out; first += step) {
            const int last = out - first < step ? out : first + step;
            weights->pack(rows(first, last).data(), first, last);
        }
        return weights;
    }
    // Views prepacked_size(type, out, in) bytes that were packed before, aligned to kAlignment; they live as long as the
    // pointer does.
    Weights(std::shared_ptr<const void> prepacked, int out, int in, Type type);

    const Prepacked& prepacked() const { return prepacked_; }
    size_t bytes() const { return prepacked_size(prepacked_.type, prepacked_.out, prepacked_.in); }
    // Writes the parts back.
    void unpack(void* const* parts) const;

  private:
    static constexpr size_t kAtOnce = size_t(1) << 20;  // elements

    Weights(Type type, int out, int in);  // not packed yet
    // Rows from `first`, with which a panel begins, to `last`, with which one or the matrix ends.
    void pack(const void* const* parts, int first, int last);

    std::shared_ptr<const void> memory_;
    Prepacked prepacked_;
};

// So many bytes in memory.
struct Bytes {
    const void* data;
    size_t size;
};
// A checksum of all bytes of each, at the speed of memory, on all threads. One changed word always changes it, other
// changes but for one in 2^64.
std::vector<uint64_t> checksums(const std::vector<Bytes>& all);

}  // namespace cpu
}  // namespace esm
