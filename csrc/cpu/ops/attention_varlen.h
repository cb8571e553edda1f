// attention_varlen, forward and backward; pre_ln_attention in training is made of it.
//
// The backward pass (Dao et al. 2022) makes the probabilities again from the log of every row's sum, which the forward
// pass keeps, so no row has to be seen whole: a block of queries meets the keys a chunk at a time, and all that lies
// between stays in the second-level cache. Scores are held with the keys as rows: as such they multiply the queries and
// the gradients of the outputs for those of the keys and values, and packed as weights are, they are what the gradients
// of the queries need. A head of a sequence is one thread's work, its sums always in the same order.
#pragma once

#include "../types.h"

namespace esm {
namespace cpu {

// q, k, v, out: (rows, heads, head_dim) of `type`; log_sums: (heads, rows), the log of every softmax's sum, or null.
struct AttentionVarlenCall {
    const void *q, *k, *v;
    Type type;
    int64_t rows;
    const int32_t* cu_seqlens;
    int64_t sequences;
    int heads, head_dim;
    float scale;
    void* out;
    float* log_sums;
};
// The gradients of q, k and v from that of `out`; `forward` as it was called, but for its `out`.
struct AttentionVarlenBackwardCall {
    AttentionVarlenCall forward;
    const void *out, *dout;
    void *dq, *dk, *dv;
};

}  // namespace cpu
}  // namespace esm

#if defined(ESM_LEVEL)
#include "../attention.h"
#include "../work.h"

namespace esm {
namespace cpu {
namespace {

// Sequence and head number i of a call.
template <class Call>
struct HeadOf {
    int64_t first;  // row
    int length, head, dim;
    size_t width, at;  // elements from one row to the next; where the head's first element is

    HeadOf(const Call& call, int64_t i)
        : first(call.cu_seqlens[i / call.heads]), length(int(call.cu_seqlens[i / call.heads + 1] - first)),
          head(int(i % call.heads)), dim(call.head_dim), width(size_t(call.heads) * dim),
          at(size_t(first) * width + size_t(head) * dim) {}

    template <class W, class A>
    void take(const void* from, int begin, int end, A* to, size_t ld) const {
        copy_head(static_cast<const W*>(from) + at + begin * width, width, end - begin, dim, to, ld);
    }
    template <class W, class A>
    void give(const A* from, size_t ld, int begin, int end, void* to) const {
        copy_head(from, ld, end - begin, dim, static_cast<W*>(to) + at + begin * width, width);
    }
};

int longest_of(const AttentionVarlenCall& call) {
    int longest = 0;
    for (int64_t i = 0; i < call.sequences; ++i)
        longest = int(larger(longest, call.cu_seqlens[i + 1] - call.cu_seqlens[i]));
    return longest;
}

// body(head) for every one that has rows.
template <class Body>
void each_head(const AttentionVarlenCall& call, const Body& body) {
    each(size_t(call.sequences * call.heads), 1, [&](size_t begin, size_t end) {
        for (size_t i = begin; i < end; ++i) {
            const HeadOf<AttentionVarlenCall> head(call, int64_t(i));
            if (head.length) body(head);
        }
    });
}

template <class W>
void attention_varlen_of(const AttentionVarlenCall& call) {
    typedef typename FormatOf<W>::Activation A;
    const int longest = longest_of(call);
    const size_t ld = leading<A>(call.head_dim), rows = longest * ld;
    each_head(call, [&](const HeadOf<AttentionVarlenCall>& head) {
        A* q = buffer<A>(AttentionVarlen::own_rows, 1, 3 * rows + head_size<A>(longest, head.dim));
        A *k = q + rows, *v = k + rows, *packed = v + rows;
        head.take<W>(call.q, 0, head.length, q, ld);
        head.take<W>(call.k, 0, head.length, k, ld);
        head.take<W>(call.v, 0, head.length, v, ld);
        pack_head(k, v, ld, head.length, head.dim, packed);
        float* log_sums = call.log_sums ? call.log_sums + head.head * call.rows + head.first : nullptr;
        attend(q, packed, q, ld, head.length, 0, head.length, head.dim, call.scale, log_sums);
        head.give<W>(q, ld, 0, head.length, call.out);
    });
}

// Of a block, of a chunk: what a tile's products read again and again then stays in the first-level cache in fp32 too.
constexpr int kQueries = 64, kKeys = 192;

// A head's gradients. Names as in the paper: S scores, P probabilities, D the products of the outputs and their
// gradients; a T at the end is for transposed.
template <class W>
class HeadGradient {
    typedef typename FormatOf<W>::Activation A;

  public:
    HeadGradient(const AttentionVarlenBackwardCall& call, int longest)
        : call_(&call), dim_(call.forward.head_dim), panels_(panels_of(dim_)), ld_(leading<A>(dim_)),
          ld_keys_(leading<A>(longest)), ld_sums_(size_t(panels_) * kPanel) {
        const A* none = nullptr;
        const size_t by_dim = panels_of(kQueries) * panel_size(none, dim_), by_query = panels_ * panel_size(none, kQueries);
        const size_t sizes[11] = {longest * ld_,   longest * ld_,    dim_ * ld_keys_, kQueries * ld_,
                                  kQueries * ld_,  by_dim,           by_dim,          by_query,
                                  by_query,        2 * kKeys * kLdP, panels_of(kQueries) * panel_size(none, kKeys)};
        A** const parts[11] = {&k_, &v_, &k_t_, &q_, &dout_, &q_keys_, &dout_keys_, &q_values_, &dout_values_, &p_t_, &packed_};
        size_t total = 0;
        for (const size_t size : sizes) total += aligned<A>(size);
        A* next = buffer<A>(AttentionVarlen::own_rows, 1, total);
        for (int i = 0; i < 11; ++i) *parts[i] = next, next += aligned<A>(sizes[i]);
        ds_t_ = p_t_ + kKeys * kLdP;

        const size_t tile = size_t(kTileRows<A>) * kQueries;
        float* sums = buffer<float>(AttentionVarlen::own_sums, 1, 2 * tile + dim_ * kQueries + 2 * kQueries + 2 * longest * ld_sums_);
        s_t_ = sums, dp_t_ = s_t_ + tile, dq_t_ = dp_t_ + tile;
        shift_ = dq_t_ + dim_ * kQueries, d_ = shift_ + kQueries;
        dk_ = d_ + kQueries, dv_ = dk_ + longest * ld_sums_;
    }

    void operator()(const HeadOf<AttentionVarlenCall>& head) const {
        const AttentionVarlenCall& forward = call_->forward;
        const int length = head.length;
        head.take<W>(forward.k, 0, length, k_, ld_);
        head.take<W>(forward.v, 0, length, v_, ld_);
        for (int key = 0; key < length; ++key)
            for (int d = 0; d < dim_; ++d) k_t_[d * ld_keys_ + key] = k_[key * ld_ + d];
        std::memset(dk_, 0, length * ld_sums_ * sizeof(float));
        std::memset(dv_, 0, length * ld_sums_ * sizeof(float));
        for (int first = 0; first < length; first += kQueries) {
            const int last = int(smaller(first + kQueries, length));
            begin(head, first, last);
            for (int key = 0; key < length; key += kKeys)
                chunk(key, int(smaller(kKeys, length - key)), last - first);
            finish_queries(head, first, last);
        }
        scale(dk_, length);
        head.give<W>(dk_, ld_sums_, 0, length, call_->dk);
        head.give<W>(dv_, ld_sums_, 0, length, call_->dv);
    }

  private:
    static constexpr size_t kLdP = kQueries + 64 / sizeof(A);  // an odd number of cache lines

    template <class T>
    static size_t aligned(size_t count) {
        return size_t(round_up(int64_t(count), 64 / sizeof(T)));
    }

    // The queries of a block and the gradients of their outputs, in both packings.
    void begin(const HeadOf<AttentionVarlenCall>& head, int first, int last) const {
        const int count = last - first;
        const float unit = SoftmaxWeight<A>(1, 0).factor[0];
        const float* log_sums = call_->forward.log_sums + head.head * call_->forward.rows + head.first + first;
        head.take<W>(call_->out, first, last, q_, ld_);
        head.take<W>(call_->dout, first, last, dout_, ld_);
        // Of the padding: P = 1, and all that it multiplies is 0.
        for (int i = 0; i < kQueries; ++i) shift_[i] = d_[i] = 0;
        for (int i = 0; i < count; ++i) {
            F products = {};
            for (int d = 0; d < dim_; d += N)
                products = fma(load_most(q_ + i * ld_ + d, dim_ - d), load_most(dout_ + i * ld_ + d, dim_ - d), products);
            shift_[i] = -unit * log_sums[i];
            d_[i] = sum(products);
        }
        head.take<W>(call_->forward.q, first, last, q_, ld_);
        pack_keys(q_, ld_, count, dim_, q_keys_);
        pack_keys(dout_, ld_, count, dim_, dout_keys_);
        pack_values(q_, ld_, count, dim_, q_values_);
        pack_values(dout_, ld_, count, dim_, dout_values_);
        std::memset(dq_t_, 0, size_t(dim_) * kQueries * sizeof(float));
    }

    // The block's queries against so many keys.
    void chunk(int key, int keys, int queries) const {
        Tiles<A>{keys}.each([&](int64_t row, int height) {
            for (int panel = 0; panel < panels_of(queries); ++panel) {
                const size_t at = panel * panel_size(q_keys_, dim_), from = (key + row) * ld_;
                tile_of(height, k_ + from, ld_, q_keys_ + at, dim_, s_t_ + panel * kPanel, kQueries);
                tile_of(height, v_ + from, ld_, dout_keys_ + at, dim_, dp_t_ + panel * kPanel, kQueries);
            }
            for (int r = 0; r < height; ++r) probabilities(r, p_t_ + (row + r) * kLdP, ds_t_ + (row + r) * kLdP, queries);
        });
        gemm(p_t_, kLdP, keys, dout_values_, queries, 0, panels_, Accumulate{dv_ + key * ld_sums_, ld_sums_});
        gemm(ds_t_, kLdP, keys, q_values_, queries, 0, panels_, Accumulate{dk_ + key * ld_sums_, ld_sums_});
        pack_values(ds_t_, kLdP, keys, int(round_up(queries, kPanel)), packed_);
        gemm(k_t_ + key, ld_keys_, dim_, packed_, keys, 0, panels_of(queries), Accumulate{dq_t_, kQueries});
    }

    void probabilities(int row, A* p_t, A* ds_t, int queries) const {
        SoftmaxWeight<A> weight(call_->forward.scale, 0);
        const float *s = s_t_ + row * kQueries, *dp = dp_t_ + row * kQueries;
        for (int i = 0; i < int(round_up(queries, kPanel)); i += N) {
            weight.shift = load(shift_ + i);
            const F p = weight(load(s + i));
            store(p_t + i, p);
            store(ds_t + i, p * (load(dp + i) - load(d_ + i)));
        }
    }

    void finish_queries(const HeadOf<AttentionVarlenCall>& head, int first, int last) const {
        float* dq = s_t_;  // a row
        for (int i = first; i < last; ++i) {
            for (int d = 0; d < dim_; ++d) dq[d] = call_->forward.scale * dq_t_[d * kQueries + i - first];
            head.give<W>(dq, 0, i, i + 1, call_->dq);
        }
    }
    void scale(float* sums, int length) const {
        for (size_t i = 0; i < length * ld_sums_; i += N) store(sums + i, load(sums + i) * call_->forward.scale);
    }

    const AttentionVarlenBackwardCall* call_;
    int dim_, panels_;
    size_t ld_, ld_keys_, ld_sums_;
    A *k_, *v_, *k_t_, *q_, *dout_, *q_keys_, *dout_keys_, *q_values_, *dout_values_, *p_t_, *ds_t_, *packed_;
    float *s_t_, *dp_t_, *dq_t_, *shift_, *d_, *dk_, *dv_;
};

template <class W>
void attention_varlen_backward_of(const AttentionVarlenBackwardCall& call) {
    const int longest = longest_of(call.forward);
    each_head(call.forward, [&](const HeadOf<AttentionVarlenCall>& head) { HeadGradient<W>(call, longest)(head); });
}

}  // namespace
}  // namespace cpu
}  // namespace esm
#endif
