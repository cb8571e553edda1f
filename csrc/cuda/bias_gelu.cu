// gelu(h + bias), exact by erf, after a GEMM that made h; and its backward pass with the sums for the bias.
#include "common.cuh"

namespace esm {

constexpr int kThreads = 128;

__device__ __forceinline__ float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678f)); }

// The normal distribution function plus x times the normal density.
__device__ __forceinline__ float gelu_slope(float x) {
    return 0.5f * (1.0f + erff(x * 0.70710678f)) + x * 0.39894228f * expf(-0.5f * x * x);
}

// Thread t of the grid's row of blocks has pack t of the columns, in rows blockIdx.y, + gridDim.y, ...
template <int V>
__device__ __forceinline__ void forward(Global<const scalar> h, Global<const scalar> bias, Global<scalar> y, int rows,
                                        int width) {
    const int p = int(blockIdx.x) * kThreads + int(threadIdx.x);
    if (p >= width / V) return;
    const Floats<V> b = to_floats(load_pack<V>(bias, p));
    for (int row = blockIdx.y; row < rows; row += gridDim.y) {
        const size_t start = size_t(row) * width;
        Floats<V> x = to_floats(load_pack<V>(h + start, p));
        for (int j = 0; j < V; ++j) x.at[j] = gelu(x.at[j] + b.at[j]);
        store_pack(y + start, p, from_floats<scalar>(x));
    }
}

KERNEL(kThreads, 8, bias_gelu_forward,
       (Global<const scalar> h, Global<const scalar> bias, Global<scalar> y, int rows, int width)) {
    if (width % kWide)
        forward<1>(h, bias, y, rows, width);
    else
        forward<kWide>(h, bias, y, rows, width);
}

// dh = dy gelu'(h + bias); shares (gridDim.y, width): the sums of the rows a thread had, for the bias.
template <int V>
__device__ __forceinline__ void backward(Global<const scalar> h, Global<const scalar> bias, Global<const scalar> dy,
                                         Global<scalar> dh, Global<float> shares, int rows, int width) {
    const int p = int(blockIdx.x) * kThreads + int(threadIdx.x);
    if (p >= width / V) return;
    const Floats<V> b = to_floats(load_pack<V>(bias, p));
    Floats<V> sums = {};
    for (int row = blockIdx.y; row < rows; row += gridDim.y) {
        const size_t start = size_t(row) * width;
        const Floats<V> x = to_floats(load_pack<V>(h + start, p));
        Floats<V> d = to_floats(load_pack<V>(dy + start, p));
        for (int j = 0; j < V; ++j) {
            d.at[j] *= gelu_slope(x.at[j] + b.at[j]);
            sums.at[j] += d.at[j];
        }
        store_pack(dh + start, p, from_floats<scalar>(d));
    }
    constexpr int kPart = V < 4 ? V : 4;  // floats that a lane moves at once
    for (int part = 0; part < V / kPart; ++part) {
        Pack<float, kPart> share;
        for (int j = 0; j < kPart; ++j) share.at[j] = sums.at[part * kPart + j];
        store_pack(shares + size_t(blockIdx.y) * width, p * (V / kPart) + part, share);
    }
}

KERNEL(kThreads, 6, bias_gelu_backward,
       (Global<const scalar> h, Global<const scalar> bias, Global<const scalar> dy, Global<scalar> dh,
        Global<float> shares, int rows, int width)) {
    if (width % kWide)
        backward<1>(h, bias, dy, dh, shares, rows, width);
    else
        backward<kWide>(h, bias, dy, dh, shares, rows, width);
}

}  // namespace esm
