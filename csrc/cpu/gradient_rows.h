// What a layer's halves share in training: matrices packed for one call, sums over rows, the layer norm's gradient.
#pragma once

#include "rows.h"
#include "work.h"

namespace esm {
namespace cpu {
namespace {

// Gains and biases in fp32, padded with zeros to whole panels.
template <class W, int Count>
class Vectors {
  public:
    Vectors(const void* const (&from)[Count], const int (&sizes)[Count]) {
        for (int i = 0; i < Count; ++i) {
            size[i] = sizes[i], offset[i] = floats;
            floats += size_t(round_up(sizes[i], kPanel));
        }
        float* memory = buffer<float>(Layer::vectors, 1, floats);
        values_ = memory;
        for (int i = 0; i < Count; ++i) widen<typename FormatOf<W>::Plain>(from[i], size[i], memory + offset[i]);
    }
    const float* operator[](int i) const { return values_ + offset[i]; }

    int size[Count];
    size_t offset[Count], floats = 0;

  private:
    const float* values_;
};

// One panel of a matrix as the GEMM reads it: of (out, in), or transposed of (in, out).
template <bool Transposed, class W>
void pack_panel(const W* matrix, int out, int in, int panel, W* to) {
    constexpr int kTogether = FormatOf<W>::kTogether, kStretch = 64;
    const int first = panel * kPanel, count = int(smaller(kPanel, out - first));
    const auto place = [&](int i, int o) { return (size_t(i / kTogether) * kPanel + o) * kTogether + i % kTogether; };
    std::memset(to, 0, panel_size(to, in) * sizeof(W));
    for (int start = 0; start < in; start += kStretch) {
        const int end = int(smaller(start + kStretch, in));
        if (Transposed)
            for (int i = start; i < end; ++i)
                for (int o = 0; o < count; ++o) to[place(i, o)] = matrix[size_t(i) * out + first + o];
        else
            for (int i = start; i < end; i += kTogether)
                for (int o = 0; o < count; ++o) {
                    const W* from = matrix + size_t(first + o) * in + i;
                    if (i + kTogether <= in)
                        std::memcpy(to + place(i, o), from, kTogether * sizeof(W));
                    else
                        to[place(i, o)] = *from;
                }
    }
}

struct Matrix {
    const void* plain;
    int out, in;
};

// Packs what multiplies rows from the right, or `transposed` what multiplies the gradients of such products.
template <class W, int Count>
void pack_matrices(Matrix (&&matrices)[Count], bool transposed, const W* (&packed)[Count]) {
    size_t offset[Count + 1] = {};
    for (int i = 0; i < Count; ++i) {
        if (transposed) matrices[i] = {matrices[i].plain, matrices[i].in, matrices[i].out};
        offset[i + 1] = offset[i] + panels_of(matrices[i].out) * panel_size(packed[i], matrices[i].in);
    }
    W* memory = buffer<W>(Layer::matrices, 1, offset[Count]);
    for (int i = 0; i < Count; ++i) {
        const W* plain = static_cast<const W*>(matrices[i].plain);
        W* to = memory + offset[i];
        const int out = matrices[i].out, in = matrices[i].in;
        each_panel(panels_of(out), [&](int begin, int end) {
            for (int panel = begin; panel < end; ++panel) {
                W* at = to + panel * panel_size(to, in);
                transposed ? pack_panel<true>(plain, out, in, panel, at) : pack_panel<false>(plain, out, in, panel, at);
            }
        });
        packed[i] = to;
    }
}

// Rows whose gradients of biases and gains are summed up together: always as many, whatever the number of threads.
constexpr int kSummedTogether = 64;

// body(first row, one past the last, sums) for each part; out: the sums of all parts in order, vector after vector.
template <class W, int Count, class Body>
void each_part_of_sums(int64_t rows, const Vectors<W, Count>& vectors, float* out, const Body& body) {
    const int64_t parts = (rows + kSummedTogether - 1) / kSummedTogether;
    float* all = buffer<float>(Layer::sums, parts, vectors.floats);
    each(size_t(parts), 1, [&](size_t begin, size_t end) {
        for (size_t part = begin; part < end; ++part) {
            const int64_t first = int64_t(part) * kSummedTogether;
            float* sums = all + part * vectors.floats;
            std::memset(sums, 0, vectors.floats * sizeof *sums);
            float* of[Count];
            for (int i = 0; i < Count; ++i) of[i] = sums + vectors.offset[i];
            body(first, smaller(first + kSummedTogether, rows), of);
        }
    });
    for (int i = 0; i < Count; out += vectors.size[i++]) {
        std::memset(out, 0, size_t(vectors.size[i]) * sizeof *out);
        for (int64_t part = 0; part < parts; ++part)
            each_part(all + size_t(part) * vectors.floats + vectors.offset[i], vectors.size[i],
                      [&](int j, F x, int left) { store_first(out + j, load_most(out + j, left) + x, left); });
    }
}

// Rows of a gradient in fp32: to `wide`, with zeros up to whole panels; to `narrow` unless it is null; and to the sums.
template <class W, class A>
void take_gradient(const float* from, int width, int64_t first, int64_t last, A* wide, size_t ld, W* narrow,
                   float* sums) {
    for (int64_t row = first; row < last; ++row, wide += ld) {
        copy_row(from + row * width, width, wide);
        each_part(from + row * width, width, [&](int i, F x, int left) {
            if (narrow) store_first(narrow + row * width + i, x, left);
            store(sums + i, load(sums + i) + x);
        });
    }
}

template <class A>
void add_rows(const A* rows, int width, int64_t count, size_t ld, float* sums) {
    for (; count; --count, rows += ld)
        each_part(rows, width, [&](int i, F x, int) { store(sums + i, load(sums + i) + x); });
}

// Keeps what GELU is given, for `columns` columns; see Gelu.
template <class W, class A>
struct GeluKeeping {
    Gelu<A> gelu;
    W* middle;
    int columns;

    ESM_INLINE void operator()(const float* c, int64_t row, int height, int column) const {
        Project<W>{middle, size_t(columns), gelu.bias, columns}(c, row, height, column);
        gelu(c, row, height, column);
    }
};

// The epilogue that does nothing: rows of `columns`, one after the other.
template <class W>
struct Store {
    W* out;
    int columns;

    ESM_INLINE void operator()(const float* c, int64_t row, int height, int column) const {
        for (int r = 0; r < height; ++r)
            each_vector(column, columns, [&](int v, int left) {
                store_first(out + (row + r) * columns + column + v, load(c + r * kPanel + v), left);
            });
    }
};

// From the gradient of a layer norm's result, rows `ld` apart and padded with zeros, and that of the stream beside it,
// if there is one, to that of x, whose place it may take. The result itself is computed again.
template <class W>
struct NormGradient {
    Norm norm;
    W* normed;
    const float* beside;
    float *dx, *dgain, *dbias;

    void operator()(int64_t first, int64_t last, const float* dnormed, size_t ld) const {
        for (int64_t row = first; row < last; ++row, dnormed += ld) of_row(row * norm.width, dnormed);
    }

  private:
    void of_row(int64_t at, const float* dnormed) const {
        const int width = norm.width;
        const float* x = norm.x + at;
        const Statistics row(x, width, norm.eps);
        F total = {}, products = {};
        each_part(x, width, [&](int i, F value, int left) {
            const F standard = (value - row.mean) * row.scale, d = load(dnormed + i), g = d * load(norm.gain + i);
            total += g;
            products = fma(g, standard, products);
            store(dgain + i, fma(d, standard, load(dgain + i)));
            store(dbias + i, load(dbias + i) + d);
            store_first(normed + at + i, fma(standard, load(norm.gain + i), load(norm.bias + i)), left);
        });
        const float mean = sum(total) / float(width), slope = sum(products) / float(width);
        each_part(x, width, [&](int i, F value, int left) {
            const F standard = (value - row.mean) * row.scale, g = load(dnormed + i) * load(norm.gain + i);
            const F d = (g - mean - standard * slope) * row.scale;
            store_first(dx + at + i, beside ? load_most(beside + at + i, left) + d : d, left);
        });
    }
};

}  // namespace
}  // namespace cpu
}  // namespace esm
