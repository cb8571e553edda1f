// pool_max: of each sequence's rows that count, the largest value of every column.
#pragma once

#include "../pooling.h"

namespace esm {
namespace cpu {

struct PoolMaxCall : PoolingCall {};

}  // namespace cpu
}  // namespace esm

#if defined(ESM_LEVEL)

namespace esm {
namespace cpu {
namespace {

void pool_max_strip(const PoolingCall& call, const Strip& strip) {
    const bool* counted = static_cast<const bool*>(call.rows);
    alignas(64) float best[kColumns] = {};
    int64_t row = strip.first;
    while (row < strip.last && !counted[row]) ++row;
    if (row < strip.last) std::memcpy(best, at(call, strip, row), size_t(strip.columns) * sizeof *best);
    for (++row; row < strip.last; ++row)
        if (counted[row])
            each_part(at(call, strip, row), strip.columns, [&](int j, F x, int) {
                const F so_far = load(best + j);
                store(best + j, select((x > so_far) | (x != x), x, so_far));  // a NaN, once met, is not exceeded
            });
    keep(call, strip, 1, 0, best);
}

template <class W>
void pool_max_of(const PoolMaxCall& call) {
    each_strip(call, [&](const Strip& strip) { pool_max_strip(call, strip); });
}

}  // namespace
}  // namespace cpu
}  // namespace esm
#endif
