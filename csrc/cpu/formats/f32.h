// Weights of fp32.
#pragma once

#if !defined(ESM_LEVEL)
#include "../layout.h"

namespace esm {
namespace cpu {

template <>
struct LayoutOf<Type::float32> : PlainLayout<uint32_t, 1, 1, Element::float32> {};

}  // namespace cpu
}  // namespace esm

#else
#include "../panels.h"

namespace esm {
namespace cpu {
namespace {

template <>
struct FormatOf<float> {
    typedef float Activation, Operand, Plain;
    static constexpr int kTogether = 1;
};

// Elements of one panel of weights.
ESM_INLINE size_t panel_size(const float*, int64_t in) { return size_t(in) * kPanel; }

// fp32 products are summed in chunks: 5,120 in one chain would lose a digit to blocked sums such as MKL's.
constexpr int kChunk = 512;

// c (R x 32, rows ldc apart) = a (R x in, rows lda apart) times one panel. All loops over R unroll into registers.
template <int R>
ESM_INLINE void tile(const float* a, size_t lda, const float* panel, int in, float* c, size_t ldc) {
    for (int part = 0; part < kPanel; part += 2 * N) {
        const float* b = panel + part;
        for (int k = 0; k < in;) {
            F sums[R][2] = {};
            const bool begun = k > 0;
            for (const int end = in - k < kChunk ? in : k + kChunk; k < end; ++k, b += kPanel) {
                const F b0 = load(b), b1 = load(b + N);
#pragma GCC unroll 12
                for (int r = 0; r < R; ++r) {
                    const F x = splat(a[r * lda + k]);
                    sums[r][0] = fma(x, b0, sums[r][0]);
                    sums[r][1] = fma(x, b1, sums[r][1]);
                }
            }
#pragma GCC unroll 12
            for (int r = 0; r < R; ++r) {
                float* to = c + r * ldc + part;
                store(to, begun ? load(to) + sums[r][0] : sums[r][0]);
                store(to + N, begun ? load(to + N) + sums[r][1] : sums[r][1]);
            }
        }
    }
}

}  // namespace
}  // namespace cpu
}  // namespace esm
#endif
