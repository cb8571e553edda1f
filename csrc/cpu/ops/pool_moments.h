// pool_moments: the weighted mean and variance of each sequence's rows, column by column: a pass for the mean, one for what
// its rounding lost, one for the variance.
#pragma once

#include "../pooling.h"

namespace esm {
namespace cpu {

struct PoolMomentsCall : PoolingCall {};

}  // namespace cpu
}  // namespace esm

#if defined(ESM_LEVEL)

namespace esm {
namespace cpu {
namespace {

void pool_moments_strip(const PoolingCall& call, const Strip& strip) {
    F weights = {};
    each_part(static_cast<const float*>(call.rows) + strip.first, int(strip.last - strip.first),
              [&](int, F weight, int) { weights += weight; });
    const float whole = sum(weights), total = whole == 0 ? 1 : whole;
    alignas(64) float mean[kColumns], rest[kColumns], variance[kColumns];
    const auto divide = [&](float* sums) {
        for (int j = 0; j < kColumns; j += N) store(sums + j, load(sums + j) / total);
    };
    weighted_sum(call, strip, mean, [](int, F x) { return x; });
    divide(mean);
    // What rounding took from a mean that is large beside the deviations from it.
    weighted_sum(call, strip, rest, [&](int j, F x) { return x - load(mean + j); });
    divide(rest);
    weighted_sum(call, strip, variance, [&](int j, F x) {
        const F apart = x - load(mean + j) - load(rest + j);
        return apart * apart;
    });
    divide(variance);
    for (int j = 0; j < kColumns; j += N) store(mean + j, load(mean + j) + load(rest + j));
    keep(call, strip, 2, 0, mean);
    keep(call, strip, 2, 1, variance);
}

template <class W>
void pool_moments_of(const PoolMomentsCall& call) {
    each_strip(call, [&](const Strip& strip) { pool_moments_strip(call, strip); });
}

}  // namespace
}  // namespace cpu
}  // namespace esm
#endif
