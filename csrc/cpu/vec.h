// A vector of N floats, by the compiler's vector extension: the same source for every level and architecture.
// Intrinsics only where there is no other way to one instruction.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace esm {
namespace cpu {
namespace {

#define ESM_INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int N = 16;
#elif defined(__AVX2__)
constexpr int N = 8;
#else
constexpr int N = 4;
#endif

typedef float F __attribute__((vector_size(4 * N)));
typedef int32_t I __attribute__((vector_size(4 * N)));
typedef uint32_t U __attribute__((vector_size(4 * N)));
typedef uint16_t Half __attribute__((vector_size(2 * N)));
struct bf16 {
    uint16_t bits;
};

ESM_INLINE F splat(float x) { return x - F{}; }
ESM_INLINE F select(I mask, F yes, F no) { return mask ? yes : no; }
ESM_INLINE F max(F a, F b) { return select(a > b, a, b); }
ESM_INLINE F min(F a, F b) { return select(a < b, a, b); }
ESM_INLINE F abs(F x) { return (F)((U)x & 0x7fffffffu); }

// a * b + c in one rounding where the CPU can. Explicit: -ffp-contract would let the compiler fuse the same expression
// in one place and not in another, and results would depend on how rows are grouped.
ESM_INLINE F fma(F a, F b, F c) {
#if defined(__AVX512F__)
    return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__FP_FAST_FMAF)
    F r;
    for (int i = 0; i < N; ++i) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return r;
#else
    return a * b + c;
#endif
}

template <class V, class T>
ESM_INLINE V load_as(const T* from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}
ESM_INLINE F load(const float* from) { return load_as<F>(from); }
ESM_INLINE F load(const bf16* from) {
#if defined(__AVX512F__)  // one instruction, where GCC makes four of __builtin_convertvector
    return (F)((U)_mm512_maskz_cvtepu16_epi32(0xffff, load_as<__m256i>(from)) << 16);
#else
    return (F)(__builtin_convertvector(load_as<Half>(from), U) << 16);
#endif
}
ESM_INLINE float widen(float x) { return x; }
ESM_INLINE float widen(bf16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}
ESM_INLINE void store(float* to, F x) { std::memcpy(to, &x, sizeof x); }

// Round to nearest, ties to even; a NaN stays one.
ESM_INLINE Half round_bf16(F x) {
#if defined(__AVX512BF16__)
    return (Half)_mm512_cvtneps_pbh((__m512)x);
#else
    const U bits = (U)x;
    const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const U quiet = (bits >> 16) | 0x40u;
    return __builtin_convertvector(x == x ? rounded : quiet, Half);
#endif
}
ESM_INLINE void store(bf16* to, F x) {
    const Half h = round_bf16(x);
    std::memcpy(to, &h, sizeof h);
}

// The first `count` < N elements; the others read as `rest`.
#if defined(__AVX512F__)
constexpr __mmask16 kAll = 0xffff;  // GCC warns of what it fills in where no mask is given
ESM_INLINE __mmask16 first_lanes(int count) { return __mmask16((1u << count) - 1); }
ESM_INLINE F load_part(const float* from, int count, float rest = 0) {
    return (F)_mm512_mask_loadu_ps((__m512)splat(rest), first_lanes(count), from);
}
ESM_INLINE F load_part(const bf16* from, int count, float rest = 0) {
    const __m512i words = _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_maskz_loadu_epi16(first_lanes(count), from));
    return (F)_mm512_mask_mov_ps((__m512)splat(rest), first_lanes(count), (__m512)((U)words << 16));
}
ESM_INLINE void store_part(float* to, F x, int count) { _mm512_mask_storeu_ps(to, first_lanes(count), (__m512)x); }
ESM_INLINE void store_part(bf16* to, F x, int count) {
    _mm256_mask_storeu_epi16(to, first_lanes(count), (__m256i)round_bf16(x));
}
#else
template <class T>
ESM_INLINE F load_part(const T* from, int count, float rest = 0) {
    alignas(64) T whole[N] = {};
    std::memcpy(whole, from, size_t(count) * sizeof(T));
    F x = load(whole);
    if (rest != 0)
        for (int i = count; i < N; ++i) x[i] = rest;
    return x;
}
template <class T>
ESM_INLINE void store_part(T* to, F x, int count) {
    alignas(64) T whole[N];
    store(whole, x);
    std::memcpy(to, whole, size_t(count) * sizeof(T));
}
#endif

// The first `count` elements or N, whichever is less.
template <class T>
ESM_INLINE F load_most(const T* from, int count) {
    return count >= N ? load(from) : load_part(from, count);
}
template <class T>
ESM_INLINE void store_most(T* to, F x, int count) {
    count >= N ? store(to, x) : store_part(to, x, count);
}

// One number of all lanes: halves with each other until one lane is left, the same order at every level.
#if defined(__SSE2__)
template <class Op>
ESM_INLINE float reduced(__m128 x, const Op& op) {
    x = op(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(op(x, _mm_shuffle_ps(x, x, 1)));
}
#if defined(__AVX2__)
template <class Op>
ESM_INLINE float reduced(__m256 x, const Op& op) {
    return reduced(op(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)), op);
}
#endif
#if defined(__AVX512F__)
template <class Op>
ESM_INLINE float reduced(__m512 x, const Op& op) {
    x = op(x, _mm512_maskz_shuffle_f32x4(kAll, x, x, 0x4e));
    x = op(x, _mm512_maskz_shuffle_f32x4(kAll, x, x, 0xb1));
    return reduced(_mm512_maskz_extractf32x4_ps(0xf, x, 0), op);
}
typedef __m512 Register;
#elif defined(__AVX2__)
typedef __m256 Register;
#else
typedef __m128 Register;
#endif
ESM_INLINE float sum(F x) {
    return reduced((Register)x, [](auto a, auto b) { return a + b; });
}
ESM_INLINE float largest(F x) {
    return reduced((Register)x, [](auto a, auto b) { return a > b ? a : b; });
}
#else
ESM_INLINE float sum(F x) {
    float parts[N];
    std::memcpy(parts, &x, sizeof parts);
    for (int width = N / 2; width; width /= 2)
        for (int i = 0; i < width; ++i) parts[i] += parts[i + width];
    return parts[0];
}
ESM_INLINE float largest(F x) {
    float best = x[0];
    for (int i = 1; i < N; ++i) best = x[i] > best ? x[i] : best;
    return best;
}
#endif

// e^x for x <= 88, relative error 2e-7; never below 2^-126, and a NaN for a NaN. Cody & Waite's reduction to
// |r| <= ln 2 / 2, then a minimax polynomial of our own fit.
ESM_INLINE F exp(F x) {
    const F shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const F low = splat(-87.3f);
    const F t = select(low > x, low, x);
    const F n = fma(t, splat(1.44269504f), shift) - shift;
    F r = fma(n, splat(-0.693359375f), t);
    r = fma(n, splat(2.12194440e-4f), r);
    F p = splat(0.00138145984f);
    p = fma(p, r, splat(0.0083687169f));
    p = fma(p, r, splat(0.0416683881f));
    p = fma(p, r, splat(0.166665206f));
    p = fma(p, r, splat(0.499999934f));
    p = fma(p, r * r, r + 1.0f);
    const U exponent = (U)__builtin_convertvector(select(n == n, n, F{}), I) << 23;
    return (F)((U)p + exponent);
}

// erf(x / sqrt 2): an odd rational function of our own fit on [0, 3.9], absolute error 4e-7, and 1 within 4e-8 beyond.
ESM_INLINE F erf_of_normal(F x) {
    const F z0 = x * 0.707106781f;
    const F z = select(abs(z0) < 3.9f, z0, select(z0 > 0.0f, splat(3.9f), splat(-3.9f)));
    const F u = z * z;
    F p = splat(2.05035298e-06f), q = splat(3.82292965e-05f);
    p = fma(p, u, splat(0.000287436611f)), q = fma(q, u, splat(0.00118159321f));
    p = fma(p, u, splat(0.0038363669f)), q = fma(q, u, splat(0.0151082019f));
    p = fma(p, u, splat(0.0529653428f)), q = fma(q, u, splat(0.114753659f));
    p = fma(p, u, splat(0.191930411f)), q = fma(q, u, splat(0.503425682f));
    p = fma(p, u, splat(1.12837903f)), q = fma(q, u, splat(1.0f));
    return z * p / q;
}

// The exact GELU, x (1 + erf(x / sqrt 2)) / 2.
ESM_INLINE F gelu(F x) {
    const F half = x * 0.5f;
    return fma(half, erf_of_normal(x), half);
}

// The exact GELU, and its derivative: the normal distribution's function and x times its density.
struct GeluAndSlope {
    F value, slope;
    ESM_INLINE explicit GeluAndSlope(F x) {
        const F below = fma(splat(0.5f), erf_of_normal(x), splat(0.5f));
        value = x * below;
        slope = fma(x, exp(x * x * -0.5f) * 0.398942280f, below);
    }
};

// What is rounded to bf16 next needs no seven digits: the same functions in half the instructions.
ESM_INLINE F gelu_for(const float*, F x) { return gelu(x); }
#if defined(__AVX512BF16__)
// 2^x for x <= 0, relative error 3e-6 (minimax, degree 4), 0 below 2^-125: a denormal would cost as much as a hundred
// of these. A NaN for a NaN.
ESM_INLINE F exp2_for_bf16(F x) {
    const __mmask16 counts = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-125.0f), _CMP_NLT_UQ);
    const __m512 n = _mm512_maskz_roundscale_ps(kAll, (__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const F r = x - (F)n;
    F p = fma(splat(0.0095701f), r, splat(0.05591786f));
    p = fma(p, r, splat(0.24024745f));
    p = fma(p, r, splat(0.69312181f));
    p = fma(p, r, splat(0.99999926f));
    return (F)_mm512_maskz_scalef_ps(counts, (__m512)p, n);
}

// x / 2 + |x| E(|x|) with E(a) = erf(a / sqrt 2) / 2 by sixteen cubics over intervals of 0.3125, absolute error 2e-6; the
// last one is 1/2, which costs x E 1.4e-5 at 4.6. Table row i holds their coefficients of degree i, in units of the interval.
ESM_INLINE F gelu_for(const bf16*, F x) {
    alignas(64) static const float table[4][16] = {
        {0.0f, 0.122668654f, 0.234012817f, 0.325747706f, 0.394349209f, 0.440914556f, 0.469603842f, 0.485647418f,
         0.493790776f, 0.497542426f, 0.499111173f, 0.499706547f, 0.499911628f, 0.499975743f, 0.499993935f, 0.5f},
        {0.124669231f, 0.118727869f, 0.102550174f, 0.0803357818f, 0.0570781861f, 0.0367806398f, 0.0214959025f,
         0.0113940606f, 0.00547755563f, 0.00238824749f, 0.000944397418f, 0.000338697255f, 0.000110166186f,
         3.24984656e-05f, 8.69467336e-06f, 0.0f},
        {0.0f, -0.00576317493f, -0.0099616866f, -0.011717254f, -0.0111154435f, -0.00896931649f, -0.00630410203f,
         -0.00390852128f, -0.00215380496f, -0.00106003439f, -0.000467516762f, -0.000185211446f, -6.60225089e-05f,
         -2.12054205e-05f, -6.14300454e-06f, 0.0f},
        {-0.00202171469f, -0.00173658638f, -0.00101505521f, -0.000161313677f, 0.000517006616f, 0.000857695965f,
         0.000877068622f, 0.000701153067f, 0.000468670529f, 0.000269684136f, 0.000135677031f, 6.02375063e-05f,
         2.37454058e-05f, 8.34592967e-06f, 2.6234838e-06f, 0.0f},
    };
    const F a = abs(x), shift = splat(12582912.0f);  // adding it leaves the nearest integer in the lowest bits
    const F t = (F)_mm512_maskz_min_ps(kAll, (__m512)(a * 3.2f), _mm512_set1_ps(15.0f));
    const F nearest = t + shift, u = t - (nearest - shift);
    const auto of_degree = [&](int i) {
        return (F)_mm512_maskz_permutexvar_ps(kAll, (__m512i)nearest, load_as<__m512>(table[i]));
    };
    const F e = fma(fma(fma(of_degree(3), u, of_degree(2)), u, of_degree(1)), u, of_degree(0));
    return fma(a, e, x * 0.5f);
}
#endif

}  // namespace
}  // namespace cpu
}  // namespace esm
