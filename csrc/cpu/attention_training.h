// What surrounds attention in a layer's first half, in training: LN and the projections before it, the projection and
// the residual after it, forward and backward. As in ffn_training.h, but that rows meet in attention in between.
#pragma once

#include "gradient_rows.h"

namespace esm {
namespace cpu {
namespace {

// A thread's own copy of rows of a tensor, as the GEMM reads them.
template <class A, class W>
const A* own_rows(const void* tensor, int width, int64_t first, int64_t last) {
    const size_t ld = leading<A>(width);
    A* rows = buffer<A>(kOwnRows, last - first, ld);
    for (int64_t row = first; row < last; ++row)
        copy_row(static_cast<const W*>(tensor) + row * width, width, rows + (row - first) * ld);
    return rows;
}

Vectors<5> vectors_of(const InputsCall& call) {
    const int width = call.width;
    return {call.type,
            {call.ln_weight, call.ln_bias, call.bias[0], call.bias[1], call.bias[2]},
            {width, width, width, width, width}};
}

template <class W>
void pack_inputs(const InputsCall& call, bool transposed, const W* (&packed)[3]) {
    const int width = call.width;
    const void* const(&plain)[3] = call.weight;
    pack_matrices<W, 3>({{plain[0], width, width}, {plain[1], width, width}, {plain[2], width, width}}, transposed,
                        packed);
}

template <class W>
void attention_inputs_of(const InputsCall& call) {
    typedef typename Format<W>::Activation A;
    const int width = call.width;
    const size_t ld = leading<A>(width);
    const Vectors<5> vectors = vectors_of(call);
    const Norm norm{call.x, width, vectors[0], vectors[1], call.eps};
    const W* packed[3];
    pack_inputs(call, false, packed);
    each_block(call.rows, [&](int64_t first, int64_t last) {
        A* normed = buffer<A>(kOwnRows, last - first, ld);
        norm(first, last, normed, ld);
        for (int i = 0; i < 3; ++i)
            gemm(normed, ld, last - first, packed[i], width, 0, panels_of(width),
                 Project<W>{static_cast<W*>(call.result[i]) + first * width, size_t(width), vectors[2 + i], width});
    });
}

template <class W>
void attention_inputs_backward_of(const InputsGradientCall& call) {
    typedef typename Format<W>::Activation A;
    const InputsCall& forward = call.forward;
    const int width = forward.width;
    const size_t ld = leading<A>(width), ld_sums = leading<float>(width);
    const Vectors<5> vectors = vectors_of(forward);
    const Norm norm{forward.x, width, vectors[0], vectors[1], forward.eps};
    const W* packed[3];
    pack_inputs(forward, true, packed);
    each_part_of_sums(forward.rows, vectors, call.dvectors, [&](int64_t first, int64_t last, float* const* sums) {
        float* dnormed = buffer<float>(kOwnGradient, kSummedTogether, ld_sums);
        std::memset(dnormed, 0, size_t(last - first) * ld_sums * sizeof *dnormed);
        for (int i = 0; i < 3; ++i) {
            const A* rows = own_rows<A, W>(forward.result[i], width, first, last);
            add_rows(rows, width, last - first, ld, sums[2 + i]);
            gemm(rows, ld, last - first, packed[i], width, 0, panels_of(width), Accumulate{dnormed, ld_sums});
        }
        NormGradient<W>{norm, static_cast<W*>(call.normed), call.beside, call.dx, sums[0], sums[1]}(
            first, last, dnormed, ld_sums);
    });
}

template <class W>
void attention_output_of(const OutputCall& call) {
    typedef typename Format<W>::Activation A;
    const int width = call.width;
    const Vectors<1> vectors(call.type, {call.bias}, {width});
    const W* packed[1];
    pack_matrices<W, 1>({{call.weight, width, width}}, false, packed);
    each_block(call.rows, [&](int64_t first, int64_t last) {
        const A* rows = own_rows<A, W>(call.mixed, width, first, last);
        gemm(rows, leading<A>(width), last - first, packed[0], width, 0, panels_of(width),
             AddTo{call.x + first * width, call.result + first * width, size_t(width), vectors[0], width});
    });
}

template <class W>
void attention_output_backward_of(const OutputGradientCall& call) {
    typedef typename Format<W>::Activation A;
    const OutputCall& forward = call.forward;
    const int width = forward.width;
    const size_t ld = leading<A>(width);
    const Vectors<1> vectors(forward.type, {forward.bias}, {width});
    const W* packed[1];
    pack_matrices<W, 1>({{forward.weight, width, width}}, true, packed);
    each_part_of_sums(forward.rows, vectors, call.dbias, [&](int64_t first, int64_t last, float* const* sums) {
        A* dresult = buffer<A>(kOwnRows, kSummedTogether, ld);
        take_gradient(call.dout, width, first, last, dresult, ld, static_cast<W*>(call.dresult), sums[0]);
        gemm(dresult, ld, last - first, packed[0], width, 0, panels_of(width),
             Store<W>{static_cast<W*>(call.dmixed) + first * width, width});
    });
}

}  // namespace
}  // namespace cpu
}  // namespace esm
