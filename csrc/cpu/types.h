// Types of tensors and weights, and how prepacked weights lie in memory. The kernels and the rest of the extension see
// this file both: see table.h for what must not stand in such a one.
#pragma once

#include <cstddef>
#include <cstdint>

#include "formats.def"

namespace esm {
namespace cpu {

// Of weights, and of the tensors that have no other than theirs. A new one has to be handled wherever one is looked at:
// there is no `default:` to run in its place.
enum class Type : int {
#define X(name, Element) name,
    ESM_FORMATS(X)
#undef X
};

// Of the elements of a tensor, whatever it holds.
enum class Element : int { float32, bfloat16, int8, int32, int64, boolean, other };

// A list of types, such as a kernel has (ops.def).
template <Type...>
struct Types {};
typedef Types<Type::float32, Type::bfloat16> PlainTypes;  // those of tensors

template <class, Type... types>
struct ListOf {
    typedef Types<types...> All;
};
typedef ListOf<void
#define X(name, Element) , Type::name
               ESM_FORMATS(X)
#undef X
               >::All AllTypes;

// A (out, in) matrix as the GEMM reads it: panels of 32 outputs, each holding for every pair of inputs 32 pairs
// (bf16, the inputs padded to a multiple of 32, so that a panel is made of whole AMX tiles), or for every input
// 32 floats. Rows and inputs beyond the matrix are zero. The same at every level.
constexpr int kPanel = 32;
constexpr int kInputs = 32;
// 8 bits: a panel is its groups of kGroup inputs, one after the other. A group holds 32 corrections (int32: -kZero times
// the sum of an output's numbers, see int8.h), 32 scales (float), and for every 4 inputs 32 quadruples of int8; the
// last group's inputs are padded with zeros to a multiple of kInputs8, so that it too is made of whole AMX tiles.
constexpr int kGroup = 256;
constexpr int kInputs8 = 64;
constexpr int kZero = 128;
// Of a row at most, so that 32 bits hold what kernels make of it.
constexpr int kMostColumns = 1 << 24;
constexpr int kMostHeadDim = 1024;
struct Prepacked {
    const void* data;
    int out, in;
    Type type;
};

}  // namespace cpu
}  // namespace esm
