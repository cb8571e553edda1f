// rows x prepacked weights -> an epilogue, one thread. Every output element is one chain of products in the order of the
// inputs, whatever the number of rows, so a row's result does not depend on its neighbours or on the threads.
#pragma once

#include "clock.h"
#include "panels.h"

#define ESM_FILES
#include "formats.def"
#undef ESM_FILES

namespace esm {
namespace cpu {
namespace {

template <Type type>
struct ElementOf;
#define X(name, Element)              \
    template <>                       \
    struct ElementOf<Type::name> {    \
        typedef Element W;            \
    };
ESM_FORMATS(X)
#undef X

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

// The epilogues. `bias` is padded with zeros to whole panels. The results of a block of rows are more than the second-level
// cache holds, and stores that wait for memory would have the next sums wait: each tile asks for the lines that the next
// panel's will go to.
template <class A>
struct Gelu {
    A* out;  // begins with column `first`
    size_t ld;
    const float* bias;
    int first = 0;

    ESM_INLINE void operator()(const float* c, int64_t row, int height, int column) const {
        for (int r = 0; r < height; ++r) {
            A* to = out + (row + r) * ld + column - first;
            __builtin_prefetch(to + kPanel, 1, 2);
            for (int v = 0; v < kPanel; v += N)
                store(to + v, gelu_for(out, load(c + r * kPanel + v) + load(bias + column + v)));
        }
    }
};

template <class A>
struct Project {
    A* out;
    size_t ld;
    const float* bias;
    int columns;

    ESM_INLINE void operator()(const float* c, int64_t row, int height, int column) const {
        for (int r = 0; r < height; ++r) {
            __builtin_prefetch(out + (row + r) * ld + column + kPanel, 1, 2);
            each_vector(column, columns, [&](int v, int left) {
                const F x = load(c + r * kPanel + v) + load(bias + column + v);
                A* to = out + (row + r) * ld + column + v;
                left >= N ? store(to, x) : store_part(to, x, left);
            });
        }
    }
};

// out += the tile.
struct Accumulate {
    float* out;
    size_t ld;

    ESM_INLINE void operator()(const float* c, int64_t row, int height, int column) const {
        for (int r = 0; r < height; ++r)
            for (int v = 0; v < kPanel; v += N) {
                float* to = out + (row + r) * ld + column + v;
                store(to, load(to) + load(c + r * kPanel + v));
            }
    }
};

// The residual of a block of rows has left the second-level cache when its turn comes: each tile asks for what the next
// panel of outputs will add to.
struct AddTo {
    const float* residual;
    float* out;
    size_t ld;
    const float* bias;
    int columns;

    ESM_INLINE void operator()(const float* c, int64_t row, int height, int column) const {
        const bool more = column + kPanel < columns;
        for (int r = 0; r < height; ++r)
            each_vector(column, columns, [&](int v, int left) {
                const size_t at = (row + r) * ld + column + v;
                const F x = load(c + r * kPanel + v) + load(bias + column + v);
                if (more && v % 16 == 0) __builtin_prefetch(residual + at + kPanel, 0, 2);
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
