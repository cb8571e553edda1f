// One layer's share of the contact logits of one sequence, without ever holding an attention map: a few query rows at
// a time, one head after another. esm_fast/ops/contact_map.py has the formula; its names are used here.
#pragma once

#include "../types.h"

namespace esm {
namespace cpu {

// q, k: (rows, heads, head_dim) of `type`; keep: (rows,) bytes; weight: (heads,); result: see the op.
struct ContactMapCall {
    const void *q, *k;
    Type type;
    const int32_t* cu_seqlens;
    int64_t sequences;
    int heads, head_dim;
    const uint8_t* keep;
    const float* weight;
    float scale;
    float* result;
};

}  // namespace cpu
}  // namespace esm

#if defined(ESM_LEVEL)
#include "../attention.h"
#include "../work.h"

namespace esm {
namespace cpu {
namespace {

// Query rows of one task. Fixed, since their columns' sums are added task by task: the order of that sum must not
// depend on the number of threads.
constexpr int kContactRows = 96;

// Sequences up to this long go through `exact_contacts`.
constexpr int kExactLength = 32;

// One short sequence in fp64. With two or three residues the average product takes away nearly all of a map, and what
// is left would be the rounding of fp32; here that costs nothing. q, k: (length, heads, dim); result (length, length).
template <class W>
void exact_contacts(const ContactMapCall& call, const W* q, const W* k, const float* keep, int length, float* result) {
    double total[kExactLength * kExactLength] = {};
    const size_t width = size_t(call.heads) * call.head_dim;
    for (int head = 0; head < call.heads; ++head) {
        double map[kExactLength * kExactLength] = {}, r[kExactLength] = {}, t = 0;
        for (int i = 0; i < length; ++i) {
            if (keep[i] == 0) continue;
            double* row = map + i * length;
            double best = -__builtin_inf(), sum = 0;
            for (int j = 0; j < length; ++j) {
                const W *a = q + i * width + head * call.head_dim, *b = k + j * width + head * call.head_dim;
                for (int d = 0; d < call.head_dim; ++d) row[j] += double(widen(a[d])) * double(widen(b[d]));
                row[j] *= call.scale;
                best = row[j] > best ? row[j] : best;
            }
            for (int j = 0; j < length; ++j) sum += row[j] = __builtin_exp(row[j] - best);
            for (int j = 0; j < length; ++j) {
                row[j] *= keep[j] / sum;
                r[i] += row[j];
                r[j] += row[j];
                t += 2 * row[j];
            }
        }
        for (int i = 0; i < length; ++i)
            for (int j = 0; j < length; ++j)
                total[i * length + j] += call.weight[head] * (map[i * length + j] + map[j * length + i] - r[i] * r[j] / t);
    }
    for (int i = 0; i < length * length; ++i) result[i] = float(total[i]);
}

template <class A>
struct Contacts {
    int length, heads, dim;
    float scale;
    const float* weight;
    const float* keep;  // (ld,), 1 or 0, 0 beyond the sequence

    // Working memory, given by memory().
    size_t ld = 0;
    A *queries = nullptr, *keys = nullptr;  // per head (length, dim), and packed
    float* total = nullptr;                 // (length, ld): the weighted sum of the heads' maps
    float* partial = nullptr;               // per task and head (ld,): sums over the task's queries
    float* sums = nullptr;                  // r of every head, packed as weights from heads to positions
    float* scaled = nullptr;                // (length, heads): r weight / t

    int panels() const { return panels_of(length); }
    int tasks() const { return (length + kContactRows - 1) / kContactRows; }
    size_t keys_size() const { return panels() * panel_size(keys, dim); }
    float* partial_of(int task, int head) const { return partial + (size_t(task) * heads + head) * ld; }
    float& sum_of(int head, int at) const { return sums[(size_t(at / kPanel) * heads + head) * kPanel + at % kPanel]; }

    void memory() {
        ld = size_t(panels()) * kPanel;
        queries = buffer<A>(ContactMap::queries, int64_t(heads) * length, dim);
        keys = buffer<A>(ContactMap::keys, heads, keys_size());
        float* next = buffer<float>(ContactMap::sums, length + (int64_t(tasks()) + 2) * heads, ld);
        total = next, next += length * ld;
        partial = next, next += size_t(tasks()) * heads * ld;
        sums = next, next += heads * ld;
        scaled = next;
    }

    // Phase 1, a head: q and k (length, heads, dim) as their producer left them.
    template <class W>
    void take(const W* q, const W* k, int head) const {
        const size_t from = size_t(heads) * dim;
        A* own = buffer<A>(ContactMap::own_keys, length, dim);
        copy_head(q + head * dim, from, length, dim, queries + size_t(head) * length * dim, dim);
        copy_head(k + head * dim, from, length, dim, own, dim);
        pack_keys(own, dim, length, dim, keys + head * keys_size());
    }

    // Phase 2, a task: the maps of its queries go into `total`, and their sums beside it.
    void add(int task) const {
        const int begin = task * kContactRows, rows = length - begin < kContactRows ? length - begin : kContactRows;
        std::memset(total + begin * ld, 0, rows * ld * sizeof(float));
        std::memset(partial_of(task, 0), 0, heads * ld * sizeof(float));
        float* scores = buffer<float>(Any::scores, kTileRows<A>, ld);
        for (int head = 0; head < heads; ++head)
            Tiles<A>{rows}.each([&](int64_t first, int height) {
                const A* from = queries + (size_t(head) * length + begin + first) * dim;
                for (int panel = 0; panel < panels(); ++panel)
                    tile_of(height, from, dim, keys + head * keys_size() + panel * panel_size(keys, dim), dim,
                            scores + panel * kPanel, ld);
                for (int r = 0; r < height; ++r)
                    sum_of(head, begin + int(first) + r) =
                        add_row(scores + r * ld, begin + int(first) + r, weight[head], partial_of(task, head));
            });
    }

    float add_row(float* scores, int query, float share, float* columns) const {
        if (keep[query] == 0) return 0;
        const float inverse = 1.0f / softmax_weights(scores, length, scale, scores);
        F row = {};
        for (int i = 0; i < int(round_up(length, N)); i += N) {
            const F a = load(scores + i) * inverse * load(keep + i);
            row += a;
            store(columns + i, load(columns + i) + a);
            float* to = total + query * ld + i;
            store(to, fma(a, splat(share), load(to)));
        }
        return sum(row);
    }

    // Phase 3: r, t and what the average product needs of them.
    void close() const {
        for (int head = 0; head < heads; ++head) {
            float t = 0;
            for (int i = 0; i < int(ld); ++i) {
                float r = i < length ? sum_of(head, i) : 0;
                for (int task = 0; task < tasks(); ++task) r += partial_of(task, head)[i];
                sum_of(head, i) = r;
                t += r;
            }
            for (int i = 0; i < length; ++i) scaled[size_t(i) * heads + head] = sum_of(head, i) * weight[head] / t;
        }
    }

    // Phase 4, some rows of the result: total + its transpose - the average products.
    void finish(int first, int last, float* result) const {
        gemm(scaled + size_t(first) * heads, heads, last - first, sums, heads, 0, panels(),
             [&](const float* c, int64_t row, int height, int column) {
                 for (int r = 0; r < height; ++r) {
                     const size_t i = size_t(first + row + r);
                     for (int v = 0; v < kPanel && column + v < length; ++v) {
                         const size_t j = size_t(column + v);
                         result[i * length + j] = total[i * ld + j] + total[j * ld + i] - c[r * kPanel + v];
                     }
                 }
             });
    }
};

template <class W>
void contact_map_of(const ContactMapCall& call) {
    typedef typename FormatOf<W>::Activation A;
    const size_t width = size_t(call.heads) * call.head_dim;
    float* result = call.result;
    for (int64_t s = 0; s < call.sequences; ++s) {
        const int64_t first = call.cu_seqlens[s];
        const int length = int(call.cu_seqlens[s + 1] - first);
        float* keep = buffer<float>(ContactMap::keep, 1, length + kPanel);
        float kept = 0;
        for (int i = 0; i < int(round_up(length, kPanel)); ++i)
            kept += keep[i] = i < length && call.keep[first + i] ? 1.0f : 0.0f;
        const size_t size = size_t(length) * length;
        const W *q = static_cast<const W*>(call.q) + first * width, *k = static_cast<const W*>(call.k) + first * width;
        if (kept <= 1) {  // of a single residue's map the average product leaves nothing
            std::memset(result, 0, size * sizeof(float));
        } else if (length <= kExactLength) {
            exact_contacts(call, q, k, keep, length, result);
        } else {
            Contacts<A> work{length, call.heads, call.head_dim, call.scale, call.weight, keep};
            work.memory();
            each(size_t(call.heads), 1, [&](size_t begin, size_t end) {
                for (size_t head = begin; head < end; ++head) work.take(q, k, int(head));
            });
            each(size_t(work.tasks()), 1, [&](size_t begin, size_t end) {
                for (size_t task = begin; task < end; ++task) work.add(int(task));
            });
            work.close();
            each(size_t(length), kContactRows,
                 [&](size_t begin, size_t end) { work.finish(int(begin), int(end), result); });
        }
        result += size;
    }
}

}  // namespace
}  // namespace cpu
}  // namespace esm
#endif
