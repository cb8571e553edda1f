#include "checksum.h"

#include <cstring>

namespace esm {

// Eight chains of words, so that their multiplications overlap. Each step can be undone, so no change of one word is
// lost on the way. Data sets hold these numbers (esm_fast/dataset/units.py): they stay as they are.
uint64_t checksum(const char* data, size_t size) {
    constexpr size_t kChains = 8;
    uint64_t chains[kChains], words[kChains];
    for (size_t i = 0; i < kChains; ++i) chains[i] = (i + 1) * kChecksumFactor;
    const auto take = [&](const char* from, size_t bytes) {
        std::memcpy(words, from, bytes);
        for (size_t i = 0; i < kChains; ++i) {
            chains[i] = (chains[i] ^ words[i]) * kChecksumFactor;
            chains[i] ^= chains[i] >> 32;
        }
    };
    for (; size >= sizeof words; data += sizeof words, size -= sizeof words) take(data, sizeof words);
    if (size) {
        std::memset(words, 0, sizeof words);
        take(data, size);
    }
    uint64_t whole = size;
    for (const uint64_t chain : chains) whole = (whole ^ chain) * kChecksumFactor, whole ^= whole >> 29;
    return whole;
}

}  // namespace esm
