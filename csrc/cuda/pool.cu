// A weighted sum of each sequence's rows, and its backward pass. Rows of weight 0 are not read.
#include "rows.cuh"

namespace esm {

constexpr int kWarps = 8;

// out[s] = the sum of weight[r] x[r] over the rows of sequence s. A block has one sequence and 32 packs of columns; its
// warps take every 8th row, whoever else is in the batch.
template <int V>
__device__ __forceinline__ void forward(Global<const float> x, Global<const int> cu_seqlens,
                                        Global<const float> weight, Global<float> out, int width) {
    SHARED(float, sums, kWarps * kWarp * V);
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, p = int(blockIdx.y) * kWarp + lane;
    const bool inside = p < width / V;
    Floats<V> sum = {};
    for (int row = cu_seqlens[blockIdx.x] + warp; row < cu_seqlens[blockIdx.x + 1]; row += kWarps) {
        const float w = weight[row];
        if (!inside || w == 0.0f) continue;
        const Floats<V> in = to_floats(load_pack<V>(x + size_t(row) * width, p));
        for (int j = 0; j < V; ++j) sum.at[j] += w * in.at[j];
    }
    for (int j = 0; j < V; ++j) sums[(warp * kWarp + lane) * V + j] = sum.at[j];
    __syncthreads();
    if (warp || !inside) return;
    for (int w = 1; w < kWarps; ++w)
        for (int j = 0; j < V; ++j) sum.at[j] += sums[(w * kWarp + lane) * V + j];
    store_pack(out + size_t(blockIdx.x) * width, p, from_floats<float>(sum));
}

KERNEL(kWarps * kWarp, 4, pool_forward,
       (Global<const float> x, Global<const int> cu_seqlens, Global<const float> weight, Global<float> out,
        int width)) {
    if (width % 4)
        forward<1>(x, cu_seqlens, weight, out, width);
    else
        forward<4>(x, cu_seqlens, weight, out, width);
}

// dx = weight dout, dweight = x . dout; both 0 where the weight is 0. A warp a row.
template <int V>
__device__ __forceinline__ float backward(Global<const float> x, Global<const float> dout, float weight,
                                          Global<float> dx, int width) {
    float product = 0.0f;
    for (int p = threadIdx.x % kWarp; p < width / V; p += kWarp) {
        Floats<V> d = to_floats(load_pack<V>(dout, p));
        if (weight != 0.0f) {
            const Floats<V> in = to_floats(load_pack<V>(x, p));
            for (int j = 0; j < V; ++j) product += in.at[j] * d.at[j];
        }
        for (int j = 0; j < V; ++j) d.at[j] = weight == 0.0f ? 0.0f : d.at[j] * weight;
        store_pack(dx, p, from_floats<float>(d));
    }
    return warp_reduce(product);
}

KERNEL(kRowThreads, 8, pool_backward,
       (Global<const float> x, Global<const int> cu_seqlens, Global<const float> weight, Global<const float> dout,
        Global<float> dx, Global<float> dweight, int rows, int sequences, int width)) {
    const int row = warp_row();
    if (row >= rows) return;
    const int s = sequence_of(row, cu_seqlens, sequences);
    const auto d = dout + size_t(s) * width;
    const float w = weight[row];
    const size_t start = size_t(row) * width;
    const float product = width % 4 ? backward<1>(x + start, d, w, dx + start, width)
                                    : backward<4>(x + start, d, w, dx + start, width);
    if (threadIdx.x % kWarp == 0) dweight[row] = product;
}

}  // namespace esm
