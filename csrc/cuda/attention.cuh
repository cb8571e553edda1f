// Attention's scores over packed sequences, a tile at a time: what attention.cu and contact_map.cu have in common.
//
// A block owns a tile of rows of one head of one sequence, 16 a warp, and walks over the other side of that sequence
// alone. Tiles begin where the sequence begins, so a sequence's bits do not depend on its neighbours; no two blocks add
// to one address, so there are no atomics. Heads have up to 64 or up to 128 columns, padded with zeros to whole tiles.
#pragma once

#include "tiles.cuh"

namespace esm {

constexpr int kMostThreads = 4 * kWarp;
constexpr int kWarps = sizeof(scalar) == 4 ? 2 : 4;  // fp32 would need more shared memory than a block can have
constexpr int kThreads = kWarps * kWarp;
constexpr int kOwn = kWarps * kTile;  // rows of a block
constexpr int kOther = 32;            // rows of a step
constexpr int kHeld = kTile * kOther / kWarp;
constexpr float kLog2E = 1.4426950408889634f;

// A warp's scratch: 16 rows of scores in fp32, which give way to what is multiplied next, in the factors' own dtype,
// and a tile of row factors beside that. The strides put the rows that are touched at once into different banks.
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

__device__ __forceinline__ Part part_of(Global<const int> cu_seqlens, int tiles, int heads, int dim, int head) {
    const int sequence = int(blockIdx.x) / tiles, start = cu_seqlens[sequence];
    const int length = cu_seqlens[sequence + 1] - start, first = int(blockIdx.x) % tiles * kOwn;
    const size_t step = size_t(heads) * dim;
    return {start, length, first, head, dim, start * step + size_t(head) * dim, step};
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

// A softmax over what has been seen of a row: the largest score, of base 2, and the sum over this lane's own columns.
struct Softmax {
    float top = -infinity(), total = 0.0f;

    // Turns scores into weights, over the largest so far; returns what all earlier weights shrink by.
    __device__ __forceinline__ float add(Floats<kHeld>& p, int first, int length, float scale) {
        float higher = top;
#pragma unroll
        for (int j = 0; j < kHeld; ++j) {
            p.at[j] = first + column_of(j) < length ? p.at[j] * (scale * kLog2E) : -infinity();
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
        return shrink;
    }
    // Of the whole row; once, at its end.
    __device__ __forceinline__ void finish() { total += __shfl_xor_sync(kAllLanes, total, 1); }
    __device__ __forceinline__ float lse() const { return top + log2f(total); }
};

}  // namespace esm
