// Packs of a row that move 16 bytes at a time on both sides of a conversion between fp32 and half.
#pragma once

#include "common.cuh"

namespace esm {

// The two lanes of a pair have 16 consecutive elements, 8 each: exchanges the second 4 of the even lane and the first 4
// of the odd one. Done twice, it is undone.
__device__ __forceinline__ Floats<8> exchange_in_pair(Floats<8> x) {
    const bool odd = threadIdx.x % 2;
    const unsigned pair = 3u << (threadIdx.x % kWarp & ~1u);
    for (int j = 0; j < 4; ++j) {
        const float received = __shfl_xor_sync(pair, odd ? x.at[j] : x.at[4 + j], 1);
        (odd ? x.at[j] : x.at[4 + j]) = received;
    }
    return x;
}

// Where the first 4 of a lane's 8 floats are moved, in packs of 4; the second are 2 packs on. So a pair moves whole
// sectors both times, which lanes that move their own 8 would not.
__device__ __forceinline__ size_t first_move(size_t index) { return index / 2 * 4 + index % 2; }

// Pack `index` of a tensor in fp32, by moves of 16 bytes. Of 8 floats the lanes 2 l and 2 l + 1 must have the packs
// 2 i and 2 i + 1.
template <int N, typename T>
__device__ __forceinline__ Floats<N> load_floats(Global<const T> tensor, size_t index) {
    if constexpr (sizeof(T) * N <= 16) {
        return to_floats(load_pack<N>(tensor, index));
    } else {
        Floats<8> x;
        for (int half = 0; half < 2; ++half) {
            const auto pack = load_pack<4>(tensor, first_move(index) + 2 * half);
            for (int j = 0; j < 4; ++j) x.at[4 * half + j] = pack.at[j];
        }
        return exchange_in_pair(x);
    }
}

// The same for a store, rounded to the tensor's dtype.
template <typename T, int N>
__device__ __forceinline__ void store_floats(Global<T> tensor, size_t index, const Floats<N>& floats) {
    if constexpr (sizeof(T) * N <= 16) {
        store_pack(tensor, index, from_floats<T>(floats));
    } else {
        const Floats<8> x = exchange_in_pair(floats);
        for (int half = 0; half < 2; ++half) {
            Pack<T, 4> pack;
            for (int j = 0; j < 4; ++j) pack.at[j] = x.at[4 * half + j];
            store_pack(tensor, first_move(index) + 2 * half, pack);
        }
    }
}

// The elements of a row that a lane moves at once: 16 bytes of the narrower dtype where rows consist of such pairs,
// else 4, else 1.
__device__ __forceinline__ int elements_of(int width) {
    if (kWide == 8 && width % 16 == 0) return 8;
    return width % 4 ? 1 : 4;
}

// A statement that depends on V, with V the elements of such a row.
#define BY_ELEMENTS(width, ...)        \
    switch (elements_of(width)) {      \
        case 8: {                      \
            constexpr int V = kWide;   \
            __VA_ARGS__;               \
            break;                     \
        }                              \
        case 4: {                      \
            constexpr int V = 4;       \
            __VA_ARGS__;               \
            break;                     \
        }                              \
        default: {                     \
            constexpr int V = 1;       \
            __VA_ARGS__;               \
        }                              \
    }

}  // namespace esm
