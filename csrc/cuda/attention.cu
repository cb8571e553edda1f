// Flash attention (Dao 2023) over packed sequences, bidirectional: softmax(scale q k') v without storing any scores.
//
// A block owns a tile of rows of one head of one sequence (queries; keys, for dk and dv), 16 a warp, and walks over the
// other side of that sequence alone. Tiles begin where the sequence begins, so a sequence's bits do not depend on its
// neighbours; no two blocks add to one address, so there are no atomics. The log-sum-exp of every row is of base 2,
// (heads, n). Heads have up to 64 or up to 128 columns, which shared memory pads with zeros to whole tiles.
#include "tiles.cuh"

namespace esm {

constexpr int kMostThreads = 4 * kWarp;
constexpr int kWarps = sizeof(scalar) == 4 ? 2 : 4;  // fp32 would need more shared memory than a block can have
constexpr int kThreads = kWarps * kWarp;
constexpr int kOwn = kWarps * kTile;  // rows of a block
constexpr int kOther = 32;            // rows of a step
constexpr int kHeld = kTile * kOther / kWarp;
constexpr float kLog2E = 1.4426950408889634f;

// A warp's scratch: 16 rows of scores in fp32, which give way to what is multiplied next, in the factors' own dtype, and
// a tile of row factors beside that. The strides put the rows that are touched at once into different banks.
constexpr int kFactors = kOther * int(sizeof(scalar)) / 4;
constexpr int kScratch = (kFactors + kTile > kOther ? kFactors + kTile : kOther) + 8;
constexpr int kNarrow = kScratch * 4 / int(sizeof(scalar));  // the stride, in elements of the factors' dtype

template <int kDim>
constexpr int kStride = kDim + kWide;

template <int kDim>
using Sums = Product<scalar>[kDim / kTile];

// What a block works on: the rows of one head of one sequence, of which its own begin at `first`.
struct Part {
    int start, length, first, head, dim;
    size_t base, step;  // of the sequence's first row, and from row to row

    // The first element of a row of this head.
    __device__ __forceinline__ size_t at(int row) const { return base + size_t(row) * step; }
};

__device__ __forceinline__ Part part_of(Global<const int> cu_seqlens, int tiles, int heads, int dim) {
    const int sequence = int(blockIdx.x) / tiles, start = cu_seqlens[sequence];
    const int length = cu_seqlens[sequence + 1] - start, first = int(blockIdx.x) % tiles * kOwn;
    const size_t step = size_t(heads) * dim;
    return {start, length, first, int(blockIdx.y), dim, start * step + size_t(blockIdx.y) * dim, step};
}

__device__ __forceinline__ int warp_of() { return int(threadIdx.x) / kWarp; }
__device__ __forceinline__ int lane_row() { return int(threadIdx.x) % kWarp / 2; }  // two lanes share a row
__device__ __forceinline__ int lane_half() { return int(threadIdx.x) % 2; }

template <int kDim, int V>
__device__ __forceinline__ void load_packs(Global<const scalar> tensor, const Part& part, int first, int rows,
                                           scalar* shared) {
    const int packs = (part.dim + kTile - 1) / kTile * kTile / V;
    for (int i = threadIdx.x; i < rows * packs; i += kThreads) {
        const int r = i / packs, c = i % packs * V;
        Pack<scalar, V> pack = {};
        if (first + r < part.length && c < part.dim) pack = load_pack<V>(tensor, (part.at(first + r) + c) / V);
        *reinterpret_cast<Pack<scalar, V>*>(shared + r * kStride<kDim> + c) = pack;
    }
}

// Rows of the sequence into shared memory; zeros beyond its end, and beyond the head's columns.
template <int kDim>
__device__ __forceinline__ void load_rows(Global<const scalar> tensor, const Part& part, int first, int rows,
                                          scalar* shared) {
    if (part.dim % kWide)
        load_packs<kDim, 1>(tensor, part, first, rows, shared);
    else
        load_packs<kDim, kWide>(tensor, part, first, rows, shared);
}

// A warp's 16 rows times the step's 32 transposed; each lane gets half of a row, its columns as `column_of` has them.
template <int kDim>
__device__ __forceinline__ Floats<kHeld> scores_of(const scalar* own, const scalar* other, int dim, float* scratch) {
    __syncwarp();
    for (int t = 0; t < kOther; t += kTile) {
        Product<scalar> sums;
        sums.clear();
#pragma unroll
        for (int c = 0; c < kDim; c += kTile)
            if (c < dim)
                sums.add_transposed(own + c, kStride<kDim>, other + t * kStride<kDim> + c, kStride<kDim>);
        sums.store(scratch + t, kScratch);
    }
    __syncwarp();
    Floats<kHeld> result;
#pragma unroll
    for (int j = 0; j < kHeld; j += 4) {
        const float* from = scratch + lane_row() * kScratch + 2 * j + 4 * lane_half();
        const Pack<float, 4> pack = *reinterpret_cast<const Pack<float, 4>*>(from);
#pragma unroll
        for (int i = 0; i < 4; ++i) result.at[j + i] = pack.at[i];
    }
    return result;
}

__device__ __forceinline__ int column_of(int j) { return j / 4 * 8 + 4 * lane_half() + j % 4; }

// The lanes' shares of 16 rows of a left factor, and each row's number beside them.
__device__ __forceinline__ void put(const Floats<kHeld>& values, float row_factor, float* scratch) {
    __syncwarp();
    scalar* row = reinterpret_cast<scalar*>(scratch) + lane_row() * kNarrow;
#pragma unroll
    for (int j = 0; j < kHeld; j += 4) {
        Pack<scalar, 4> pack;
#pragma unroll
        for (int i = 0; i < 4; ++i) pack.at[i] = from_float<scalar>(values.at[j + i]);
        *reinterpret_cast<Pack<scalar, 4>*>(row + column_of(j)) = pack;
    }
    float* factors = scratch + lane_row() * kScratch + kFactors + 8 * lane_half();
#pragma unroll
    for (int i = 0; i < 8; i += 4)
        *reinterpret_cast<Pack<float, 4>*>(factors + i) = {row_factor, row_factor, row_factor, row_factor};
    __syncwarp();
}

// sums += what was `put`, times the step's rows.
template <int kDim>
__device__ __forceinline__ void add_product(Sums<kDim>& sums, const float* scratch, const scalar* other, int dim) {
#pragma unroll
    for (int c = 0; c < kDim / kTile; ++c)
        if (c * kTile < dim)
            for (int k = 0; k < kOther; k += kTile)
                sums[c].add(reinterpret_cast<const scalar*>(scratch) + k, kNarrow,
                            other + k * kStride<kDim> + c * kTile, kStride<kDim>);
}

template <int kDim>
__device__ __forceinline__ void clear(Sums<kDim>& sums) {
#pragma unroll
    for (int c = 0; c < kDim / kTile; ++c) sums[c].clear();
}

// A warp's 16 rows of sums, times a factor, into a tensor.
template <int kDim>
__device__ __forceinline__ void store_rows(const Sums<kDim>& sums, float factor, Global<scalar> tensor,
                                           const Part& part, float* scratch) {
    const int row = part.first + warp_of() * kTile + lane_row();
#pragma unroll
    for (int c = 0; c < kDim / kTile; ++c) {
        if (c * kTile >= part.dim) continue;
        __syncwarp();
        sums[c].store(scratch, kScratch);
        __syncwarp();
        if (row >= part.length) continue;
        const float* own = scratch + lane_row() * kScratch + 8 * lane_half();
        const int column = c * kTile + 8 * lane_half();
        const size_t to = part.at(row) + column;
        if (part.dim % kWide) {
            for (int i = 0; i < min(8, part.dim - column); ++i) tensor[to + i] = from_float<scalar>(own[i] * factor);
            continue;
        }
        for (int i = 0; i < min(8, part.dim - column); i += kWide) {
            Floats<kWide> values;
            for (int j = 0; j < kWide; ++j) values.at[j] = own[i + j] * factor;
            store_pack(tensor, (to + i) / kWide, from_floats<scalar>(values));
        }
    }
}

// Shared memory: `tiles` tiles of the block's own rows, two of the other side's, and the warps' scratch.
template <int kDim>
struct Shared {
    scalar *own[2], *other[2];
    float *scratch, *rows;  // of this warp; of the step's rows, two numbers each

    __device__ __forceinline__ Shared(unsigned char* bytes, int tiles) {
        scalar* next = reinterpret_cast<scalar*>(bytes);
        for (int i = 0; i < tiles; ++i, next += kOwn * kStride<kDim>) own[i] = next;
        for (int i = 0; i < 2; ++i, next += kOther * kStride<kDim>) other[i] = next;
        float* all = reinterpret_cast<float*>(next);
        scratch = all + warp_of() * kTile * kScratch;
        rows = all + kOwn * kScratch;
    }
    // This warp's rows of the block's own.
    __device__ __forceinline__ const scalar* mine(int i) const { return own[i] + warp_of() * kTile * kStride<kDim>; }
};

template <int kDim>
__device__ __forceinline__ void forward(Global<const scalar> q, Global<const scalar> k, Global<const scalar> v,
                                        Global<scalar> out, Global<float> lse, Global<const int> cu_seqlens, int n,
                                        int tiles, int heads, int dim, float scale) {
    DYNAMIC_SHARED(bytes);
    const Part part = part_of(cu_seqlens, tiles, heads, dim);
    if (part.first >= part.length) return;
    const Shared<kDim> shared(bytes, 1);
    const int first = part.first + warp_of() * kTile;
    load_rows<kDim>(q, part, part.first, kOwn, shared.own[0]);
    float top = -infinity(), total = 0.0f;  // of this lane's row; the sum over its own columns
    Sums<kDim> sums;
    clear<kDim>(sums);
    for (int key = 0; key < part.length; key += kOther) {
        __syncthreads();
        load_rows<kDim>(k, part, key, kOther, shared.other[0]);
        load_rows<kDim>(v, part, key, kOther, shared.other[1]);
        __syncthreads();
        if (first >= part.length) continue;
        Floats<kHeld> p = scores_of<kDim>(shared.mine(0), shared.other[0], dim, shared.scratch);
        float higher = top;
#pragma unroll
        for (int j = 0; j < kHeld; ++j) {
            p.at[j] = key + column_of(j) < part.length ? p.at[j] * (scale * kLog2E) : -infinity();
            higher = fmaxf(higher, p.at[j]);
        }
        higher = fmaxf(higher, __shfl_xor_sync(kAllLanes, higher, 1));
        const float shrink = exp2f(top - higher);
        top = higher;
        total *= shrink;
#pragma unroll
        for (int j = 0; j < kHeld; ++j) {
            p.at[j] = exp2f(p.at[j] - top);
            total += p.at[j];
        }
        put(p, shrink, shared.scratch);
#pragma unroll
        for (int c = 0; c < kDim / kTile; ++c)
            if (c * kTile < dim) sums[c].scale(shared.scratch + kFactors, kScratch);
        add_product<kDim>(sums, shared.scratch, shared.other[1], dim);
    }
    if (first >= part.length) return;
    total += __shfl_xor_sync(kAllLanes, total, 1);
    store_rows<kDim>(sums, 1.0f / total, out, part, shared.scratch);
    const int row = first + lane_row();
    if (lane_half() == 0 && row < part.length) lse[size_t(part.head) * n + part.start + row] = top + log2f(total);
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
    const Part part = part_of(cu_seqlens, tiles, heads, dim);
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
    const Part part = part_of(cu_seqlens, tiles, heads, dim);
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
