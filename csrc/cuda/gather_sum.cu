// Sums of the rows that share an index: what a scatter-add computes, in one order and without atomics.
#include "common.cuh"

namespace esm {

constexpr int kWarps = 4;

// out[i] = the sum of factors[r] x[r] over r = order[k], begins[i] <= k < begins[i + 1]; factors may be null, for 1.
// A block has one i and 32 packs of columns; its warps take every 4th row.
template <int V>
__device__ __forceinline__ void sum_rows(Global<const float> x, Global<const float> factors,
                                         Global<const long long> order, Global<const int> begins, Global<scalar> out,
                                         int width) {
    SHARED(float, sums, kWarps * kWarp * V);
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, p = int(blockIdx.y) * kWarp + lane;
    const bool inside = p < width / V;
    Floats<V> sum = {};
    for (int k = begins[blockIdx.x] + warp; k < begins[blockIdx.x + 1]; k += kWarps) {
        const size_t row = size_t(order[k]);
        const float factor = factors ? float(factors[row]) : 1.0f;
        if (!inside || factor == 0.0f) continue;
        const Floats<V> in = to_floats(load_pack<V>(x + row * width, p));
        for (int j = 0; j < V; ++j) sum.at[j] += factor * in.at[j];
    }
    for (int j = 0; j < V; ++j) sums[(warp * kWarp + lane) * V + j] = sum.at[j];
    __syncthreads();
    if (warp || !inside) return;
    for (int w = 1; w < kWarps; ++w)
        for (int j = 0; j < V; ++j) sum.at[j] += sums[(w * kWarp + lane) * V + j];
    store_pack(out + size_t(blockIdx.x) * width, p, from_floats<scalar>(sum));
}

KERNEL(kWarps * kWarp, 4, gather_sum_forward,
       (Global<const float> x, Global<const float> factors, Global<const long long> order, Global<const int> begins,
        Global<scalar> out, int width)) {
    if (width % 4)
        sum_rows<1>(x, factors, order, begins, out, width);
    else
        sum_rows<4>(x, factors, order, begins, out, width);
}

}  // namespace esm
