// Layer norm of rows that warps hold. Gain and bias are read once a block, which has several rows for every warp.
#pragma once

#include "rows.cuh"

namespace esm {

constexpr int kSharedColumns = 1280;  // as many as a warp holds of a row

// Gain and bias in shared memory, 2 kSharedColumns elements; what rows have beyond that stays where it is.
template <int V>
class Affine {
  public:
    // By every thread of the block. Without gain there is no norm, and nothing to read.
    __device__ __forceinline__ Affine(Global<const scalar> gain, Global<const scalar> bias, scalar* shared, int width)
        : gain_(gain), bias_(bias), shared_(shared) {
        const int packs = gain ? min(width / V, kPacks) : 0;
        for (int p = threadIdx.x; p < packs; p += blockDim.x) {
            at(p) = load_pack<V>(gain, p);
            at(kPacks + p) = load_pack<V>(bias, p);
        }
        __syncthreads();
    }
    __device__ __forceinline__ Floats<V> gain(int p) const {
        return to_floats(p < kPacks ? at(p) : load_pack<V>(gain_, p));
    }
    __device__ __forceinline__ Floats<V> bias(int p) const {
        return to_floats(p < kPacks ? at(kPacks + p) : load_pack<V>(bias_, p));
    }

  private:
    static constexpr int kPacks = kSharedColumns / V;
    __device__ __forceinline__ Pack<scalar, V>& at(int p) const {
        return reinterpret_cast<Pack<scalar, V>*>(shared_)[p];
    }

    Global<const scalar> gain_, bias_;
    scalar* shared_;
};

struct Statistics {
    float mean, inverse_deviation;
};

// In two passes over the row: the mean first, so that nothing cancels.
template <int V, typename Load>
__device__ __forceinline__ Statistics statistics_of(const Row<V, Load>& row, int width, float eps) {
    const float mean = row.template reduce<Sum>(0.0f, [](float x, int) { return x; }) / float(width);
    const float squares = row.template reduce<Sum>(0.0f, [=](float x, int) { return (x - mean) * (x - mean); });
    return {mean, rsqrtf(squares / float(width) + eps)};
}

// y = (x - mean) / deviation * gain + bias.
template <int V, typename Load, typename T>
__device__ __forceinline__ Statistics normalise(const Row<V, Load>& row, const Affine<V>& affine, Global<T> y,
                                                int width, float eps) {
    const Statistics s = statistics_of(row, width, eps);
    row.each([&](int p, const Floats<V>& x) {
        const Floats<V> g = affine.gain(p), b = affine.bias(p);
        Floats<V> out;
        for (int j = 0; j < V; ++j) out.at[j] = (x.at[j] - s.mean) * s.inverse_deviation * g.at[j] + b.at[j];
        store_floats(y, p, out);
    });
    return s;
}

}  // namespace esm
