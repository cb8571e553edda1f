// A matrix packed for the GEMM (see Packed in table.h), in memory of its own or of a mapped file.
#pragma once

#include <memory>

#include "table.h"

namespace esm {
namespace cpu {

// Raised whenever packed bytes change their meaning: files hold it.
constexpr int kLayout = 1;
// What packed bytes are aligned to.
constexpr size_t kAlignment = 64;

// Bytes of a packed (out, in) matrix.
size_t packed_size(Type type, int out, int in);

class Weights {
  public:
    // Packs a row-major (out, in) matrix of `type`, float32 or bfloat16. Throws std::bad_alloc.
    Weights(const void* matrix, int out, int in, Type type);
    // Packs a matrix of 8 bits: numbers (out, in) from -127 to 127 and scales (out, groups); see quantized.h.
    Weights(const int8_t* numbers, const float* scales, int out, int in);
    // Views packed_size(type, out, in) bytes that were packed before, aligned to kAlignment; they live as long as the
    // pointer does.
    Weights(std::shared_ptr<const void> packed, int out, int in, Type type);

    const Packed& packed() const { return packed_; }
    size_t bytes() const { return packed_size(packed_.type, packed_.out, packed_.in); }
    // Writes the row-major matrix back, or the numbers and scales of one of 8 bits.
    void unpack(void* matrix) const;
    void unpack(int8_t* numbers, float* scales) const;

  private:
    std::shared_ptr<const void> memory_;
    Packed packed_;
};

// A number that changes when the values do, very likely: it looks at some of them only.
uint64_t fingerprint(const void* data, size_t bytes);

}  // namespace cpu
}  // namespace esm
