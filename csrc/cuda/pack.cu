// Sequences end to end: residue ids to tokens and positions, and rows between the packed and the padded layout.
#include "rows.cuh"

namespace esm {

constexpr int kThreads = 128, kTokens = 4;                 // a thread's
constexpr int kCls = 0, kEos = 2, kFirstPosition = 2;  // padding_idx + 1

// tokens and positions of cu_seqlens[b] places: <cls>, the ids from starts[order[s]] on, <eos>.
KERNEL(kThreads, 8, pack_tokens,
       (Global<const unsigned char> ids, Global<const long long> starts, Global<const long long> order,
        Global<const int> cu_seqlens, Global<int> tokens, Global<int> positions, int n, int sequences)) {
    const int first = (int(blockIdx.x) * kThreads + int(threadIdx.x)) * kTokens;
    if (first >= n) return;
    const int count = min(kTokens, n - first);
    Pack<int, kTokens> token = {}, position = {};
    int s = sequence_of(first, cu_seqlens, sequences), begin = cu_seqlens[s], end = cu_seqlens[s + 1];
    for (int j = 0; j < count; ++j) {
        const int i = first + j;
        while (i >= end) {
            ++s;
            begin = end;
            end = cu_seqlens[s + 1];
        }
        const bool inner = i > begin && i < end - 1;
        token.at[j] = inner ? int(ids[starts[order[s]] + (i - begin - 1)]) : i == begin ? kCls : kEos;
        position.at[j] = kFirstPosition + i - begin;
    }
    if (count == kTokens) {
        store_pack(tokens, first / kTokens, token);
        store_pack(positions, first / kTokens, position);
    } else {
        for (int j = 0; j < count; ++j) tokens[first + j] = token.at[j], positions[first + j] = position.at[j];
    }
}

template <int V>
__device__ __forceinline__ void copy_row(Global<const scalar> from, Global<scalar> to, int width) {
    for (int p = threadIdx.x % kWarp; p < width / V; p += kWarp) store_pack(to, p, load_pack<V>(from, p));
}
template <int V>
__device__ __forceinline__ void clear_row(Global<scalar> to, int width) {
    for (int p = threadIdx.x % kWarp; p < width / V; p += kWarp) store_pack(to, p, Pack<scalar, V>{});
}

// padded (sequences, size, width): each sequence's rows, and zeros behind them. A warp a row of it.
KERNEL(kRowThreads, 8, pack_pad,
       (Global<const scalar> packed, Global<const int> cu_seqlens, Global<scalar> padded, int rows, int size,
        int width)) {
    const int row = warp_row();
    if (row >= rows) return;
    const int s = row / size, from = cu_seqlens[s] + row % size;
    const auto to = padded + size_t(row) * width;
    const auto x = packed + size_t(from) * width;
    if (from >= cu_seqlens[s + 1]) {
        if (width % kWide)
            clear_row<1>(to, width);
        else
            clear_row<kWide>(to, width);
    } else if (width % kWide) {
        copy_row<1>(x, to, width);
    } else {
        copy_row<kWide>(x, to, width);
    }
}

// Undoes it: packed (rows, width). A warp a row of it.
KERNEL(kRowThreads, 8, pack_unpad,
       (Global<const scalar> padded, Global<const int> cu_seqlens, Global<scalar> packed, int rows, int sequences,
        int size, int width)) {
    const int row = warp_row();
    if (row >= rows) return;
    const int s = sequence_of(row, cu_seqlens, sequences);
    const auto from = padded + (size_t(s) * size + (row - cu_seqlens[s])) * width;
    const auto to = packed + size_t(row) * width;
    if (width % kWide)
        copy_row<1>(from, to, width);
    else
        copy_row<kWide>(from, to, width);
}

}  // namespace esm
