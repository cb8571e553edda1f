// nvcuda::wmma, 16 x 16 x 16, half and bfloat16 with float accumulators. Which element of a tile a lane holds is not
// specified; here it is scrambled, so that a kernel that assumes an order computes nonsense.
#pragma once

#include "device.h"

namespace nvcuda {
namespace wmma {

struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major, mem_col_major };

constexpr int kSide = 16;

template <typename Use, int M, int N, int K, typename T, typename Layout = void>
struct fragment {
    static_assert(M == kSide && N == kSide && K == kSide, "the emulator has 16 x 16 x 16");
    static constexpr int num_elements = kSide * kSide / 32;
    T x[num_elements];

    // The place in the tile, row by row, of a lane's element. 37 is odd, so this is one to one; each use has its own.
    static int place(int element) {
        const int turn = std::is_same<Use, matrix_a>::value ? 11 : std::is_same<Use, matrix_b>::value ? 90 : 173;
        return ((int(emulator::lane()) * num_elements + element) * 37 + turn) % (kSide * kSide);
    }
};

template <typename T>
inline float widened(T x) {
    if constexpr (std::is_same<T, __half>::value) return __half2float(x);
    else if constexpr (std::is_same<T, __nv_bfloat16>::value) return __bfloat162float(x);
    else return x;
}

// Where an element of a tile lies; the warp must be together, and the tile aligned as the guide demands.
template <typename T>
inline size_t offset(const T* tile, unsigned stride, bool by_columns, int place) {
    if (uintptr_t(tile) % 32) emulator::fail("a wmma tile must be aligned to 32 bytes");
    const size_t bytes = stride * sizeof(T);
    if (bytes % 16) emulator::fail("a wmma tile's stride must be a multiple of 16 bytes, not %zu", bytes);
    const int row = place / kSide, column = place % kSide;
    return by_columns ? size_t(column) * stride + row : size_t(row) * stride + column;
}

template <typename T>
inline const T* raw(const T* tile) {
    return tile;
}
template <typename T>
inline const T* raw(Global<T> tile) {
    return tile.raw();
}

template <typename F, typename P>
inline void load(F& f, P tile, unsigned stride, bool by_columns, int line) {
    emulator::exchange(~0u, 0, line);
    for (int e = 0; e < F::num_elements; ++e) f.x[e] = tile[offset(raw(tile), stride, by_columns, F::place(e))];
    emulator::exchange(~0u, 0, line);
}

template <typename Use, typename T, typename Layout, typename P>
inline void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout>& f, P tile, unsigned stride,
                             int line = __builtin_LINE()) {
    load(f, tile, stride, std::is_same<Layout, col_major>::value, line);
}
template <typename P>
inline void load_matrix_sync(fragment<accumulator, 16, 16, 16, float>& f, P tile, unsigned stride, layout_t layout,
                             int line = __builtin_LINE()) {
    load(f, tile, stride, layout == mem_col_major, line);
}

template <typename P>
inline void store_matrix_sync(P tile, const fragment<accumulator, 16, 16, 16, float>& f, unsigned stride,
                              layout_t layout, int line = __builtin_LINE()) {
    using F = fragment<accumulator, 16, 16, 16, float>;
    emulator::exchange(~0u, 0, line);
    for (int e = 0; e < F::num_elements; ++e)
        tile[offset(raw(tile), stride, layout == mem_col_major, F::place(e))] = f.x[e];
    emulator::exchange(~0u, 0, line);
}

template <typename F, typename T>
inline void fill_fragment(F& f, T value) {
    for (auto& x : f.x) x = value;
}

template <typename T, typename LayoutA, typename LayoutB>
inline void mma_sync(fragment<accumulator, 16, 16, 16, float>& d, const fragment<matrix_a, 16, 16, 16, T, LayoutA>& a,
                     const fragment<matrix_b, 16, 16, 16, T, LayoutB>& b,
                     const fragment<accumulator, 16, 16, 16, float>& c, int line = __builtin_LINE()) {
    emulator::exchange(~0u, 0, line);
    for (int e = 0; e < a.num_elements; ++e) {
        emulator::tile_put(0, a.place(e), widened(a.x[e]));
        emulator::tile_put(1, b.place(e), widened(b.x[e]));
    }
    emulator::exchange(~0u, 0, line);
    for (int e = 0; e < c.num_elements; ++e) d.x[e] = c.x[e] + emulator::tile_product(c.place(e));
}

}  // namespace wmma
}  // namespace nvcuda
