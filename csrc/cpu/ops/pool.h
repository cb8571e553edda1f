// pool: a weighted sum of each sequence's rows.
#pragma once

#include "../pooling.h"

namespace esm {
namespace cpu {

struct PoolCall : PoolingCall {};

}  // namespace cpu
}  // namespace esm

#if defined(ESM_LEVEL)

namespace esm {
namespace cpu {
namespace {

void pool_strip(const PoolingCall& call, const Strip& strip) {
    alignas(64) float total[kColumns];
    weighted_sum(call, strip, total, [](int, F x) { return x; });
    keep(call, strip, 1, 0, total);
}

template <class W>
void pool_of(const PoolCall& call) {
    each_strip(call, [&](const Strip& strip) { pool_strip(call, strip); });
}

}  // namespace
}  // namespace cpu
}  // namespace esm
#endif
