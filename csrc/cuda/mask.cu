// Masks packed tokens for training, as csrc/masking.h defines it for the CPU too.
#include "../masking.h"
#include "common.cuh"

namespace esm {

constexpr int kThreads = 128, kTokens = 4;  // a thread's

// records (sequences,): the number of each sequence in its data set.
KERNEL(kThreads, 8, mask_tokens,
       (Global<const int> tokens, Global<const int> cu_seqlens, Global<const long long> records, Global<int> shown,
        Global<int> targets, int n, int sequences, int epoch, unsigned long long seed)) {
    const int first = (int(blockIdx.x) * kThreads + int(threadIdx.x)) * kTokens;
    if (first >= n) return;
    const bool whole = first + kTokens <= n;
    Pack<int, kTokens> in = {}, out, target;
    if (whole) in = load_pack<kTokens>(tokens, first / kTokens);
    int s = sequence_of(first, cu_seqlens, sequences), begin = cu_seqlens[s], end = cu_seqlens[s + 1];
    for (int j = 0; j < kTokens && first + j < n; ++j) {
        const int i = first + j;
        while (i >= end) {  // empty sequences too
            ++s;
            begin = end;
            end = cu_seqlens[s + 1];
        }
        const int token = whole ? in.at[j] : int(tokens[i]);
        const Shown decided = mask_token(token, unsigned(i - begin), records[s], unsigned(epoch), seed);
        out.at[j] = decided.token;
        target.at[j] = decided.target;
        if (!whole) shown[i] = decided.token, targets[i] = decided.target;
    }
    if (whole) {
        store_pack(shown, first / kTokens, out);
        store_pack(targets, first / kTokens, target);
    }
}

}  // namespace esm
