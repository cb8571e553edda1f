// Flash attention (Dao 2023) over packed sequences, bidirectional: softmax(scale q k') v without storing any scores.
// The log-sum-exp of every row is of base 2, (heads, n).
#include "attention.cuh"

namespace esm {

template <int kDim>
__device__ __forceinline__ void forward(Global<const scalar> q, Global<const scalar> k, Global<const scalar> v,
                                        Global<scalar> out, Global<float> lse, Global<const int> cu_seqlens, int n,
                                        int tiles, int heads, int dim, float scale) {
    DYNAMIC_SHARED(bytes);
    const Part part = part_of(cu_seqlens, tiles, heads, dim, int(blockIdx.y));
    if (part.first >= part.length) return;
    const Shared<kDim> shared(bytes, 1);
    const int first = part.first + warp_of() * kTile;
    load_rows<kDim>(q, part, part.first, kOwn, shared.own[0]);
    Softmax softmax;
    Sums<kDim> sums;
    clear<kDim>(sums);
    for (int key = 0; key < part.length; key += kOther) {
        __syncthreads();
        load_rows<kDim>(k, part, key, kOther, shared.other[0]);
        load_rows<kDim>(v, part, key, kOther, shared.other[1]);
        __syncthreads();
        if (first >= part.length) continue;
        Floats<kHeld> p = scores_of<kDim>(shared.mine(0), shared.other[0], dim, shared.scratch);
        const float shrink = softmax.add(p, key, part.length, scale);
        put(p, shrink, shared.scratch);
#pragma unroll
        for (int c = 0; c < kDim / kTile; ++c)
            if (c * kTile < dim) sums[c].scale(shared.scratch + kFactors, kScratch);
        add_product<kDim>(sums, shared.scratch, shared.other[1], dim);
    }
    if (first >= part.length) return;
    softmax.finish();
    store_rows<kDim>(sums, 1.0f / softmax.total, out, part, shared.scratch);
    const int row = first + lane_row();
    if (lane_half() == 0 && row < part.length) lse[size_t(part.head) * n + part.start + row] = softmax.lse();
}

// The inner product of a row of two tensors, shared by its two lanes.
template <int V>
__device__ __forceinline__ float inner(Global<const scalar> a, Global<const scalar> b, size_t at, int dim) {
    float sum = 0.0f;
    for (int c = lane_half() * V; c < dim; c += 2 * V) {
        const Floats<V> x = to_floats(load_pack<V>(a, (at + c) / V)), y = to_floats(load_pack<V>(b, (at + c) / V));
        for (int j = 0; j < V; ++j) sum += x.at[j] * y.at[j];
    }
    return sum;
}

// dq; and delta (heads, n), the inner product of each row of out and its gradient, which dk and dv need as well.
template <int kDim>
__device__ __forceinline__ void backward_q(Global<const scalar> q, Global<const scalar> k, Global<const scalar> v,
                                           Global<const scalar> out, Global<const float> lse,
                                           Global<const scalar> grad, Global<float> delta, Global<scalar> dq,
                                           Global<const int> cu_seqlens, int n, int tiles, int heads, int dim,
                                           float scale) {
    DYNAMIC_SHARED(bytes);
    const Part part = part_of(cu_seqlens, tiles, heads, dim, int(blockIdx.y));
    if (part.first >= part.length) return;
    const Shared<kDim> shared(bytes, 2);
    load_rows<kDim>(q, part, part.first, kOwn, shared.own[0]);
    load_rows<kDim>(grad, part, part.first, kOwn, shared.own[1]);
    const int first = part.first + warp_of() * kTile, row = first + lane_row();
    const size_t line = size_t(part.head) * n + part.start + row;
    float own_lse = 0.0f, own_delta = 0.0f;
    if (row < part.length) {
        own_lse = lse[line];
        own_delta = dim % kWide ? inner<1>(out, grad, part.at(row), dim) : inner<kWide>(out, grad, part.at(row), dim);
    }
    own_delta += __shfl_xor_sync(kAllLanes, own_delta, 1);
    if (lane_half() == 0 && row < part.length) delta[line] = own_delta;
    Sums<kDim> sums;
    clear<kDim>(sums);
    for (int key = 0; key < part.length; key += kOther) {
        __syncthreads();
        load_rows<kDim>(k, part, key, kOther, shared.other[0]);
        load_rows<kDim>(v, part, key, kOther, shared.other[1]);
        __syncthreads();
        if (first >= part.length) continue;
        Floats<kHeld> p = scores_of<kDim>(shared.mine(0), shared.other[0], dim, shared.scratch);
#pragma unroll
        for (int j = 0; j < kHeld; ++j)
            p.at[j] = key + column_of(j) < part.length ? exp2f(p.at[j] * (scale * kLog2E) - own_lse) : 0.0f;
        const Floats<kHeld> dp = scores_of<kDim>(shared.mine(1), shared.other[1], dim, shared.scratch);
#pragma unroll
        for (int j = 0; j < kHeld; ++j) p.at[j] *= dp.at[j] - own_delta;
        put(p, 1.0f, shared.scratch);
        add_product<kDim>(sums, shared.scratch, shared.other[0], dim);
    }
    if (first < part.length) store_rows<kDim>(sums, scale, dq, part, shared.scratch);
}

// dk and dv, from scores that are transposed: a row for each of the block's keys.
template <int kDim>
__device__ __forceinline__ void backward_kv(Global<const scalar> q, Global<const scalar> k, Global<const scalar> v,
                                            Global<const float> lse, Global<const scalar> grad,
                                            Global<const float> delta, Global<scalar> dk, Global<scalar> dv,
                                            Global<const int> cu_seqlens, int n, int tiles, int heads, int dim,
                                            float scale) {
    DYNAMIC_SHARED(bytes);
    const Part part = part_of(cu_seqlens, tiles, heads, dim, int(blockIdx.y));
    if (part.first >= part.length) return;
    const Shared<kDim> shared(bytes, 2);
    load_rows<kDim>(k, part, part.first, kOwn, shared.own[0]);
    load_rows<kDim>(v, part, part.first, kOwn, shared.own[1]);
    const int first = part.first + warp_of() * kTile;
    const size_t line = size_t(part.head) * n + part.start;
    Sums<kDim> dk_sums, dv_sums;
    clear<kDim>(dk_sums);
    clear<kDim>(dv_sums);
    for (int query = 0; query < part.length; query += kOther) {
        __syncthreads();
        load_rows<kDim>(q, part, query, kOther, shared.other[0]);
        load_rows<kDim>(grad, part, query, kOther, shared.other[1]);
        if (threadIdx.x < kOther) {
            const int row = query + int(threadIdx.x);
            const bool exists = row < part.length;
            shared.rows[threadIdx.x] = exists ? float(lse[line + row]) : infinity();  // so that p is 0 beyond the end
            shared.rows[kOther + threadIdx.x] = exists ? float(delta[line + row]) : 0.0f;
        }
        __syncthreads();
        if (first >= part.length) continue;
        Floats<kHeld> p = scores_of<kDim>(shared.mine(0), shared.other[0], dim, shared.scratch);
#pragma unroll
        for (int j = 0; j < kHeld; ++j)
            p.at[j] = exp2f(p.at[j] * (scale * kLog2E) - shared.rows[column_of(j)]);
        put(p, 1.0f, shared.scratch);
        add_product<kDim>(dv_sums, shared.scratch, shared.other[1], dim);
        const Floats<kHeld> dp = scores_of<kDim>(shared.mine(1), shared.other[1], dim, shared.scratch);
#pragma unroll
        for (int j = 0; j < kHeld; ++j) p.at[j] *= dp.at[j] - shared.rows[kOther + column_of(j)];
        put(p, 1.0f, shared.scratch);
        add_product<kDim>(dk_sums, shared.scratch, shared.other[0], dim);
    }
    if (first >= part.length) return;
    store_rows<kDim>(dk_sums, scale, dk, part, shared.scratch);
    store_rows<kDim>(dv_sums, 1.0f, dv, part, shared.scratch);
}

KERNEL(kMostThreads, 1, attention_forward_64,
       (Global<const scalar> q, Global<const scalar> k, Global<const scalar> v, Global<scalar> out, Global<float> lse,
        Global<const int> cu_seqlens, int n, int tiles, int heads, int dim, float scale)) {
    forward<64>(q, k, v, out, lse, cu_seqlens, n, tiles, heads, dim, scale);
}
KERNEL(kMostThreads, 1, attention_forward_128,
       (Global<const scalar> q, Global<const scalar> k, Global<const scalar> v, Global<scalar> out, Global<float> lse,
        Global<const int> cu_seqlens, int n, int tiles, int heads, int dim, float scale)) {
    forward<128>(q, k, v, out, lse, cu_seqlens, n, tiles, heads, dim, scale);
}
KERNEL(kMostThreads, 1, attention_backward_q_64,
       (Global<const scalar> q, Global<const scalar> k, Global<const scalar> v, Global<const scalar> out,
        Global<const float> lse, Global<const scalar> grad, Global<float> delta, Global<scalar> dq,
        Global<const int> cu_seqlens, int n, int tiles, int heads, int dim, float scale)) {
    backward_q<64>(q, k, v, out, lse, grad, delta, dq, cu_seqlens, n, tiles, heads, dim, scale);
}
KERNEL(kMostThreads, 1, attention_backward_q_128,
       (Global<const scalar> q, Global<const scalar> k, Global<const scalar> v, Global<const scalar> out,
        Global<const float> lse, Global<const scalar> grad, Global<float> delta, Global<scalar> dq,
        Global<const int> cu_seqlens, int n, int tiles, int heads, int dim, float scale)) {
    backward_q<128>(q, k, v, out, lse, grad, delta, dq, cu_seqlens, n, tiles, heads, dim, scale);
}
KERNEL(kMostThreads, 1, attention_backward_kv_64,
       (Global<const scalar> q, Global<const scalar> k, Global<const scalar> v, Global<const float> lse,
        Global<const scalar> grad, Global<const float> delta, Global<scalar> dk, Global<scalar> dv,
        Global<const int> cu_seqlens, int n, int tiles, int heads, int dim, float scale)) {
    backward_kv<64>(q, k, v, lse, grad, delta, dk, dv, cu_seqlens, n, tiles, heads, dim, scale);
}
KERNEL(kMostThreads, 1, attention_backward_kv_128,
       (Global<const scalar> q, Global<const scalar> k, Global<const scalar> v, Global<const float> lse,
        Global<const scalar> grad, Global<const float> delta, Global<scalar> dk, Global<scalar> dv,
        Global<const int> cu_seqlens, int n, int tiles, int heads, int dim, float scale)) {
    backward_kv<128>(q, k, v, lse, grad, delta, dk, dv, cu_seqlens, n, tiles, heads, dim, scale);
}

}  // namespace esm
