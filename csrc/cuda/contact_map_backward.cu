// The gradient of contact_map, on the tiles of its forward pass, again without a stored attention map.
//
// With g the gradient of a sequence's logits plus its mirror image (mirror.cu), r the row sums of a head's symmetrised
// map, t their sum and w the head's weight, the gradient of the attention map itself is, over kept rows and columns,
//
//     w g_ij + e_i + e_j, where e = w (r . g r / (2 t) - g r) / t
//
// from where it continues through the softmax. A row that is not kept has no gradient: its log-sum-exp counts as
// infinite, so that its weights are 0. A kept row's weight of a column that is not kept still moves with the row's sum.
#include "attention.cuh"

namespace esm {

// A block's head of a sequence: what of a row or column the gradient is made of.
struct Head {
    Part part;
    Global<const float> map, lse, e;
    Global<const unsigned char> keep;
    float weight;

    __device__ __forceinline__ bool kept(int row) const { return row < part.length && keep[row]; }
    __device__ __forceinline__ float lse_of(int row) const { return kept(row) ? float(lse[row]) : infinity(); }
    __device__ __forceinline__ float e_of(int row) const { return kept(row) ? float(e[row]) : 0.0f; }
};

// map: g, of which a sequence's begins at starts[s]. e, lse, delta, along (heads, n).
struct Tensors {
    Global<const float> lse, e, weight, map;
    Global<const unsigned char> keep;
    Global<const long long> starts;
    Global<const int> cu_seqlens;
    int n, tiles, heads, dim;

    __device__ __forceinline__ size_t line(const Part& part) const { return size_t(part.head) * n + part.start; }
    __device__ __forceinline__ Head head() const {
        const Part part = part_of(cu_seqlens, tiles, heads, dim, int(blockIdx.y));
        const size_t begin = size_t(starts[int(blockIdx.x) / tiles]);
        return {part, map + begin, lse + line(part), e + line(part), keep + part.start, weight[part.head]};
    }
};

// A warp's 16 rows and the step's 32 columns of g; 0 beyond the end.
__device__ __forceinline__ Floats<kHeld> map_tile(const Head& head, int row, int column, float* scratch) {
    const int lane = int(threadIdx.x) % kWarp, length = head.part.length;
    __syncwarp();
    for (int r = 0; r < kTile; ++r) {
        const bool exists = row + r < length && column + lane < length;
        const size_t at = size_t(row + r) * length + column + lane;
        scratch[r * kScratch + lane] = exists ? float(head.map[at]) : 0.0f;
    }
    __syncwarp();
    Floats<kHeld> result;
#pragma unroll
    for (int j = 0; j < kHeld; ++j) result.at[j] = scratch[lane_row() * kScratch + column_of(j)];
    return result;
}

// The attention weights of a warp's 16 rows for the step's 32 columns, g, and the gradient of the weights.
struct Step {
    Floats<kHeld> p, g, dp;
};

// shared.rows: of each column e, and whether it is kept.
template <int kDim>
__device__ __forceinline__ Step step_of(const Head& head, const Shared<kDim>& shared, int first, int column,
                                        float own_lse, float own_e, float scale) {
    Step step;
    step.p = scores_of<kDim>(shared.mine(0), shared.other[0], head.part.dim, shared.scratch);
    step.g = map_tile(head, first, column, shared.scratch);
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
        const int c = column_of(j);
        const bool exists = column + c < head.part.length;
        step.p.at[j] = exists ? exp2f(step.p.at[j] * (scale * kLog2E) - own_lse) : 0.0f;
        const float gradient = head.weight * step.g.at[j] + own_e + shared.rows[c];
        step.dp.at[j] = shared.rows[kOther + c] != 0.0f ? gradient : 0.0f;
    }
    return step;
}

template <int kDim>
__device__ __forceinline__ void load_columns(Global<const scalar> k, const Head& head, int column,
                                             const Shared<kDim>& shared) {
    __syncthreads();
    load_rows<kDim>(k, head.part, column, kOther, shared.other[0]);
    if (threadIdx.x < kOther) {
        shared.rows[threadIdx.x] = head.e_of(column + int(threadIdx.x));
        shared.rows[kOther + threadIdx.x] = head.kept(column + int(threadIdx.x)) ? 1.0f : 0.0f;
    }
    __syncthreads();
}

// The inner products of a row of the attention map with its gradient (delta), and with g, for the weight (along).
template <int kDim>
__device__ __forceinline__ void inner_products(Global<const scalar> q, Global<const scalar> k, const Tensors& tensors,
                                               Global<float> delta, Global<float> along, float scale) {
    DYNAMIC_SHARED(bytes);
    const Head head = tensors.head();
    if (head.part.first >= head.part.length) return;
    const Shared<kDim> shared(bytes, 1);
    const int first = head.part.first + warp_of() * kTile, row = first + lane_row();
    load_rows<kDim>(q, head.part, head.part.first, kOwn, shared.own[0]);
    const float own_lse = head.lse_of(row), own_e = head.e_of(row);
    float with_gradient = 0.0f, with_g = 0.0f;
    for (int column = 0; column < head.part.length; column += kOther) {
        load_columns<kDim>(k, head, column, shared);
        if (first >= head.part.length) continue;
        const Step step = step_of<kDim>(head, shared, first, column, own_lse, own_e, scale);
#pragma unroll
        for (int j = 0; j < kHeld; ++j) {
            with_gradient += step.p.at[j] * step.dp.at[j];
            with_g += step.p.at[j] * step.g.at[j];
        }
    }
    if (first >= head.part.length) return;
    with_gradient += __shfl_xor_sync(kAllLanes, with_gradient, 1);
    with_g += __shfl_xor_sync(kAllLanes, with_g, 1);
    if (lane_half() || row >= head.part.length) return;
    delta[tensors.line(head.part) + row] = with_gradient;
    along[tensors.line(head.part) + row] = with_g;
}

template <int kDim>
__device__ __forceinline__ void backward_q(Global<const scalar> q, Global<const scalar> k, const Tensors& tensors,
                                           Global<const float> delta, Global<scalar> dq, float scale) {
    DYNAMIC_SHARED(bytes);
    const Head head = tensors.head();
    if (head.part.first >= head.part.length) return;
    const Shared<kDim> shared(bytes, 1);
    const int first = head.part.first + warp_of() * kTile, row = first + lane_row();
    load_rows<kDim>(q, head.part, head.part.first, kOwn, shared.own[0]);
    const float own_lse = head.lse_of(row), own_e = head.e_of(row);
    const float own_delta = row < head.part.length ? float(delta[tensors.line(head.part) + row]) : 0.0f;
    Sums<kDim> sums;
    clear<kDim>(sums);
    for (int column = 0; column < head.part.length; column += kOther) {
        load_columns<kDim>(k, head, column, shared);
        if (first >= head.part.length) continue;
        Step step = step_of<kDim>(head, shared, first, column, own_lse, own_e, scale);
#pragma unroll
        for (int j = 0; j < kHeld; ++j) step.p.at[j] *= step.dp.at[j] - own_delta;
        put(step.p, 1.0f, shared.scratch);
        add_product<kDim>(sums, shared.scratch, shared.other[0], head.part.dim);
    }
    if (first < head.part.length) store_rows<kDim>(sums, scale, dq, head.part, shared.scratch);
}

// From scores that are transposed, a row for each of the block's keys; g is its own mirror image.
template <int kDim>
__device__ __forceinline__ void backward_k(Global<const scalar> q, Global<const scalar> k, const Tensors& tensors,
                                           Global<const float> delta, Global<scalar> dk, float scale) {
    DYNAMIC_SHARED(bytes);
    SHARED(float, deltas, kOther);
    const Head head = tensors.head();
    const Part part = head.part;
    if (part.first >= part.length) return;
    const Shared<kDim> shared(bytes, 1);
    const int first = part.first + warp_of() * kTile, key = first + lane_row();
    load_rows<kDim>(k, part, part.first, kOwn, shared.own[0]);
    const float own_e = head.e_of(key);
    const bool own_kept = head.kept(key);
    Sums<kDim> sums;
    clear<kDim>(sums);
    for (int query = 0; query < part.length; query += kOther) {
        __syncthreads();
        load_rows<kDim>(q, part, query, kOther, shared.other[0]);
        if (threadIdx.x < kOther) {
            const int row = query + int(threadIdx.x);
            shared.rows[threadIdx.x] = head.lse_of(row);
            shared.rows[kOther + threadIdx.x] = head.e_of(row);
            deltas[threadIdx.x] = row < part.length ? float(delta[tensors.line(part) + row]) : 0.0f;
        }
        __syncthreads();
        if (first >= part.length) continue;
        Floats<kHeld> p = scores_of<kDim>(shared.mine(0), shared.other[0], part.dim, shared.scratch);
        const Floats<kHeld> g = map_tile(head, first, query, shared.scratch);
#pragma unroll
        for (int j = 0; j < kHeld; ++j) {
            const int c = column_of(j);
            const float gradient = own_kept ? head.weight * g.at[j] + own_e + shared.rows[kOther + c] : 0.0f;
            p.at[j] = exp2f(p.at[j] * (scale * kLog2E) - shared.rows[c]) * (gradient - deltas[c]);
        }
        put(p, 1.0f, shared.scratch);
        add_product<kDim>(sums, shared.scratch, shared.other[0], part.dim);
    }
    if (first < part.length) store_rows<kDim>(sums, scale, dk, part, shared.scratch);
}

#define BACKWARD(name, kDim, function, A, a, B, b)                                                                   \
    KERNEL(kMostThreads, 1, name,                                                                                    \
           (Global<const scalar> q, Global<const scalar> k, Global<const float> lse, Global<const float> e,          \
            Global<const float> weight, Global<const float> map, Global<const unsigned char> keep, A a, B b,         \
            Global<const long long> starts, Global<const int> cu_seqlens, int n, int tiles, int heads, int dim,      \
            float scale)) {                                                                                          \
        const Tensors tensors = {lse, e, weight, map, keep, starts, cu_seqlens, n, tiles, heads, dim};               \
        function<kDim>(q, k, tensors, a, b, scale);                                                                  \
    }

BACKWARD(contact_map_backward_rows_64, 64, inner_products, Global<float>, delta, Global<float>, along)
BACKWARD(contact_map_backward_rows_128, 128, inner_products, Global<float>, delta, Global<float>, along)
BACKWARD(contact_map_backward_q_64, 64, backward_q, Global<const float>, delta, Global<scalar>, dq)
BACKWARD(contact_map_backward_q_128, 128, backward_q, Global<const float>, delta, Global<scalar>, dq)
BACKWARD(contact_map_backward_k_64, 64, backward_k, Global<const float>, delta, Global<scalar>, dk)
BACKWARD(contact_map_backward_k_128, 128, backward_k, Global<const float>, delta, Global<scalar>, dk)

}  // namespace esm
