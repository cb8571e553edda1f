// Weights and activations of 8 bits. A row of activations has a scale of its own for every kGroup inputs, and so has
// every output of the weights: within a group products and sums are exact integers, at every level the same ones, and
// the groups' sums are added up in fp32.
#pragma once

#if !defined(ESM_LEVEL)
#include "../layout.h"

namespace esm {
namespace cpu {

// Numbers (out, in) from -127 to 127, and scales (out, groups).
template <>
struct LayoutOf<Type::int8> {
    static constexpr Element plain = Element::bfloat16;
    static constexpr int kQuad = 4;
    static constexpr size_t kHead = kPanel * (sizeof(int32_t) + sizeof(float));  // of a group

    static int groups(int in) { return (in + kGroup - 1) / kGroup; }
    static int padded(int inputs) { return (inputs + kInputs8 - 1) / kInputs8 * kInputs8; }
    static size_t place(int row, int input) {
        return kHead + size_t(input / kQuad * kPanel + row) * kQuad + size_t(input % kQuad);
    }

    static std::vector<Part> parts(int in) { return {{Element::int8, in}, {Element::float32, groups(in)}}; }
    static size_t panel_size(int in) { return size_t(padded(in)) * kPanel + size_t(groups(in)) * kHead; }

    // use(bytes of a group in the panel, the first of its numbers in the matrix, that of its scale, inputs) for each
    // group of each row.
    template <class Use>
    static void each(int out, int in, int panel, const Use& use) {
        size_t group_at = 0;
        for (int group = 0; group < groups(in); ++group) {
            const int input = group * kGroup, inputs = in - input < kGroup ? in - input : kGroup;
            for (int row = 0; row < rows_of(out, panel); ++row) {
                const size_t output = size_t(panel) * kPanel + size_t(row);
                use(group_at, row, output * size_t(in) + size_t(input), output * size_t(groups(in)) + size_t(group), inputs);
            }
            group_at += kHead + size_t(padded(inputs)) * kPanel;
        }
    }

    static void pack(const void* const* parts, int out, int in, int panel, void* to) {
        const int8_t* numbers = static_cast<const int8_t*>(parts[0]);
        const float* scales = static_cast<const float*>(parts[1]);
        char* bytes = static_cast<char*>(to);
        std::memset(bytes, 0, panel_size(in));
        each(out, in, panel, [&](size_t at, int row, size_t number, size_t scale, int inputs) {
            char* group = bytes + at;
            int32_t sum = 0;
            for (int i = 0; i < inputs; ++i) {
                sum += numbers[number + size_t(i)];
                group[place(row, i)] = char(numbers[number + size_t(i)]);
            }
            const int32_t correction = -kZero * sum;
            std::memcpy(group + size_t(row) * sizeof correction, &correction, sizeof correction);
            std::memcpy(group + (kPanel + size_t(row)) * sizeof(float), scales + scale, sizeof(float));
        });
    }
    static void unpack(const void* from, int out, int in, int panel, void* const* parts) {
        int8_t* numbers = static_cast<int8_t*>(parts[0]);
        float* scales = static_cast<float*>(parts[1]);
        const char* bytes = static_cast<const char*>(from);
        each(out, in, panel, [&](size_t at, int row, size_t number, size_t scale, int inputs) {
            const char* group = bytes + at;
            for (int i = 0; i < inputs; ++i) numbers[number + size_t(i)] = int8_t(group[place(row, i)]);
            std::memcpy(scales + scale, group + (kPanel + size_t(row)) * sizeof(float), sizeof(float));
        });
    }
};

}  // namespace cpu
}  // namespace esm

#else
#include "../panels.h"
#include "bf16.h"

namespace esm {
namespace cpu {
namespace {

// A weight, from -127 to 127.
struct int8 {
    int8_t bits;
};

// An activation from -127 to 127, plus 128: VNNI and AMX multiply unsigned by signed bytes. What the 128 add to a sum
// depends on the weights alone, and their panel holds it. A row's scales follow its bytes.
struct biased8 {
    uint8_t bits;
};

template <>
struct FormatOf<int8> {
    typedef FormatOf<bf16>::Activation Activation;
    typedef biased8 Operand;
    typedef bf16 Plain;
};
template <>
constexpr bool kQuantized<biased8> = true;

constexpr float kTiniest = 1e-30f;

ESM_INLINE int groups_of(int64_t in) { return int((in + kGroup - 1) / kGroup); }

template <>
ESM_INLINE size_t leading<biased8>(int64_t n) {
    const int64_t bytes = round_up(n, kInputs8) + groups_of(n) * int64_t(sizeof(float));
    return size_t(round_up(bytes, 64) | 64);
}

// Where a row of n activations keeps its scales.
ESM_INLINE const float* scales_of(const biased8* row, int64_t n) {
    return reinterpret_cast<const float*>(row + round_up(n, kInputs8));
}

typedef uint8_t Bytes __attribute__((vector_size(N)));

// Adding 1.5 * 2^23 rounds to an integer, and leaves it in the lowest byte.
ESM_INLINE Bytes round_biased(F x) {
    const U rounded = (U)(x + 12582912.0f);
#if defined(__AVX512F__)  // GCC makes 60 instructions of __builtin_convertvector
    const Bytes bytes = (Bytes)_mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)rounded);
#else
    const Bytes bytes = __builtin_convertvector(rounded, Bytes);
#endif
    return bytes ^ uint8_t(kZero);
}

// The largest magnitude, found as an integer, which puts NaN above infinity above all numbers.
template <class T>
ESM_INLINE T largest_bits(const void* x, int n, T mask) {
    typedef T V __attribute__((vector_size(4 * N)));
    constexpr int kLanes = int(sizeof(V) / sizeof(T));
    const T* bits = static_cast<const T*>(x);
    V best = {};
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        const V magnitude = load_as<V>(bits + i) & mask;
        best = best > magnitude ? best : magnitude;
    }
    T lanes[kLanes], most = 0;
    std::memcpy(lanes, &best, sizeof best);
    for (int width = kLanes / 2; width; width /= 2)
        for (int j = 0; j < width; ++j) lanes[j] = lanes[j] > lanes[j + width] ? lanes[j] : lanes[j + width];
    for (; i < n; ++i) most = T(bits[i] & mask) > most ? T(bits[i] & mask) : most;
    return lanes[0] > most ? lanes[0] : most;
}
ESM_INLINE float largest_magnitude(const float* x, int n) {
    const uint32_t bits = largest_bits<uint32_t>(x, n, 0x7fffffffu);
    float largest;
    std::memcpy(&largest, &bits, sizeof bits);
    return largest;
}
#if defined(__AVX512BW__)
// 32 numbers at a time, and the largest of eight lanes by the one instruction there is for it, which finds the least.
ESM_INLINE float largest_magnitude(const bf16* x, int n) {
    const __m512i mask = _mm512_set1_epi16(0x7fff);
    __m512i best = _mm512_setzero_si512();
    int i = 0;
    for (; i + 32 <= n; i += 32) best = _mm512_max_epu16(best, _mm512_and_si512(mask, _mm512_loadu_si512(x + i)));
    if (i < n) {
        const __m512i last = _mm512_maskz_loadu_epi16((__mmask32(1) << (n - i)) - 1, x + i);
        best = _mm512_max_epu16(best, _mm512_and_si512(mask, last));
    }
    const __m256i low = _mm512_maskz_extracti64x4_epi64(15, best, 0), high = _mm512_maskz_extracti64x4_epi64(15, best, 1);
    const __m256i half = _mm256_max_epu16(low, high);
    const __m128i quarter = _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    const __m128i least = _mm_minpos_epu16(_mm_xor_si128(quarter, _mm_set1_epi16(-1)));
    return widen(bf16{uint16_t(~_mm_extract_epi16(least, 0))});
}
#else
ESM_INLINE float largest_magnitude(const bf16* x, int n) { return widen(bf16{largest_bits<uint16_t>(x, n, 0x7fff)}); }
#endif

// Inputs of one group, to the nearest of 255 values; returns their scale. Where the largest magnitude is NaN or infinite
// the scale is so too, and so is every output of the row. Magnitudes too small to be divided by count as 0.
template <class A>
ESM_INLINE float quantize_group(const A* x, int n, biased8* out) {
    const int rest = n % N, whole = n - rest;
    const float largest = largest_magnitude(x, n);
    const bool none = largest < kTiniest;
    const float inverse = none ? 0.0f : 127.0f / largest;
    for (int i = 0; i < whole; i += N) {
        const Bytes bytes = round_biased(load(x + i) * inverse);
        std::memcpy(out + i, &bytes, sizeof bytes);
    }
    if (rest) {
        const Bytes bytes = round_biased(load_part(x + whole, rest) * inverse);
        std::memcpy(out + whole, &bytes, size_t(rest));
    }
    return none ? 0.0f : largest / 127.0f;
}

// A group of a row of n, whose inputs begin at x.
template <class A>
void quantize_part(const A* x, int group, int n, biased8* row) {
    const int first = group * kGroup, inputs = n - first < kGroup ? n - first : kGroup;
    const_cast<float*>(scales_of(row, n))[group] = quantize_group(x, inputs, row + first);
    if (inputs < kGroup) std::memset(row + n, kZero, size_t(round_up(n, kInputs8) - n));
}

// One row of n.
template <class A>
void quantize_row(const A* x, int n, biased8* out) {
    for (int group = 0; group < groups_of(n); ++group) quantize_part(x + group * kGroup, group, n, out);
}

// A panel's groups one after the other: see Prepacked.
ESM_INLINE size_t group_size(int64_t inputs) { return size_t(round_up(inputs, kInputs8) + 2 * sizeof(float)) * kPanel; }
ESM_INLINE size_t panel_size(const int8*, int64_t in) {
    return size_t(round_up(in, kInputs8) + groups_of(in) * int64_t(2 * sizeof(float))) * kPanel;
}

// c = a times one panel, as the other tiles. What a group adds to a row is (its integer sum) x (weight's scale x row's).
#if defined(__AVX512VNNI__)
#if !defined(__AMX_BF16__)
// So low that the groups' integer sums and what they add up to stay in registers both.
template <>
constexpr int kTileRows<biased8> = 7;
#endif

ESM_INLINE I dot(I sum, __m512i a, __m512i b) { return (I)_mm512_dpbusd_epi32((__m512i)sum, a, b); }

template <int R>
ESM_INLINE void tile(const biased8* a, size_t lda, const int8* panel, int in, float* c, size_t ldc) {
    F totals[R][2] = {};
    for (int first = 0, group = 0; first < in; first += kGroup, ++group) {
        const int inputs = int(round_up(in - first < kGroup ? in - first : kGroup, kInputs8));
        const int8* b = panel + 2 * kPanel * sizeof(float);
        const I c0 = load_as<I>(panel), c1 = load_as<I>(panel + 64);
        I sums[R][2];
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) sums[r][0] = c0, sums[r][1] = c1;
        for (int k = 0; k < inputs; k += 4, b += 4 * kPanel) {
            const __m512i b0 = _mm512_loadu_si512(b), b1 = _mm512_loadu_si512(b + 64);
#pragma GCC unroll 12
            for (int r = 0; r < R; ++r) {
                const __m512i x = _mm512_set1_epi32(load_as<int32_t>(a + r * lda + first + k));
                sums[r][0] = dot(sums[r][0], x, b0);
                sums[r][1] = dot(sums[r][1], x, b1);
            }
        }
        const F s0 = load_as<F>(panel + 128), s1 = load_as<F>(panel + 192);
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
            const float x = load_as<float>(scales_of(a + r * lda, in) + group);
            totals[r][0] = fma(__builtin_convertvector(sums[r][0], F), s0 * x, totals[r][0]);
            totals[r][1] = fma(__builtin_convertvector(sums[r][1], F), s1 * x, totals[r][1]);
        }
        panel = b;
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) store(c + r * ldc, totals[r][0]), store(c + r * ldc + N, totals[r][1]);
}
#else
template <int R>
void tile(const biased8* a, size_t lda, const int8* panel, int in, float* c, size_t ldc) {
    for (int first = 0, group = 0; first < in; first += kGroup, ++group) {
        const int inputs = int(round_up(in - first < kGroup ? in - first : kGroup, kInputs8));
        const int8* b = panel + 2 * kPanel * sizeof(float);
        for (int r = 0; r < R; ++r) {
            int32_t sums[kPanel];
            float scale[kPanel];
            std::memcpy(sums, panel, sizeof sums);
            std::memcpy(scale, panel + sizeof sums, sizeof scale);
            const biased8* row = a + r * lda + first;
            for (int k = 0; k < inputs; k += 4)
                for (int o = 0; o < kPanel; ++o)
                    for (int i = 0; i < 4; ++i) sums[o] += row[k + i].bits * b[k * kPanel + 4 * o + i].bits;
            const float x = load_as<float>(scales_of(a + r * lda, in) + group);
            for (int o = 0; o < kPanel; ++o)
                c[r * ldc + o] = (first ? c[r * ldc + o] : 0.0f) + float(sums[o]) * (scale[o] * x);
        }
        panel = b + inputs * kPanel;
    }
}
#endif

}  // namespace
}  // namespace cpu
}  // namespace esm
#endif
