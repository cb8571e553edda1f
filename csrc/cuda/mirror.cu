// What the gradient of contact_map begins with: the gradient of each sequence's map plus its mirror image, over kept
// rows and columns, and its products with every head's row sums.
#include "common.cuh"

namespace esm {

constexpr int kWarps = 4, kHeads = 32, kHeadsPerWarp = kHeads / kWarps;
constexpr int kStride = kWarp + 1;  // so that a column of a tile lies in as many banks

struct Map {
    Global<const float> values;
    Global<const unsigned char> keep;
    int length;

    __device__ __forceinline__ float at(int row, int column) const {
        if (row >= length || column >= length || !keep[row] || !keep[column]) return 0.0f;
        return values[size_t(row) * length + column];
    }
};

// mirrored: as grad, whose maps begin at starts[s]. sums, products (heads, n). A block has 32 rows of a sequence and up
// to 32 heads; those of the first heads also store their rows of `mirrored`.
KERNEL(kWarps * kWarp, 4, mirror_sums,
       (Global<const float> grad, Global<const float> sums, Global<const unsigned char> keep, Global<float> mirrored,
        Global<float> products, Global<const long long> starts, Global<const int> cu_seqlens, int n, int tiles,
        int heads)) {
    SHARED(float, there, kWarp * kStride);
    SHARED(float, back, kWarp * kStride);
    SHARED(float, row_sums, kHeads * kWarp);
    const int sequence = int(blockIdx.x) / tiles, first = int(blockIdx.x) % tiles * kWarp;
    const int start = cu_seqlens[sequence], length = cu_seqlens[sequence + 1] - start;
    if (first >= length) return;
    const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp, head = int(blockIdx.y) * kHeads;
    const size_t begin = size_t(starts[sequence]);
    const Map map = {grad + begin, keep + start, length};
    Floats<kHeadsPerWarp> total = {};
    for (int other = 0; other < length; other += kWarp) {
        __syncthreads();
        for (int r = warp; r < kWarp; r += kWarps) {
            there[r * kStride + lane] = map.at(first + r, other + lane);
            back[r * kStride + lane] = map.at(other + r, first + lane);
        }
        for (int h = warp; h < kHeads; h += kWarps) {
            const bool exists = head + h < heads && other + lane < length;
            row_sums[h * kWarp + lane] = exists ? float(sums[size_t(head + h) * n + start + other + lane]) : 0.0f;
        }
        __syncthreads();
        for (int r = warp; r < kWarp && head == 0; r += kWarps)
            if (first + r < length && other + lane < length)
                mirrored[begin + size_t(first + r) * length + other + lane] =
                    there[r * kStride + lane] + back[lane * kStride + r];
        for (int c = 0; c < kWarp; ++c) {
            const float g = there[lane * kStride + c] + back[c * kStride + lane];
#pragma unroll
            for (int h = 0; h < kHeadsPerWarp; ++h)
                total.at[h] += g * row_sums[(warp * kHeadsPerWarp + h) * kWarp + c];
        }
    }
    if (first + lane >= length) return;
#pragma unroll
    for (int h = 0; h < kHeadsPerWarp; ++h) {
        const int own = head + warp * kHeadsPerWarp + h;
        if (own < heads) products[size_t(own) * n + start + first + lane] = total.at[h];
    }
}

}  // namespace esm
