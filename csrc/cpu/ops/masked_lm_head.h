// masked_lm_head: the language-model head and the loss; and in training, on the selected rows alone: forward with what
// GELU is given kept, and softmax less the one-hot targets; and backward but for the matrices' own gradients. As in
// gelu_ffn.h.
#pragma once

#include "../types.h"

namespace esm {
namespace cpu {

// rows: how many to compute; row_of: (rows,) which they are in x, or null for all in order; logits: (rows, outputs of
// the table) in the weights' type; targets: (rows,) below that number, or kIgnored, or null with loss null.
constexpr int64_t kIgnored = -100;
struct MaskedLmHeadCall {
    const float* x;
    int64_t rows;
    const int64_t *row_of, *targets;
    float eps;
    const void *dense_bias, *ln_weight, *ln_bias, *bias;
    Prepacked dense, table;
    void* logits;
    float* loss;
};

// masked_lm_head in training. x: (rows, width), the selected ones; the matrices are plain, as above. middle: what GELU
// is given; wrong: (rows, tokens), softmax less the one-hot targets; both are kept for the gradients. targets, wrong
// and loss are null where no loss is wanted.
struct MaskedLmHeadTrainCall {
    const float* x;
    int64_t rows;
    int width, tokens;
    float eps;
    Type type;
    const void *dense_weight, *dense_bias, *ln_weight, *ln_bias, *token_table, *bias;
    const int64_t* targets;
    void* middle;
    float* wrong;
    void* logits;
    float* loss;
};
// From the gradients of the loss and, (rows, tokens) of `type`, of the logits; of `forward`, x, targets and the results
// are not read. dvectors: those of ln_weight, ln_bias, dense_bias and bias, one after the other; normed, dmiddle and
// dscores, that of the logits from both: the factors of the matrices' gradients.
struct MaskedLmHeadBackwardCall {
    MaskedLmHeadTrainCall forward;
    float dloss;
    const void* dlogits;
    float *dx, *dvectors;
    void *normed, *dmiddle, *dscores;
};

}  // namespace cpu
}  // namespace esm

#if defined(ESM_LEVEL)
#include "../gradient_rows.h"

namespace esm {
namespace cpu {
namespace {

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
void masked_lm_head_of(const MaskedLmHeadCall& call) {
    typedef typename FormatOf<W>::Activation A;
    const int width = call.dense.in, tokens = call.table.out;
    typedef typename FormatOf<W>::Plain Plain;
    float* gain = buffer<float>(Layer::vectors, 1, 3 * size_t(width) + size_t(tokens) + 4 * kPanel);
    float* ln_bias = widen<Plain>(call.ln_weight, width, gain);
    float* dense_bias = widen<Plain>(call.ln_bias, width, ln_bias);
    float* bias = widen<Plain>(call.dense_bias, width, dense_bias);
    widen<Plain>(call.bias, tokens, bias);
    float* losses = buffer<float>(Layer::sums, call.targets ? call.rows : 0, 1);

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
        A* rows = buffer<A>(Layer::rows, call.rows, ld);
        float* hidden = buffer<float>(Layer::wide, call.rows, ld_hidden);
        take(0, call.rows, rows);
        each_panel(panels, [&](int first, int last) {
            gemm(rows, ld, call.rows, dense, width, first, last, Gelu<float>{hidden, ld_hidden, dense_bias});
        });
        norm(hidden, call.rows, rows);
        float* logits = buffer<float>(Layer::wide, call.rows, ld_logits);
        each_panel(table_panels, [&](int first, int last) {
            gemm(rows, ld, call.rows, table, width, first, last, Project<float>{logits, ld_logits, bias, tokens});
        });
        finish(0, call.rows, logits);
    } else {
        each_block(call.rows, [&](int64_t first, int64_t last) {
            const int64_t count = last - first;
            A* rows = buffer<A>(Layer::own_rows, count, ld);
            float* hidden = buffer<float>(Layer::own_fp32, count, ld_hidden);
            take(first, last, rows);
            gemm(rows, ld, count, dense, width, 0, panels, Gelu<float>{hidden, ld_hidden, dense_bias});
            norm(hidden, count, rows);
            float* logits = buffer<float>(Layer::own_wide, count, ld_logits);
            gemm(rows, ld, count, table, width, 0, table_panels, Project<float>{logits, ld_logits, bias, tokens});
            finish(first, last, logits);
        });
    }
    if (call.targets) *call.loss = total_of(losses, call.rows);
}

template <class W>
class HeadTraining {
    typedef typename FormatOf<W>::Activation A;
    enum { kGain, kLnBias, kDenseBias, kBias };

  public:
    explicit HeadTraining(const MaskedLmHeadTrainCall& call)
        : call_(&call), width_(call.width), tokens_(call.tokens), ld_(leading<A>(width_)),
          ld_tokens_(leading<A>(tokens_)), ld_wide_(leading<float>(width_)),
          vectors_({call.ln_weight, call.ln_bias, call.dense_bias, call.bias},
                   {width_, width_, width_, tokens_}) {}

    void forward() const {
        const W* packed[2];
        pack(false, packed);
        float* losses = buffer<float>(Layer::sums, call_->targets ? call_->rows : 0, 1);
        const size_t ld_logits = leading<float>(tokens_);
        each_block(call_->rows, [&](int64_t first, int64_t last) {
            const int64_t count = last - first;
            A* rows = buffer<A>(Layer::own_rows, count, ld_);
            float* hidden = buffer<float>(Layer::own_fp32, count, ld_wide_);
            float* logits = buffer<float>(Layer::own_wide, count, ld_logits);
            for (int64_t row = 0; row < count; ++row)
                copy_row(call_->x + (first + row) * width_, width_, rows + row * ld_);
            gemm(rows, ld_, count, packed[0], width_, 0, panels_of(width_),
                 GeluKeeping<W, float>{{hidden, ld_wide_, vectors_[kDenseBias]}, of_row(call_->middle, first), width_});
            for (int64_t row = 0; row < count; ++row)
                layer_norm(hidden + row * ld_wide_, width_, vectors_[kGain], vectors_[kLnBias], call_->eps,
                           rows + row * ld_);
            gemm(rows, ld_, count, packed[1], width_, 0, panels_of(tokens_),
                 Project<float>{logits, ld_logits, vectors_[kBias], tokens_});
            for (int64_t row = first; row < last; ++row, logits += ld_logits) {
                W* to = static_cast<W*>(call_->logits) + row * tokens_;
                each_part(logits, tokens_, [&](int i, F x, int left) { store_first(to + i, x, left); });
                if (call_->targets)
                    losses[row] = cross_entropy(logits, tokens_, call_->targets[row], call_->wrong + row * tokens_);
            }
        });
        if (call_->targets) *call_->loss = total_of(losses, call_->rows);
    }

    void backward(const MaskedLmHeadBackwardCall& to) const {
        const W* packed[2];
        pack(true, packed);
        each_part_of_sums(call_->rows, vectors_, to.dvectors, [&](int64_t first, int64_t last, float* const* sums) {
            const int64_t rows = last - first;
            A* dlogits = buffer<A>(Layer::own_wide, kSummedTogether, ld_tokens_);
            A* dmiddle = buffer<A>(Layer::own_rows, kSummedTogether, ld_);
            float* dnormed = buffer<float>(Layer::own_fp32, 2 * kSummedTogether, ld_wide_);
            float* hidden = dnormed + kSummedTogether * ld_wide_;
            const W* middle = of_row(call_->middle, first);
            take_logits(to, first, last, dlogits, sums[kBias]);
            std::memset(dnormed, 0, size_t(rows) * ld_wide_ * sizeof *dnormed);
            gemm(dlogits, ld_tokens_, rows, packed[1], tokens_, 0, panels_of(width_), Accumulate{dnormed, ld_wide_});
            each_part(middle, int(rows) * width_,
                      [&](int i, F x, int left) { store_first(hidden + i, GeluAndSlope(x).value, left); });
            const Norm norm{hidden, width_, vectors_[kGain], vectors_[kLnBias], call_->eps};
            NormGradient<W>{norm, of_row(to.normed, first), nullptr, hidden, sums[kGain], sums[kLnBias]}(
                0, rows, dnormed, ld_wide_);
            through_gelu(middle, hidden, rows, of_row(to.dmiddle, first), dmiddle, sums[kDenseBias]);
            gemm(dmiddle, ld_, rows, packed[0], width_, 0, panels_of(width_),
                 Store<float>{to.dx + first * width_, width_});
        });
    }

  private:
    void pack(bool transposed, const W* (&packed)[2]) const {
        pack_matrices<W, 2>({{call_->dense_weight, width_, width_}, {call_->token_table, tokens_, width_}}, transposed,
                            packed);
    }
    W* of_row(void* tensor, int64_t row) const { return static_cast<W*>(tensor) + row * width_; }

    // The gradients of a part's logits: through the loss, and what comes in for themselves.
    void take_logits(const MaskedLmHeadBackwardCall& to, int64_t first, int64_t last, A* own, float* sums) const {
        for (int64_t row = first; row < last; ++row, own += ld_tokens_) {
            const int64_t at = row * tokens_;
            each_part(static_cast<const W*>(to.dlogits) + at, tokens_, [&](int i, F d, int left) {
                if (call_->wrong) d = fma(splat(to.dloss), load_most(call_->wrong + at + i, left), d);
                store_first(static_cast<W*>(to.dscores) + at + i, d, left);
                store_first(own + i, d, left);
                store(sums + i, load(sums + i) + d);
            });
            std::memset(own + tokens_, 0, size_t(round_up(tokens_, kPanel) - tokens_) * sizeof *own);
        }
    }

    // From the gradient of GELU's result to that of what it was given, to `dmiddle` and, with zeros up to whole panels,
    // to `own`.
    void through_gelu(const W* middle, const float* gradient, int64_t rows, W* dmiddle, A* own, float* sums) const {
        for (int64_t row = 0; row < rows; ++row, own += ld_) {
            const int64_t at = row * width_;
            each_part(middle + at, width_, [&](int i, F x, int left) {
                const F d = load_most(gradient + at + i, left) * GeluAndSlope(x).slope;
                store_first(dmiddle + at + i, d, left);
                store_first(own + i, d, left);
                store(sums + i, load(sums + i) + d);
            });
            std::memset(own + width_, 0, size_t(round_up(width_, kPanel) - width_) * sizeof *own);
        }
    }

    const MaskedLmHeadTrainCall* call_;
    int width_, tokens_;
    size_t ld_, ld_tokens_, ld_wide_;
    Vectors<W, 4> vectors_;
};

template <class W>
void masked_lm_head_train_of(const MaskedLmHeadTrainCall& call) {
    HeadTraining<W>(call).forward();
}
template <class W>
void masked_lm_head_backward_of(const MaskedLmHeadBackwardCall& call) {
    HeadTraining<W>(call.forward).backward(call);
}

}  // namespace
}  // namespace cpu
}  // namespace esm
#endif
