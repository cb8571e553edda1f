// Masks packed tokens for training: esm_fast/train/masking.py on the GPU, bit for bit. Every random number is a hash of
// seed, purpose, epoch, record and position, so nothing depends on who else is in the batch.
#include "common.cuh"

namespace esm {

constexpr int kThreads = 256, kMask = 32, kNoTarget = -100;

using Word = unsigned long long;
constexpr Word kStep = 0x9E3779B97F4A7C15ull, kNever = ~0ull;  // a chance has 53 bits
enum Purpose { kCount = 2, kSelect, kAction, kReplacement };  // esm_fast/train/random.py

// SplitMix64's output function.
__device__ __forceinline__ Word mixed(Word z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

struct Stream {
    Word start;

    __device__ __forceinline__ Stream(Word seed, Purpose purpose, int epoch, Word record)
        : start(mixed(mixed(mixed(seed + kStep * (Word(purpose) + 1)) + kStep * (Word(epoch) + 1)) +
                      kStep * (record + 1))) {}
    // 53 random bits; as a number in [0, 1) they are `uniform`'s.
    __device__ __forceinline__ Word chance(int position) const {
        return mixed(start + kStep * (Word(position) + 1)) >> 11;
    }
};

__device__ __forceinline__ double uniform(Word chance) { return double(chance) * 0x1p-53; }

// What to select and to show; the last two are numbers of 53 bits, and of a letter both ends are meant.
struct Rules {
    double share;
    int ends, first_letter, last_letter;  // ends: special tokens at each end that are never selected
    Word masked, replaced;
};

// floor(share candidates + U): rounded after the product as well, as on the CPU, not fused.
__device__ __forceinline__ int selected_of(const Rules& rules, int candidates, Word chance) {
    return min(int(__dadd_rn(__dmul_rn(rules.share, double(candidates)), uniform(chance))), candidates);
}

__device__ __forceinline__ int shown_instead(const Rules& rules, int target, Word action, Word chance) {
    if (action < rules.masked) return kMask;
    if (action >= rules.replaced) return target;
    const bool among = target >= rules.first_letter && target <= rules.last_letter;
    const int letters = rules.last_letter - rules.first_letter + 1 - among;
    const int chosen = rules.first_letter + int(uniform(chance) * double(letters));
    return chosen + (among && chosen >= target);  // never the letter that stood there
}

// A block has a sequence. Without replacement: selected are the smallest chances, the earlier one of two equal ones.
__device__ __forceinline__ void mask(Global<const int> tokens, Global<const int> cu_seqlens,
                                     Global<const long long> records, Global<int> shown, Global<int> targets,
                                     int epoch, Word seed, const Rules& rules) {
    SHARED(Word, chances, kThreads);
    const int begin = cu_seqlens[blockIdx.x], length = cu_seqlens[blockIdx.x + 1] - begin;
    const Word record = Word(records[blockIdx.x]);
    const Stream select(seed, kSelect, epoch, record), count(seed, kCount, epoch, record);
    const Stream action(seed, kAction, epoch, record), replacement(seed, kReplacement, epoch, record);
    const int wanted = selected_of(rules, max(length - 2 * rules.ends, 0), count.chance(0));
    const auto chance_of = [&](int p) {
        return p >= rules.ends && p < length - rules.ends ? select.chance(p) : kNever;
    };
    for (int first = 0; first < length; first += kThreads) {
        const int p = first + int(threadIdx.x);
        const Word own = chance_of(p);
        int rank = 0;
        for (int from = 0; from < length; from += kThreads) {
            __syncthreads();
            chances[threadIdx.x] = chance_of(from + int(threadIdx.x));
            __syncthreads();
            for (int t = 0; t < min(kThreads, length - from); ++t)
                rank += chances[t] < own || (chances[t] == own && from + t < p);
        }
        if (p >= length) continue;
        const size_t at = size_t(begin) + p;
        const int token = tokens[at];
        const bool chosen = own != kNever && rank < wanted;
        shown[at] = chosen ? shown_instead(rules, token, action.chance(p), replacement.chance(p)) : token;
        targets[at] = chosen ? token : kNoTarget;
    }
}

// records (sequences,): the number of each sequence in its data set.
KERNEL(kThreads, 4, mask_tokens,
       (Global<const int> tokens, Global<const int> cu_seqlens, Global<const long long> records, Global<int> shown,
        Global<int> targets, int epoch, unsigned long long seed, double share, unsigned long long masked,
        unsigned long long replaced, int ends, int first_letter, int last_letter)) {
    mask(tokens, cu_seqlens, records, shown, targets, epoch, seed,
         {share, ends, first_letter, last_letter, masked, replaced});
}

}  // namespace esm
