// masked_lm_head in training, on the selected rows alone: forward with what GELU was given kept, and softmax less the
// one-hot targets; and backward but for the matrices' own gradients. As in ffn_training.h.
#pragma once

#include "ffn_training.h"

namespace esm {
namespace cpu {
namespace {

template <class W>
class HeadTraining {
    typedef typename Format<W>::Activation A;
    enum { kGain, kLnBias, kDenseBias, kBias };

  public:
    explicit HeadTraining(const HeadTrainingCall& call)
        : call_(&call), width_(call.width), tokens_(call.tokens), ld_(leading<A>(width_)),
          ld_tokens_(leading<A>(tokens_)), ld_wide_(leading<float>(width_)),
          vectors_(call.type, {call.ln_weight, call.ln_bias, call.dense_bias, call.bias},
                   {width_, width_, width_, tokens_}) {}

    void forward() const {
        const W* packed[2];
        pack(false, packed);
        float* losses = buffer<float>(kPartsSlot, call_->targets ? call_->rows : 0, 1);
        const size_t ld_logits = leading<float>(tokens_);
        each_block(call_->rows, [&](int64_t first, int64_t last) {
            const int64_t count = last - first;
            A* rows = buffer<A>(kOwnRows, count, ld_);
            float* hidden = buffer<float>(kOwnGradient, count, ld_wide_);
            float* logits = buffer<float>(kOwnWide, count, ld_logits);
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

    void backward(const HeadGradientCall& to) const {
        const W* packed[2];
        pack(true, packed);
        each_part_of_sums(call_->rows, vectors_, to.dvectors, [&](int64_t first, int64_t last, float* const* sums) {
            const int64_t rows = last - first;
            A* dlogits = buffer<A>(kOwnWide, kSummedTogether, ld_tokens_);
            A* dmiddle = buffer<A>(kOwnRows, kSummedTogether, ld_);
            float* dnormed = buffer<float>(kOwnGradient, 2 * kSummedTogether, ld_wide_);
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
    void take_logits(const HeadGradientCall& to, int64_t first, int64_t last, A* own, float* sums) const {
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

    const HeadTrainingCall* call_;
    int width_, tokens_;
    size_t ld_, ld_tokens_, ld_wide_;
    Vectors<4> vectors_;
};

template <class W>
void head_training_of(const HeadTrainingCall& call) {
    HeadTraining<W>(call).forward();
}
template <class W>
void head_backward_of(const HeadGradientCall& call) {
    HeadTraining<W>(call.forward).backward(call);
}

}  // namespace
}  // namespace cpu
}  // namespace esm
