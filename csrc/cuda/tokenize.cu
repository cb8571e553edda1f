// Upper-cased residues to token ids, as csrc/tokenize.cpp does it: a byte a token, all records side by side, and again,
// record by record, where that was not all: literal <mask> and its like, a final '*', bytes that are no residue.
#include "common.cuh"

namespace esm {

using byte = unsigned char;

constexpr int kThreads = 256, kBytes = 16;  // a thread's
constexpr int kFirstId = 4, kX = 24;
constexpr byte kUnknown = 0xff;

// The id of a residue: its place in the alphabet.
__device__ __forceinline__ byte id_of(byte residue) {
    const char alphabet[] = "LAGVSERTIDPKQNFYMHWCXBUZO.-";
    byte id = kUnknown;
    for (int i = 0; i < int(sizeof alphabet) - 1; ++i)
        if (residue == byte(alphabet[i])) id = byte(kFirstId + i);
    return id;
}

// Counts a byte without an id in its record.
__device__ __forceinline__ void flag(long long at, Global<const long long> offsets, Global<int> flags, int records) {
    int low = 0, high = records;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (offsets[middle] <= at)
            low = middle;
        else
            high = middle;
    }
    atomicAdd(flags + low, 1);
}

// ids[i] of residues[i] for offsets[0] <= i < offsets[records]; flags (records,), which begin as 0.
KERNEL(kThreads, 4, tokenize_bytes,
       (Global<const byte> residues, Global<const long long> offsets, Global<byte> ids, Global<int> flags, int n,
        int records)) {
    SHARED(byte, table, 256);
    table[threadIdx.x] = id_of(byte(threadIdx.x));
    __syncthreads();
    const int first = (int(blockIdx.x) * kThreads + int(threadIdx.x)) * kBytes, count = min(kBytes, n - first);
    if (count == kBytes) {
        const Pack<byte, kBytes> in = load_pack<kBytes>(residues, first / kBytes);
        Pack<byte, kBytes> out;
        bool known = true;
        for (int j = 0; j < kBytes; ++j) {
            out.at[j] = table[in.at[j]];
            known &= out.at[j] != kUnknown;
        }
        store_pack(ids, first / kBytes, out);
        if (known) return;  // no barrier follows
        for (int j = 0; j < kBytes; ++j)
            if (out.at[j] == kUnknown) flag(first + j, offsets, flags, records);
    } else {
        for (int j = 0; j < count; ++j) {
            const byte id = table[byte(residues[first + j])];
            ids[first + j] = id;
            if (id == kUnknown) flag(first + j, offsets, flags, records);
        }
    }
}

// A record without its final '*'.
struct Text {
    Global<const byte> bytes;
    long long begin, end;
};

__device__ __forceinline__ bool spells(const Text& text, long long i, const char* word, int size) {
    if (text.end - i < size) return false;
    bool same = true;
    for (int j = 0; j < size && same; ++j) same = text.bytes[i + j] == byte(word[j]);
    return same;
}

struct Special {
    int id, size;  // 0 bytes: there is none
};

// As records spell them, upper-cased; a packed batch has no padding, so <pad> has none.
__device__ __forceinline__ Special special_at(const Text& text, long long i) {
    if (text.bytes[i] != '<') return {0, 0};
    if (spells(text, i, "<CLS>", 5)) return {0, 5};
    if (spells(text, i, "<EOS>", 5)) return {2, 5};
    if (spells(text, i, "<UNK>", 5)) return {3, 5};
    if (spells(text, i, "<NULL_1>", 8)) return {31, 8};
    if (spells(text, i, "<MASK>", 6)) return {32, 6};
    return {0, 0};
}

constexpr int kLongest = 8;

// Whether byte i lies inside a special token that began before it. None holds a second '<', so none hides another.
__device__ __forceinline__ bool inside_special(const Text& text, long long i) {
    for (int back = 1; back < kLongest && i - back >= text.begin; ++back)
        if (special_at(text, i - back).size > back) return true;
    return false;
}

// What was found out about a record; see RecordCheck in csrc/esm.h.
struct Found {
    int count, unknown, first;
    bool stop;
};

// Encodes a record by all lanes of a warp, again from its bytes.
__device__ __forceinline__ Found encode(Text text, Global<byte> ids) {
    const int lane = threadIdx.x % kWarp;
    Found found = {0, 0, 0, text.bytes[text.end - 1] == '*'};
    if (found.stop) --text.end;
    for (long long base = text.begin; base < text.end; base += kWarp) {
        const long long i = base + lane;
        const bool token = i < text.end && !inside_special(text, i);
        int id = 0;
        if (token) {
            const Special special = special_at(text, i);
            id = special.size ? special.id : id_of(text.bytes[i]);
        }
        const bool odd = id == kUnknown;
        const unsigned tokens = __ballot_sync(kAllLanes, token), odds = __ballot_sync(kAllLanes, odd);
        if (token) ids[text.begin + found.count + __popc(tokens & ((1u << lane) - 1))] = byte(odd ? kX : id);
        if (odds && !found.unknown) found.first = int(base - text.begin) + __ffs(int(odds)) - 1;
        found.unknown += __popc(odds);
        found.count += __popc(tokens);
    }
    return found;
}

// counts[r]: the tokens of record r, which begin at ids[offsets[r]]; unknown[r]: its bytes that are no residue, each
// read as X; first[r]: the column of the first; stops[r]: a final '*' was dropped. worst: the least of
// record << 32 | column over all of these bytes; it begins beyond all places. A lane a record; the warp together for
// each that is flagged.
KERNEL(kThreads, 4, tokenize_records,
       (Global<const byte> residues, Global<const long long> offsets, Global<const int> flags, Global<byte> ids,
        Global<int> counts, Global<int> unknown, Global<int> first, Global<byte> stops, Global<long long> worst,
        int records)) {
    const int r = int(blockIdx.x) * kThreads + int(threadIdx.x), lane = threadIdx.x % kWarp;
    const bool exists = r < records;
    const long long begin = exists ? (long long)(offsets[r]) : 0, end = exists ? (long long)(offsets[r + 1]) : 0;
    Found own = {int(end - begin), 0, 0, false};
    unsigned flagged = __ballot_sync(kAllLanes, exists && flags[r] != 0);
    while (flagged) {
        const int who = __ffs(int(flagged)) - 1;
        const Text text{residues, __shfl_sync(kAllLanes, begin, who), __shfl_sync(kAllLanes, end, who)};
        const Found found = encode(text, ids);
        if (lane == who) own = found;
        flagged &= flagged - 1;
    }
    if (!exists) return;
    counts[r] = own.count;
    unknown[r] = own.unknown;
    first[r] = own.first;
    stops[r] = own.stop;
    if (own.unknown) atomicMin(worst, (long long)(r) << 32 | own.first);
}

}  // namespace esm
