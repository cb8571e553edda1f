// A transformer layer's two halves, each one fused, and the stack of all layers.
//
// A half is a few steps. With many rows a thread takes a block of them through as many steps as it can without meeting
// the others, which it must only where attention looks at other rows. With few, the threads share each matrix's panels
// instead, so that each weight is read once.
#pragma once

#include "attention.h"
#include "work.h"

namespace esm {
namespace cpu {
namespace {

// Scratch slots. The calling thread's, for all to see: small vectors, and rows (or packed heads) that threads share.
// Every thread's own: the rows of its block, or one head of its own; attend() uses two more.
enum Slot { kVectors, kQkv, kShared, kMiddle, kOwn, kOwnMiddle, kOwnOperand };

// Fewer queries than this are not worth a part of their own.
constexpr int kPartRows = 48;

// x + out(attention(q, k, v of LN(x))).
template <class W>
class Attention {
    typedef typename Format<W>::Activation A;
    typedef typename Format<W>::Operand B;
    typedef typename Format<W>::Plain Plain;

  public:
    // Floats that the small vectors take.
    static int64_t vectors(const AttentionCall& call) { return 6 * round_up(call.q.in, kPanel); }

    Attention(const AttentionCall& call, float* memory)
        : call_(&call), width_(call.q.in), ld_(leading<A>(width_)), ld_normed_(leading<B>(width_)) {
        const void* vectors[6] = {call.ln_weight, call.ln_bias, call.q_bias, call.k_bias, call.v_bias, call.out_bias};
        for (int i = 0; i < 6; ++i) {
            vector_[i] = memory;
            memory = widen(vectors[i], call.q.type, width_, memory);
        }
        qkv_ = buffer<A>(kQkv, 3 * call.rows, ld_);
    }

    // LN, q, k and v of some rows, on this thread.
    void project(int64_t first, int64_t last) const {
        B* normed = buffer<B>(kOwn, last - first, ld_normed_);
        norm()(first, last, normed, ld_normed_);
        for (int which = 0; which < 3; ++which) project(which, normed, first, last - first, 0, panels());
    }
    void project_by_panels() const {
        B* normed = buffer<B>(kShared, call_->rows, ld_normed_);
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
        A* shared = parts > 1 ? buffer<A>(kShared, heads, size) : nullptr;
        each(size_t(heads), 1, [&](size_t begin, size_t end) {
            for (size_t i = begin; i < end; ++i) {
                const Head head = head_of(int64_t(i));
                A* packed = shared ? shared + i * size : buffer<A>(kOwn, 1, size);
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
    void finish(int64_t first, int64_t last) const { finish(mixed(first, last, kOwn), first, last, 0, panels()); }
    void finish_by_panels() const {
        const Rows<B> all = mixed(0, call_->rows, kShared);
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
        const Packed* matrices[3] = {&call_->q, &call_->k, &call_->v};
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

    Rows<B> mixed(int64_t first, int64_t last, int slot) const {
        return operand(weights_of<W>(call_->out), qkv_ + first * ld_, ld_, last - first, width_, slot);
    }
    void finish(Rows<B> in, int64_t first, int64_t last, int from, int to) const {
        gemm(in.data, in.ld, last - first, weights_of<W>(call_->out), width_, from, to,
             AddTo{call_->x + first * width_, call_->result + first * width_, size_t(width_), vector_[5], width_});
    }

    const AttentionCall* call_;
    int width_;
    size_t ld_, ld_normed_;
    A* qkv_;
    const float* vector_[6];
};

// x + fc2(gelu(fc1(LN(x)))).
template <class W>
class Ffn {
    typedef typename Format<W>::Activation A;
    typedef typename Format<W>::Operand B;

  public:
    static int64_t vectors(const FfnCall& call) {
        return 3 * round_up(call.fc1.in, kPanel) + round_up(call.fc1.out, kPanel);
    }

    Ffn(const FfnCall& call, float* memory)
        : call_(&call), width_(call.fc1.in), hidden_(call.fc1.out), ld_(leading<B>(width_)),
          ld_middle_(leading<A>(hidden_)) {
        const Type type = call.fc1.type;
        float* ln_bias = widen(call.ln_weight, type, width_, memory);
        float* bias1 = widen(call.ln_bias, type, width_, ln_bias);
        float* bias2 = widen(call.fc1_bias, type, hidden_, bias1);
        widen(call.fc2_bias, type, width_, bias2);
        norm_ = {call.x, width_, memory, ln_bias, call.eps};
        bias1_ = bias1, bias2_ = bias2;
    }

    // Some rows, on this thread.
    void rows(int64_t first, int64_t last) const {
        B* normed = buffer<B>(kOwn, last - first, ld_);
        A* middle = buffer<A>(kOwnMiddle, last - first, ld_middle_);
        norm_(first, last, normed, ld_);
        widened(normed, middle, last - first, 0, panels_of(hidden_));
        narrowed(operand_of(middle, last - first, kOwnOperand), first, last, 0, panels_of(width_));
    }
    void by_panels() const {
        B* normed = buffer<B>(kShared, call_->rows, ld_);
        A* middle = buffer<A>(kMiddle, call_->rows, ld_middle_);
        norm_.all(call_->rows, normed, ld_);
        each_panel(panels_of(hidden_), [&](int begin, int end) { widened(normed, middle, call_->rows, begin, end); });
        const Rows<B> in = operand_of(middle, call_->rows, kShared);
        each_panel(panels_of(width_), [&](int begin, int end) { narrowed(in, 0, call_->rows, begin, end); });
    }

  private:
    void widened(const B* normed, A* middle, int64_t rows, int from, int to) const {
        gemm(normed, ld_, rows, weights_of<W>(call_->fc1), width_, from, to, Gelu<A>{middle, ld_middle_, bias1_});
    }
    Rows<B> operand_of(const A* middle, int64_t rows, int slot) const {
        return operand(weights_of<W>(call_->fc2), middle, ld_middle_, rows, hidden_, slot);
    }
    void narrowed(Rows<B> in, int64_t first, int64_t last, int from, int to) const {
        gemm(in.data, in.ld, last - first, weights_of<W>(call_->fc2), hidden_, from, to,
             AddTo{call_->x + first * width_, call_->result + first * width_, size_t(width_), bias2_, width_});
    }

    const FfnCall* call_;
    int width_, hidden_;
    size_t ld_, ld_middle_;
    Norm norm_;
    const float *bias1_, *bias2_;
};

float* vectors_memory(int64_t floats) { return buffer<float>(kVectors, floats, 1); }

template <class W>
void pre_ln_attention_of(const AttentionCall& call) {
    const Attention<W> attention(call, vectors_memory(Attention<W>::vectors(call)));
    if (few<W>(call.rows)) {
        attention.project_by_panels();
        attention.attend();
        attention.finish_by_panels();
    } else {
        each_block<typename Format<W>::Activation>(call.rows, [&](int64_t first, int64_t last) { attention.project(first, last); });
        attention.attend();
        each_block<typename Format<W>::Activation>(call.rows, [&](int64_t first, int64_t last) { attention.finish(first, last); });
    }
}

template <class W>
void gelu_ffn_of(const FfnCall& call) {
    const Ffn<W> ffn(call, vectors_memory(Ffn<W>::vectors(call)));
    if (few<W>(call.rows))
        ffn.by_panels();
    else
        each_block<typename Format<W>::Activation>(call.rows, [&](int64_t first, int64_t last) { ffn.rows(first, last); });
}

void copy_stream(const LayerCall& layer, int64_t first, int64_t last) {
    const size_t width = size_t(layer.ffn.fc1.in), at = size_t(first) * width;
    if (layer.copy) std::memcpy(layer.copy + at, layer.ffn.result + at, size_t(last - first) * width * sizeof(float));
}

// From one attention to the next a block of rows goes through all steps without meeting the others.
template <class W>
void transformer_stack_of(const StackCall& call) {
    int64_t attention_floats = 0, ffn_floats = 0;
    for (int64_t i = 0; i < call.count; ++i) {
        attention_floats = larger(attention_floats, Attention<W>::vectors(call.layers[i].attention));
        ffn_floats = larger(ffn_floats, Ffn<W>::vectors(call.layers[i].ffn));
    }
    float* memory = vectors_memory(2 * attention_floats + ffn_floats);
    const auto attention_of = [&](int64_t i) {
        return Attention<W>(call.layers[i].attention, memory + i % 2 * attention_floats);
    };
    const int64_t rows = call.layers->attention.rows;
    const bool by_panels = few<W>(rows);

    Attention<W> attention = attention_of(0);
    if (by_panels)
        attention.project_by_panels();
    else
        each_block<typename Format<W>::Activation>(rows, [&](int64_t first, int64_t last) { attention.project(first, last); });
    for (int64_t i = 0; i < call.count; ++i) {
        attention.attend();
        const LayerCall& layer = call.layers[i];
        const bool more = i + 1 < call.count;
        const Attention<W> next = more ? attention_of(i + 1) : attention;
        const Ffn<W> ffn(layer.ffn, memory + 2 * attention_floats);
        if (by_panels) {
            attention.finish_by_panels();
            ffn.by_panels();
            copy_stream(layer, 0, rows);
            if (more) next.project_by_panels();
        } else {
            each_block<typename Format<W>::Activation>(rows, [&](int64_t first, int64_t last) {
                attention.finish(first, last);
                ffn.rows(first, last);
                copy_stream(layer, first, last);
                if (more) next.project(first, last);
            });
        }
        attention = next;
    }
}

}  // namespace
}  // namespace cpu
}  // namespace esm
