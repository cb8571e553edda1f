// Small kernels with faults to plant, by which the emulator itself is tested. fault 0 is the right kernel.
#include "common.cuh"

namespace esm {

// y is x, 64 floats a block, with each block's share turned round in shared memory.
KERNEL(64, 1, toys_reverse, (Global<const float> x, Global<float> y, int fault)) {
    SHARED(float, tile, 64);
    const int t = threadIdx.x, base = 64 * int(blockIdx.x);
    if (fault == 1 && t == 5) return;                        // before the others' barrier
    const int from = fault == 2 ? base + t + 1 : base + t;   // beyond the end, in the last block
    if (!(fault == 3 && t == 9)) tile[fault == 8 && t == 63 ? 64 : t] = x[from];  // 3: one place stays unwritten
    if (fault == 4 && t < 32)
        __syncthreads();  // two barriers where one is meant
    else if (fault != 5)  // 5: none
        __syncthreads();
    y[fault == 6 ? t : base + t] = tile[63 - t];             // 6: every block writes the first one's share
    if (fault == 7) y[base + t] = y[(base + 64) % (64 * int(gridDim.x))];  // reads what another block writes
}

// y[i] = sum of 32 consecutive x, by every lane; fault 1: half of the lanes do not take part.
KERNEL(64, 1, toys_sum, (Global<const float> x, Global<float> y, int fault)) {
    const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
    if (fault == 1 && i % 32 >= 16) {
        y[i] = 0.0f;
        return;
    }
    if (fault == 2) {
        y[i] = __shfl_sync(0xffffu << i % 32 / 16 * 16, x[i], 0);  // the upper half asks a lane that is not with it
        return;
    }
    y[i] = warp_reduce(x[i]);
}

// counts[0] = how many x are positive, counts[1] the place of the first (atomics over blocks); order in lanes by ballot.
KERNEL(64, 1, toys_positive, (Global<const float> x, Global<int> counts, Global<int> order, int fault)) {
    const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
    const bool positive = x[i] > 0.0f;
    const unsigned lanes = __ballot_sync(kAllLanes, positive);
    if (positive) {
        if (fault == 1)
            counts[0] = counts[0] + 1;
        else
            atomicAdd(counts, 1);
        atomicMin(counts + 1, i);
    }
    order[i] = positive ? __popc(lanes & ((1u << i % 32) - 1)) : -1;
}

// c (16, 16) = a b'; fault 1: takes lane l's element e for element 8 l + e; fault 2: a stride that wmma does not take.
KERNEL(32, 1, toys_product, (Global<const f16> a, Global<const f16> b, Global<float> c, int fault)) {
    using namespace nvcuda::wmma;
    fragment<matrix_a, 16, 16, 16, f16, row_major> left;
    fragment<matrix_b, 16, 16, 16, f16, col_major> right;
    fragment<accumulator, 16, 16, 16, float> sums;
    SHARED(float, tile, 16 * 20);
    fill_fragment(sums, 0.0f);
    load_matrix_sync(left, a, fault == 2 ? 12 : 16);
    load_matrix_sync(right, b, 16);
    mma_sync(sums, left, right, sums);
    if (fault == 1) {
        for (int e = 0; e < 8; ++e) {
            const int place = 8 * int(threadIdx.x) + e;
            tile[place / 16 * 20 + place % 16] = sums.x[e];
        }
    } else {
        store_matrix_sync(tile, sums, 20, mem_row_major);
    }
    if (fault != 3) __syncwarp();  // 3: reads what other lanes stored without waiting for them
    for (int i = threadIdx.x; i < 256; i += 32) c[i] = tile[i / 16 * 20 + i % 16];
}

// y = x in packs of 4; fault 1: one element on, where packs are not aligned.
KERNEL(64, 1, toys_copy, (Global<const float> x, Global<float> y, int fault)) {
    const size_t i = blockIdx.x * blockDim.x + threadIdx.x;
    store_pack(y, i, load_pack<4>(x + (fault == 1), i));
}

}  // namespace esm
