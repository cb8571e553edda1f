// The two halves of a transformer layer, each one fused.
#pragma once

#include "attention.h"
#include "work.h"

namespace esm {
namespace cpu {
namespace {

template <class W>
void gelu_ffn_of(const FfnCall& call) {
    typedef typename ActivationOf<W>::type A;
    const int width = call.fc1.in, hidden = call.fc1.out;
    float* gain = static_cast<float*>(scratch(0, (3 * size_t(width) + size_t(hidden) + 4 * kPanel) * sizeof(float)));
    float* ln_bias = widen(call.ln_weight, call.fc1.type, width, gain);
    float* bias1 = widen(call.ln_bias, call.fc1.type, width, ln_bias);
    float* bias2 = widen(call.fc1_bias, call.fc1.type, hidden, bias1);
    widen(call.fc2_bias, call.fc1.type, width, bias2);

    const Norm norm{call.x, width, gain, ln_bias, call.eps};
    const W *fc1 = weights_of<W>(call.fc1), *fc2 = weights_of<W>(call.fc2);
    const size_t ld = leading<A>(width), ld_middle = leading<A>(hidden), ld_x = size_t(width);
    const int panels1 = panels_of(hidden), panels2 = panels_of(width);

    if (few(call.rows)) {
        A* normed = buffer<A>(1, call.rows, ld);
        A* middle = buffer<A>(2, call.rows, ld_middle);
        norm(0, call.rows, normed, ld);
        each_panel(panels1, [&](int first, int last) {
            gemm(normed, ld, call.rows, fc1, width, first, last, Gelu<A>{middle, ld_middle, bias1});
        });
        each_panel(panels2, [&](int first, int last) {
            gemm(middle, ld_middle, call.rows, fc2, hidden, first, last,
                 AddTo{call.x, call.result, ld_x, bias2, width});
        });
        return;
    }
    each_block(call.rows, [&](int64_t first, int64_t last) {
        const int64_t rows = last - first;
        A* normed = buffer<A>(4, rows, ld);
        A* middle = buffer<A>(5, rows, ld_middle);
        norm(first, last, normed, ld);
        gemm(normed, ld, rows, fc1, width, 0, panels1, Gelu<A>{middle, ld_middle, bias1});
        gemm(middle, ld_middle, rows, fc2, hidden, 0, panels2,
             AddTo{call.x + first * width, call.result + first * width, ld_x, bias2, width});
    });
}

template <class W>
void pre_ln_attention_of(const AttentionCall& call) {
    typedef typename ActivationOf<W>::type A;
    const int width = call.q.in, dim = width / call.heads, panels = panels_of(width);
    const size_t ld = leading<A>(width), ld_x = size_t(width);
    const int64_t n = call.rows;
    const Packed* projections[3] = {&call.q, &call.k, &call.v};
    const void* biases[3] = {call.q_bias, call.k_bias, call.v_bias};

    float* gain = static_cast<float*>(scratch(0, 6 * (size_t(width) + kPanel) * sizeof(float)));
    float* ln_bias = widen(call.ln_weight, call.q.type, width, gain);
    float* next = widen(call.ln_bias, call.q.type, width, ln_bias);
    const float* wide[3];
    for (int i = 0; i < 3; ++i) wide[i] = next, next = widen(biases[i], call.q.type, width, next);
    const float* out_bias = next;
    widen(call.out_bias, call.q.type, width, next);

    const Norm norm{call.x, width, gain, ln_bias, call.eps};
    A* qkv = buffer<A>(1, 3 * n, ld);
    const auto project = [&](int which, const A* normed, int64_t first, int64_t rows, int from, int to) {
        A* out = qkv + (which * n + first) * ld;
        gemm(normed, ld, rows, weights_of<W>(*projections[which]), width, from, to,
             Project<A>{out, ld, wide[which], width});
    };
    if (few(n)) {
        A* normed = buffer<A>(2, n, ld);
        norm(0, n, normed, ld);
        each_panel(3 * panels, [&](int first, int last) {
            for (int i = first; i < last; ++i) project(i / panels, normed, 0, n, i % panels, i % panels + 1);
        });
    } else {
        each_block(n, [&](int64_t first, int64_t last) {
            A* normed = buffer<A>(4, last - first, ld);
            norm(first, last, normed, ld);
            for (int i = 0; i < 3; ++i) project(i, normed, first, last - first, 0, panels);
        });
    }

    // A head's result takes the place of its queries.
    each(size_t(call.sequences) * call.heads, 1, [&](size_t begin, size_t end) {
        for (size_t i = begin; i < end; ++i) {
            const int64_t sequence = int64_t(i) / call.heads, column = int64_t(i) % call.heads * dim;
            const int64_t first = call.cu_seqlens[sequence], length = call.cu_seqlens[sequence + 1] - first;
            if (!length) continue;
            A *q = qkv + first * ld + column, *k = q + n * ld, *v = k + n * ld;
            if (call.rotary) {
                const float *cosines = call.rotary + first * dim, *sines = cosines + n * dim;
                rotate(q, ld, int(length), dim, cosines, sines);
                rotate(k, ld, int(length), dim, cosines, sines);
            }
            if (call.q_result) {
                copy_head(q, ld, length, dim, static_cast<W*>(call.q_result) + first * width + column, ld_x);
                copy_head(k, ld, length, dim, static_cast<W*>(call.k_result) + first * width + column, ld_x);
            }
            attend(q, k, v, q, ld, int(length), dim);
        }
    });

    const W* out = weights_of<W>(call.out);
    const auto finish = [&](int64_t first, int64_t last, int from, int to) {
        gemm(qkv + first * ld, ld, last - first, out, width, from, to,
             AddTo{call.x + first * width, call.result + first * width, ld_x, out_bias, width});
    };
    if (few(n))
        each_panel(panels, [&](int from, int to) { finish(0, n, from, to); });
    else
        each_block(n, [&](int64_t first, int64_t last) { finish(first, last, 0, panels); });
}

}  // namespace
}  // namespace cpu
}  // namespace esm
