#include <numeric>
#include <stdexcept>
#include <string>

#include "esm.h"
#include "threads.h"

namespace esm {
namespace {

constexpr int32_t kFirstPosition = 2;       // padding_idx + 1: rows 0 and 1 of ESM-1b's position table are never used
constexpr int64_t kGrainTokens = 64 * 1024;  // less work than this is not worth waking a thread

}  // namespace

std::vector<size_t> plan(const int64_t* lengths, size_t n, int64_t budget, int64_t* order) {
    std::iota(order, order + n, int64_t{0});
    std::stable_sort(order, order + n, [=](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
    std::vector<size_t> ends;
    int64_t sum = 0;
    for (size_t i = 0; i < n; ++i) {
        const int64_t length = lengths[order[i]];
        if (i && length > budget - sum) {
            ends.push_back(i);
            sum = 0;
        }
        sum += length;
    }
    if (n) ends.push_back(n);
    return ends;
}

int64_t pack_offsets(const PackSource& source, int32_t* cu_seqlens) {
    int64_t longest = 0, end = 0;
    cu_seqlens[0] = 0;
    for (size_t i = 0; i < source.b; ++i) {
        const int64_t s = source.order[i];
        if (s < 0 || s >= source.n) throw std::out_of_range("order names sequence " + std::to_string(s));
        const int64_t start = source.starts[s], length = source.lengths[s];
        if (start < 0 || length < 0 || start > source.n_ids || length > source.n_ids - start)
            throw std::out_of_range("sequence " + std::to_string(s) + " lies outside ids");
        end += length + 2;
        if (end > INT32_MAX) throw std::out_of_range("a batch holds at most 2^31 - 1 tokens");
        cu_seqlens[i + 1] = int32_t(end);
        longest = std::max(longest, length + 2);
    }
    return longest;
}

void pack(const PackSource& source, const int32_t* cu_seqlens, int32_t* tokens, int32_t* positions) {
    const size_t b = source.b, n = size_t(cu_seqlens[b]);
    const size_t grain = n < size_t(kGrainTokens) ? b : b * kGrainTokens / n;
    parallel_for(b, grain, [&](size_t begin, size_t end) {
        for (size_t i = begin; i < end; ++i) {
            const int64_t s = source.order[i];
            const uint8_t* ids = source.ids + source.starts[s];
            int32_t* out = tokens + cu_seqlens[i];
            *out++ = kCls;
            out = std::copy(ids, ids + source.lengths[s], out);
            *out = kEos;
            std::iota(positions + cu_seqlens[i], positions + cu_seqlens[i + 1], kFirstPosition);
        }
    });
}

}  // namespace esm
