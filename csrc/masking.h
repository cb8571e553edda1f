// Which tokens a masked language model is asked for, and what it is shown instead: one definition for the CPU and, as
// csrc/cuda/mask.cu includes it, for the GPU. A decision depends on the seed, the epoch, the record's number and the
// position in it alone, so that neither packing, nor the number of GPUs, nor where a run was resumed changes a bit.
#pragma once

#if defined(__CUDACC__)
#define ESM_ON_BOTH __host__ __device__
#else
#define ESM_ON_BOTH
#endif

namespace esm {

struct Four {
    unsigned word[4];
};

// Philox4x32-10 (Salmon et al. 2011): 128 random bits of a counter and a key.
ESM_ON_BOTH inline Four philox(Four counter, unsigned key0, unsigned key1) {
    for (int round = 0; round < 10; ++round) {
        const unsigned long long a = 0xD2511F53ull * counter.word[0], b = 0xCD9E8D57ull * counter.word[2];
        counter = {{unsigned(b >> 32) ^ counter.word[1] ^ key0, unsigned(b),
                    unsigned(a >> 32) ^ counter.word[3] ^ key1, unsigned(a)}};
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return counter;
}

constexpr int kShownMask = 32, kNoTarget = -100;        // <mask>; a target that does not count
constexpr int kFirstResidue = 4, kLastResidue = 30;     // what may be asked for: not the special tokens
constexpr int kStandard = 20;                           // the amino acids 4 to 23, which replace others
constexpr unsigned kAsked = 644245094u;                 // 15 % of 2^32
constexpr unsigned kMasked = 3435973836u;               // of these 80 % are shown as <mask>,
constexpr unsigned kReplaced = 3865470566u;             // 10 % as another amino acid, 10 % as they are

struct Shown {
    int token, target;
};

ESM_ON_BOTH inline Shown mask_token(int token, unsigned position, unsigned long long record, unsigned epoch,
                                    unsigned long long seed) {
    const Four counter{{position, epoch, unsigned(record), unsigned(record >> 32)}};
    const Four random = philox(counter, unsigned(seed), unsigned(seed >> 32));
    const bool residue = token >= kFirstResidue && token <= kLastResidue;
    if (!residue || random.word[0] >= kAsked) return {token, kNoTarget};
    if (random.word[1] < kMasked) return {kShownMask, token};
    if (random.word[1] >= kReplaced) return {token, token};
    const bool standard = token < kFirstResidue + kStandard;
    const unsigned choices = standard ? kStandard - 1 : kStandard;
    int other = kFirstResidue + int(static_cast<unsigned long long>(random.word[2]) * choices >> 32);
    if (standard && other >= token) ++other;  // all but the token itself, equally likely
    return {other, token};
}

}  // namespace esm
