#include <array>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "esm.h"
#include "threads.h"

namespace esm {
namespace {

constexpr uint8_t kSpace = 0xFE, kUnknown = 0xFF;  // table entries that are no id: both have the top bit
constexpr size_t kGrainBytes = 256 * 1024;         // less work than this is not worth waking a thread

constexpr char kResidues[] = "LAGVSERTIDPKQNFYMHWCXBUZO.-";  // ids 4, 5, ...

struct Special {
    const char *text, *upper;
    uint8_t size, id;
};
// `upper` is the spelling in records, whose residues are upper-cased; a packed batch has no padding, so <pad> has none.
constexpr Special kSpecials[] = {
    {"<cls>", "<CLS>", 5, 0},      {"<pad>", nullptr, 5, 1},        {"<eos>", "<EOS>", 5, 2},
    {"<unk>", "<UNK>", 5, 3},      {"<null_1>", "<NULL_1>", 8, 31}, {"<mask>", "<MASK>", 6, 32},
};

constexpr std::array<uint8_t, 256> make_table() {
    std::array<uint8_t, 256> table{};
    for (auto& entry : table) entry = kUnknown;
    for (uint8_t i = 0; kResidues[i]; ++i) table[uint8_t(kResidues[i])] = uint8_t(4 + i);
    for (uint8_t c = 9; c <= 13; ++c) table[c] = kSpace;  // what str.split() splits ASCII text on
    for (uint8_t c = 28; c <= 32; ++c) table[c] = kSpace;
    return table;
}
constexpr std::array<uint8_t, 256> kTable = make_table();

#if defined(__x86_64__)
#define ESM_AVX2 __attribute__((target("avx2")))

// The ids of 16 letters, twice.
ESM_AVX2 inline __m256i ids_from(char first) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(&kTable[uint8_t(first)])));
}

// The ids of letters, 32 at a time, up to the first 32 bytes among which one is no letter with an id; returns how many.
ESM_AVX2 size_t encode_letters(Text text, uint8_t* out) {
    const __m256i low = ids_from('A'), high = ids_from('Q'), last = _mm256_set1_epi8('Z' - 'A');
    size_t i = 0;
    for (; i + 32 <= text.size; i += 32) {
        const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(text.data + i));
        const __m256i letter = _mm256_sub_epi8(bytes, _mm256_set1_epi8('A'));
        const __m256i is_high = _mm256_cmpgt_epi8(letter, _mm256_set1_epi8('Q' - 'A' - 1));
        const __m256i of_low = _mm256_shuffle_epi8(low, letter), of_high = _mm256_shuffle_epi8(high, letter);
        const __m256i ids = _mm256_blendv_epi8(of_low, of_high, is_high);
        const __m256i is_letter = _mm256_cmpeq_epi8(_mm256_min_epu8(letter, last), letter);
        if (_mm256_movemask_epi8(_mm256_andnot_si256(ids, is_letter)) != -1) break;  // an id has no top bit
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), ids);
    }
    return i;
}
const bool kHasAvx2 = __builtin_cpu_supports("avx2");
#else
constexpr bool kHasAvx2 = false;
size_t encode_letters(Text, uint8_t*) { return 0; }
#endif

// One id a byte; true where every byte had one. Almost every protein needs no more than this.
bool encode_plain(Text text, uint8_t* out) {
    uint8_t seen = 0;
    for (size_t i = kHasAvx2 ? encode_letters(text, out) : 0; i < text.size; ++i) {
        out[i] = kTable[text.data[i]];
        seen |= out[i];
    }
    return !(seen & 0x80);
}

const Special* special_at(Text text, size_t i, const char* Special::* spelling) {
    if (text.data[i] != '<') return nullptr;
    for (const Special& special : kSpecials) {
        const char* wanted = special.*spelling;
        const bool fits = wanted && text.size - i >= special.size;
        if (fits && !std::memcmp(text.data + i, wanted, special.size)) return &special;
    }
    return nullptr;
}

size_t encode_record(Text text, uint8_t* out, RecordCheck& check) {
    check = {};
    if (text.size && text.data[text.size - 1] == '*') {
        --text.size;
        check.stop = true;
    }
    if (encode_plain(text, out)) return text.size;
    size_t count = 0;
    for (size_t i = 0; i < text.size;) {
        const uint8_t id = kTable[text.data[i]];
        if (const Special* special = special_at(text, i, &Special::upper)) {
            out[count++] = special->id;
            i += special->size;
        } else if (id >= kSpace) {
            if (!check.unknown++) check.first_unknown = int64_t(i);
            out[count++] = kX;
            ++i;
        } else {
            out[count++] = id;
            ++i;
        }
    }
    return count;
}

// Items of which there are n, `bytes` long together: how many make a piece worth a thread.
size_t grain(size_t n, size_t bytes) { return bytes < kGrainBytes ? n : n * kGrainBytes / bytes; }

// Encodes text as fair-esm does, up to its first unknown run, into `out` (room for text.size ids); returns the count.
size_t encode(Text text, uint8_t* out, Run& unknown) {
    if (encode_plain(text, out)) return text.size;
    size_t count = 0;
    for (size_t i = 0; i < text.size;) {
        const uint8_t id = kTable[text.data[i]];
        const Special* special = special_at(text, i, &Special::text);
        const bool is_run = id == kUnknown && !special;
        if (is_run && unknown.begin == unknown.end) unknown.begin = i;
        if (is_run) {
            unknown.end = ++i;
            continue;
        }
        if (unknown.end) break;  // the run ends at white space or at a token
        if (special) {
            out[count++] = special->id;
            i += special->size;
        } else {
            if (id != kSpace) out[count++] = id;
            ++i;
        }
    }
    return count;
}

}  // namespace

EncodedTexts encode_texts(const std::vector<Text>& texts) {
    const size_t n = texts.size();
    EncodedTexts encoded;
    encoded.starts.resize(n);
    encoded.counts.resize(n);
    encoded.unknown.resize(n);
    size_t bytes = 0;
    for (size_t i = 0; i < n; ++i) encoded.starts[i] = std::exchange(bytes, bytes + texts[i].size);
    encoded.ids = Bytes(bytes);
    parallel_for(n, grain(n, bytes), [&](size_t begin, size_t end) {
        for (size_t i = begin; i < end; ++i)
            encoded.counts[i] = encode(texts[i], encoded.ids.data() + encoded.starts[i], encoded.unknown[i]);
    });
    return encoded;
}

void fill_rows(const EncodedTexts& encoded, size_t width, int64_t* out) {
    const size_t n = encoded.counts.size();
    parallel_for(n, grain(n, n * width * sizeof(int64_t)), [&](size_t begin, size_t end) {
        for (size_t i = begin; i < end; ++i) {
            int64_t* row = out + i * width;
            const uint8_t* ids = encoded.ids.data() + encoded.starts[i];
            *row++ = kCls;
            row = std::copy(ids, ids + encoded.counts[i], row);
            *row++ = kEos;
            std::fill(row, out + (i + 1) * width, kPad);
        }
    });
}

void encode_records(const uint8_t* residues, const int64_t* offsets, size_t n, Bytes& ids, int64_t* offsets_out,
                    RecordCheck* checks) {
    const int64_t bytes = offsets[n] - offsets[0];
    uint8_t* out = ids.reserve(bytes);
    const auto place = [&](size_t i) { return out + (offsets[i] - offsets[0]); };
    parallel_for(n, grain(n, bytes), [&](size_t begin, size_t end) {
        for (size_t i = begin; i < end; ++i) {
            const Text text{residues + offsets[i], size_t(offsets[i + 1] - offsets[i])};
            offsets_out[i + 1] = int64_t(encode_record(text, place(i), checks[i]));
        }
    });
    // Records that became shorter (a final '*', a <mask>) leave gaps: close them.
    offsets_out[0] = 0;
    for (size_t i = 0; i < n; ++i) {
        const size_t count = size_t(offsets_out[i + 1]);
        if (place(i) != out + offsets_out[i]) std::memmove(out + offsets_out[i], place(i), count);
        offsets_out[i + 1] += offsets_out[i];
    }
    ids.set_size(size_t(offsets_out[n]));
}

}  // namespace esm
