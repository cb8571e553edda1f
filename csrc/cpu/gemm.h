// rows x packed weights -> an epilogue, one thread. Every output element is one chain of products in the order of the
// inputs, whatever the number of rows, so a row's result does not depend on its neighbours or on the threads.
#pragma once

#include "clock.h"
#include "table.h"
#include "vec.h"

namespace esm {
namespace cpu {
namespace {

// Rows of a tile: kRows x 2 vectors of sums fill most of the registers, with room for two vectors of weights.
constexpr int kRows = N == 16 ? 12 : 6;

// Rows of a tile for activations A: as above, but for amx.h.
template <class A>
constexpr int kTileRows = kRows;

// Type of the activations that multiply weights W. With a bf16 dot product they are bf16 too; without, products are
// in fp32 and rounding the activations would only lose digits.
template <class W>
struct ActivationOf {
    typedef float type;
};
#if defined(__AVX512BF16__)
template <>
struct ActivationOf<bf16> {
    typedef bf16 type;
};
#endif

// What the GEMM itself reads; see int8.h for the weights where that is another type.
template <class W>
struct OperandOf : ActivationOf<W> {};

// Type of the vectors and results beside weights W.
template <class W>
struct PlainOf {
    typedef W type;
};

ESM_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
ESM_INLINE int panels_of(int64_t columns) { return int((columns + kPanel - 1) / kPanel); }

// Elements of one panel of weights.
ESM_INLINE size_t panel_size(const bf16*, int64_t in) { return size_t(round_up(in, kInputs)) * kPanel; }
ESM_INLINE size_t panel_size(const float*, int64_t in) { return size_t(in) * kPanel; }

// Elements from one row to the next for rows of at least n: an odd number of cache lines, lest rows share cache sets.
template <class T>
ESM_INLINE size_t leading(int64_t n) {
    const size_t in_line = 64 / sizeof(T);
    return (size_t(round_up(n, kPanel)) / in_line | 1) * in_line;
}

// fp32 products are summed in chunks: 5,120 in one chain would lose a digit to blocked sums such as MKL's.
constexpr int kChunk = 512;

// c (R x 32, rows ldc apart) = a (R x in, rows lda apart) times one panel. All loops over R unroll into registers.
template <int R>
ESM_INLINE void tile(const float* a, size_t lda, const float* panel, int in, float* c, size_t ldc) {
    for (int part = 0; part < kPanel; part += 2 * N) {
        const float* b = panel + part;
        for (int k = 0; k < in;) {
            F sums[R][2] = {};
            const bool begun = k > 0;
            for (const int end = in - k < kChunk ? in : k + kChunk; k < end; ++k, b += kPanel) {
                const F b0 = load(b), b1 = load(b + N);
#pragma GCC unroll 12
                for (int r = 0; r < R; ++r) {
                    const F x = splat(a[r * lda + k]);
                    sums[r][0] = fma(x, b0, sums[r][0]);
                    sums[r][1] = fma(x, b1, sums[r][1]);
                }
            }
#pragma GCC unroll 12
            for (int r = 0; r < R; ++r) {
                float* to = c + r * ldc + part;
                store(to, begun ? load(to) + sums[r][0] : sums[r][0]);
                store(to + N, begun ? load(to + N) + sums[r][1] : sums[r][1]);
            }
        }
    }
}

// bf16 weights widened on the way: of a pair's 32 bits, the low half is the even input, the high half the odd one.
template <int R>
ESM_INLINE void tile(const float* a, size_t lda, const bf16* panel, int in, float* c, size_t ldc) {
    for (int part = 0; part < kPanel; part += 2 * N) {
        F sums[R][2] = {};
        const bf16* b = panel + 2 * part;
        for (int k = 0; k < in; k += 2, b += 2 * kPanel) {
#pragma GCC unroll 2
            for (int odd = 0; odd < 2; ++odd) {
                const U w0 = load_as<U>(b), w1 = load_as<U>(b + 2 * N);
                const F b0 = (F)(odd ? w0 & 0xffff0000u : w0 << 16), b1 = (F)(odd ? w1 & 0xffff0000u : w1 << 16);
#pragma GCC unroll 12
                for (int r = 0; r < R; ++r) {
                    const F x = splat(a[r * lda + k + odd]);
                    sums[r][0] = fma(x, b0, sums[r][0]);
                    sums[r][1] = fma(x, b1, sums[r][1]);
                }
            }
        }
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) store(c + r * ldc + part, sums[r][0]), store(c + r * ldc + part + N, sums[r][1]);
    }
}

#if defined(__AVX512BF16__)
ESM_INLINE __m512 dot(__m512 sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

template <int R>
ESM_INLINE void tile(const bf16* a, size_t lda, const bf16* panel, int in, float* c, size_t ldc) {
    __m512 sums[R][2];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    const bf16* b = panel;
    for (int k = 0; k < in; k += 2, b += 2 * kPanel) {
        const __m512i b0 = _mm512_loadu_si512(b), b1 = _mm512_loadu_si512(b + 2 * N);
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
            const __m512i x = _mm512_set1_epi32(load_as<int32_t>(a + r * lda + k));
            sums[r][0] = dot(sums[r][0], x, b0);
            sums[r][1] = dot(sums[r][1], x, b1);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
        _mm512_storeu_ps(c + r * ldc, sums[r][0]);
        _mm512_storeu_ps(c + r * ldc + N, sums[r][1]);
    }
}
#endif

// tile<rows>.
template <int R = kRows, class A, class W>
void tile_of(int rows, const A* a, size_t lda, const W* panel, int in, float* c, size_t ldc) {
    if constexpr (R <= kTileRows<A>)
        if (rows == R) return tile<R>(a, lda, panel, in, c, ldc);
    if constexpr (R > 1) tile_of<R - 1>(rows, a, lda, panel, in, c, ldc);
}

// Tiles of nearly equal height: 13 rows go as 7 and 6, because a tile of one row waits for its own sums.
template <class A>
struct Tiles {
    int64_t rows;
    template <class Body>
    ESM_INLINE void each(const Body& body) const {
        int64_t left = (rows + kTileRows<A> - 1) / kTileRows<A>;
        for (int64_t row = 0; row < rows; --left) {
            const int height = int((rows - row + left - 1) / left);
            body(row, height);
            row += height;
        }
    }
};

// finish(c, row, height, column) takes each tile of sums, height x 32, when it is done.
template <class A, class W, class Finish>
void gemm(const A* a, size_t lda, int64_t rows, const W* packed, int in, int first_panel, int last_panel,
          const Finish& finish) {
    const double start = clock_start();
    alignas(64) float c[kTileRows<A> * kPanel];
    for (int panel = first_panel; panel < last_panel; ++panel) {
        const W* weights = packed + panel * panel_size(packed, in);
        Tiles<A>{rows}.each([&](int64_t row, int height) {
            tile_of(height, a + row * lda, lda, weights, in, c, kPanel);
            finish(c, row, height, panel * kPanel);
        });
    }
    clock_stop(Phase::kGemm, start);
}

// Calls use(v, left) for the vectors v of a tile's row that hold columns at all; left is how many, N or more for all.
template <class Use>
ESM_INLINE void each_vector(int column, int columns, const Use& use) {
    for (int v = 0; v < kPanel && column + v < columns; v += N) use(v, columns - column - v);
}

// The epilogues. `bias` is padded with zeros to whole panels.
template <class A>
struct Gelu {
    A* out;
    size_t ld;
    const float* bias;

    ESM_INLINE void operator()(const float* c, int64_t row, int height, int column) const {
        for (int r = 0; r < height; ++r)
            for (int v = 0; v < kPanel; v += N)
                store(out + (row + r) * ld + column + v,
                      gelu_for(out, load(c + r * kPanel + v) + load(bias + column + v)));
    }
};

template <class A>
struct Project {
    A* out;
    size_t ld;
    const float* bias;
    int columns;

    ESM_INLINE void operator()(const float* c, int64_t row, int height, int column) const {
        for (int r = 0; r < height; ++r)
            each_vector(column, columns, [&](int v, int left) {
                const F x = load(c + r * kPanel + v) + load(bias + column + v);
                A* to = out + (row + r) * ld + column + v;
                left >= N ? store(to, x) : store_part(to, x, left);
            });
    }
};

struct AddTo {
    const float* residual;
    float* out;
    size_t ld;
    const float* bias;
    int columns;

    ESM_INLINE void operator()(const float* c, int64_t row, int height, int column) const {
        for (int r = 0; r < height; ++r)
            each_vector(column, columns, [&](int v, int left) {
                const size_t at = (row + r) * ld + column + v;
                const F x = load(c + r * kPanel + v) + load(bias + column + v);
                if (left >= N)
                    store(out + at, load(residual + at) + x);
                else
                    store_part(out + at, load_part(residual + at, left) + x, left);
            });
    }
};

}  // namespace
}  // namespace cpu
}  // namespace esm
