// CUDA as the kernels in csrc/cuda/ speak it, on top of emulator.h: what they do not use is not here.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "emulator.h"
#include "kernel.h"

#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(bytes) alignas(bytes)
#define threadIdx (emulator::thread_index)
#define blockIdx (emulator::block_index)
#define blockDim (emulator::block_size)
#define gridDim (emulator::grid_size)

#define SHARED(type, name, count) \
    static char name##_key;       \
    type* const name = static_cast<type*>(emulator::shared(&name##_key, sizeof(type) * (count)))
#define DYNAMIC_SHARED(name) unsigned char* const name = static_cast<unsigned char*>(emulator::dynamic_shared())

// ---- Global memory: a pointer that remembers its tensor, and a reference that tells loads from stores

template <typename T>
class Reference {
  public:
    using Value = std::remove_const_t<T>;
    __forceinline__ Reference(T* at, const emulator::Tensor* tensor) : at_(at), tensor_(tensor) {}
    Reference(const Reference&) = default;
    __forceinline__ operator Value() const {
        emulator::access(at_, sizeof(T), alignof(T), tensor_, emulator::Access::load);
        return *at_;
    }
    __forceinline__ const Reference& operator=(Value value) const {
        emulator::access(at_, sizeof(T), alignof(T), tensor_, emulator::Access::store);
        *at_ = value;
        return *this;
    }
    __forceinline__ const Reference& operator=(const Reference& other) const { return *this = Value(other); }

  private:
    T* at_;
    const emulator::Tensor* tensor_;
};

template <typename T>
class Global {
  public:
    Global(T* at, const emulator::Tensor* tensor) : at_(at), tensor_(tensor) {}
    template <typename U, typename = std::enable_if_t<std::is_same<const U, T>::value>>
    Global(Global<U> other) : at_(other.raw()), tensor_(other.tensor()) {}

    template <typename I>
    __forceinline__ Reference<T> operator[](I index) const {
        return {at_ + index, tensor_};
    }
    __forceinline__ Reference<T> operator*() const { return {at_, tensor_}; }
    template <typename I>
    Global operator+(I distance) const {
        return {at_ + distance, tensor_};
    }
    explicit operator bool() const { return at_; }
    bool operator!() const { return !at_; }

    T* raw() const { return at_; }
    const emulator::Tensor* tensor() const { return tensor_; }

  private:
    T* at_;
    const emulator::Tensor* tensor_;
};

template <typename To, typename From>
inline Global<To> global_cast(Global<From> from) {
    return {reinterpret_cast<To*>(from.raw()), from.tensor()};
}

// ---- Barriers and warps

inline void __syncthreads(int line = __builtin_LINE()) { emulator::wait_for_block(line); }
inline void __syncwarp(unsigned lanes = ~0u, int line = __builtin_LINE()) { emulator::wait_for_warp(lanes, line); }

namespace emulator {

template <typename T>
inline uint64_t bits(T value) {
    static_assert(sizeof(T) <= 8, "a shuffle moves up to 8 bytes");
    uint64_t result = 0;
    std::memcpy(&result, &value, sizeof value);
    return result;
}

// The value of an element of a tensor, too.
template <typename T>
inline T plain(T value) {
    return value;
}
template <typename T>
inline std::remove_const_t<T> plain(Reference<T> element) {
    return element;
}
template <typename T>
using Plain = decltype(plain(std::declval<T>()));

template <typename T>
inline T shuffle(unsigned lanes, T value, int from, int line) {
    const uint64_t* given = exchange(lanes, bits(value), line);
    if (from < 0 || from > 31) return value;
    if (!(lanes >> from & 1)) fail("line %d: a shuffle from lane %d, which takes no part in it", line, from);
    std::memcpy(&value, &given[from], sizeof value);
    return value;
}

}  // namespace emulator

template <typename T>
inline emulator::Plain<T> __shfl_sync(unsigned lanes, T value, int from, int line = __builtin_LINE()) {
    return emulator::shuffle(lanes, emulator::plain(value), from & 31, line);
}
template <typename T>
inline emulator::Plain<T> __shfl_xor_sync(unsigned lanes, T value, int distance, int line = __builtin_LINE()) {
    return emulator::shuffle(lanes, emulator::plain(value), int(emulator::lane()) ^ distance, line);
}
template <typename T>
inline emulator::Plain<T> __shfl_down_sync(unsigned lanes, T value, int distance, int line = __builtin_LINE()) {
    return emulator::shuffle(lanes, emulator::plain(value), int(emulator::lane()) + distance, line);
}
template <typename T>
inline emulator::Plain<T> __shfl_up_sync(unsigned lanes, T value, int distance, int line = __builtin_LINE()) {
    return emulator::shuffle(lanes, emulator::plain(value), int(emulator::lane()) - distance, line);
}
inline unsigned __ballot_sync(unsigned lanes, int predicate, int line = __builtin_LINE()) {
    const uint64_t* given = emulator::exchange(lanes, predicate != 0, line);
    unsigned result = 0;
    for (unsigned l = 0; l < 32; ++l) result |= unsigned(lanes >> l & 1 && given[l]) << l;
    return result;
}
inline int __any_sync(unsigned lanes, int predicate, int line = __builtin_LINE()) {
    return __ballot_sync(lanes, predicate, line) != 0;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }

// ---- Numbers

struct __half {
    _Float16 value;
};
struct __nv_bfloat16 {
    uint16_t bits;
};
struct float2 {
    float x, y;
};
inline float __half2float(__half x) { return float(x.value); }
inline __half __float2half_rn(float x) { return {_Float16(x)}; }
inline float __bfloat162float(__nv_bfloat16 x) {
    const uint32_t wide = uint32_t(x.bits) << 16;
    float result;
    std::memcpy(&result, &wide, 4);
    return result;
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return {0x7fff};
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};  // to nearest, ties to even
}
inline float __int_as_float(int bits) {
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
using std::max;
using std::min;

// ---- Atomics. Integers only: float additions in no fixed order would change bits.
template <typename T>
inline T atomicAdd(Global<T> at, T value) {
    static_assert(std::is_integral<T>::value, "");
    emulator::access(at.raw(), sizeof(T), alignof(T), at.tensor(), emulator::Access::atomic);
    return __atomic_fetch_add(at.raw(), value, __ATOMIC_RELAXED);
}
template <typename T>
inline T atomicMin(Global<T> at, T value) {
    static_assert(std::is_integral<T>::value, "");
    emulator::access(at.raw(), sizeof(T), alignof(T), at.tensor(), emulator::Access::atomic);
    T old = __atomic_load_n(at.raw(), __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(at.raw(), &old, old < value ? old : value, false, __ATOMIC_RELAXED,
                                        __ATOMIC_RELAXED)) {
    }
    return old;
}

// In shared memory.
template <typename T>
inline T atomicAdd(T* at, T value) {
    static_assert(std::is_integral<T>::value, "");
    return __atomic_fetch_add(at, value, __ATOMIC_RELAXED);
}

#include "wmma.h"
