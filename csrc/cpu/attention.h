// Attention of one head over one sequence. Keys and values are packed as weights are, so that both products are the
// GEMM's tiles; a few query rows at a time get all their scores at once, and an ordinary softmax.
#pragma once

#include "amx.h"
#include "rows.h"

namespace esm {
namespace cpu {
namespace {

// Keys as outputs, head dimensions as inputs.
ESM_INLINE void pack_keys(const float* k, size_t ld, int length, int dim, float* out) {
    std::memset(out + size_t(panels_of(length) - 1) * panel_size(out, dim), 0, panel_size(out, dim) * sizeof *out);
    for (int key = 0; key < length; ++key) {
        float* to = out + size_t(key / kPanel) * panel_size(out, dim) + key % kPanel;
        for (int d = 0; d < dim; ++d) to[d * kPanel] = k[key * ld + d];
    }
}
// Head dimensions as outputs, keys as inputs.
ESM_INLINE void pack_values(const float* v, size_t ld, int length, int dim, float* out) {
    for (int column = 0; column < dim; column += kPanel) {
        const int columns = dim - column < kPanel ? dim - column : kPanel;
        for (int key = 0; key < length; ++key, out += kPanel) {
            std::memset(out, 0, kPanel * sizeof *out);
            std::memcpy(out, v + key * ld + column, size_t(columns) * sizeof *out);
        }
    }
}

#if defined(__AVX512BF16__)
ESM_INLINE void pack_keys(const bf16* k, size_t ld, int length, int dim, bf16* out) {
    const int panels = panels_of(length), full = dim % kInputs ? 0 : panels - 1;  // those without padding
    std::memset(out + full * panel_size(out, dim), 0, (panels - full) * panel_size(out, dim) * sizeof *out);
    for (int key = 0; key < length; ++key) {
        bf16* to = out + size_t(key / kPanel) * panel_size(out, dim) + 2 * (key % kPanel);
        for (int d = 0; d < dim; d += 2) std::memcpy(to + d * kPanel, k + key * ld + d, 2 * sizeof *out);
    }
}
ESM_INLINE void pack_values(const bf16* v, size_t ld, int length, int dim, bf16* out) {
    for (int column = 0; column < dim; column += kPanel) {
        const int columns = dim - column < kPanel ? dim - column : kPanel;
        for (int key = 0; key < length; key += 2, out += 2 * kPanel) {
            const bf16 *even = v + key * ld + column, *odd = even + ld;
            uint32_t pairs[kPanel] = {};
            for (int c = 0; c < columns; ++c) pairs[c] = even[c].bits;
            if (key + 1 < length)
                for (int c = 0; c < columns; ++c) pairs[c] |= uint32_t(odd[c].bits) << 16;
            std::memcpy(out, pairs, sizeof pairs);
        }
        const size_t padding = size_t(round_up(length, kInputs) - round_up(length, 2)) * kPanel;
        std::memset(out, 0, padding * sizeof *out);
        out += padding;
    }
}
#endif

// (rows, dim) of one head, from one type to another.
template <class A, class W>
void copy_head(const A* from, size_t ld_from, int64_t rows, int dim, W* to, size_t ld_to) {
    for (int64_t row = 0; row < rows; ++row)
        for (int d = 0; d < dim; d += N)
            store_most(to + row * ld_to + d, load_most(from + row * ld_from + d, dim - d), dim - d);
}

constexpr int kMostDim = 1024;

// The rotary embedding in place, for the rows of one sequence and head: halves (a, b) -> (a cos - b sin, b cos + a sin).
template <class A>
void rotate(A* x, size_t ld, int length, int dim, const float* cosines, const float* sines) {
    const int half = dim / 2;
    float row[2][kMostDim / 2];
    for (int t = 0; t < length; ++t, x += ld, cosines += dim, sines += dim) {
        for (int d = 0; d < half; ++d) {
            const float first = widen(x[d]), second = widen(x[d + half]);
            row[0][d] = first * cosines[d] - second * sines[d];
            row[1][d] = second * cosines[d + half] + first * sines[d + half];
        }
        for (int part = 0; part < 2; ++part)
            for (int d = 0; d < half; d += N) {
                const int count = half - d < N ? half - d : N;
                store_part(x + part * half + d, load_part(row[part] + d, count), count);
            }
    }
}

// Elements of one head's packed keys and values.
template <class A>
size_t head_size(int64_t length, int dim) {
    const A* none = nullptr;
    return panels_of(length) * panel_size(none, dim) + panels_of(dim) * panel_size(none, length);
}
template <class A>
void pack_head(const A* k, const A* v, size_t ld, int length, int dim, A* packed) {
    const double start = clock_start();
    pack_keys(k, ld, length, dim, packed);
    pack_values(v, ld, length, dim, packed + panels_of(length) * panel_size(packed, dim));
    clock_stop(Phase::kAttention, start);
}

// Queries `begin` to `end` of a head against its packed keys and values. q, out: (length, dim) with rows ld apart; out
// may be q. log_sums: (length,), the log of every query's sum, or null.
template <class A>
void attend(const A* q, const A* packed, A* out, size_t ld, int length, int64_t begin, int64_t end, int dim,
            float scale, float* log_sums = nullptr) {
    const double start = clock_start();
    const int key_panels = panels_of(length), dim_panels = panels_of(dim);
    const A *keys = packed, *values = keys + key_panels * panel_size(keys, dim);
    const size_t ld_scores = size_t(key_panels) * kPanel;
    float* scores = static_cast<float*>(scratch(5, kTileRows<A> * ld_scores * sizeof(float)));
    A* weights = static_cast<A*>(scratch(6, kTileRows<A> * ld_scores * sizeof(A)));
    Tiles<A>{end - begin}.each([&](int64_t row, int height) {
        const int64_t first = begin + row;
        for (int panel = 0; panel < key_panels; ++panel)
            tile_of(height, q + first * ld, ld, keys + panel * panel_size(keys, dim), dim, scores + panel * kPanel,
                    ld_scores);
        float inverse[kTileRows<A>];
        for (int r = 0; r < height; ++r) {
            float* log_sum = log_sums ? log_sums + first + r : nullptr;
            inverse[r] = 1.0f / softmax_weights(scores + r * ld_scores, length, scale, weights + r * ld_scores, log_sum);
        }
        gemm(weights, ld_scores, height, values, length, 0, dim_panels,
             [&](const float* c, int64_t done, int rows, int column) {
                 for (int r = 0; r < rows; ++r)
                     each_vector(column, dim, [&](int at, int left) {
                         const F x = load(c + r * kPanel + at) * inverse[done + r];
                         A* to = out + (first + done + r) * ld + column + at;
                         left >= N ? store(to, x) : store_part(to, x, left);
                     });
             });
    });
    clock_stop(Phase::kAttention, start);
}

}  // namespace
}  // namespace cpu
}  // namespace esm
