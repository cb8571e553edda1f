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
// With masks of ones: GCC 12 warns of what the instructions without a mask leave undefined.
ESM_INLINE __m512i low_words(__m512i a, __m512i b) { return _mm512_maskz_unpacklo_epi32(kAll, a, b); }
ESM_INLINE __m512i high_words(__m512i a, __m512i b) { return _mm512_maskz_unpackhi_epi32(kAll, a, b); }
ESM_INLINE __m512i low_pairs(__m512i a, __m512i b) { return _mm512_maskz_unpacklo_epi64(0xff, a, b); }
ESM_INLINE __m512i high_pairs(__m512i a, __m512i b) { return _mm512_maskz_unpackhi_epi64(0xff, a, b); }
// The even quarters of both, and the odd ones.
ESM_INLINE __m512i even_quarters(__m512i a, __m512i b) { return _mm512_maskz_shuffle_i32x4(kAll, a, b, 0x88); }
ESM_INLINE __m512i odd_quarters(__m512i a, __m512i b) { return _mm512_maskz_shuffle_i32x4(kAll, a, b, 0xdd); }

// 16 rows of 16 words, as columns.
ESM_INLINE void transpose(__m512i (&r)[16]) {
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i)
        t[2 * i] = low_words(r[2 * i], r[2 * i + 1]), t[2 * i + 1] = high_words(r[2 * i], r[2 * i + 1]);
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        r[i] = low_pairs(t[i], t[i + 2]), r[i + 1] = high_pairs(t[i], t[i + 2]);
        r[i + 2] = low_pairs(t[i + 1], t[i + 3]), r[i + 3] = high_pairs(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        t[i] = even_quarters(r[i], r[i + 4]), t[i + 4] = odd_quarters(r[i], r[i + 4]);
        t[i + 8] = even_quarters(r[i + 8], r[i + 12]), t[i + 12] = odd_quarters(r[i + 8], r[i + 12]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        r[i] = even_quarters(t[i], t[i + 8]), r[i + 8] = odd_quarters(t[i], t[i + 8]);
        r[i + 4] = even_quarters(t[i + 4], t[i + 12]), r[i + 12] = odd_quarters(t[i + 4], t[i + 12]);
    }
}

// The first `count` of 32 elements, zeros behind them.
ESM_INLINE __m512i load_row(const bf16* from, int count) {
    return _mm512_maskz_loadu_epi16(count < kPanel ? (__mmask32(1) << count) - 1 : ~__mmask32(0), from);
}

ESM_INLINE void pack_keys(const bf16* k, size_t ld, int length, int dim, bf16* out) {
    const int inputs = int(round_up(dim, kInputs));
    for (int first = 0; first < int(round_up(length, kPanel)); first += 16) {
        bf16* to = out + size_t(first / kPanel) * panel_size(out, dim) + first % kPanel * 2;
        for (int d = 0; d < inputs; d += kInputs) {
            __m512i rows[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i)
                rows[i] = first + i < length ? load_row(k + (first + i) * ld + d, dim - d) : _mm512_setzero_si512();
            transpose(rows);
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + (d + 2 * i) * kPanel, rows[i]);
        }
    }
}
ESM_INLINE void pack_values(const bf16* v, size_t ld, int length, int dim, bf16* out) {
    alignas(64) uint16_t order[2][32];  // pairs of the two rows' elements, the first 16 and the last
    for (int i = 0; i < 32; ++i)
        order[0][i] = uint16_t(i / 2 + i % 2 * 32), order[1][i] = uint16_t(i / 2 + i % 2 * 32 + 16);
    const __m512i left = load_as<__m512i>(order[0]), right = load_as<__m512i>(order[1]);
    for (int column = 0; column < dim; column += kPanel)
        for (int key = 0; key < int(round_up(length, kInputs)); key += 2, out += 2 * kPanel) {
            const bf16* from = v + key * ld + column;
            const __m512i zeros = _mm512_setzero_si512();
            const __m512i even = key < length ? load_row(from, dim - column) : zeros;
            const __m512i odd = key + 1 < length ? load_row(from + ld, dim - column) : zeros;
            _mm512_storeu_si512(out, _mm512_permutex2var_epi16(even, left, odd));
            _mm512_storeu_si512(out + kPanel, _mm512_permutex2var_epi16(even, right, odd));
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

#if defined(__AVX512F__)
// A head that is one vector, its halves side by side: the sines of the first half count as negative.
template <class A>
ESM_INLINE void rotate_vector(A* x, const float* cosines, const float* sines) {
    const F row = load(x), swapped = (F)_mm512_maskz_shuffle_f32x4(kAll, (__m512)row, (__m512)row, 0x4e);
    const __m512 turned = (__m512)(swapped * load(sines));
    store(x, row * load(cosines) + (F)_mm512_mask_xor_ps(turned, 0xff, turned, _mm512_set1_ps(-0.0f)));
}
#endif

// The rotary embedding in place, for the rows of one sequence and head: halves (a, b) -> (a cos - b sin, b cos + a sin),
// in fp32 and with one rounding to A.
template <class A>
void rotate(A* x, size_t ld, int length, int dim, const float* cosines, const float* sines) {
    const int half = dim / 2;
    for (int t = 0; t < length; ++t, x += ld, cosines += dim, sines += dim) {
#if defined(__AVX512F__)
        if (dim == N) {
            rotate_vector(x, cosines, sines);
            continue;
        }
#endif
        for (int d = 0; d < half; d += N) {
            const int left = half - d, other = d + half;
            const F first = load_most(x + d, left), second = load_most(x + other, left);
            const F low = first * load_most(cosines + d, left) - second * load_most(sines + d, left);
            const F high = second * load_most(cosines + other, left) + first * load_most(sines + other, left);
            store_most(x + d, low, left);
            store_most(x + other, high, left);
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
    float* scores = buffer<float>(Any::scores, kTileRows<A>, ld_scores);
    A* weights = buffer<A>(Any::probabilities, kTileRows<A>, ld_scores);
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

#if defined(__AMX_BF16__)
// The softmax of a tile's rows, some vectors at a time: softmax_weights() in pieces, with zeros up to whole panels.
class Softmax {
  public:
    Softmax(int length, float scale) : length_(length), padded_(int(round_up(length, kPanel))), scale_(scale) {}

    // 1 / their sums go to inverse; log_sums may be null.
    void begin(float* scores, bf16* weights, int height, float* inverse, float* log_sums) {
        scores_ = scores, weights_ = weights, height_ = height, inverse_ = inverse, log_sums_ = log_sums;
        row_ = 0, at_ = 0;
    }
    int pairs() const { return height_ * padded_ / kPanel; }

    // So many pairs of vectors more.
    ESM_INLINE void advance(int pairs) {
        while (pairs > 0 && row_ < height_) {
            if (at_ == 0) begin_row();
            float* scores = scores_ + size_t(row_) * padded_;
            bf16* weights = weights_ + size_t(row_) * padded_;
            const int left = padded_ - at_, end = left < pairs * kPanel ? padded_ : at_ + pairs * kPanel;
            pairs -= (end - at_) / kPanel;
            const SoftmaxWeight<bf16> weight = weight_;
            F total = total_;
            int i = at_;
            for (; i < end; i += kPanel) {
                const F first = weight(load(scores + i)), second = weight(load(scores + i + N));
                total += first;
                total += second;
                _mm512_storeu_si512(weights + i, (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
            }
            total_ = total, at_ = i;
            if (at_ == padded_) end_row();
        }
    }

  private:
    void begin_row() {
        float* scores = scores_ + size_t(row_) * padded_;
        for (int i = length_; i < padded_; ++i) scores[i] = -__builtin_inff();
        F best = splat(-__builtin_inff()), other = best;
        for (int i = 0; i < padded_; i += kPanel) {
            best = max(best, load(scores + i));
            other = max(other, load(scores + i + N));
        }
        most_ = largest(max(best, other));
        weight_ = SoftmaxWeight<bf16>(scale_, most_), total_ = F{};
    }
    void end_row() {
        const float total = sum(total_);
        inverse_[row_] = 1.0f / total;
        if (log_sums_) log_sums_[row_] = scale_ * most_ + __builtin_logf(total);
        ++row_, at_ = 0;
    }

    int length_, padded_;
    float scale_, most_ = 0;
    float *scores_ = nullptr, *inverse_ = nullptr, *log_sums_ = nullptr;
    bf16* weights_ = nullptr;
    int height_ = 0, row_ = 0, at_ = 0;
    SoftmaxWeight<bf16> weight_{0, 0};
    F total_ = {};
};

// The queries as tiles read them: copies with zeros behind them, made once and not for every panel of keys, where a head
// is no whole number of steps.
struct Queries {
    const bf16* q;
    size_t from_ld, ld;
    int dim, inputs;
    bf16* copy = nullptr;

    Queries(const bf16* q_, size_t ld_, int dim_)
        : q(q_), from_ld(ld_), ld(ld_), dim(dim_), inputs(int(round_up(dim_, kInputs))) {
        if (inputs == dim) return;
        ld = size_t(inputs);
        copy = buffer<bf16>(Any::queries, kTileRows<bf16>, ld);
    }
    const bf16* rows(int64_t first, int height) const {
        const bf16* from = q + first * int64_t(from_ld);
        if (!copy) return from;
        for (int d = 0; d < dim; d += kInputs) copy_end(from + d, from_ld, height, dim - d, copy + d, ld);
        return copy;
    }
};

// The same with tiles. The softmax takes longer than the products, so it runs beside them: that of one tile of queries
// beside the scores of the next one and the sums of the one before.
void attend(const bf16* q, const bf16* packed, bf16* out, size_t ld, int length, int64_t begin, int64_t end, int dim,
            float scale, float* log_sums = nullptr) {
    const int count = int(end - begin);
    if (count <= 0) return;
    const double start = clock_start();
    constexpr int kMost = kTileRows<bf16>;
    const int key_panels = panels_of(length), dim_panels = panels_of(dim), padded = key_panels * kPanel;
    const bf16 *keys = packed, *values = keys + key_panels * panel_size(keys, dim);
    const int tiles = (count + kMost - 1) / kMost, most = (count + tiles - 1) / tiles;
    const size_t size = size_t(kMost) * padded;
    float* scores = buffer<float>(Any::scores, 2, size);
    bf16* weights = buffer<bf16>(Any::probabilities, 2, size);
    const Queries queries(q, ld, dim);
    alignas(64) float sums[2][kMost * kPanel];
    float inverse[3][kMost];
    const auto first_of = [&](int tile) { return begin + int64_t(tile) * most; };
    const auto height_of = [&](int tile) { return tile + 1 < tiles ? most : count - tile * most; };
    const float* inverse_of_last = nullptr;
    const auto finish = [&](const float* c, int64_t row, int height, int column) {
        for (int r = 0; r < height; ++r, ++row)
            each_vector(column, dim, [&](int at, int left) {
                const F x = load(c + r * kPanel + at) * inverse_of_last[(row - begin) % most];
                bf16* to = out + row * ld + column + at;
                left >= N ? store(to, x) : store_part(to, x, left);
            });
    };
    Products products;
    Softmax softmax(length, scale);
    Finishing last;
    bool turn = false;
    for (int tile = 0; tile < tiles + 2; ++tile) {
        const int softened = tile - 1, summed = tile - 2;
        const int steps = (tile < tiles ? key_panels * panels_of(dim) : 0) + (summed >= 0 ? dim_panels * key_panels : 0);
        int pairs = 0;
        if (softened >= 0 && softened < tiles) {
            softmax.begin(scores + softened % 2 * size, weights + softened % 2 * size, height_of(softened),
                          inverse[softened % 3], log_sums ? log_sums + first_of(softened) : nullptr);
            pairs = steps ? (softmax.pairs() + steps - 1) / steps : softmax.pairs();
        }
        const auto beside = [&](int) {
            softmax.advance(pairs);
            last.advance(4, finish);
        };
        if (tile < tiles) {
            const bf16* rows = queries.rows(first_of(tile), height_of(tile));
            for (int panel = 0; panel < key_panels; ++panel) {
                products(height_of(tile), rows, queries.ld, keys + panel * panel_size(keys, dim), queries.inputs, kPanel,
                         nullptr, scores + tile % 2 * size + panel * kPanel, size_t(padded), beside);
                last.advance(kMost, finish);
            }
        }
        if (summed >= 0)
            for (int panel = 0; panel < dim_panels; ++panel) {
                products(height_of(summed), weights + summed % 2 * size, size_t(padded),
                         values + panel * panel_size(values, length), padded, dim - panel * kPanel, nullptr, sums[turn],
                         kPanel, beside);
                last.advance(kMost, finish);
                inverse_of_last = inverse[summed % 3];
                last = Finishing{sums[turn], first_of(summed), height_of(summed), panel * kPanel, 0};
                turn = !turn;
            }
        if (!steps) products.flush();
        softmax.advance(kMost * padded);
    }
    products.flush();
    last.advance(kMost, finish);
    clock_stop(Phase::kAttention, start);
}
#endif

}  // namespace
}  // namespace cpu
}  // namespace esm
