// Weights and rows as the GEMM sees them, whatever their format: panels of kPanel outputs (see Prepacked in types.h).
#pragma once

#include "types.h"
#include "vec.h"

namespace esm {
namespace cpu {
namespace {

// Rows of a tile: kRows x 2 vectors of sums fill most of the registers, with room for two vectors of weights.
constexpr int kRows = N == 16 ? 12 : 6;

// Rows of a tile for activations A: as above, but for amx.h.
template <class A>
constexpr int kTileRows = kRows;

// What a format of weights says of itself; a file of formats/ has the one of its W, with its panel_size, its tile and,
// where the GEMM does not read the activations as they are, what makes its operand of them.
//
//     typedef ... Activation;  // of the rows between the steps of a layer
//     typedef ... Operand;     // of the rows that the GEMM reads
//     typedef ... Plain;       // of the vectors and results beside the weights
//     static constexpr int kTogether = ...;  // inputs of an output that lie side by side in a panel
template <class W>
struct FormatOf;

// Whether the GEMM reads operands B that have to be made of the activations, by quantize_row(activations, n, B*).
template <class B>
constexpr bool kQuantized = false;

ESM_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
ESM_INLINE int panels_of(int64_t columns) { return int((columns + kPanel - 1) / kPanel); }

// Elements from one row to the next for rows of at least n: an odd number of cache lines, lest rows share cache sets.
template <class T>
ESM_INLINE size_t leading(int64_t n) {
    const size_t in_line = 64 / sizeof(T);
    return (size_t(round_up(n, kPanel)) / in_line | 1) * in_line;
}

}  // namespace
}  // namespace cpu
}  // namespace esm
