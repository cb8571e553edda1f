// pool: a weighted sum of each sequence's rows.
#pragma once

#include "../types.h"

namespace esm {
namespace cpu {

// x: (rows, width); weight: (rows,); result: (sequences, width).
struct PoolCall {
    const float *x, *weight;
    const int32_t* cu_seqlens;
    int64_t sequences;
    int width;
    float* result;
};

}  // namespace cpu
}  // namespace esm

#if defined(ESM_LEVEL)
#include "../rows.h"
#include "../work.h"

namespace esm {
namespace cpu {
namespace {

// Sums of a few rows are summed again: one chain of 1,000 would lose a digit. A thread takes some columns of one
// sequence, so that a single sequence has work for several.
constexpr int kSummedRows = 32, kColumns = 256;

template <class W>
void pool_of(const PoolCall& call) {
    const size_t strips = (size_t(call.width) + kColumns - 1) / kColumns;
    each(size_t(call.sequences) * strips, 1, [&](size_t begin, size_t end) {
        for (size_t i = begin; i < end; ++i) {
            const size_t sequence = i / strips;
            const int column = int(i % strips) * kColumns, left = call.width - column;
            const int columns = left < kColumns ? left : kColumns;
            alignas(64) float total[kColumns] = {}, part[kColumns] = {};
            const int64_t last = call.cu_seqlens[sequence + 1];
            for (int64_t row = call.cu_seqlens[sequence]; row < last;) {
                const int64_t stop = last - row < kSummedRows ? last : row + kSummedRows;
                for (; row < stop; ++row) {
                    if (call.weight[row] == 0) continue;
                    const F weight = splat(call.weight[row]);
                    each_part(call.x + row * call.width + column, columns,
                              [&](int j, F x, int) { store(part + j, fma(weight, x, load(part + j))); });
                }
                for (int j = 0; j < kColumns; j += N) store(total + j, load(total + j) + load(part + j));
                std::memset(part, 0, sizeof part);
            }
            std::memcpy(call.result + sequence * size_t(call.width) + column, total, size_t(columns) * sizeof(float));
        }
    });
}

}  // namespace
}  // namespace cpu
}  // namespace esm
#endif
