// Matrices of 8 bits: the panels of Type::kInt8 (see Packed in table.h).
#pragma once

#include "table.h"

namespace esm {
namespace cpu {

// Scales of one output.
constexpr int groups_of(int in) { return (in + kGroup - 1) / kGroup; }

// Bytes of a packed (out, in) matrix.
size_t quantized_size(int out, int in);
// numbers: (out, in) from -127 to 127; scales: (out, groups).
void pack_quantized(const int8_t* numbers, const float* scales, int out, int in, void* packed);
void unpack_quantized(const void* packed, int out, int in, int8_t* numbers, float* scales);

}  // namespace cpu
}  // namespace esm
