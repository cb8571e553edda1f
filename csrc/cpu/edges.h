// What surrounds the layers: the embedding, the language-model head, attention maps for those who want them, pooling.
#pragma once

#include "rows.h"
#include "work.h"

namespace esm {
namespace cpu {
namespace {

constexpr size_t kTurn = 32;  // rows a thread takes at once, where a row is little work

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

// What each row's token embedding is multiplied by: the token-dropout scale of its sequence.
const float* scale_of_rows(const EmbeddingCall& call) {
    float* scales = static_cast<float*>(scratch(1, size_t(call.rows) * sizeof(float)));
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
    float* gain = static_cast<float*>(scratch(0, 2 * (size_t(width) + kPanel) * sizeof(float)));
    float* bias = gain;
    if (call.ln_weight) {
        bias = widen(call.ln_weight, call.type, width, gain);
        widen(call.ln_bias, call.type, width, bias);
    }
    const float* scales = call.token_dropout ? scale_of_rows(call) : nullptr;
    each(size_t(call.rows), kTurn, [&](size_t begin, size_t end) {
        float* normed = buffer<float>(4, 1, leading<float>(width));
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

// Cross-entropy of a row of logits in fp32, which is overwritten; and its gradient, where that is wanted.
float cross_entropy(float* logits, int count, int64_t target, float* gradient = nullptr) {
    if (gradient) std::memset(gradient, 0, size_t(count) * sizeof *gradient);
    if (target == kIgnored) return 0;
    const float wanted = logits[target];
    float best = logits[0];
    for (int i = 1; i < count; ++i) best = logits[i] > best ? logits[i] : best;
    const float total = softmax_weights(logits, count, 1.0f, logits);
    if (gradient) {
        const float inverse = 1.0f / total;
        each_part(logits, count, [&](int i, F x, int left) { store_first(gradient + i, x * inverse, left); });
        gradient[target] -= 1;
    }
    return __builtin_logf(total) + (best - wanted);
}

float total_of(const float* losses, int64_t rows) {
    double total = 0;
    for (int64_t row = 0; row < rows; ++row) total += losses[row];
    return float(total);
}

template <class W>
void masked_lm_head_of(const HeadCall& call) {
    typedef typename Format<W>::Activation A;
    const int width = call.dense.in, tokens = call.table.out;
    const Type type = call.dense.type;
    float* gain = static_cast<float*>(scratch(0, (3 * size_t(width) + size_t(tokens) + 4 * kPanel) * sizeof(float)));
    float* ln_bias = widen(call.ln_weight, type, width, gain);
    float* dense_bias = widen(call.ln_bias, type, width, ln_bias);
    float* bias = widen(call.dense_bias, type, width, dense_bias);
    widen(call.bias, type, tokens, bias);
    float* losses = buffer<float>(1, call.targets ? call.rows : 0, 1);

    const W *dense = weights_of<W>(call.dense), *table = weights_of<W>(call.table);
    const size_t ld = leading<A>(width), ld_hidden = leading<float>(width), ld_logits = leading<float>(tokens);
    const auto take = [&](int64_t first, int64_t last, A* rows) {
        for (int64_t row = first; row < last; ++row, rows += ld)
            copy_row(call.x + (call.row_of ? call.row_of[row] : row) * width, width, rows);
    };
    const auto norm = [&](const float* hidden, int64_t rows, A* normed) {
        for (int64_t row = 0; row < rows; ++row)
            layer_norm(hidden + row * ld_hidden, width, gain, ln_bias, call.eps, normed + row * ld);
    };
    const auto finish = [&](int64_t first, int64_t last, float* logits) {
        for (int64_t row = first; row < last; ++row, logits += ld_logits) {
            W* to = static_cast<W*>(call.logits) + row * tokens;
            each_part(logits, tokens, [&](int i, F x, int left) { store_first(to + i, x, left); });
            if (call.targets) losses[row] = cross_entropy(logits, tokens, call.targets[row]);
        }
    };

    const int panels = panels_of(width), table_panels = panels_of(tokens);
    if (few<W>(call.rows)) {
        A* rows = buffer<A>(2, call.rows, ld);
        float* hidden = buffer<float>(3, call.rows, ld_hidden);
        take(0, call.rows, rows);
        each_panel(panels, [&](int first, int last) {
            gemm(rows, ld, call.rows, dense, width, first, last, Gelu<float>{hidden, ld_hidden, dense_bias});
        });
        norm(hidden, call.rows, rows);
        float* logits = buffer<float>(3, call.rows, ld_logits);
        each_panel(table_panels, [&](int first, int last) {
            gemm(rows, ld, call.rows, table, width, first, last, Project<float>{logits, ld_logits, bias, tokens});
        });
        finish(0, call.rows, logits);
    } else {
        each_block(call.rows, [&](int64_t first, int64_t last) {
            const int64_t count = last - first;
            A* rows = buffer<A>(4, count, ld);
            float* hidden = buffer<float>(5, count, ld_hidden);
            take(first, last, rows);
            gemm(rows, ld, count, dense, width, 0, panels, Gelu<float>{hidden, ld_hidden, dense_bias});
            norm(hidden, count, rows);
            float* logits = buffer<float>(6, count, ld_logits);
            gemm(rows, ld, count, table, width, 0, table_panels, Project<float>{logits, ld_logits, bias, tokens});
            finish(first, last, logits);
        });
    }
    if (call.targets) *call.loss = total_of(losses, call.rows);
}

template <class W>
void masked_softmax_of(const SoftmaxCall& call) {
    const int64_t size = call.size;
    each(size_t(call.batch * call.heads * size), kTurn, [&](size_t begin, size_t end) {
        float* weights = buffer<float>(4, 1, leading<float>(size));
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

// Sums of a few rows are summed again: one chain of 1,000 would lose a digit. A thread takes some columns of one
// sequence, so that a single sequence has work for several.
constexpr int kSummedRows = 32, kColumns = 256;

void pool(const PoolCall& call) {
    const size_t strips = (size_t(call.width) + kColumns - 1) / kColumns;
    each(size_t(call.sequences) * strips, 1, [&](size_t begin, size_t end) {
        for (size_t i = begin; i < end; ++i) {
            const size_t sequence = i / strips;
            const int column = int(i % strips) * kColumns, left = call.width - column;
            const int columns = left < kColumns ? left : kColumns;
            alignas(64) float total[kColumns] = {}, part[kColumns] = {};
            const int64_t last = call.cu_seqlens[sequence + 1];
            for (int64_t row = call.cu_seqlens[sequence]; row < last;) {
                const int64_t stop = last - row < kSummedRows ? last : row + kSummedRows;
                for (; row < stop; ++row) {
                    if (call.weight[row] == 0) continue;
                    const F weight = splat(call.weight[row]);
                    each_part(call.x + row * call.width + column, columns,
                              [&](int j, F x, int) { store(part + j, fma(weight, x, load(part + j))); });
                }
                for (int j = 0; j < kColumns; j += N) store(total + j, load(total + j) + load(part + j));
                std::memset(part, 0, sizeof part);
            }
            std::memcpy(call.result + sequence * size_t(call.width) + column, total, size_t(columns) * sizeof(float));
        }
    });
}

}  // namespace
}  // namespace cpu
}  // namespace esm
