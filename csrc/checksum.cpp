#include "checksum.h"

#include <cstring>
#include <utility>

namespace esm {

namespace {

constexpr size_t kChains = 8;
using Chains = std::make_index_sequence<kChains>;

uint64_t taken(uint64_t chain, const char* word) {
    uint64_t bits;
    std::memcpy(&bits, word, sizeof bits);
    chain = (chain ^ bits) * kChecksumFactor;
    return chain ^ (chain >> 32);
}

// A word a chain, written out: a loop over an array goes through memory, a quarter slower in the cache.
template <size_t... I>
void take(uint64_t (&chains)[kChains], const char* words, std::index_sequence<I...>) {
    ((chains[I] = taken(chains[I], words + I * sizeof(uint64_t))), ...);
}

}  // namespace

// Eight chains of words, so that their multiplications overlap. Each step can be undone, so no change of one word is
// lost on the way. Data sets hold these numbers (esm_fast/dataset/units.py): they stay as they are.
uint64_t checksum(const char* data, size_t size) {
    uint64_t chains[kChains];
    char words[sizeof chains] = {};
    for (size_t i = 0; i < kChains; ++i) chains[i] = (i + 1) * kChecksumFactor;
    for (; size >= sizeof words; data += sizeof words, size -= sizeof words) take(chains, data, Chains{});
    if (size) {
        std::memcpy(words, data, size);
        take(chains, words, Chains{});
    }
    uint64_t whole = size;  // of the rest: data sets were written so
    for (const uint64_t chain : chains) whole = (whole ^ chain) * kChecksumFactor, whole ^= whole >> 29;
    return whole;
}

}  // namespace esm
