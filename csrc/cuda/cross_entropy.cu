// The cross-entropy of logits (rows, vocabulary), a thread a row, and its backward pass. A block's rows lie side by
// side in memory: they pass through shared memory, so that the block reads and writes whole lines.
#include "common.cuh"

namespace esm {

constexpr int kRows = 64;      // threads a block; vocabularies are odd or small, so few banks meet
constexpr int kIgnored = -100;  // a target that does not count, as torch has it

struct Tile {
    size_t start;
    int rows, elements;
};

__device__ __forceinline__ Tile tile_of(int rows, int vocabulary) {
    const int first = int(blockIdx.x) * kRows, own = min(kRows, rows - first);
    return {size_t(first) * vocabulary, own, own * vocabulary};
}

// Calls `visit(element, pack)` for the tile's packs, and `one(element)` for what is left at its end.
template <typename Visit, typename One>
__device__ __forceinline__ void each_of(const Tile& tile, Visit visit, One one) {
    // 64 rows of anything begin at a multiple of 16 bytes.
    for (int p = threadIdx.x; p < tile.elements / kWide; p += kRows) visit(p * kWide, tile.start / kWide + p);
    for (int i = tile.elements / kWide * kWide + int(threadIdx.x); i < tile.elements; i += kRows) one(i);
}

__device__ __forceinline__ void load_tile(const Tile& tile, Global<const scalar> logits, float* shared) {
    each_of(tile, [&](int i, size_t pack) {
        const Floats<kWide> x = to_floats(load_pack<kWide>(logits, pack));
        for (int j = 0; j < kWide; ++j) shared[i + j] = x.at[j];
    }, [&](int i) { shared[i] = to_float(logits[tile.start + i]); });
    __syncthreads();
}

// The largest logit of a row, and the sum of the exponentials less that.
__device__ __forceinline__ float2 normaliser(const float* row, int vocabulary) {
    float2 n = {-infinity(), 0.0f};
    for (int v = 0; v < vocabulary; ++v) n.x = fmaxf(n.x, row[v]);
    for (int v = 0; v < vocabulary; ++v) n.y += expf(row[v] - n.x);
    return n;
}

// losses (rows,): 0 for an ignored target, NaN for one that is no token.
KERNEL(kRows, 6, cross_entropy_forward,
       (Global<const scalar> logits, Global<const long long> targets, Global<float> losses, int rows, int vocabulary)) {
    DYNAMIC_SHARED(bytes);
    float* shared = reinterpret_cast<float*>(bytes);
    const Tile tile = tile_of(rows, vocabulary);
    load_tile(tile, logits, shared);
    const int r = threadIdx.x;
    if (r >= tile.rows) return;
    const size_t row = size_t(blockIdx.x) * kRows + r;
    const long long target = targets[row];
    const float* own = shared + r * vocabulary;
    const float2 n = normaliser(own, vocabulary);
    const bool exists = target >= 0 && target < vocabulary;
    losses[row] = exists ? n.x + logf(n.y) - own[target] : target == kIgnored ? 0.0f : __int_as_float(0x7fffffff);
}

// dlogits = (softmax - the target's one) dloss + along; dloss is one number in memory, along may be null.
KERNEL(kRows, 6, cross_entropy_backward,
       (Global<const scalar> logits, Global<const long long> targets, Global<const float> dloss,
        Global<const scalar> along, Global<scalar> dlogits, int rows, int vocabulary)) {
    DYNAMIC_SHARED(bytes);
    float* shared = reinterpret_cast<float*>(bytes);
    const Tile tile = tile_of(rows, vocabulary);
    load_tile(tile, logits, shared);
    const int r = threadIdx.x;
    if (r < tile.rows) {
        const long long target = targets[size_t(blockIdx.x) * kRows + r];
        float* own = shared + r * vocabulary;
        const float2 n = normaliser(own, vocabulary);
        const float scale = target == kIgnored ? 0.0f : float(dloss[0]);
        for (int v = 0; v < vocabulary; ++v) own[v] = (expf(own[v] - n.x) / n.y - float(v == target)) * scale;
    }
    __syncthreads();
    each_of(tile, [&](int i, size_t pack) {
        Floats<kWide> out = {};
        if (along) out = to_floats(load_pack<kWide>(along, pack));
        for (int j = 0; j < kWide; ++j) out.at[j] += shared[i + j];
        store_pack(dlogits, pack, from_floats<scalar>(out));
    }, [&](int i) {
        const float beside = along ? to_float(along[tile.start + i]) : 0.0f;
        dlogits[tile.start + i] = from_float<scalar>(shared[i] + beside);
    });
}

}  // namespace esm
