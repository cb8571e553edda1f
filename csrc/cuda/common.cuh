// What the CUDA kernels share. One source has three readers: nvcc and NVRTC for the GPU, g++ for the emulator in
// tests/cuda_emulator/, which runs the same kernels on a CPU. To stay readable by all of them, a kernel
//   - is declared with KERNEL, takes its tensors as Global<T>, and has its shared memory from SHARED or DYNAMIC_SHARED;
//   - is written for one dtype, `scalar`: a file is compiled once for each of f32, f16 and bf16;
//   - has no inline PTX, and no float atomics: the order of their additions would change bits from run to run;
//   - accumulates in fp32, and counts elements of a tensor in size_t, rows and columns in int.
// Every thread of a block reaches every __syncthreads(); none returns before the last one.
#pragma once

#ifdef ESM_EMULATE_CUDA
#include "device.h"  // tests/cuda_emulator/
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <mma.h>

// A kernel of at most `threads` threads a block, `blocks` of which an SM must be able to hold: a promise to the
// compiler, which spares registers for it, and what the audit checks.
#define KERNEL(threads, blocks, name, params) extern "C" __global__ void __launch_bounds__(threads, blocks) name params
#define SHARED(type, name, count) __shared__ __align__(128) type name[count]
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

// A tensor in device memory. No two of a kernel's tensors overlap, unless both are only read.
template <typename T>
using Global = T* __restrict__;

template <typename To, typename From>
__device__ __forceinline__ To* global_cast(From* tensor) {
    return reinterpret_cast<To*>(tensor);
}
#endif

namespace esm {

using f32 = float;
using f16 = __half;
using bf16 = __nv_bfloat16;
using scalar = ESM_SCALAR;

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
    return x;
}
template <>
__device__ __forceinline__ f16 from_float<f16>(float x) {
    return __float2half_rn(x);
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
    return __float2bfloat16_rn(x);
}

// N consecutive elements, which move in one instruction where they fill 4, 8 or 16 bytes.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
    static_assert(sizeof(T) * N <= 16, "a lane moves up to 16 bytes");
    T at[N];
};

// As many as fill 16 bytes.
constexpr int kWide = 16 / int(sizeof(scalar));

// Elements N * index to N * index + N - 1 of a tensor whose address is a multiple of the pack's size.
template <int N, typename T>
__device__ __forceinline__ Pack<T, N> load_pack(Global<const T> tensor, size_t index) {
    return global_cast<const Pack<T, N>>(tensor)[index];
}

template <typename T, int N>
__device__ __forceinline__ void store_pack(Global<T> tensor, size_t index, const Pack<T, N>& pack) {
    global_cast<Pack<T, N>>(tensor)[index] = pack;
}

// In fp32, where sums are made: not a Pack, which may be 16 bytes at most.
template <int N>
struct Floats {
    float at[N];
};

template <typename T, int N>
__device__ __forceinline__ Floats<N> to_floats(const Pack<T, N>& pack) {
    Floats<N> result;
    for (int j = 0; j < N; ++j) result.at[j] = to_float(pack.at[j]);
    return result;
}

template <typename T, int N>
__device__ __forceinline__ Pack<T, N> from_floats(const Floats<N>& floats) {
    Pack<T, N> result;
    for (int j = 0; j < N; ++j) result.at[j] = from_float<T>(floats.at[j]);
    return result;
}

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

struct Sum {
    static __device__ __forceinline__ float of(float a, float b) { return a + b; }
};
struct Largest {
    static __device__ __forceinline__ float of(float a, float b) { return fmaxf(a, b); }
};

// The reduction of every lane's value, in every lane.
template <typename Reduce = Sum>
__device__ __forceinline__ float warp_reduce(float value) {
#pragma unroll
    for (int distance = kWarp / 2; distance; distance /= 2)
        value = Reduce::of(value, __shfl_xor_sync(kAllLanes, value, distance));
    return value;
}

// The sequence that holds a row: the last whose first row is not beyond it. Empty sequences hold none.
__device__ __forceinline__ int sequence_of(int row, Global<const int> cu_seqlens, int sequences) {
    int low = 0, high = sequences;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (cu_seqlens[middle] <= row)
            low = middle;
        else
            high = middle;
    }
    return low;
}

}  // namespace esm
