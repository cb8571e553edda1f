// The kernels of one level. CMake compiles this file once per level, with that level's flags and ESM_LEVEL its name.
#include "contacts.h"
#include "edges.h"
#include "layers.h"
#include "work.h"

namespace esm {
namespace cpu {
namespace {

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
void transformer_stack(const StackCall& call) {
    call.layers->ffn.fc1.type == Type::kFloat32 ? transformer_stack_of<float>(call) : transformer_stack_of<bf16>(call);
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

}  // namespace

#define ESM_JOIN_(a, b) a##b
#define ESM_JOIN(a, b) ESM_JOIN_(a, b)
#define ESM_TEXT_(a) #a
#define ESM_TEXT(a) ESM_TEXT_(a)
extern const Table ESM_JOIN(kernels_, ESM_LEVEL);
const Table ESM_JOIN(kernels_, ESM_LEVEL) = {
    ESM_TEXT(ESM_LEVEL), gelu_ffn,       pre_ln_attention, transformer_stack, contact_map,
    embedding,           masked_lm_head, masked_softmax,   pool,              peak};

}  // namespace cpu
}  // namespace esm
