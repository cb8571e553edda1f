// One layer's contact logits (esm_fast/ops/contact_map.py), streamed over the heads: no attention map is ever stored.
//
// Each pass computes the scores that it needs again: for the log-sum-exp of every row; for the sums of each symmetrised
// map's rows; and for the tiles of the result on and above the diagonal, summed over the heads in registers, which are
// stored with their mirror images. A softmax goes over all keys; rows and columns that are not kept count in no sum.
#include "attention.cuh"

namespace esm {

// lse (heads, n), of base 2.
template <int kDim>
__device__ __forceinline__ void row_lse(Global<const scalar> q, Global<const scalar> k, Global<float> lse,
                                        Global<const int> cu_seqlens, int n, int tiles, int heads, int dim,
                                        float scale) {
    DYNAMIC_SHARED(bytes);
    const Part part = part_of(cu_seqlens, tiles, heads, dim, int(blockIdx.y));
    if (part.first >= part.length) return;
    const Shared<kDim> shared(bytes, 1);
    const int first = part.first + warp_of() * kTile, row = first + lane_row();
    load_rows<kDim>(q, part, part.first, kOwn, shared.own[0]);
    Softmax softmax;
    for (int key = 0; key < part.length; key += kOther) {
        __syncthreads();
        load_rows<kDim>(k, part, key, kOther, shared.other[0]);
        __syncthreads();
        if (first >= part.length) continue;
        Floats<kHeld> p = scores_of<kDim>(shared.mine(0), shared.other[0], dim, shared.scratch);
        softmax.add(p, key, part.length, scale);
    }
    if (first >= part.length) return;
    softmax.finish();
    if (lane_half() == 0 && row < part.length) lse[size_t(part.head) * n + part.start + row] = softmax.lse();
}

// Two numbers of each of the step's rows: of `a`, with `beyond` for rows that do not exist, and of `b`, with 0.
template <typename A, typename B>
__device__ __forceinline__ void load_numbers(A a, float beyond, B b, int first, int length, float* rows) {
    if (threadIdx.x >= kOther) return;
    const int row = first + int(threadIdx.x);
    rows[threadIdx.x] = row < length ? float(a(row)) : beyond;
    rows[kOther + threadIdx.x] = row < length ? float(b(row)) : 0.0f;
}

// sums (heads, n): of the rows of each map and its mirror image, over kept rows and columns; 0 where not kept.
template <int kDim>
__device__ __forceinline__ void row_sums(Global<const scalar> q, Global<const scalar> k, Global<const float> lse,
                                         Global<const unsigned char> keep, Global<float> sums,
                                         Global<const int> cu_seqlens, int n, int tiles, int heads, int dim,
                                         float scale) {
    DYNAMIC_SHARED(bytes);
    const Part part = part_of(cu_seqlens, tiles, heads, dim, int(blockIdx.y));
    if (part.first >= part.length) return;
    const Shared<kDim> shared(bytes, 2);
    const int first = part.first + warp_of() * kTile, row = first + lane_row();
    const size_t line = size_t(part.head) * n + part.start;
    const auto lse_of = [&](int r) { return float(lse[line + r]); };
    const auto kept = [&](int r) { return float(keep[size_t(part.start) + r]); };
    load_rows<kDim>(q, part, part.first, kOwn, shared.own[0]);
    load_rows<kDim>(k, part, part.first, kOwn, shared.own[1]);
    const float own_lse = row < part.length ? lse_of(row) : infinity();
    float sum = 0.0f;
    for (int other = 0; other < part.length; other += kOther) {
        __syncthreads();
        load_rows<kDim>(k, part, other, kOther, shared.other[0]);
        load_rows<kDim>(q, part, other, kOther, shared.other[1]);
        load_numbers(lse_of, infinity(), kept, other, part.length, shared.rows);
        __syncthreads();
        if (first >= part.length) continue;
        const Floats<kHeld> there = scores_of<kDim>(shared.mine(0), shared.other[0], dim, shared.scratch);
#pragma unroll
        for (int j = 0; j < kHeld; ++j)
            sum += exp2f(there.at[j] * (scale * kLog2E) - own_lse) * shared.rows[kOther + column_of(j)];
        const Floats<kHeld> back = scores_of<kDim>(shared.mine(1), shared.other[1], dim, shared.scratch);
#pragma unroll
        for (int j = 0; j < kHeld; ++j)
            sum += exp2f(back.at[j] * (scale * kLog2E) - shared.rows[column_of(j)]) *
                   shared.rows[kOther + column_of(j)];
    }
    if (first >= part.length) return;
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    if (lane_half() == 0 && row < part.length) sums[line + row] = kept(row) != 0.0f ? sum : 0.0f;
}

// Where a sequence's map lies, and what is left of it once tokens that are no residues are taken out.
struct Map {
    Global<float> out;
    Global<const unsigned char> keep;
    int length;

    __device__ __forceinline__ void put(int row, int column, float value) const {
        const bool kept = keep[row] && keep[column];
        out[size_t(row) * length + column] = kept ? value : 0.0f;
    }
};

// A warp's 16 rows and 32 columns of the sum over the heads, the part on and above the diagonal, both ways round. A
// warp's lanes write along the rows of the map.
__device__ __forceinline__ void put_tile(const Map& map, int row, int column, const Floats<kHeld>& sums,
                                         float* scratch) {
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kHeld; ++j) scratch[lane_row() * kScratch + column_of(j)] = sums.at[j];
    __syncwarp();
    const int lane = int(threadIdx.x) % kWarp;
    for (int r = 0; r < kTile; ++r)
        if (column + lane >= row + r && column + lane < map.length)
            map.put(row + r, column + lane, scratch[r * kScratch + lane]);
    const int r = lane % kTile;
    for (int c = lane / kTile; c < kOther; c += kWarp / kTile)
        if (column + c > row + r && column + c < map.length)
            map.put(column + c, row + r, scratch[r * kScratch + c]);
}

// out: each sequence's map, of which element 0 is out[starts[s]]. wholes (heads, sequences): t, the sum of a whole map.
// The average product is r_i (r_j / t), not r_i r_j / t, so that a lone residue's logit is exactly 0.
template <int kDim>
__device__ __forceinline__ void map_tiles(Global<const scalar> q, Global<const scalar> k, Global<const float> lse,
                                          Global<const float> sums, Global<const float> wholes,
                                          Global<const float> weight, Global<const unsigned char> keep,
                                          Global<float> out, Global<const long long> starts,
                                          Global<const int> cu_seqlens, int n, int tiles, int heads, int dim,
                                          float scale) {
    DYNAMIC_SHARED(bytes);
    const int sequence = int(blockIdx.x) / tiles, sequences = int(gridDim.x) / tiles, left = int(blockIdx.y) * kOther;
    const Part whole = part_of(cu_seqlens, tiles, heads, dim, 0);
    if (left < whole.first || left >= whole.length) return;
    const Shared<kDim> shared(bytes, 2);
    const int first = whole.first + warp_of() * kTile, row = first + lane_row();
    const bool idle = first >= whole.length || first >= left + kOther;  // beyond the end, or below the diagonal
    Floats<kHeld> total = {};
    for (int head = 0; head < heads; ++head) {
        const Part part = part_of(cu_seqlens, tiles, heads, dim, head);
        const size_t line = size_t(head) * n + part.start;
        const auto lse_of = [&](int r) { return float(lse[line + r]); };
        const float whole_sum = wholes[size_t(head) * sequences + sequence];
        const auto share_of = [&](int r) { return float(sums[line + r]) / whole_sum; };
        __syncthreads();
        load_rows<kDim>(q, part, part.first, kOwn, shared.own[0]);
        load_rows<kDim>(k, part, part.first, kOwn, shared.own[1]);
        load_rows<kDim>(k, part, left, kOther, shared.other[0]);
        load_rows<kDim>(q, part, left, kOther, shared.other[1]);
        load_numbers(lse_of, infinity(), share_of, left, part.length, shared.rows);
        __syncthreads();
        if (idle) continue;
        const float w = weight[head], own_lse = row < part.length ? lse_of(row) : infinity();
        const float own_sum = row < part.length ? float(sums[line + row]) : 0.0f;
        const Floats<kHeld> there = scores_of<kDim>(shared.mine(0), shared.other[0], dim, shared.scratch);
        const Floats<kHeld> back = scores_of<kDim>(shared.mine(1), shared.other[1], dim, shared.scratch);
#pragma unroll
        for (int j = 0; j < kHeld; ++j) {
            const float a = exp2f(there.at[j] * (scale * kLog2E) - own_lse);
            const float b = exp2f(back.at[j] * (scale * kLog2E) - shared.rows[column_of(j)]);
            total.at[j] += w * (a + b - own_sum * shared.rows[kOther + column_of(j)]);
        }
    }
    const Map map = {out + size_t(starts[sequence]), keep + whole.start, whole.length};
    if (!idle) put_tile(map, first, left, total, shared.scratch);
}

KERNEL(kMostThreads, 1, contact_map_lse_64,
       (Global<const scalar> q, Global<const scalar> k, Global<float> lse, Global<const int> cu_seqlens, int n,
        int tiles, int heads, int dim, float scale)) {
    row_lse<64>(q, k, lse, cu_seqlens, n, tiles, heads, dim, scale);
}
KERNEL(kMostThreads, 1, contact_map_lse_128,
       (Global<const scalar> q, Global<const scalar> k, Global<float> lse, Global<const int> cu_seqlens, int n,
        int tiles, int heads, int dim, float scale)) {
    row_lse<128>(q, k, lse, cu_seqlens, n, tiles, heads, dim, scale);
}
KERNEL(kMostThreads, 1, contact_map_sums_64,
       (Global<const scalar> q, Global<const scalar> k, Global<const float> lse, Global<const unsigned char> keep,
        Global<float> sums, Global<const int> cu_seqlens, int n, int tiles, int heads, int dim, float scale)) {
    row_sums<64>(q, k, lse, keep, sums, cu_seqlens, n, tiles, heads, dim, scale);
}
KERNEL(kMostThreads, 1, contact_map_sums_128,
       (Global<const scalar> q, Global<const scalar> k, Global<const float> lse, Global<const unsigned char> keep,
        Global<float> sums, Global<const int> cu_seqlens, int n, int tiles, int heads, int dim, float scale)) {
    row_sums<128>(q, k, lse, keep, sums, cu_seqlens, n, tiles, heads, dim, scale);
}
KERNEL(kMostThreads, 1, contact_map_tiles_64,
       (Global<const scalar> q, Global<const scalar> k, Global<const float> lse, Global<const float> sums,
        Global<const float> wholes, Global<const float> weight, Global<const unsigned char> keep, Global<float> out,
        Global<const long long> starts, Global<const int> cu_seqlens, int n, int tiles, int heads, int dim,
        float scale)) {
    map_tiles<64>(q, k, lse, sums, wholes, weight, keep, out, starts, cu_seqlens, n, tiles, heads, dim, scale);
}
KERNEL(kMostThreads, 1, contact_map_tiles_128,
       (Global<const scalar> q, Global<const scalar> k, Global<const float> lse, Global<const float> sums,
        Global<const float> wholes, Global<const float> weight, Global<const unsigned char> keep, Global<float> out,
        Global<const long long> starts, Global<const int> cu_seqlens, int n, int tiles, int heads, int dim,
        float scale)) {
    map_tiles<128>(q, k, lse, sums, wholes, weight, keep, out, starts, cu_seqlens, n, tiles, heads, dim, scale);
}

}  // namespace esm
