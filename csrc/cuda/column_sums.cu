// Sums down the columns of a matrix: the shares of blocks, put together in one order.
#include "common.cuh"

namespace esm {

constexpr int kWarps = 8;

// out[c] = sum of x[r, c] over rows r. A warp takes every 8th row of 32 columns.
KERNEL(kWarps * kWarp, 4, column_sums_forward, (Global<const float> x, Global<scalar> out, int rows, int columns)) {
    SHARED(float, sums, kWarps * kWarp);
    const int column = int(blockIdx.x) * kWarp + int(threadIdx.x) % kWarp;
    float sum = 0.0f;
    if (column < columns)
        for (int row = threadIdx.x / kWarp; row < rows; row += kWarps) sum += x[size_t(row) * columns + column];
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x < kWarp && column < columns) {
        for (int warp = 1; warp < kWarps; ++warp) sum += sums[warp * kWarp + threadIdx.x];
        out[column] = from_float<scalar>(sum);
    }
}

}  // namespace esm
