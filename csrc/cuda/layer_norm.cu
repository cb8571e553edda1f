// Layer norm over the rows of a matrix, statistics in fp32, into the dtype of the GEMM that follows. The input is the
// fp32 residual stream or, for the kernels called narrow, a matrix of that dtype itself.
#include "norm.cuh"

namespace esm {

// statistics (rows, 2) keeps the mean and 1 / deviation for the backward pass; it may be null.
template <int V, typename T>
__device__ __forceinline__ void forward(Global<const T> x, const Affine<V>& affine, Global<scalar> y,
                                        Global<float> statistics, int rows, int width, float eps) {
    for (int row = warp_row(); row < rows; row += int(gridDim.x) * kRowsPerBlock) {
        const size_t start = size_t(row) * width;
        const Statistics s = normalise(make_row<V>(loader<V, T>(x + start), width), affine, y + start, width, eps);
        if (statistics && threadIdx.x % kWarp == 0)
            store_pack(statistics, size_t(row), Pack<float, 2>{s.mean, s.inverse_deviation});
    }
}

#define FORWARD(name, T)                                                                                             \
    KERNEL(kRowThreads, 4, name,                                                                                     \
           (Global<const T> x, Global<const scalar> gain, Global<const scalar> bias, Global<scalar> y,               \
            Global<float> statistics, int rows, int width, float eps)) {                                             \
        SHARED(scalar, shared, 2 * kSharedColumns);                                                                  \
        BY_ELEMENTS(width, forward<V, T>(x, Affine<V>(gain, bias, shared, width), y, statistics, rows, width, eps))  \
    }

FORWARD(layer_norm_forward, float)
FORWARD(layer_norm_forward_narrow, scalar)

// ---- Backward: a block takes rows blockIdx.x, + gridDim.x, ...; a thread has the same columns in all of them, so that
// the gain and the sums for gain and bias stay in its registers. Their order depends on the grid alone.

constexpr int kBackwardThreads = 512;

// Both sums over the block, in every thread. `buffer` is another one at the next call, which saves a barrier.
__device__ __forceinline__ float2 block_sums(float a, float b, float* buffer) {
    a = warp_reduce(a);
    b = warp_reduce(b);
    const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
    if (threadIdx.x % kWarp == 0) {
        buffer[2 * warp] = a;
        buffer[2 * warp + 1] = b;
    }
    __syncthreads();
    float2 sums = {0.0f, 0.0f};
    for (int w = 0; w < warps; ++w) {
        sums.x += buffer[2 * w];
        sums.y += buffer[2 * w + 1];
    }
    return sums;
}

// dx = dy's share through the norm, plus `along`, the gradient that passes beside it (may be null).
// shares (gridDim.x, 2, width): the block's sums of dy * normal and dy.
template <int V, typename T, typename D>
__device__ __forceinline__ void backward(Global<const T> x, Global<const scalar> gain, Global<const D> dy,
                                         Global<const float> statistics, Global<const float> along, Global<T> dx,
                                         Global<float> shares, int rows, int width) {
    SHARED(float, buffers, 2 * 2 * kBackwardThreads / kWarp);
    constexpr int kSlots = V == 8 ? 2 : 4;  // packs a thread may have
    const int packs = width / V, step = blockDim.x;
    Floats<V> dgain[kSlots] = {}, dbias[kSlots] = {};
    Pack<scalar, V> gains[kSlots];
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
        const int p = int(threadIdx.x) + i * step;
        if (p < packs) gains[i] = load_pack<V>(gain, p);
    }
    int turn = 0;
    for (int row = blockIdx.x; row < rows; row += gridDim.x, turn ^= 1) {
        const size_t start = size_t(row) * width;
        const Pack<float, 2> s = load_pack<2>(statistics, row);
        Floats<V> normal[kSlots], dnormal[kSlots];
        float sum = 0.0f, product = 0.0f;
#pragma unroll
        for (int i = 0; i < kSlots; ++i) {
            const int p = int(threadIdx.x) + i * step;
            if (p >= packs) break;
            const Floats<V> in = load_floats<V>(x + start, p), g = to_floats(gains[i]);
            const Floats<V> d = load_floats<V>(dy + start, p);
            for (int j = 0; j < V; ++j) {
                normal[i].at[j] = (in.at[j] - s.at[0]) * s.at[1];
                dnormal[i].at[j] = d.at[j] * g.at[j];
                dgain[i].at[j] += d.at[j] * normal[i].at[j];
                dbias[i].at[j] += d.at[j];
                sum += dnormal[i].at[j];
                product += dnormal[i].at[j] * normal[i].at[j];
            }
        }
        const float2 sums = block_sums(sum, product, buffers + turn * 2 * kBackwardThreads / kWarp);
        const float mean = sums.x / float(width), slope = sums.y / float(width);
#pragma unroll
        for (int i = 0; i < kSlots; ++i) {
            const int p = int(threadIdx.x) + i * step;
            if (p >= packs) break;
            Floats<V> out = {};
            if (along) out = load_floats<V>(along + start, p);
            for (int j = 0; j < V; ++j)
                out.at[j] += (dnormal[i].at[j] - mean - normal[i].at[j] * slope) * s.at[1];
            store_floats(dx + start, p, out);
        }
    }
    const size_t share = 2 * size_t(blockIdx.x) * width;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
        const int p = int(threadIdx.x) + i * step;
        if (p >= packs) break;
        store_floats(shares + share, p, dgain[i]);
        store_floats(shares + (share + width), p, dbias[i]);
    }
}

#define BACKWARD(name, T, D)                                                                                         \
    KERNEL(kBackwardThreads, 1, name,                                                                                \
           (Global<const T> x, Global<const scalar> gain, Global<const D> dy, Global<const float> statistics,        \
            Global<const float> along, Global<T> dx, Global<float> shares, int rows, int width)) {                   \
        BY_ELEMENTS(width, backward<V>(x, gain, dy, statistics, along, dx, shares, rows, width))                     \
    }

BACKWARD(layer_norm_backward, float, scalar)
BACKWARD(layer_norm_backward_narrow, scalar, scalar)
BACKWARD(layer_norm_backward_wide, float, float)  // of a norm whose output was fp32 too

}  // namespace esm
