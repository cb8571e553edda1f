// masked_softmax: attention maps, for those who want them.
#pragma once

#include "../types.h"

namespace esm {
namespace cpu {

// scores: (batch, heads, size, size) of `type`; lengths: (batch,), read as lying in [0, size]; result as scores.
struct MaskedSoftmaxCall {
    const void* scores;
    Type type;
    const int64_t* lengths;
    int64_t batch, heads, size;
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

template <class W>
void masked_softmax_of(const MaskedSoftmaxCall& call) {
    const int64_t size = call.size;
    each(size_t(call.batch * call.heads * size), kTurn, [&](size_t begin, size_t end) {
        float* weights = buffer<float>(MaskedSoftmax::own_row, 1, leading<float>(size));
        for (size_t i = begin; i < end; ++i) {
            const int64_t said = call.lengths[int64_t(i) / (call.heads * size)];
            const int length = int(said < 0 ? 0 : said > size ? size : said);
            float* to = call.result + i * size_t(size);
            std::memset(to, 0, size_t(size) * sizeof *to);
            if (int64_t(i) % size >= length) continue;
            copy_row(static_cast<const W*>(call.scores) + i * size_t(size), length, weights);
            const float inverse = 1.0f / softmax_weights(weights, length, 1.0f, weights);
            each_part(weights, length, [&](int j, F x, int left) { store_first(to + j, x * inverse, left); });
        }
    });
}

}  // namespace
}  // namespace cpu
}  // namespace esm
#endif
