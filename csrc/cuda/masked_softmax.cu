// Row-wise softmax over the valid keys of padded scores (batch, heads, size, size), and its backward pass.
#include "rows.cuh"

namespace esm {

// Where a warp's row lies, and how much of it is valid: nothing, in a row of padding.
struct Place {
    size_t start;
    int valid;
};

__device__ __forceinline__ Place place_of(int row, Global<const int> lengths, int heads, int size) {
    const int length = lengths[row / size / heads];
    return {size_t(row) * size, row % size < length ? length : 0};
}

template <int V>
__device__ __forceinline__ void forward(Global<const scalar> scores, Global<float> weights, int size, int valid) {
    const auto row = make_row<V>(loader<V, scalar>(scores), size);
    const float largest = row.template reduce<Largest>(-infinity(), [=](float x, int column) {
        return column < valid ? x : -infinity();
    });
    const float sum = row.template reduce<Sum>(0.0f, [=](float x, int column) {
        return column < valid ? expf(x - largest) : 0.0f;
    });
    row.each([&](int p, const Floats<V>& x) {
        Floats<V> out;
        for (int j = 0; j < V; ++j) out.at[j] = p * V + j < valid ? expf(x.at[j] - largest) / sum : 0.0f;
        store_floats(weights, p, out);
    });
}

// rows = batch * heads * size; lengths (batch,).
KERNEL(kRowThreads, 5, masked_softmax_forward,
       (Global<const scalar> scores, Global<const int> lengths, Global<float> weights, int rows, int heads, int size)) {
    const int row = warp_row();
    if (row >= rows) return;
    const Place at = place_of(row, lengths, heads, size);
    BY_ELEMENTS(size, forward<V>(scores + at.start, weights + at.start, size, at.valid))
}

// dscores = weights (dweights - the row's sum of weights dweights); what lies in the padding is not looked at.
template <int V>
__device__ __forceinline__ void backward(Global<const float> weights, Global<const float> dweights,
                                         Global<scalar> dscores, int size, int valid) {
    const auto product = make_row<V>([=](int p) {
        const Floats<V> w = load_floats<V>(weights, p), d = load_floats<V>(dweights, p);
        Floats<V> result;
        for (int j = 0; j < V; ++j) result.at[j] = p * V + j < valid ? w.at[j] * d.at[j] : 0.0f;
        return result;
    }, size);
    const float sum = product.template reduce<Sum>(0.0f, [](float x, int) { return x; });
    product.each([&](int p, const Floats<V>& wd) {
        const Floats<V> w = load_floats<V>(weights, p);
        Floats<V> out;
        for (int j = 0; j < V; ++j) out.at[j] = p * V + j < valid ? wd.at[j] - w.at[j] * sum : 0.0f;
        store_floats(dscores, p, out);
    });
}

KERNEL(kRowThreads, 4, masked_softmax_backward,
       (Global<const float> weights, Global<const float> dweights, Global<const int> lengths, Global<scalar> dscores,
        int rows, int heads, int size)) {
    const int row = warp_row();
    if (row >= rows) return;
    const Place at = place_of(row, lengths, heads, size);
    BY_ELEMENTS(size, backward<V>(weights + at.start, dweights + at.start, dscores + at.start, size, at.valid))
}

}  // namespace esm
