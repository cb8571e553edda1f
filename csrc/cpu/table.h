// What the CPU kernels offer, and the little they need from outside: the one header seen by both sides.
//
// kernels.cpp is compiled once per instruction-set level and holds everything in an anonymous namespace; its only
// symbol is the table below. So no function compiled for a newer CPU can replace its namesake elsewhere at link time.
// For the same reason nothing here is a template or an inline function, and no kernel file includes the C++ library.
#pragma once

#include <cstddef>
#include <cstdint>

namespace esm {
namespace cpu {

enum class Type : int { kFloat32, kBfloat16, kInt8 };

// A (out, in) matrix as the GEMM reads it: panels of 32 outputs, each holding for every pair of inputs 32 pairs
// (bf16, the inputs padded to a multiple of 32, so that a panel is made of whole AMX tiles), or for every input
// 32 floats. Rows and inputs beyond the matrix are zero. The same at every level.
constexpr int kPanel = 32;
constexpr int kInputs = 32;
// 8 bits: a panel is its groups of kGroup inputs, one after the other. A group holds 32 corrections (int32: -kZero times
// the sum of an output's numbers, see int8.h), 32 scales (float), and for every 4 inputs 32 quadruples of int8; the
// last group's inputs are padded with zeros to a multiple of kInputs8, so that it too is made of whole AMX tiles.
constexpr int kGroup = 256;
constexpr int kInputs8 = 64;
constexpr int kZero = 128;
struct Packed {
    const void* data;
    int out, in;
    Type type;
};

// Pointers named by the op's own arguments; vectors (gains, biases) have the weights' type, x and result are float.
struct FfnCall {
    const float* x;
    float* result;
    int64_t rows;
    float eps;
    const void *ln_weight, *ln_bias, *fc1_bias, *fc2_bias;
    Packed fc1, fc2;
};

struct AttentionCall {
    const float* x;
    float* result;
    int64_t rows;
    const int32_t* cu_seqlens;
    int64_t sequences;
    int heads;
    float eps;
    const void *ln_weight, *ln_bias, *q_bias, *k_bias, *v_bias, *out_bias;
    Packed q, k, v, out;
    const float* rotary;         // (2, rows, head_dim), or null
    void *q_result, *k_result;  // (rows, width) in the weights' type, or null
};

// Layers of one shape over the same rows. The first reads the caller's x; every other reads the result, in place.
struct LayerCall {
    AttentionCall attention;
    FfnCall ffn;
    float* copy;  // where the stream after this layer goes too, or null
};
struct StackCall {
    const LayerCall* layers;
    int64_t count;
};

// q, k, v, out: (rows, heads, head_dim) of `type`; log_sums: (heads, rows), the log of every softmax's sum, or null.
struct VarlenCall {
    const void *q, *k, *v;
    Type type;
    int64_t rows;
    const int32_t* cu_seqlens;
    int64_t sequences;
    int heads, head_dim;
    float scale;
    void* out;
    float* log_sums;
};
// The gradients of q, k and v from that of `out`; `forward` as it was called, but for its `out`.
struct GradientCall {
    VarlenCall forward;
    const void *out, *dout;
    void *dq, *dk, *dv;
};

// gelu_ffn in training. The matrices are plain, (out, in): they change with every step. All but x and result is of
// `type`; middle: (rows, hidden), what GELU is given.
struct FfnTrainingCall {
    const float* x;
    int64_t rows;
    int width, hidden;
    float eps;
    Type type;
    const void *ln_weight, *ln_bias, *fc1_weight, *fc1_bias, *fc2_weight, *fc2_bias;
    void* middle;
    float* result;  // read by nothing, and null in a gradient's call
};
// dvectors: the gradients of ln_weight, ln_bias, fc2_bias and fc1_bias, one after the other. Those of the matrices are
// products over the rows, whose factors go to normed, dmiddle, activated and dresult, the result's gradient in `type`.
struct FfnGradientCall {
    FfnTrainingCall forward;
    const float* dout;
    float *dx, *dvectors;
    void *normed, *dmiddle, *activated, *dresult;
};

// Before attention in training: result[i] = LN(x) weight[i]' + bias[i] for q, k and v. Plain matrices, as above.
struct InputsCall {
    const float* x;
    int64_t rows;
    int width;
    float eps;
    Type type;
    const void *ln_weight, *ln_bias, *weight[3], *bias[3];
    void* result[3];
};
// The results of `forward` are their gradients; beside: that of the stream that passes by; dvectors: the gradients of
// ln_weight, ln_bias and the biases, one after the other; normed: LN(x), a factor of the matrices' gradients.
struct InputsGradientCall {
    InputsCall forward;
    const float* beside;
    float *dx, *dvectors;
    void* normed;
};
// After it: result = x + mixed weight' + bias.
struct OutputCall {
    const float* x;
    int64_t rows;
    int width;
    Type type;
    const void *mixed, *weight, *bias;
    float* result;
};
struct OutputGradientCall {
    OutputCall forward;
    const float* dout;
    float* dbias;
    void *dmixed, *dresult;  // dresult: `dout` in `type`, or null
};

// q, k: (rows, heads, head_dim) of `type`; keep: (rows,) bytes; weight: (heads,); result: see the op.
struct ContactCall {
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

// tokens, positions: (rows,) within the tables; tables, gains and biases of `type`; ln_weight null for no layer norm.
struct EmbeddingCall {
    const int64_t *tokens, *positions;
    const int32_t* cu_seqlens;
    int64_t rows, sequences;
    const void *token_table, *position_table, *ln_weight, *ln_bias;
    Type type;
    int width;
    bool token_dropout;  // the three members below, and cu_seqlens, are read only then
    int64_t mask;        // the token that has no embedding
    float kept;          // share of the tokens that were no <mask> in training
    const float* scale;  // (sequences,), or null for kept / (1 - share of <mask>)
    float eps;
    float* result;
};

// rows: how many to compute; row_of: (rows,) which they are in x, or null for all in order; logits: (rows, outputs of
// the table) in the weights' type; targets: (rows,) below that number, or kIgnored, or null with loss null.
constexpr int64_t kIgnored = -100;
struct HeadCall {
    const float* x;
    int64_t rows;
    const int64_t *row_of, *targets;
    float eps;
    const void *dense_bias, *ln_weight, *ln_bias, *bias;
    Packed dense, table;
    void* logits;
    float* loss;
};

// masked_lm_head in training. x: (rows, width), the selected ones; the matrices are plain, as above. middle: what GELU
// is given; wrong: (rows, tokens), softmax less the one-hot targets; both are kept for the gradients. targets, wrong
// and loss are null where no loss is wanted.
struct HeadTrainingCall {
    const float* x;
    int64_t rows;
    int width, tokens;
    float eps;
    Type type;
    const void *dense_weight, *dense_bias, *ln_weight, *ln_bias, *token_table, *bias;
    const int64_t* targets;
    void* middle;
    float* wrong;
    void* logits;
    float* loss;
};
// From the gradients of the loss and, (rows, tokens) of `type`, of the logits; of `forward`, x, targets and the results
// are not read. dvectors: those of ln_weight, ln_bias, dense_bias and bias, one after the other; normed, dmiddle and
// dscores, that of the logits from both: the factors of the matrices' gradients.
struct HeadGradientCall {
    HeadTrainingCall forward;
    float dloss;
    const void* dlogits;
    float *dx, *dvectors;
    void *normed, *dmiddle, *dscores;
};

// scores: (batch, heads, size, size) of `type`; lengths: (batch,), read as lying in [0, size]; result as scores.
struct SoftmaxCall {
    const void* scores;
    Type type;
    const int64_t* lengths;
    int64_t batch, heads, size;
    float* result;
};

// x: (rows, width); weight: (rows,); result: (sequences, width).
struct PoolCall {
    const float *x, *weight;
    const int32_t* cu_seqlens;
    int64_t sequences;
    int width;
    float* result;
};

struct Table {
    const char* name;
    void (*gelu_ffn)(const FfnCall&);
    void (*pre_ln_attention)(const AttentionCall&);
    void (*transformer_stack)(const StackCall&);
    void (*attention_varlen)(const VarlenCall&);
    void (*attention_backward)(const GradientCall&);
    void (*attention_inputs)(const InputsCall&);
    void (*attention_inputs_backward)(const InputsGradientCall&);
    void (*attention_output)(const OutputCall&);
    void (*attention_output_backward)(const OutputGradientCall&);
    void (*ffn_training)(const FfnTrainingCall&);
    void (*ffn_backward)(const FfnGradientCall&);
    void (*head_training)(const HeadTrainingCall&);
    void (*head_backward)(const HeadGradientCall&);
    void (*contact_map)(const ContactCall&);
    void (*embedding)(const EmbeddingCall&);
    void (*masked_lm_head)(const HeadCall&);
    void (*masked_softmax)(const SoftmaxCall&);
    void (*pool)(const PoolCall&);
    // (rows, in) times 8-bit weights, transposed: the GEMM alone.
    void (*int8_linear)(const float* x, int64_t rows, const Packed&, float* result);
    // GFLOP/s of the GEMM's own instruction on registers alone, all threads together.
    double (*peak)(Type);
};

// Provided to the kernels, compiled for the oldest CPU.

// body(context, begin, end) over pieces of about `grain` that cover [0, n); see threads.h.
void parallel(size_t n, size_t grain, void (*body)(void*, size_t, size_t), void* context);
int parallel_width();
// This thread's memory number `slot` (0 to 7), at least `bytes`, aligned to a cache line; it lives until a call for that
// slot with another number of bytes. Contents are undefined.
void* scratch(int slot, size_t bytes);
double seconds();

// Levels, best last. `select` takes a name of `level(i)`; it throws std::invalid_argument with the reason if this
// machine cannot run it. The first use selects ESM_FAST_ISA, or the best.
const Table& active();
int levels();
const char* level(int i);
bool runs(int i);
void select(const char* name);

}  // namespace cpu
}  // namespace esm
