// gelu_ffn in training: forward with what GELU was given kept, and backward but for the matrices' own gradients.
//
// A thread takes a block of rows through all steps, so that what lies between them stays in its second-level cache. The
// matrices change with every step of training: they are packed anew in each call, as they are for the forward pass and
// transposed for the backward pass, which costs as much as a few rows. Blocks of the backward pass have one size, and
// their sums are added up in order, so that gradients of biases and gains have the same bits on any number of threads.
#pragma once

#include "gradient_rows.h"

namespace esm {
namespace cpu {
namespace {

// Keeps what GELU is given, for `columns` columns; see Gelu.
template <class W, class A>
struct GeluKeeping {
    Gelu<A> gelu;
    W* middle;
    int columns;

    ESM_INLINE void operator()(const float* c, int64_t row, int height, int column) const {
        Project<W>{middle, size_t(columns), gelu.bias, columns}(c, row, height, column);
        gelu(c, row, height, column);
    }
};

// From the gradient of GELU's result to that of what it was given, which goes to `dmiddle`, and with zeros up to whole
// panels to `out`.
template <class W, class A>
struct GeluGradient {
    const W* middle;
    W *activated, *dmiddle;
    A* out;
    size_t ld;
    float* sums;
    int columns;

    ESM_INLINE void operator()(const float* c, int64_t row, int height, int column) const {
        for (int v = 0; v < kPanel; v += N) {
            const int left = columns - column - v;
            F total = {};
            for (int r = 0; r < height; ++r) {
                F d = {};
                if (left > 0) {
                    const size_t at = (row + r) * columns + column + v;
                    const GeluAndSlope gelu(load_most(middle + at, left));
                    d = load(c + r * kPanel + v) * gelu.slope;
                    store_most(activated + at, gelu.value, left);
                    store_most(dmiddle + at, d, left);
                }
                store(out + (row + r) * ld + column + v, d);
                total += d;
            }
            store(sums + column + v, load(sums + column + v) + total);
        }
    }
};

template <class W>
class FfnTraining {
    typedef typename Format<W>::Activation A;
    enum { kGain, kLnBias, kOutBias, kHiddenBias };

  public:
    explicit FfnTraining(const FfnTrainingCall& call)
        : call_(&call), width_(call.width), hidden_(call.hidden), ld_(leading<A>(width_)),
          ld_wide_(leading<A>(hidden_)),
          vectors_(call.type, {call.ln_weight, call.ln_bias, call.fc2_bias, call.fc1_bias},
                   {width_, width_, width_, hidden_}),
          norm_{call.x, width_, vectors_[kGain], vectors_[kLnBias], call.eps} {}

    void forward() const {
        const W* packed[2];
        pack(false, packed);
        each_block(call_->rows, [&](int64_t first, int64_t last) {
            const int64_t rows = last - first, at = first * width_;
            A* normed = buffer<A>(kOwnRows, rows, ld_);
            A* wide = buffer<A>(kOwnWide, rows, ld_wide_);
            norm_(first, last, normed, ld_);
            gemm(normed, ld_, rows, packed[0], width_, 0, panels_of(hidden_),
                 GeluKeeping<W, A>{{wide, ld_wide_, vectors_[kHiddenBias]}, hidden_row(call_->middle, first), hidden_});
            gemm(wide, ld_wide_, rows, packed[1], hidden_, 0, panels_of(width_),
                 AddTo{call_->x + at, call_->result + at, size_t(width_), vectors_[kOutBias], width_});
        });
    }

    void backward(const FfnGradientCall& to) const {
        const W* packed[2];
        pack(true, packed);
        const size_t ld_sums = leading<float>(width_);
        each_part_of_sums(call_->rows, vectors_, to.dvectors, [&](int64_t first, int64_t last, float* const* sums) {
            const int64_t rows = last - first;
            A* dresult = buffer<A>(kOwnRows, kSummedTogether, ld_);
            A* wide = buffer<A>(kOwnWide, kSummedTogether, ld_wide_);
            float* dnormed = buffer<float>(kOwnGradient, kSummedTogether, ld_sums);
            take_gradient(to.dout, width_, first, last, dresult, ld_, static_cast<W*>(to.dresult), sums[kOutBias]);
            gemm(dresult, ld_, rows, packed[1], width_, 0, panels_of(hidden_),
                 GeluGradient<W, A>{hidden_row(call_->middle, first), hidden_row(to.activated, first),
                                    hidden_row(to.dmiddle, first), wide, ld_wide_, sums[kHiddenBias], hidden_});
            std::memset(dnormed, 0, size_t(rows) * ld_sums * sizeof *dnormed);
            gemm(wide, ld_wide_, rows, packed[0], hidden_, 0, panels_of(width_), Accumulate{dnormed, ld_sums});
            NormGradient<W>{norm_, static_cast<W*>(to.normed), to.dout, to.dx, sums[kGain], sums[kLnBias]}(
                first, last, dnormed, ld_sums);
        });
    }

  private:
    void pack(bool transposed, const W* (&packed)[2]) const {
        pack_matrices<W, 2>({{call_->fc1_weight, hidden_, width_}, {call_->fc2_weight, width_, hidden_}}, transposed,
                            packed);
    }
    W* hidden_row(void* tensor, int64_t row) const { return static_cast<W*>(tensor) + row * hidden_; }

    const FfnTrainingCall* call_;
    int width_, hidden_;
    size_t ld_, ld_wide_;
    Vectors<4> vectors_;
    Norm norm_;
};

template <class W>
void ffn_training_of(const FfnTrainingCall& call) {
    FfnTraining<W>(call).forward();
}
template <class W>
void ffn_backward_of(const FfnGradientCall& call) {
    FfnTraining<W>(call.forward).backward(call);
}

}  // namespace
}  // namespace cpu
}  // namespace esm
