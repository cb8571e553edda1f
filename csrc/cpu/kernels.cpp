// The kernels of one level. CMake compiles this file once per level, with that level's flags and ESM_LEVEL its name.
#include "attention.h"
#include "contacts.h"
#include "gemm.h"
#include "rows.h"
#include "table.h"
#include "vec.h"

namespace esm {
namespace cpu {
namespace {

// Rows a thread takes through a GEMM at once: many rows share one reading of the weights, but they have to stay in L2.
constexpr int64_t kBlockRows = 192;

template <class Body>
void each(size_t n, size_t grain, const Body& body) {
    const auto run = [](void* context, size_t begin, size_t end) { (*static_cast<const Body*>(context))(begin, end); };
    parallel(n, grain, run, const_cast<void*>(static_cast<const void*>(&body)));
}

// body(first row, one past the last) in nearly equal blocks, a whole number of them per thread.
template <class Body>
void each_block(int64_t rows, const Body& body) {
    const int64_t blocks = round_up((rows + kBlockRows - 1) / kBlockRows, parallel_width());
    each(size_t(blocks), 1, [&](size_t begin, size_t end) {
        for (size_t i = begin; i < end; ++i) {
            const int64_t first = rows * int64_t(i) / blocks, last = rows * int64_t(i + 1) / blocks;
            if (first < last) body(first, last);
        }
    });
}

// body(first panel, one past the last) over the panels of a matrix.
template <class Body>
void each_panel(int panels, const Body& body) {
    each(size_t(panels), size_t(panels / (4 * parallel_width()) + 1),
         [&](size_t begin, size_t end) { body(int(begin), int(end)); });
}

// With few rows a thread: the threads share the weights' columns, not the rows, so that each weight is read once.
bool few(int64_t rows) { return rows < int64_t(kRows) * parallel_width(); }

template <class W>
const W* weights_of(const Packed& packed) {
    return static_cast<const W*>(packed.data);
}

template <class A>
A* buffer(int slot, int64_t rows, size_t ld) {
    return static_cast<A*>(scratch(slot, size_t(rows) * ld * sizeof(A)));
}

struct Norm {
    const float* x;
    int width;
    const float *gain, *bias;
    float eps;

    template <class A>
    void operator()(int64_t first, int64_t last, A* out, size_t ld) const {
        for (int64_t row = first; row < last; ++row, out += ld)
            layer_norm(x + row * width, width, gain, bias, eps, out);
    }
};

template <class W>
void gelu_ffn_of(const FfnCall& call) {
    typedef typename ActivationOf<W>::type A;
    const int width = call.fc1.in, hidden = call.fc1.out;
    float* gain = static_cast<float*>(scratch(0, (3 * size_t(width) + size_t(hidden) + 4 * kPanel) * sizeof(float)));
    float* ln_bias = widen(call.ln_weight, call.fc1.type, width, gain);
    float* bias1 = widen(call.ln_bias, call.fc1.type, width, ln_bias);
    float* bias2 = widen(call.fc1_bias, call.fc1.type, hidden, bias1);
    widen(call.fc2_bias, call.fc1.type, width, bias2);

    const Norm norm{call.x, width, gain, ln_bias, call.eps};
    const W *fc1 = weights_of<W>(call.fc1), *fc2 = weights_of<W>(call.fc2);
    const size_t ld = leading<A>(width), ld_middle = leading<A>(hidden), ld_x = size_t(width);
    const int panels1 = panels_of(hidden), panels2 = panels_of(width);

    if (few(call.rows)) {
        A* normed = buffer<A>(1, call.rows, ld);
        A* middle = buffer<A>(2, call.rows, ld_middle);
        norm(0, call.rows, normed, ld);
        each_panel(panels1, [&](int first, int last) {
            gemm(normed, ld, call.rows, fc1, width, first, last, Gelu<A>{middle, ld_middle, bias1});
        });
        each_panel(panels2, [&](int first, int last) {
            gemm(middle, ld_middle, call.rows, fc2, hidden, first, last,
                 AddTo{call.x, call.result, ld_x, bias2, width});
        });
        return;
    }
    each_block(call.rows, [&](int64_t first, int64_t last) {
        const int64_t rows = last - first;
        A* normed = buffer<A>(4, rows, ld);
        A* middle = buffer<A>(5, rows, ld_middle);
        norm(first, last, normed, ld);
        gemm(normed, ld, rows, fc1, width, 0, panels1, Gelu<A>{middle, ld_middle, bias1});
        gemm(middle, ld_middle, rows, fc2, hidden, 0, panels2,
             AddTo{call.x + first * width, call.result + first * width, ld_x, bias2, width});
    });
}

template <class W>
void pre_ln_attention_of(const AttentionCall& call) {
    typedef typename ActivationOf<W>::type A;
    const int width = call.q.in, dim = width / call.heads, panels = panels_of(width);
    const size_t ld = leading<A>(width), ld_x = size_t(width);
    const int64_t n = call.rows;
    const Packed* projections[3] = {&call.q, &call.k, &call.v};
    const void* biases[3] = {call.q_bias, call.k_bias, call.v_bias};

    float* gain = static_cast<float*>(scratch(0, 6 * (size_t(width) + kPanel) * sizeof(float)));
    float* ln_bias = widen(call.ln_weight, call.q.type, width, gain);
    float* next = widen(call.ln_bias, call.q.type, width, ln_bias);
    const float* wide[3];
    for (int i = 0; i < 3; ++i) wide[i] = next, next = widen(biases[i], call.q.type, width, next);
    const float* out_bias = next;
    widen(call.out_bias, call.q.type, width, next);

    const Norm norm{call.x, width, gain, ln_bias, call.eps};
    A* qkv = buffer<A>(1, 3 * n, ld);
    const auto project = [&](int which, const A* normed, int64_t first, int64_t rows, int from, int to) {
        A* out = qkv + (which * n + first) * ld;
        gemm(normed, ld, rows, weights_of<W>(*projections[which]), width, from, to,
             Project<A>{out, ld, wide[which], width});
    };
    if (few(n)) {
        A* normed = buffer<A>(2, n, ld);
        norm(0, n, normed, ld);
        each_panel(3 * panels, [&](int first, int last) {
            for (int i = first; i < last; ++i) project(i / panels, normed, 0, n, i % panels, i % panels + 1);
        });
    } else {
        each_block(n, [&](int64_t first, int64_t last) {
            A* normed = buffer<A>(4, last - first, ld);
            norm(first, last, normed, ld);
            for (int i = 0; i < 3; ++i) project(i, normed, first, last - first, 0, panels);
        });
    }

    // A head's result takes the place of its queries.
    each(size_t(call.sequences) * call.heads, 1, [&](size_t begin, size_t end) {
        for (size_t i = begin; i < end; ++i) {
            const int64_t sequence = int64_t(i) / call.heads, column = int64_t(i) % call.heads * dim;
            const int64_t first = call.cu_seqlens[sequence], length = call.cu_seqlens[sequence + 1] - first;
            if (!length) continue;
            A *q = qkv + first * ld + column, *k = q + n * ld, *v = k + n * ld;
            if (call.rotary) {
                const float *cosines = call.rotary + first * dim, *sines = cosines + n * dim;
                rotate(q, ld, int(length), dim, cosines, sines);
                rotate(k, ld, int(length), dim, cosines, sines);
            }
            if (call.q_result) {
                copy_head(q, ld, length, dim, static_cast<W*>(call.q_result) + first * width + column, ld_x);
                copy_head(k, ld, length, dim, static_cast<W*>(call.k_result) + first * width + column, ld_x);
            }
            attend(q, k, v, q, ld, int(length), dim);
        }
    });

    const W* out = weights_of<W>(call.out);
    const auto finish = [&](int64_t first, int64_t last, int from, int to) {
        gemm(qkv + first * ld, ld, last - first, out, width, from, to,
             AddTo{call.x + first * width, call.result + first * width, ld_x, out_bias, width});
    };
    if (few(n))
        each_panel(panels, [&](int from, int to) { finish(0, n, from, to); });
    else
        each_block(n, [&](int64_t first, int64_t last) { finish(first, last, 0, panels); });
}


template <class W>
void contact_map_of(const ContactCall& call) {
    typedef typename ActivationOf<W>::type A;
    const size_t width = size_t(call.heads) * call.head_dim;
    float* result = call.result;
    for (int64_t s = 0; s < call.sequences; ++s) {
        const int64_t first = call.cu_seqlens[s];
        const int length = int(call.cu_seqlens[s + 1] - first);
        float* keep = static_cast<float*>(scratch(0, (size_t(length) + kPanel) * sizeof(float)));
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

// One tile's work on operands that stay in the first-level cache.
template <class W>
double peak_of() {
    typedef typename ActivationOf<W>::type A;
    constexpr int kInner = 64, kRounds = 20000;
    const size_t threads = size_t(parallel_width());
    const double start = seconds();
    each(threads, 1, [&](size_t begin, size_t end) {
        alignas(64) A a[kRows * kInner] = {};
        alignas(64) W panel[kPanel * kInner] = {};
        alignas(64) float c[kRows * kPanel];
        for (size_t i = begin; i < end; ++i)
            for (int round = 0; round < kRounds; ++round) {
                tile_of(kRows, a, kInner, panel, kInner, c, kPanel);
                asm volatile("" : : "r"(a), "r"(panel), "r"(c) : "memory");  // or the loop would be no work at all
            }
    });
    return 2.0 * kRows * kPanel * kInner * kRounds * double(threads) / (seconds() - start) / 1e9;
}
double peak(Type type) { return type == Type::kFloat32 ? peak_of<float>() : peak_of<bf16>(); }

void gelu_ffn(const FfnCall& call) {
    call.fc1.type == Type::kFloat32 ? gelu_ffn_of<float>(call) : gelu_ffn_of<bf16>(call);
}
void pre_ln_attention(const AttentionCall& call) {
    call.q.type == Type::kFloat32 ? pre_ln_attention_of<float>(call) : pre_ln_attention_of<bf16>(call);
}
void contact_map(const ContactCall& call) {
    call.type == Type::kFloat32 ? contact_map_of<float>(call) : contact_map_of<bf16>(call);
}

}  // namespace

#define ESM_JOIN_(a, b) a##b
#define ESM_JOIN(a, b) ESM_JOIN_(a, b)
#define ESM_TEXT_(a) #a
#define ESM_TEXT(a) ESM_TEXT_(a)
extern const Table ESM_JOIN(kernels_, ESM_LEVEL);
const Table ESM_JOIN(kernels_, ESM_LEVEL) = {ESM_TEXT(ESM_LEVEL), gelu_ffn, pre_ln_attention, contact_map, peak};

}  // namespace cpu
}  // namespace esm
