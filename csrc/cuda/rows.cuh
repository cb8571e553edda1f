// A row of a matrix in the registers of one warp: read once, passed over as often as a norm or a softmax needs.
#pragma once

#include "common.cuh"

namespace esm {

constexpr int kRowsPerBlock = 4;  // a warp each
constexpr int kHeld = 10;         // packs a lane holds: of 4 floats, this is a row of 1,280

// Pack i of lane l is pack 32 i + l of the row, so that the warp's accesses are whole lines. V elements a pack: 4 where
// the width is a multiple of it, else 1. What a row has beyond 32 kHeld packs is read again at every pass.
template <int V>
class Row {
  public:
    __device__ __forceinline__ Row(Global<const float> row, int width) : row_(row), packs_(width / V) {
#pragma unroll
        for (int i = 0; i < kHeld; ++i)
            if (pack(i) < packs_) held_[i] = load_pack<V>(row, pack(i));
    }

    // Calls `visit(p, pack)` for every pack p of this lane.
    template <typename Visit>
    __device__ __forceinline__ void each(Visit visit) const {
#pragma unroll
        for (int i = 0; i < kHeld; ++i)
            if (pack(i) < packs_) visit(pack(i), held_[i]);
        for (int i = kHeld; pack(i) < packs_; ++i) visit(pack(i), load_pack<V>(row_, pack(i)));
    }

  private:
    static __device__ __forceinline__ int pack(int i) { return kWarp * i + int(threadIdx.x) % kWarp; }

    Global<const float> row_;
    int packs_;
    Pack<float, V> held_[kHeld];
};

}  // namespace esm
