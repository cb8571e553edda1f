// Row by row: layer norm, softmax, the small vectors of a call in fp32, and from one type to another.
#pragma once

#include "gemm.h"
#include "workspace.h"

namespace esm {
namespace cpu {
namespace {

// A row's mean, and one over its standard deviation: in fp32, in two passes.
struct Statistics {
    float mean, scale;

    Statistics(const float* x, int width, float eps) {
        const int whole = width / N * N, rest = width - whole;
        F total = {};
        for (int i = 0; i < whole; i += N) total += load(x + i);
        if (rest) total += load_part(x + whole, rest);
        mean = sum(total) / float(width);
        F squares = {};
        for (int i = 0; i < whole; i += N) {
            const F d = load(x + i) - mean;
            squares = fma(d, d, squares);
        }
        if (rest) {
            const F d = load_part(x + whole, rest, mean) - mean;
            squares = fma(d, d, squares);
        }
        scale = 1.0f / __builtin_sqrtf(sum(squares) / float(width) + eps);
    }
};

template <class A>
void normed_row(const float* x, int width, const float* gain, const float* bias, float eps, A* out) {
    const int whole = width / N * N, rest = width - whole;
    const Statistics row(x, width, eps);
    for (int i = 0; i < whole; i += N)
        store(out + i, fma((load(x + i) - row.mean) * row.scale, load(gain + i), load(bias + i)));
    const int padded = int(round_up(width, kPanel));
    std::memset(out + whole, 0, size_t(padded - whole) * sizeof(A));
    if (rest) {
        const F normed = (load_part(x + whole, rest) - row.mean) * row.scale;
        store_part(out + whole, fma(normed, load(gain + whole), load(bias + whole)), rest);
    }
}

// Layer norm, as the GEMM reads it; the row's padding up to whole panels is set to 0.
template <class B>
void layer_norm(const float* x, int width, const float* gain, const float* bias, float eps, B* out) {
    if constexpr (kQuantized<B>) {
        float* row = buffer<float>(Any::normed, 1, size_t(round_up(width, kPanel)));
        layer_norm(x, width, gain, bias, eps, row);
        quantize_row(row, width, out);
    } else {
        normed_row(x, width, gain, bias, eps, out);
    }
}

// e^(scale (x - most)), as many digits as type A has.
template <class A>
struct SoftmaxWeight {
    F factor, shift;
    SoftmaxWeight(float scale, float most) : factor(splat(scale)), shift(splat(-most * scale)) {}
    ESM_INLINE F operator()(F x) const { return exp(fma(x, factor, shift)); }
};
#if defined(__AVX512BF16__)
template <>
struct SoftmaxWeight<bf16> {
    F factor, shift;
    SoftmaxWeight(float scale, float most) : factor(splat(scale * 1.44269504f)), shift(-most * factor) {}
    ESM_INLINE F operator()(F x) const { return exp2_for_bf16(fma(x, factor, shift)); }
};
#endif

// weights[i] = e^(scale (scores[i] - max)), with zeros up to a whole vector; returns their sum in fp32, and the log of
// the sum of e^(scale scores[i]) where it is wanted. The scores' own padding is overwritten.
template <class A>
float softmax_weights(float* scores, int length, float scale, A* weights, float* log_sum = nullptr) {
    const int padded = int(round_up(length, N));
    for (int i = length; i < padded; ++i) scores[i] = -__builtin_inff();
    F best = splat(-__builtin_inff());
    for (int i = 0; i < padded; i += N) best = max(best, load(scores + i));
    const float most = largest(best);
    const SoftmaxWeight<A> weight(scale, most);
    F total = {};
    for (int i = 0; i < padded; i += N) {
        const F e = weight(load(scores + i));
        total += e;
        store(weights + i, e);
    }
    if (log_sum) *log_sum = scale * most + __builtin_logf(sum(total));
    return sum(total);
}

// `count` values of P in fp32, then zeros to whole panels; returns where the next vector may begin.
template <class P>
float* widen(const void* from, int count, float* to) {
    const P* values = static_cast<const P*>(from);
    const int padded = int(round_up(count, kPanel)), whole = count / N * N;
    std::memset(to + whole, 0, size_t(padded - whole) * sizeof(float));
    for (int i = 0; i < whole; i += N) store(to + i, load(values + i));
    for (int i = whole; i < count; ++i) to[i] = widen(values[i]);
    return to + padded;
}

// use(i, values, left) for each vector of a row; left is how many of its elements count, N or more for all.
template <class T, class Use>
ESM_INLINE void each_part(const T* row, int width, const Use& use) {
    for (int i = 0; i < width; i += N)
        use(i, width - i >= N ? load(row + i) : load_part(row + i, width - i), width - i);
}

template <class T>
ESM_INLINE void store_first(T* to, F x, int left) {
    left >= N ? store(to, x) : store_part(to, x, left);
}

// From one type to another, with zeros up to whole panels.
template <class T, class A>
void copy_row(const T* from, int width, A* to) {
    each_part(from, width, [&](int i, F x, int left) { store_first(to + i, x, left); });
    std::memset(to + width, 0, size_t(round_up(width, kPanel) - width) * sizeof *to);
}

}  // namespace
}  // namespace cpu
}  // namespace esm
