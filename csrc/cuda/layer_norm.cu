// Layer norm over the rows of the fp32 residual stream, into the dtype of the GEMM that follows. A warp a row.
#include "rows.cuh"

namespace esm {

struct Statistics {
    float mean, inverse_deviation;
};

// Of a row that is held, in two passes: the mean first, so that nothing cancels.
template <int V>
__device__ __forceinline__ Statistics statistics_of(const Row<V>& row, int width, float eps) {
    float sum = 0.0f, squares = 0.0f;
    row.each([&](int, const Pack<float, V>& x) {
        for (int j = 0; j < V; ++j) sum += x.at[j];
    });
    const float mean = warp_reduce(sum) / float(width);
    row.each([&](int, const Pack<float, V>& x) {
        for (int j = 0; j < V; ++j) squares += (x.at[j] - mean) * (x.at[j] - mean);
    });
    return {mean, rsqrtf(warp_reduce(squares) / float(width) + eps)};
}

template <int V>
__device__ __forceinline__ Statistics normalise(Global<const float> x, Global<const scalar> gain,
                                                Global<const scalar> bias, Global<scalar> y, int width, float eps) {
    const Row<V> row(x, width);
    const Statistics s = statistics_of(row, width, eps);
    row.each([&](int p, const Pack<float, V>& in) {
        const Pack<scalar, V> g = load_pack<V>(gain, p), b = load_pack<V>(bias, p);
        Pack<scalar, V> out;
        for (int j = 0; j < V; ++j) {
            const float normal = (in.at[j] - s.mean) * s.inverse_deviation;
            out.at[j] = from_float<scalar>(normal * to_float(g.at[j]) + to_float(b.at[j]));
        }
        store_pack(y, p, out);
    });
    return s;
}

// y = (x - mean) / deviation * gain + bias. statistics (rows, 2) keeps the mean and 1 / deviation; it may be null.
KERNEL(kWarp * kRowsPerBlock, 6, layer_norm_forward,
       (Global<const float> x, Global<const scalar> gain, Global<const scalar> bias, Global<scalar> y,
        Global<float> statistics, int rows, int width, float eps)) {
    const int row = int(blockIdx.x) * kRowsPerBlock + int(threadIdx.x) / kWarp;
    if (row >= rows) return;  // a whole warp, and there is no barrier
    const size_t start = size_t(row) * width;
    const Statistics s = width % 4 ? normalise<1>(x + start, gain, bias, y + start, width, eps)
                                   : normalise<4>(x + start, gain, bias, y + start, width, eps);
    if (statistics && threadIdx.x % kWarp == 0)
        store_pack(statistics, size_t(row), Pack<float, 2>{s.mean, s.inverse_deviation});
}

}  // namespace esm
