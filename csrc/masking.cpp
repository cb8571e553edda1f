#include "masking.h"

#include "esm.h"
#include "threads.h"

namespace esm {

void mask_tokens(const int32_t* tokens, const int32_t* cu_seqlens, const int64_t* records, size_t b, uint32_t epoch,
                 uint64_t seed, int32_t* shown, int32_t* targets) {
    constexpr size_t kGrainTokens = 16 * 1024;  // less work than this is not worth waking a thread
    const size_t n = size_t(cu_seqlens[b]), grain = n < kGrainTokens ? b : b * kGrainTokens / n;
    parallel_for(b, grain, [&](size_t begin, size_t end) {
        for (size_t s = begin; s < end; ++s) {
            for (int32_t i = cu_seqlens[s]; i < cu_seqlens[s + 1]; ++i) {
                const uint32_t position = uint32_t(i - cu_seqlens[s]);
                const Shown decided = mask_token(tokens[i], position, uint64_t(records[s]), epoch, seed);
                shown[i] = decided.token;
                targets[i] = decided.target;
            }
        }
    });
}

}  // namespace esm
