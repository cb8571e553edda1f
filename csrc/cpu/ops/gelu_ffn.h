// gelu_ffn: a transformer layer's second half, work being shared as in pre_ln_attention.h; and in training.
//
// There a thread takes a block of rows through all steps, so that what lies between them stays in its second-level
// cache. The matrices change with every step of training: they are packed anew in each call, as they are for the forward
// pass and transposed for the backward pass, which costs as much as a few rows. Blocks of the backward pass have one
// size, and their sums are added up in order, so that gradients of biases and gains have the same bits on any number of
// threads.
#pragma once

#include "../types.h"

namespace esm {
namespace cpu {

// Pointers named by the op's own arguments; vectors (gains, biases) have the weights' type, x and result are float.
struct GeluFfnCall {
    const float* x;
    float* result;
    int64_t rows;
    float eps;
    const void *ln_weight, *ln_bias, *fc1_bias, *fc2_bias;
    Prepacked fc1, fc2;
};

// gelu_ffn in training. The matrices are plain, (out, in): they change with every step. All but x and result is of
// `type`; middle: (rows, hidden), what GELU is given.
struct GeluFfnTrainCall {
    const float* x;
    int64_t rows;
    int width, hidden;
    float eps;
    Type type;
    const void *ln_weight, *ln_bias, *fc1_weight, *fc1_bias, *fc2_weight, *fc2_bias;
    void* middle;
    float* result;  // read by nothing, and null in a gradient's call
};
// dvectors: the gradients of ln_weight, ln_bias, fc2_bias and fc1_bias, one after the other. Those of the matrices are
// products over the rows, whose factors go to normed, dmiddle, activated and dresult, the result's gradient in `type`.
struct GeluFfnBackwardCall {
    GeluFfnTrainCall forward;
    const float* dout;
    float *dx, *dvectors;
    void *normed, *dmiddle, *activated, *dresult;
};

}  // namespace cpu
}  // namespace esm

#if defined(ESM_LEVEL)
#include "../gradient_rows.h"

namespace esm {
namespace cpu {
namespace {

// x + fc2(gelu(fc1(LN(x)))).
template <class W>
class Ffn {
    typedef typename FormatOf<W>::Activation A;
    typedef typename FormatOf<W>::Operand B;

  public:
    static int64_t vectors(const GeluFfnCall& call) {
        return 3 * round_up(call.fc1.in, kPanel) + round_up(call.fc1.out, kPanel);
    }

    Ffn(const GeluFfnCall& call, float* memory)
        : call_(&call), width_(call.fc1.in), hidden_(call.fc1.out), ld_(leading<B>(width_)),
          ld_middle_(leading<A>(hidden_)) {
        typedef typename FormatOf<W>::Plain Plain;
        float* ln_bias = widen<Plain>(call.ln_weight, width_, memory);
        float* bias1 = widen<Plain>(call.ln_bias, width_, ln_bias);
        float* bias2 = widen<Plain>(call.fc1_bias, hidden_, bias1);
        widen<Plain>(call.fc2_bias, width_, bias2);
        norm_ = {call.x, width_, memory, ln_bias, call.eps};
        bias1_ = bias1, bias2_ = bias2;
    }

    // Some rows, on this thread.
    void rows(int64_t first, int64_t last) const {
        B* normed = buffer<B>(Layer::own_rows, last - first, ld_);
        norm_(first, last, normed, ld_);
        narrowed(hidden(normed, last - first), first, last, 0, panels_of(width_));
    }
    void by_panels() const {
        B* normed = buffer<B>(Layer::rows, call_->rows, ld_);
        A* middle = buffer<A>(Layer::wide, call_->rows, ld_middle_);
        norm_.all(call_->rows, normed, ld_);
        each_panel(panels_of(hidden_), [&](int begin, int end) { widened(normed, middle, call_->rows, begin, end); });
        const Rows<B> in = operand_of(middle, call_->rows, Layer::rows);
        each_panel(panels_of(width_), [&](int begin, int end) { narrowed(in, 0, call_->rows, begin, end); });
    }

  private:
    // GELU's results as fc2 reads them. Those of 8 bits are quantised group by group, so that what they are made of stays
    // in the second-level cache.
    Rows<B> hidden(const B* normed, int64_t rows) const {
        if constexpr (kQuantized<B>) {
            constexpr int kPanels = kGroup / kPanel;
            const size_t ld = leading<B>(hidden_), ld_group = leading<A>(kGroup);
            B* quantized = buffer<B>(Layer::own_operand, rows, ld);
            A* middle = buffer<A>(Layer::own_wide, rows, ld_group);
            for (int group = 0; group < groups_of(hidden_); ++group) {
                const int from = group * kPanels, to = int(smaller(from + kPanels, panels_of(hidden_)));
                gemm(normed, ld_, rows, weights_of<W>(call_->fc1), width_, from, to,
                     Gelu<A>{middle, ld_group, bias1_, group * kGroup});
                for (int64_t row = 0; row < rows; ++row)
                    quantize_part(middle + row * ld_group, group, hidden_, quantized + row * ld);
            }
            return {quantized, ld};
        } else {
            A* middle = buffer<A>(Layer::own_wide, rows, ld_middle_);
            widened(normed, middle, rows, 0, panels_of(hidden_));
            return {middle, ld_middle_};
        }
    }
    void widened(const B* normed, A* middle, int64_t rows, int from, int to) const {
        gemm(normed, ld_, rows, weights_of<W>(call_->fc1), width_, from, to, Gelu<A>{middle, ld_middle_, bias1_});
    }
    Rows<B> operand_of(const A* middle, int64_t rows, Layer memory) const {
        return operand(weights_of<W>(call_->fc2), middle, ld_middle_, rows, hidden_, memory);
    }
    void narrowed(Rows<B> in, int64_t first, int64_t last, int from, int to) const {
        gemm(in.data, in.ld, last - first, weights_of<W>(call_->fc2), hidden_, from, to,
             AddTo{call_->x + first * width_, call_->result + first * width_, size_t(width_), bias2_, width_});
    }

    const GeluFfnCall* call_;
    int width_, hidden_;
    size_t ld_, ld_middle_;
    Norm norm_;
    const float *bias1_, *bias2_;
};

template <class W>
void gelu_ffn_of(const GeluFfnCall& call) {
    const Ffn<W> ffn(call, buffer<float>(Layer::vectors, Ffn<W>::vectors(call), 1));
    if (few<W>(call.rows))
        ffn.by_panels();
    else
        each_block<typename FormatOf<W>::Activation>(call.rows, [&](int64_t first, int64_t last) { ffn.rows(first, last); });
}

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
    typedef typename FormatOf<W>::Activation A;
    enum { kGain, kLnBias, kOutBias, kHiddenBias };

  public:
    explicit FfnTraining(const GeluFfnTrainCall& call)
        : call_(&call), width_(call.width), hidden_(call.hidden), ld_(leading<A>(width_)),
          ld_wide_(leading<A>(hidden_)),
          vectors_({call.ln_weight, call.ln_bias, call.fc2_bias, call.fc1_bias},
                   {width_, width_, width_, hidden_}),
          norm_{call.x, width_, vectors_[kGain], vectors_[kLnBias], call.eps} {}

    void forward() const {
        const W* packed[2];
        pack(false, packed);
        each_block(call_->rows, [&](int64_t first, int64_t last) {
            const int64_t rows = last - first, at = first * width_;
            A* normed = buffer<A>(Layer::own_rows, rows, ld_);
            A* wide = buffer<A>(Layer::own_wide, rows, ld_wide_);
            norm_(first, last, normed, ld_);
            gemm(normed, ld_, rows, packed[0], width_, 0, panels_of(hidden_),
                 GeluKeeping<W, A>{{wide, ld_wide_, vectors_[kHiddenBias]}, hidden_row(call_->middle, first), hidden_});
            gemm(wide, ld_wide_, rows, packed[1], hidden_, 0, panels_of(width_),
                 AddTo{call_->x + at, call_->result + at, size_t(width_), vectors_[kOutBias], width_});
        });
    }

    void backward(const GeluFfnBackwardCall& to) const {
        const W* packed[2];
        pack(true, packed);
        const size_t ld_sums = leading<float>(width_);
        each_part_of_sums(call_->rows, vectors_, to.dvectors, [&](int64_t first, int64_t last, float* const* sums) {
            const int64_t rows = last - first;
            A* dresult = buffer<A>(Layer::own_rows, kSummedTogether, ld_);
            A* wide = buffer<A>(Layer::own_wide, kSummedTogether, ld_wide_);
            float* dnormed = buffer<float>(Layer::own_fp32, kSummedTogether, ld_sums);
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

    const GeluFfnTrainCall* call_;
    int width_, hidden_;
    size_t ld_, ld_wide_;
    Vectors<W, 4> vectors_;
    Norm norm_;
};

template <class W>
void gelu_ffn_train_of(const GeluFfnTrainCall& call) {
    FfnTraining<W>(call).forward();
}
template <class W>
void gelu_ffn_backward_of(const GeluFfnBackwardCall& call) {
    FfnTraining<W>(call.forward).backward(call);
}

}  // namespace
}  // namespace cpu
}  // namespace esm
#endif
