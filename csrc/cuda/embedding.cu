// The input embedding, LN(factor * E[token] + P[position]), and what its backward pass adds up.
#include "norm.cuh"

namespace esm {

// factors (tokens): what multiplies each token's embedding. 0 for <mask>, else the sequence's: given, or
// kept / (1 - its share of <mask>). A warp a sequence.
KERNEL(kRowThreads, 4, embedding_factors,
       (Global<const int> tokens, Global<const int> cu_seqlens, Global<const float> given, Global<float> factors,
        int sequences, int mask, float kept)) {
    const int s = warp_row(), lane = threadIdx.x % kWarp;
    if (s >= sequences) return;
    const int begin = cu_seqlens[s], end = cu_seqlens[s + 1];
    float masked = 0.0f;
    for (int i = begin + lane; i < end; i += kWarp) masked += tokens[i] == mask;
    masked = warp_reduce(masked);
    const float factor = given ? float(given[s]) : kept / (1.0f - masked / float(end - begin));
    for (int i = begin + lane; i < end; i += kWarp) factors[i] = tokens[i] == mask ? 0.0f : factor;
}

template <int V>
__device__ __forceinline__ void embed(Global<const scalar> token, Global<const scalar> position, float factor,
                                      const Affine<V>& affine, bool normed, Global<float> out, int width,
                                      float eps) {
    const auto row = make_row<V>([=](int p) {
        const Floats<V> e = load_floats<V>(token, p), at = load_floats<V>(position, p);
        Floats<V> x;
        for (int j = 0; j < V; ++j) x.at[j] = (factor == 0.0f ? 0.0f : factor * e.at[j]) + at.at[j];
        return x;
    }, width);
    if (normed)
        normalise(row, affine, out, width, eps);
    else
        row.each([&](int p, const Floats<V>& x) { store_floats(out, p, x); });
}

struct Tables {
    Global<const int> tokens, positions;
    Global<const float> factors;
    Global<const scalar> token, position;
};

template <int V>
__device__ __forceinline__ void embed_rows(const Tables& tables, Global<const scalar> gain, Global<const scalar> bias,
                                           scalar* shared, Global<float> out, int rows, int width, float eps) {
    const Affine<V> affine(gain, bias, shared, width);
    for (int row = warp_row(); row < rows; row += int(gridDim.x) * kRowsPerBlock) {
        const auto token = tables.token + size_t(tables.tokens[row]) * width;
        const auto position = tables.position + size_t(tables.positions[row]) * width;
        const float factor = tables.factors ? float(tables.factors[row]) : 1.0f;
        embed<V>(token, position, factor, affine, bool(gain), out + size_t(row) * width, width, eps);
    }
}

// factors may be null, for 1; gain and bias too, for no norm. Ids and positions must lie within the tables.
KERNEL(kRowThreads, 3, embedding_forward,
       (Global<const int> tokens, Global<const int> positions, Global<const float> factors,
        Global<const scalar> token_table, Global<const scalar> position_table, Global<const scalar> gain,
        Global<const scalar> bias, Global<float> out, int rows, int width, float eps)) {
    SHARED(scalar, shared, 2 * kSharedColumns);
    const Tables tables = {tokens, positions, factors, token_table, position_table};
    BY_ELEMENTS(width, embed_rows<V>(tables, gain, bias, shared, out, rows, width, eps))
}

}  // namespace esm
