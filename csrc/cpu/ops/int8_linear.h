// int8_linear: rows times 8-bit weights, transposed. The GEMM alone, to be held against its definition.
#pragma once

#include "../types.h"

namespace esm {
namespace cpu {

// x: (rows, in); result: (rows, out).
struct Int8LinearCall {
    const float* x;
    int64_t rows;
    Prepacked weights;
    float* result;
};

}  // namespace cpu
}  // namespace esm

#if defined(ESM_LEVEL)
#include "../work.h"

namespace esm {
namespace cpu {
namespace {

template <class W>
void int8_linear_of(const Int8LinearCall& call) {
    const int in = call.weights.in, out = call.weights.out;
    const W* panels = weights_of<W>(call.weights);
    float* no_bias = buffer<float>(Int8Linear::bias, 1, leading<float>(out));
    std::memset(no_bias, 0, leading<float>(out) * sizeof(float));
    each_block(call.rows, [&](int64_t first, int64_t last) {
        const auto a = operand(panels, call.x + first * in, size_t(in), last - first, in, Int8Linear::own_operand);
        gemm(a.data, a.ld, last - first, panels, in, 0, panels_of(out),
             Project<float>{call.result + first * out, size_t(out), no_bias, out});
    });
}

}  // namespace
}  // namespace cpu
}  // namespace esm
#endif
