// The kernels of one level. CMake compiles this file once per level, with that level's flags and ESM_LEVEL its name.
#include "attention_training.h"
#include "contacts.h"
#include "edges.h"
#include "ffn_training.h"
#include "head_training.h"
#include "layers.h"
#include "training.h"
#include "work.h"

namespace esm {
namespace cpu {
namespace {

#define ESM_BY_TYPE(type, kernel, arguments)                    \
    switch (type) {                                             \
        case Type::kFloat32: return kernel<float> arguments;    \
        case Type::kBfloat16: return kernel<bf16> arguments;    \
        default: return kernel<int8> arguments;                 \
    }

// One tile's work on operands that stay in the first-level cache.
template <class W>
double peak_of() {
    typedef typename Format<W>::Operand A;
    constexpr int kHeight = kTileRows<A>, kInner = sizeof(W) == 1 || kHeight == 32 ? kGroup : 64;
    constexpr int kRounds = (N == 16 ? 12800000 : 1280000) / kInner;  // 10 ms and more: waking threads is nothing then
    const size_t threads = size_t(parallel_width());
    const double start = seconds();
    each(threads, 1, [&](size_t begin, size_t end) {
        const size_t ld = leading<A>(kInner);
        A* a = buffer<A>(1, kHeight, ld);
        W* panel = buffer<W>(2, 1, panel_size(static_cast<W*>(nullptr), kInner));
        std::memset(a, 0, kHeight * ld * sizeof *a);
        std::memset(panel, 0, panel_size(panel, kInner) * sizeof *panel);
        alignas(64) float c[kHeight * kPanel];
        for (size_t i = begin; i < end; ++i)
            for (int round = 0; round < kRounds; ++round) {
                tile_of(kHeight, a, ld, panel, kInner, c, kPanel);
                asm volatile("" : : "r"(a), "r"(panel), "r"(c) : "memory");  // or the loop would be no work at all
            }
    });
    return 2.0 * kHeight * kPanel * kInner * kRounds * double(threads) / (seconds() - start) / 1e9;
}
double peak(Type type) { ESM_BY_TYPE(type, peak_of, ()); }
void gelu_ffn(const FfnCall& call) { ESM_BY_TYPE(call.fc1.type, gelu_ffn_of, (call)); }
void pre_ln_attention(const AttentionCall& call) { ESM_BY_TYPE(call.q.type, pre_ln_attention_of, (call)); }
void transformer_stack(const StackCall& call) {
    ESM_BY_TYPE(call.layers->ffn.fc1.type, transformer_stack_of, (call));
}
void attention_varlen(const VarlenCall& call) {
    call.type == Type::kFloat32 ? attention_varlen_of<float>(call) : attention_varlen_of<bf16>(call);
}
void attention_backward(const GradientCall& call) {
    call.forward.type == Type::kFloat32 ? attention_backward_of<float>(call) : attention_backward_of<bf16>(call);
}
void attention_inputs(const InputsCall& call) {
    call.type == Type::kFloat32 ? attention_inputs_of<float>(call) : attention_inputs_of<bf16>(call);
}
void attention_inputs_backward(const InputsGradientCall& call) {
    call.forward.type == Type::kFloat32 ? attention_inputs_backward_of<float>(call)
                                        : attention_inputs_backward_of<bf16>(call);
}
void attention_output(const OutputCall& call) {
    call.type == Type::kFloat32 ? attention_output_of<float>(call) : attention_output_of<bf16>(call);
}
void attention_output_backward(const OutputGradientCall& call) {
    call.forward.type == Type::kFloat32 ? attention_output_backward_of<float>(call)
                                        : attention_output_backward_of<bf16>(call);
}
void ffn_training(const FfnTrainingCall& call) {
    call.type == Type::kFloat32 ? ffn_training_of<float>(call) : ffn_training_of<bf16>(call);
}
void ffn_backward(const FfnGradientCall& call) {
    call.forward.type == Type::kFloat32 ? ffn_backward_of<float>(call) : ffn_backward_of<bf16>(call);
}
void head_training(const HeadTrainingCall& call) {
    call.type == Type::kFloat32 ? head_training_of<float>(call) : head_training_of<bf16>(call);
}
void head_backward(const HeadGradientCall& call) {
    call.forward.type == Type::kFloat32 ? head_backward_of<float>(call) : head_backward_of<bf16>(call);
}
void contact_map(const ContactCall& call) {
    call.type == Type::kFloat32 ? contact_map_of<float>(call) : contact_map_of<bf16>(call);
}
void embedding(const EmbeddingCall& call) {
    call.type == Type::kFloat32 ? embedding_of<float>(call) : embedding_of<bf16>(call);
}
void masked_lm_head(const HeadCall& call) {
    call.dense.type == Type::kFloat32 ? masked_lm_head_of<float>(call) : masked_lm_head_of<bf16>(call);
}
void masked_softmax(const SoftmaxCall& call) {
    call.type == Type::kFloat32 ? masked_softmax_of<float>(call) : masked_softmax_of<bf16>(call);
}

void int8_linear(const float* x, int64_t rows, const Packed& weights, float* result) {
    const int in = weights.in, out = weights.out;
    const int8* panels = weights_of<int8>(weights);
    float* no_bias = buffer<float>(0, 1, leading<float>(out));
    std::memset(no_bias, 0, leading<float>(out) * sizeof(float));
    each_block(rows, [&](int64_t first, int64_t last) {
        const Rows<biased8> a = operand(panels, x + first * in, size_t(in), last - first, in, 4);
        gemm(a.data, a.ld, last - first, panels, in, 0, panels_of(out),
             Project<float>{result + first * out, size_t(out), no_bias, out});
    });
}

}  // namespace

#define ESM_JOIN_(a, b) a##b
#define ESM_JOIN(a, b) ESM_JOIN_(a, b)
#define ESM_TEXT_(a) #a
#define ESM_TEXT(a) ESM_TEXT_(a)
extern const Table ESM_JOIN(kernels_, ESM_LEVEL);
const Table ESM_JOIN(kernels_, ESM_LEVEL) = {
    ESM_TEXT(ESM_LEVEL),
    gelu_ffn,
    pre_ln_attention,
    transformer_stack,
    attention_varlen,
    attention_backward,
    attention_inputs,
    attention_inputs_backward,
    attention_output,
    attention_output_backward,
    ffn_training,
    ffn_backward,
    head_training,
    head_backward,
    contact_map,
    embedding,
    masked_lm_head,
    masked_softmax,
    pool,
    int8_linear,
    peak,
};

}  // namespace cpu
}  // namespace esm
