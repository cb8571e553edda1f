// Weights of bf16. With a bf16 dot product the activations are bf16 too; without, products are in fp32, and rounding the
// activations would only lose digits.
#pragma once

#if !defined(ESM_LEVEL)
#include "../layout.h"

namespace esm {
namespace cpu {

template <>
struct LayoutOf<Type::bfloat16> : PlainLayout<uint16_t, 2, kInputs, Element::bfloat16> {};

}  // namespace cpu
}  // namespace esm

#else
#include "../panels.h"

namespace esm {
namespace cpu {
namespace {

template <>
struct FormatOf<bf16> {
#if defined(__AVX512BF16__)
    typedef bf16 Activation;
#else
    typedef float Activation;
#endif
    typedef Activation Operand;
    typedef bf16 Plain;
    static constexpr int kTogether = 2;
};

// Elements of one panel of weights.
ESM_INLINE size_t panel_size(const bf16*, int64_t in) { return size_t(round_up(in, kInputs)) * kPanel; }

// bf16 weights widened on the way: of a pair's 32 bits, the low half is the even input, the high half the odd one.
template <int R>
ESM_INLINE void tile(const float* a, size_t lda, const bf16* panel, int in, float* c, size_t ldc) {
    for (int part = 0; part < kPanel; part += 2 * N) {
        F sums[R][2] = {};
        const bf16* b = panel + 2 * part;
        for (int k = 0; k < in; k += 2, b += 2 * kPanel) {
#pragma GCC unroll 2
            for (int odd = 0; odd < 2; ++odd) {
                const U w0 = load_as<U>(b), w1 = load_as<U>(b + 2 * N);
                const F b0 = (F)(odd ? w0 & 0xffff0000u : w0 << 16), b1 = (F)(odd ? w1 & 0xffff0000u : w1 << 16);
#pragma GCC unroll 12
                for (int r = 0; r < R; ++r) {
                    const F x = splat(a[r * lda + k + odd]);
                    sums[r][0] = fma(x, b0, sums[r][0]);
                    sums[r][1] = fma(x, b1, sums[r][1]);
                }
            }
        }
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) store(c + r * ldc + part, sums[r][0]), store(c + r * ldc + part + N, sums[r][1]);
    }
}

#if defined(__AVX512BF16__)
ESM_INLINE __m512 dot(__m512 sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

template <int R>
ESM_INLINE void tile(const bf16* a, size_t lda, const bf16* panel, int in, float* c, size_t ldc) {
    __m512 sums[R][2];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    const bf16* b = panel;
    for (int k = 0; k < in; k += 2, b += 2 * kPanel) {
        const __m512i b0 = _mm512_loadu_si512(b), b1 = _mm512_loadu_si512(b + 2 * N);
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
            const __m512i x = _mm512_set1_epi32(load_as<int32_t>(a + r * lda + k));
            sums[r][0] = dot(sums[r][0], x, b0);
            sums[r][1] = dot(sums[r][1], x, b1);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
        _mm512_storeu_ps(c + r * ldc, sums[r][0]);
        _mm512_storeu_ps(c + r * ldc + N, sums[r][1]);
    }
}
#endif

}  // namespace
}  // namespace cpu
}  // namespace esm
#endif
