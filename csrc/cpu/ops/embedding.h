// embedding: both tables' rows, the token-dropout scale, the layer norm.
#pragma once

#include "../types.h"

namespace esm {
namespace cpu {

// tokens, positions: (rows,) within the tables; tables, gains and biases of `type`; ln_weight null for no layer norm.
struct EmbeddingCall {
    const int64_t *tokens, *positions;
    const int32_t* cu_seqlens;
    int64_t rows, sequences;
    const void *token_table, *position_table, *ln_weight, *ln_bias;
    Type type;
    int width;
    bool token_dropout;  // the three members below, and cu_seqlens, are read only then
    int64_t mask;        // the token that has no embedding
    float kept;          // share of the tokens that were no <mask> in training
    const float* scale;  // (sequences,), or null for kept / (1 - share of <mask>)
    float eps;
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

// What each row's token embedding is multiplied by: the token-dropout scale of its sequence.
const float* scale_of_rows(const EmbeddingCall& call) {
    float* scales = buffer<float>(Embedding::scales, call.rows, 1);
    for (int64_t s = 0; s < call.sequences; ++s) {
        const int64_t first = call.cu_seqlens[s], last = call.cu_seqlens[s + 1];
        int64_t masked = 0;
        for (int64_t row = first; row < last; ++row) masked += call.tokens[row] == call.mask;
        const float seen = 1.0f - float(masked) / float(last - first);
        for (int64_t row = first; row < last; ++row) scales[row] = call.scale ? call.scale[s] : call.kept / seen;
    }
    return scales;
}

template <class W>
void embedding_of(const EmbeddingCall& call) {
    const int width = call.width;
    float* gain = buffer<float>(Embedding::vectors, 2, size_t(width) + kPanel);
    float* bias = gain;
    if (call.ln_weight) {
        bias = widen<typename FormatOf<W>::Plain>(call.ln_weight, width, gain);
        widen<typename FormatOf<W>::Plain>(call.ln_bias, width, bias);
    }
    const float* scales = call.token_dropout ? scale_of_rows(call) : nullptr;
    each(size_t(call.rows), kTurn, [&](size_t begin, size_t end) {
        float* normed = buffer<float>(Embedding::own_row, 1, leading<float>(width));
        for (size_t row = begin; row < end; ++row) {
            const W* token = static_cast<const W*>(call.token_table) + call.tokens[row] * width;
            const W* position = static_cast<const W*>(call.position_table) + call.positions[row] * width;
            float* to = call.result + row * width;
            const bool hidden = scales && call.tokens[row] == call.mask;
            const F scale = splat(scales ? scales[row] : 1.0f);
            each_part(position, width, [&](int i, F x, int left) {
                if (!hidden) x += scale * (left >= N ? load(token + i) : load_part(token + i, left));
                store_first(to + i, x, left);
            });
            if (!call.ln_weight) continue;
            layer_norm(to, width, gain, bias, call.eps, normed);
            std::memcpy(to, normed, size_t(width) * sizeof *to);
        }
    });
}

}  // namespace
}  // namespace cpu
}  // namespace esm
#endif
