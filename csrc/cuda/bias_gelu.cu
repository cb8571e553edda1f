// gelu(h + bias), exact by erf, after a GEMM that made h; and its backward pass with the sums for the bias.
#include "packs.cuh"

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
    const Floats<V> b = load_floats<V>(bias, p);
    for (int row = blockIdx.y; row < rows; row += gridDim.y) {
        const size_t start = size_t(row) * width;
        Floats<V> x = load_floats<V>(h + start, p);
        for (int j = 0; j < V; ++j) x.at[j] = gelu(x.at[j] + b.at[j]);
        store_floats(y + start, p, x);
    }
}

KERNEL(kThreads, 8, bias_gelu_forward,
       (Global<const scalar> h, Global<const scalar> bias, Global<scalar> y, int rows, int width)) {
    BY_ELEMENTS(width, forward<V>(h, bias, y, rows, width))
}

// dh = dy gelu'(h + bias); shares (gridDim.y, width): the sums of the rows a thread had, for the bias.
template <int V>
__device__ __forceinline__ void backward(Global<const scalar> h, Global<const scalar> bias, Global<const scalar> dy,
                                         Global<scalar> dh, Global<float> shares, int rows, int width) {
    const int p = int(blockIdx.x) * kThreads + int(threadIdx.x);
    if (p >= width / V) return;
    const Floats<V> b = load_floats<V>(bias, p);
    Floats<V> sums = {};
    for (int row = blockIdx.y; row < rows; row += gridDim.y) {
        const size_t start = size_t(row) * width;
        const Floats<V> x = load_floats<V>(h + start, p);
        Floats<V> d = load_floats<V>(dy + start, p);
        for (int j = 0; j < V; ++j) {
            d.at[j] *= gelu_slope(x.at[j] + b.at[j]);
            sums.at[j] += d.at[j];
        }
        store_floats(dh + start, p, d);
    }
    store_floats(shares + size_t(blockIdx.y) * width, p, sums);
}

KERNEL(kThreads, 6, bias_gelu_backward,
       (Global<const scalar> h, Global<const scalar> bias, Global<const scalar> dy, Global<scalar> dh,
        Global<float> shares, int rows, int width)) {
    BY_ELEMENTS(width, backward<V>(h, bias, dy, dh, shares, rows, width))
}

}  // namespace esm
