// How the kernels share work among the threads, and the memory they work in.
#pragma once

#include "amx_int8.h"
#include "host.h"
#include "rows.h"

namespace esm {
namespace cpu {
namespace {

// Rows a thread takes through a GEMM at once: many rows share one reading of the weights, but they have to stay in L2.
// Tiles are so fast that reading the weights is what bounds them: they need more rows.
#if defined(__AMX_BF16__)
template <class A>
constexpr int64_t kBlockRows = sizeof(A) == sizeof(float) ? 192 : 384;
#else
template <class A>
constexpr int64_t kBlockRows = 192;
#endif
// Rows a thread takes at once, where a row is little work.
constexpr size_t kTurn = 32;

ESM_INLINE int64_t smaller(int64_t a, int64_t b) { return b < a ? b : a; }
ESM_INLINE int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }

template <class Body>
void each(size_t n, size_t grain, const Body& body) {
    const auto run = [](void* context, size_t begin, size_t end) {
        (*static_cast<const Body*>(context))(begin, end);
        release_tiles();
    };
    parallel(n, grain, run, const_cast<void*>(static_cast<const void*>(&body)));
}

// body(first row, one past the last) in nearly equal blocks of rows of A, a whole number of them per thread.
template <class A = float, class Body>
void each_block(int64_t rows, const Body& body) {
    const int64_t blocks = round_up((rows + kBlockRows<A> - 1) / kBlockRows<A>, parallel_width());
    each(size_t(blocks), 1, [&](size_t begin, size_t end) {
        for (size_t i = begin; i < end; ++i) {
            const int64_t first = rows * int64_t(i) / blocks, last = rows * int64_t(i + 1) / blocks;
            if (first < last) body(first, last);
        }
    });
}

// body(first panel, one past the last) over the panels of a matrix.
template <class Body>
void each_panel(int panels, const Body& body) {
    each(size_t(panels), size_t(panels / (4 * parallel_width()) + 1),
         [&](size_t begin, size_t end) { body(int(begin), int(end)); });
}

// With few rows a thread: the threads share the weights' columns, not the rows, so that each weight is read once. Where
// reading the weights is the bound, that goes for all that one block could hold.
template <class W>
bool few(int64_t rows) {
    typedef typename FormatOf<W>::Activation A;
    constexpr bool kTiles = kTileRows<A> > kRows;
    return rows < int64_t(kTileRows<A>) * parallel_width() || (kTiles && rows <= kBlockRows<A>);
}

template <class W>
const W* weights_of(const Prepacked& weights) {
    return static_cast<const W*>(weights.data);
}

// Rows as a GEMM with weights W reads them: these themselves, or copies of its own type in the memory of that name.
template <class B>
struct Rows {
    const B* data;
    size_t ld;
};
template <class W, class A, class List>
Rows<typename FormatOf<W>::Operand> operand(const W*, const A* rows, size_t ld, int64_t count, int n, List name) {
    typedef typename FormatOf<W>::Operand B;
    if constexpr (kQuantized<B>) {
        const size_t to = leading<B>(n);
        B* quantized = buffer<B>(name, count, to);
        for (int64_t row = 0; row < count; ++row) quantize_row(rows + row * ld, n, quantized + row * to);
        return {quantized, to};
    } else {
        return {rows, ld};
    }
}

struct Norm {
    const float* x;
    int width;
    const float *gain, *bias;
    float eps;

    template <class A>
    void operator()(int64_t first, int64_t last, A* out, size_t ld) const {
        const double start = clock_start();
        for (int64_t row = first; row < last; ++row, out += ld)
            layer_norm(x + row * width, width, gain, bias, eps, out);
        clock_stop(Phase::kNorm, start);
    }

    // Every row, shared among the threads.
    template <class A>
    void all(int64_t rows, A* out, size_t ld) const {
        each(size_t(rows), 8, [&](size_t begin, size_t end) {
            (*this)(int64_t(begin), int64_t(end), out + begin * ld, ld);
        });
    }
};

}  // namespace
}  // namespace cpu
}  // namespace esm
