// Sums down the columns of a matrix: the shares of blocks, put together in one order.
#include "packs.cuh"

namespace esm {

constexpr int kWarps = 8;

// out[c] = sum of x[r, c] over rows r. A warp takes every 8th row of 32 packs of columns.
template <int V>
__device__ __forceinline__ void sum_columns(Global<const float> x, Global<scalar> out, int rows, int columns,
                                            float* sums) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, p = int(blockIdx.x) * kWarp + lane;
    const bool inside = p < columns / V;
    Floats<V> sum = {};
    if (inside)
        for (int row = warp; row < rows; row += kWarps) {
            const Floats<V> share = load_floats<V>(x + size_t(row) * columns, p);
            for (int j = 0; j < V; ++j) sum.at[j] += share.at[j];
        }
    for (int j = 0; j < V; ++j) sums[(j * kWarps + warp) * kWarp + lane] = sum.at[j];
    __syncthreads();
    if (warp || !inside) return;
    for (int w = 1; w < kWarps; ++w)
        for (int j = 0; j < V; ++j) sum.at[j] += sums[(j * kWarps + w) * kWarp + lane];
    store_floats(out, p, sum);
}

KERNEL(kWarps * kWarp, 4, column_sums_forward, (Global<const float> x, Global<scalar> out, int rows, int columns)) {
    SHARED(float, sums, 4 * kWarps * kWarp);
    if (columns % 4)
        sum_columns<1>(x, out, rows, columns, sums);
    else
        sum_columns<4>(x, out, rows, columns, sums);
}

}  // namespace esm
