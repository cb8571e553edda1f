// Poolings: ops that make a vector of each sequence's rows, or several. What they share.
#pragma once

#include "types.h"

// X(op, what it takes for each row, its elements, how many vectors it makes of a sequence). The op's file in ops/ has
// its work on one Strip, <op>_strip; the op itself, and a stack that pools its stream, run it on all.
#define ESM_POOLINGS(X)              \
    X(pool, weight, float32, 1)      \
    X(pool_max, counted, boolean, 1) \
    X(pool_moments, weight, float32, 2)

namespace esm {
namespace cpu {

enum class Pooling : int {
#define X(op, rows, element, vectors) op,
    ESM_POOLINGS(X)
#undef X
};

// x: (rows, width); rows: (rows,) elements of the op; result: (sequences, vectors, width).
struct PoolingCall {
    const float* x;
    const void* rows;
    const int32_t* cu_seqlens;
    int64_t sequences;
    int width;
    float* result;
};

}  // namespace cpu
}  // namespace esm

#if defined(ESM_LEVEL)
#include "rows.h"
#include "work.h"

namespace esm {
namespace cpu {
namespace {

// Some columns of one sequence, so that a single sequence has work for several threads. kColumns are whole vectors.
constexpr int kColumns = 256;
struct Strip {
    size_t sequence;
    int64_t first, last;  // rows
    int column, columns;
};

template <class Use>
void each_strip(const PoolingCall& call, const Use& use) {
    const size_t strips = (size_t(call.width) + kColumns - 1) / kColumns;
    each(size_t(call.sequences) * strips, 1, [&](size_t begin, size_t end) {
        for (size_t i = begin; i < end; ++i) {
            const size_t sequence = i / strips;
            const int column = int(i % strips) * kColumns, left = call.width - column;
            use(Strip{sequence, call.cu_seqlens[sequence], call.cu_seqlens[sequence + 1], column,
                      left < kColumns ? left : kColumns});
        }
    });
}

inline const float* at(const PoolingCall& call, const Strip& strip, int64_t row) {
    return call.x + row * call.width + strip.column;
}
// Vector number `which` of the `vectors` of a sequence.
inline void keep(const PoolingCall& call, const Strip& strip, int vectors, int which, const float* made) {
    float* to = call.result + (strip.sequence * size_t(vectors) + size_t(which)) * size_t(call.width) + strip.column;
    std::memcpy(to, made, size_t(strip.columns) * sizeof *to);
}

// Sums of a few rows are summed again: one chain of 1,000 would lose a digit.
constexpr int kSummedRows = 32;

// total[j] = the sum of weight * term(j, x) over the rows that have a weight; `total` has kColumns.
template <class Term>
void weighted_sum(const PoolingCall& call, const Strip& strip, float* total, const Term& term) {
    const float* weights = static_cast<const float*>(call.rows);
    alignas(64) float part[kColumns] = {};
    std::memset(total, 0, sizeof part);
    for (int64_t row = strip.first; row < strip.last;) {
        const int64_t stop = strip.last - row < kSummedRows ? strip.last : row + kSummedRows;
        for (; row < stop; ++row) {
            if (weights[row] == 0) continue;
            const F weight = splat(weights[row]);
            each_part(at(call, strip, row), strip.columns,
                      [&](int j, F x, int) { store(part + j, fma(weight, term(j, x), load(part + j))); });
        }
        for (int j = 0; j < kColumns; j += N) store(total + j, load(total + j) + load(part + j));
        std::memset(part, 0, sizeof part);
    }
}

}  // namespace
}  // namespace cpu
}  // namespace esm
#endif
