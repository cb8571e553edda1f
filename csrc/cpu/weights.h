// A matrix packed for the GEMM (see Packed in table.h), in memory of its own.
#pragma once

#include "table.h"

namespace esm {
namespace cpu {

class Weights {
  public:
    // Packs a row-major (out, in) matrix of `type`. Throws std::bad_alloc.
    Weights(const void* matrix, int out, int in, Type type);
    Weights(const Weights&) = delete;
    Weights& operator=(const Weights&) = delete;
    ~Weights();

    const Packed& packed() const { return packed_; }
    size_t bytes() const { return bytes_; }

  private:
    Packed packed_;
    size_t bytes_;
};

// A number that changes when the values do, very likely: it looks at some of them only.
uint64_t fingerprint(const void* data, size_t bytes);

}  // namespace cpu
}  // namespace esm
