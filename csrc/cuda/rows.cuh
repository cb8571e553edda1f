// A row of a matrix in the registers of one warp: read once, passed over as often as a norm or a softmax needs.
#pragma once

#include "packs.cuh"

namespace esm {

constexpr int kRowsPerBlock = 4;  // a warp each
constexpr int kRowThreads = kRowsPerBlock * kWarp;

// The row that this warp has; all its lanes have the same.
__device__ __forceinline__ int warp_row() {
    return int(blockIdx.x) * kRowsPerBlock + int(threadIdx.x) / kWarp;
}

// Pack i of lane l is pack 32 i + l of the row, so that the warp's accesses are whole lines. A pack has V elements, see
// elements_of. `load(p)` gives pack p in fp32; what a row has beyond the packs that are held (1,280 elements, or 320
// single ones) is loaded again at every pass.
template <int V, typename Load>
class Row {
  public:
    __device__ __forceinline__ Row(Load load, int width) : load_(load), packs_(width / V) {
#pragma unroll
        for (int i = 0; i < kHeld; ++i)
            if (pack(i) < packs_) held_[i] = load_(pack(i));
    }

    // Calls `visit(p, pack)` for every pack p of this lane.
    template <typename Visit>
    __device__ __forceinline__ void each(Visit visit) const {
#pragma unroll
        for (int i = 0; i < kHeld; ++i)
            if (pack(i) < packs_) visit(pack(i), held_[i]);
        for (int i = kHeld; pack(i) < packs_; ++i) visit(pack(i), load_(pack(i)));
    }

    // The reduction of `term(element, column)` over the row, in every lane.
    template <typename Reduce, typename Term>
    __device__ __forceinline__ float reduce(float start, Term term) const {
        float sum = start;
        each([&](int p, const Floats<V>& x) {
            for (int j = 0; j < V; ++j) sum = Reduce::of(sum, term(x.at[j], p * V + j));
        });
        return warp_reduce<Reduce>(sum);
    }

  private:
    static constexpr int kHeld = V == 8 ? 5 : 10;
    static __device__ __forceinline__ int pack(int i) { return kWarp * i + int(threadIdx.x) % kWarp; }

    Load load_;
    int packs_;
    Floats<V> held_[kHeld];
};

template <int V, typename Load>
__device__ __forceinline__ Row<V, Load> make_row(Load load, int width) {
    return Row<V, Load>(load, width);
}

// What `make_row` takes for a row in memory.
template <int V, typename T>
__device__ __forceinline__ auto loader(Global<const T> row) {
    return [row](int p) { return load_floats<V>(row, p); };
}

}  // namespace esm
