// Rows between the packed and the padded layout.
#include "rows.cuh"

namespace esm {

template <int V>
__device__ __forceinline__ void copy_row(Global<const scalar> from, Global<scalar> to, int width) {
    for (int p = threadIdx.x % kWarp; p < width / V; p += kWarp) store_pack(to, p, load_pack<V>(from, p));
}
template <int V>
__device__ __forceinline__ void clear_row(Global<scalar> to, int width) {
    for (int p = threadIdx.x % kWarp; p < width / V; p += kWarp) store_pack(to, p, Pack<scalar, V>{});
}

// A row of `to` is one of `from`, or zeros where there is none.
__device__ __forceinline__ void copy_or_clear(Global<const scalar> from, Global<scalar> to, int width, bool there) {
    if (width % kWide)
        there ? copy_row<1>(from, to, width) : clear_row<1>(to, width);
    else
        there ? copy_row<kWide>(from, to, width) : clear_row<kWide>(to, width);
}

// packed (n, width): the rows of padded that `rows` names. A warp a row of it.
KERNEL(kRowThreads, 8, pack_take_rows,
       (Global<const scalar> padded, Global<const long long> rows, Global<scalar> packed, int n, int width)) {
    const int place = warp_row();
    if (place < n) copy_or_clear(padded + rows[place] * width, packed + size_t(place) * width, width, true);
}

// Undoes it: padded (size, width), zeros in the rows that `rows` does not name. A warp a row of it. As the names
// increase, at most `row` of them come before this one, and at least as many as the rows that are left out allow: where
// none is left out, nothing is searched.
KERNEL(kRowThreads, 8, pack_spread_rows,
       (Global<const scalar> packed, Global<const long long> rows, Global<scalar> padded, int n, int size,
        int width)) {
    const int row = warp_row();
    if (row >= size) return;
    int low = max(row - (size - n), 0), high = min(row, n);
    while (low < high) {
        const int middle = (low + high) / 2;
        if (rows[middle] < row)
            low = middle + 1;
        else
            high = middle;
    }
    const bool there = low < n && rows[low] == row;
    copy_or_clear(packed + size_t(low) * width, padded + size_t(row) * width, width, there);
}

}  // namespace esm
