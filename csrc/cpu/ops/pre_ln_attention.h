// pre_ln_attention: a transformer layer's first half; and in training what surrounds attention in it: LN and the
// projections before, the projection and the residual after, forward and backward (see gradient_rows.h).
//
// A half is a few steps. With many rows a thread takes a block of them through as many steps as it can without meeting
// the others, which it must only where attention looks at other rows. With few, the threads share each matrix's panels
// instead, so that each weight is read once.
#pragma once

#include "../types.h"

namespace esm {
namespace cpu {

// Pointers named by the op's own arguments; vectors (gains, biases) have the weights' type, x and result are float.
struct PreLnAttentionCall {
    const float* x;
    float* result;
    int64_t rows;
    const int32_t* cu_seqlens;
    int64_t sequences;
    int heads;
    float eps;
    const void *ln_weight, *ln_bias, *q_bias, *k_bias, *v_bias, *out_bias;
    Prepacked q, k, v, out;
    const float* rotary;         // (2, rows, head_dim), or null
    void *q_result, *k_result;  // (rows, width) in the weights' type, or null
};

// Before attention in training: result[i] = LN(x) weight[i]' + bias[i] for q, k and v. Plain matrices, as above.
struct PreLnAttentionInputsCall {
    const float* x;
    int64_t rows;
    int width;
    float eps;
    Type type;
    const void *ln_weight, *ln_bias, *weight[3], *bias[3];
    void* result[3];
};
// The results of `forward` are their gradients; beside: that of the stream that passes by; dvectors: the gradients of
// ln_weight, ln_bias and the biases, one after the other; normed: LN(x), a factor of the matrices' gradients.
struct PreLnAttentionInputsBackwardCall {
    PreLnAttentionInputsCall forward;
    const float* beside;
    float *dx, *dvectors;
    void* normed;
};
// After it: result = x + mixed weight' + bias.
struct PreLnAttentionOutputCall {
    const float* x;
    int64_t rows;
    int width;
    Type type;
    const void *mixed, *weight, *bias;
    float* result;
};
struct PreLnAttentionOutputBackwardCall {
    PreLnAttentionOutputCall forward;
    const float* dout;
    float* dbias;
    void *dmixed, *dresult;  // dresult: `dout` in `type`, or null
};

}  // namespace cpu
}  // namespace esm

#if defined(ESM_LEVEL)
#include "../attention.h"
#include "../gradient_rows.h"

namespace esm {
namespace cpu {
namespace {

// Fewer queries than this are not worth a part of their own.
constexpr int kPartRows = 48;

// x + out(attention(q, k, v of LN(x))).
template <class W>
class Attention {
    typedef typename FormatOf<W>::Activation A;
    typedef typename FormatOf<W>::Operand B;
    typedef typename FormatOf<W>::Plain Plain;

  public:
    // Floats that the small vectors take.
    static int64_t vectors(const PreLnAttentionCall& call) { return 6 * round_up(call.q.in, kPanel); }

    Attention(const PreLnAttentionCall& call, float* memory)
        : call_(&call), width_(call.q.in), ld_(leading<A>(width_)), ld_normed_(leading<B>(width_)) {
        const void* vectors[6] = {call.ln_weight, call.ln_bias, call.q_bias, call.k_bias, call.v_bias, call.out_bias};
        for (int i = 0; i < 6; ++i) {
            vector_[i] = memory;
            memory = widen<Plain>(vectors[i], width_, memory);
        }
        qkv_ = buffer<A>(Layer::qkv, 3 * call.rows, ld_);
    }

    // LN, q, k and v of some rows, on this thread.
    void project(int64_t first, int64_t last) const {
        B* normed = buffer<B>(Layer::own_rows, last - first, ld_normed_);
        norm()(first, last, normed, ld_normed_);
        for (int which = 0; which < 3; ++which) project(which, normed, first, last - first, 0, panels());
    }
    void project_by_panels() const {
        B* normed = buffer<B>(Layer::rows, call_->rows, ld_normed_);
        norm().all(call_->rows, normed, ld_normed_);
        each_panel(3 * panels(), [&](int begin, int end) {
            for (int i = begin; i < end;) {
                const int which = i / panels(), first = which * panels(), to = end < first + panels() ? end : first + panels();
                project(which, normed, 0, call_->rows, i - first, to - first);
                i = to;
            }
        });
    }

    // Attention itself, of all rows. With few heads for the threads, several share the queries of one.
    void attend() const {
        const int64_t heads = call_->sequences * call_->heads, longest = longest_sequence();
        const int64_t parts = smaller(most_parts(longest), heads ? round_up(4 * parallel_width(), heads) / heads : 0);
        const size_t size = head_size<A>(longest, dim());
        A* shared = parts > 1 ? buffer<A>(Layer::rows, heads, size) : nullptr;
        each(size_t(heads), 1, [&](size_t begin, size_t end) {
            for (size_t i = begin; i < end; ++i) {
                const Head head = head_of(int64_t(i));
                A* packed = shared ? shared + i * size : buffer<A>(Layer::own_rows, 1, size);
                prepare(head, packed);
                if (!shared) attend(head, packed, 0, 1);
            }
        });
        if (shared)
            each(size_t(heads * parts), 1, [&](size_t begin, size_t end) {
                for (size_t i = begin; i < end; ++i) {
                    const Head head = head_of(int64_t(i) / parts);
                    attend(head, shared + i / size_t(parts) * size, int64_t(i) % parts,
                           smaller(parts, most_parts(head.length)));
                }
            });
    }

    // The output projection and the residual of some rows, on this thread.
    void finish(int64_t first, int64_t last) const { finish(mixed(first, last, Layer::own_rows), first, last, 0, panels()); }
    void finish_by_panels() const {
        const Rows<B> all = mixed(0, call_->rows, Layer::rows);
        each_panel(panels(), [&](int begin, int end) { finish(all, 0, call_->rows, begin, end); });
    }

  private:
    struct Head {
        int64_t first;  // row
        int length, column;
    };

    int dim() const { return width_ / call_->heads; }
    int panels() const { return panels_of(width_); }
    Norm norm() const { return {call_->x, width_, vector_[0], vector_[1], call_->eps}; }
    static int64_t most_parts(int64_t length) { return (length + kPartRows - 1) / kPartRows; }

    int64_t longest_sequence() const {
        int64_t longest = 0;
        for (int64_t i = 0; i < call_->sequences; ++i)
            longest = larger(longest, call_->cu_seqlens[i + 1] - call_->cu_seqlens[i]);
        return longest;
    }
    Head head_of(int64_t i) const {
        const int32_t* ends = call_->cu_seqlens + i / call_->heads;
        return {ends[0], ends[1] - ends[0], int(i % call_->heads) * dim()};
    }

    void project(int which, const B* normed, int64_t first, int64_t rows, int from, int to) const {
        const Prepacked* matrices[3] = {&call_->q, &call_->k, &call_->v};
        gemm(normed, ld_normed_, rows, weights_of<W>(*matrices[which]), width_, from, to,
             Project<A>{qkv_ + (which * call_->rows + first) * ld_, ld_, vector_[2 + which], width_});
    }

    void prepare(const Head& head, A* packed) const {
        const int64_t n = call_->rows, length = head.length;
        if (!length) return;
        A *q = qkv_ + head.first * ld_ + head.column, *k = q + n * ld_, *v = k + n * ld_;
        if (call_->rotary) {
            const float *cosines = call_->rotary + head.first * dim(), *sines = cosines + n * dim();
            rotate(q, ld_, head.length, dim(), cosines, sines);
            rotate(k, ld_, head.length, dim(), cosines, sines);
        }
        if (call_->q_result) {
            const int64_t at = head.first * width_ + head.column;
            copy_head(q, ld_, length, dim(), static_cast<Plain*>(call_->q_result) + at, size_t(width_));
            copy_head(k, ld_, length, dim(), static_cast<Plain*>(call_->k_result) + at, size_t(width_));
        }
        pack_head(k, v, ld_, head.length, dim(), packed);
    }

    // One of so many parts of a head's queries; the result takes their place.
    void attend(const Head& head, const A* packed, int64_t part, int64_t parts) const {
        if (part >= parts) return;
        A* q = qkv_ + head.first * ld_ + head.column;
        const int64_t begin = head.length * part / parts, end = head.length * (part + 1) / parts;
        cpu::attend(q, packed, q, ld_, head.length, begin, end, dim(), 1.0f / __builtin_sqrtf(float(dim())));
    }

    Rows<B> mixed(int64_t first, int64_t last, Layer memory) const {
        return operand(weights_of<W>(call_->out), qkv_ + first * ld_, ld_, last - first, width_, memory);
    }
    void finish(Rows<B> in, int64_t first, int64_t last, int from, int to) const {
        gemm(in.data, in.ld, last - first, weights_of<W>(call_->out), width_, from, to,
             AddTo{call_->x + first * width_, call_->result + first * width_, size_t(width_), vector_[5], width_});
    }

    const PreLnAttentionCall* call_;
    int width_;
    size_t ld_, ld_normed_;
    A* qkv_;
    const float* vector_[6];
};

template <class W>
void pre_ln_attention_of(const PreLnAttentionCall& call) {
    const Attention<W> attention(call, buffer<float>(Layer::vectors, Attention<W>::vectors(call), 1));
    if (few<W>(call.rows)) {
        attention.project_by_panels();
        attention.attend();
        attention.finish_by_panels();
    } else {
        each_block<typename FormatOf<W>::Activation>(call.rows, [&](int64_t first, int64_t last) { attention.project(first, last); });
        attention.attend();
        each_block<typename FormatOf<W>::Activation>(call.rows, [&](int64_t first, int64_t last) { attention.finish(first, last); });
    }
}

// A thread's own copy of rows of a tensor, as the GEMM reads them.
template <class A, class W>
const A* own_rows(const void* tensor, int width, int64_t first, int64_t last) {
    const size_t ld = leading<A>(width);
    A* rows = buffer<A>(Layer::own_rows, last - first, ld);
    for (int64_t row = first; row < last; ++row)
        copy_row(static_cast<const W*>(tensor) + row * width, width, rows + (row - first) * ld);
    return rows;
}

template <class W>
Vectors<W, 5> vectors_of(const PreLnAttentionInputsCall& call) {
    const int width = call.width;
    return {{call.ln_weight, call.ln_bias, call.bias[0], call.bias[1], call.bias[2]},
            {width, width, width, width, width}};
}

template <class W>
void pack_inputs(const PreLnAttentionInputsCall& call, bool transposed, const W* (&packed)[3]) {
    const int width = call.width;
    const void* const(&plain)[3] = call.weight;
    pack_matrices<W, 3>({{plain[0], width, width}, {plain[1], width, width}, {plain[2], width, width}}, transposed,
                        packed);
}

template <class W>
void pre_ln_attention_inputs_of(const PreLnAttentionInputsCall& call) {
    typedef typename FormatOf<W>::Activation A;
    const int width = call.width;
    const size_t ld = leading<A>(width);
    const Vectors<W, 5> vectors = vectors_of<W>(call);
    const Norm norm{call.x, width, vectors[0], vectors[1], call.eps};
    const W* packed[3];
    pack_inputs(call, false, packed);
    each_block(call.rows, [&](int64_t first, int64_t last) {
        A* normed = buffer<A>(Layer::own_rows, last - first, ld);
        norm(first, last, normed, ld);
        for (int i = 0; i < 3; ++i)
            gemm(normed, ld, last - first, packed[i], width, 0, panels_of(width),
                 Project<W>{static_cast<W*>(call.result[i]) + first * width, size_t(width), vectors[2 + i], width});
    });
}

template <class W>
void pre_ln_attention_inputs_backward_of(const PreLnAttentionInputsBackwardCall& call) {
    typedef typename FormatOf<W>::Activation A;
    const PreLnAttentionInputsCall& forward = call.forward;
    const int width = forward.width;
    const size_t ld = leading<A>(width), ld_sums = leading<float>(width);
    const Vectors<W, 5> vectors = vectors_of<W>(forward);
    const Norm norm{forward.x, width, vectors[0], vectors[1], forward.eps};
    const W* packed[3];
    pack_inputs(forward, true, packed);
    each_part_of_sums(forward.rows, vectors, call.dvectors, [&](int64_t first, int64_t last, float* const* sums) {
        float* dnormed = buffer<float>(Layer::own_fp32, kSummedTogether, ld_sums);
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
void pre_ln_attention_output_of(const PreLnAttentionOutputCall& call) {
    typedef typename FormatOf<W>::Activation A;
    const int width = call.width;
    const Vectors<W, 1> vectors({call.bias}, {width});
    const W* packed[1];
    pack_matrices<W, 1>({{call.weight, width, width}}, false, packed);
    each_block(call.rows, [&](int64_t first, int64_t last) {
        const A* rows = own_rows<A, W>(call.mixed, width, first, last);
        gemm(rows, leading<A>(width), last - first, packed[0], width, 0, panels_of(width),
             AddTo{call.x + first * width, call.result + first * width, size_t(width), vectors[0], width});
    });
}

template <class W>
void pre_ln_attention_output_backward_of(const PreLnAttentionOutputBackwardCall& call) {
    typedef typename FormatOf<W>::Activation A;
    const PreLnAttentionOutputCall& forward = call.forward;
    const int width = forward.width;
    const size_t ld = leading<A>(width);
    const Vectors<W, 1> vectors({forward.bias}, {width});
    const W* packed[1];
    pack_matrices<W, 1>({{forward.weight, width, width}}, true, packed);
    each_part_of_sums(forward.rows, vectors, call.dbias, [&](int64_t first, int64_t last, float* const* sums) {
        A* dresult = buffer<A>(Layer::own_rows, kSummedTogether, ld);
        take_gradient(call.dout, width, first, last, dresult, ld, static_cast<W*>(call.dresult), sums[0]);
        gemm(dresult, ld, last - first, packed[0], width, 0, panels_of(width),
             Store<W>{static_cast<W*>(call.dmixed) + first * width, width});
    });
}

}  // namespace
}  // namespace cpu
}  // namespace esm
#endif
