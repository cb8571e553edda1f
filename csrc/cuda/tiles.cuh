// Products of 16 x 16 tiles by one warp: by tensor cores (WMMA) for half types, by FMA for fp32. Which lane holds which
// element is no kernel's business: what needs rows and columns goes through shared memory.
#pragma once

#include "common.cuh"

namespace esm {

constexpr int kTile = 16;

// A tile of fp32 sums, in the registers of a warp. Factors lie in shared memory, aligned to 32 bytes, their rows a
// multiple of 16 bytes apart.
template <typename T>
class Product {
  public:
    __device__ __forceinline__ void clear() { nvcuda::wmma::fill_fragment(sums_, 0.0f); }

    // += a b
    __device__ __forceinline__ void add(const T* a, int a_stride, const T* b, int b_stride) {
        multiply<nvcuda::wmma::row_major>(a, a_stride, b, b_stride);
    }
    // += a b'
    __device__ __forceinline__ void add_transposed(const T* a, int a_stride, const T* b, int b_stride) {
        multiply<nvcuda::wmma::col_major>(a, a_stride, b, b_stride);
    }

    // Each element by its own factor: tiles of one type have one layout, whatever it is.
    __device__ __forceinline__ void scale(const float* factors, int stride) {
        Sums by;
        nvcuda::wmma::load_matrix_sync(by, factors, stride, nvcuda::wmma::mem_row_major);
#pragma unroll
        for (int e = 0; e < Sums::num_elements; ++e) sums_.x[e] *= by.x[e];
    }
    __device__ __forceinline__ void store(float* to, int stride) const {
        nvcuda::wmma::store_matrix_sync(to, sums_, stride, nvcuda::wmma::mem_row_major);
    }

  private:
    template <typename Layout>
    __device__ __forceinline__ void multiply(const T* a, int a_stride, const T* b, int b_stride) {
        nvcuda::wmma::fragment<nvcuda::wmma::matrix_a, kTile, kTile, kTile, T, nvcuda::wmma::row_major> left;
        nvcuda::wmma::fragment<nvcuda::wmma::matrix_b, kTile, kTile, kTile, T, Layout> right;
        nvcuda::wmma::load_matrix_sync(left, a, a_stride);
        nvcuda::wmma::load_matrix_sync(right, b, b_stride);
        nvcuda::wmma::mma_sync(sums_, left, right, sums_);
    }

    using Sums = nvcuda::wmma::fragment<nvcuda::wmma::accumulator, kTile, kTile, kTile, float>;
    Sums sums_;
};

// A lane has half a row.
template <>
class Product<float> {
  public:
    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int e = 0; e < kHeld; ++e) sums_[e] = 0.0f;
    }
    __device__ __forceinline__ void add(const float* a, int a_stride, const float* b, int b_stride) {
        multiply(a + row() * a_stride, b + column(), b_stride, 1);
    }
    __device__ __forceinline__ void add_transposed(const float* a, int a_stride, const float* b, int b_stride) {
        multiply(a + row() * a_stride, b + column() * b_stride, 1, b_stride);
    }
    __device__ __forceinline__ void scale(const float* factors, int stride) {
#pragma unroll
        for (int e = 0; e < kHeld; ++e) sums_[e] *= factors[row() * stride + column() + e];
    }
    __device__ __forceinline__ void store(float* to, int stride) const {
#pragma unroll
        for (int e = 0; e < kHeld; ++e) to[row() * stride + column() + e] = sums_[e];
    }

  private:
    static constexpr int kHeld = kTile * kTile / kWarp;
    static __device__ __forceinline__ int row() { return int(threadIdx.x) % kWarp / 2; }
    static __device__ __forceinline__ int column() { return int(threadIdx.x) % 2 * kHeld; }

    __device__ __forceinline__ void multiply(const float* a, const float* b, int b_down, int b_along) {
#pragma unroll 4
        for (int k = 0; k < kTile; ++k) {
            const float factor = a[k];
#pragma unroll
            for (int e = 0; e < kHeld; ++e) sums_[e] += factor * b[k * b_down + e * b_along];
        }
    }

    float sums_[kHeld];
};

}  // namespace esm
