// Row by row: layer norm, softmax, and the small vectors of a call in fp32.
#pragma once

#include "formats/int8.h"

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

// Layer norm; the row's padding up to whole panels is set to 0.
template <class A>
void layer_norm(const float* x, int width, const float* gain, const float* bias, float eps, A* out) {
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

void layer_norm(const float* x, int width, const float* gain, const float* bias, float eps, biased8* out) {
    float* row = static_cast<float*>(scratch(7, size_t(round_up(width, kPanel)) * sizeof(float)));
    layer_norm(x, width, gain, bias, eps, row);
    quantize_row(row, width, out);
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

// `count` values of the vectors beside weights of `type` in fp32, then zeros to whole panels; returns where the next vector may begin.
float* widen(const void* from, Type type, int count, float* to) {
    const int padded = int(round_up(count, kPanel)), whole = count / N * N;
    std::memset(to + whole, 0, size_t(padded - whole) * sizeof(float));
    if (type == Type::kFloat32) {
        std::memcpy(to, from, size_t(count) * sizeof(float));
    } else {
        const bf16* values = static_cast<const bf16*>(from);
        for (int i = 0; i < whole; i += N) store(to + i, load(values + i));
        for (int i = whole; i < count; ++i) to[i] = widen(values[i]);
    }
    return to + padded;
}

}  // namespace
}  // namespace cpu
}  // namespace esm
