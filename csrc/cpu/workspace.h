// The kernels' working memory, by name. What is named in one list below, or in Any and one list, may be live at once and
// never shares memory; two lists do, because a thread works for one op at a time.
//
// Every thread has its own of each. Under "shared" stand those of the calling thread which the others read and write
// too; under "own" those that each thread uses for its piece of work.
#pragma once

#include "host.h"

namespace esm {
namespace cpu {
namespace {

// What any op may use without knowing: one head's scores, their softmax and its queries (attention.h), a row before it is
// quantised (rows.h), sums of products between two parts of the inputs (amx.h).
enum class Any { scores, probabilities, queries, normed, resting, kCount };

// The halves of a layer, the stack of them and the language-model head, in training too.
enum class Layer {
    // shared
    vectors,   // gains and biases in fp32
    qkv,       // of all rows
    matrices,  // prepacked for one call
    sums,      // of the parts of a sum, in order
    rows,
    wide,  // rows of the hidden width, or of logits
    // own
    own_rows,
    own_wide,
    own_operand,
    own_fp32,
    kCount
};
enum class AttentionVarlen { own_rows, own_sums, kCount };
enum class ContactMap { keep, queries, keys, sums, own_keys, kCount };
enum class Embedding { vectors, scales, own_row, kCount };
enum class MaskedSoftmax { own_row, kCount };
enum class Int8Linear { bias, own_operand, kCount };
enum class Peak { own_rows, own_panel, kCount };

constexpr int kSlots = 16;

constexpr int slot_of(Any name) { return int(name); }
template <class List>
constexpr int slot_of(List name) {
    static_assert(int(Any::kCount) + int(List::kCount) <= kSlots, "more names than there are slots");
    return int(Any::kCount) + int(name);
}

// rows x ld elements under a name.
template <class T, class List>
T* buffer(List name, int64_t rows, size_t ld) {
    return static_cast<T*>(scratch(slot_of(name), size_t(rows) * ld * sizeof(T)));
}

}  // namespace
}  // namespace cpu
}  // namespace esm
