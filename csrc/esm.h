// What the C++ files share: the tokens, and the data path from FASTA bytes to packed batches. No Python, no torch.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <utility>
#include <vector>

namespace esm {

constexpr uint8_t kCls = 0, kPad = 1, kEos = 2, kX = 24;

// A byte buffer that grows in place where the allocator can (a 100 MB record is not copied at each doubling) and
// leaves new bytes unset. `release` hands the memory over, to be freed with std::free.
class Bytes {
  public:
    Bytes() = default;
    explicit Bytes(size_t size) { reserve(size); }
    Bytes(Bytes&& other) noexcept { swap(other); }
    Bytes& operator=(Bytes&& other) noexcept {
        swap(other);
        return *this;
    }
    ~Bytes() { std::free(data_); }

    uint8_t* data() { return data_; }
    const uint8_t* data() const { return data_; }
    size_t size() const { return size_; }

    // Room for `extra` more bytes; returns where they go.
    uint8_t* reserve(size_t extra) {
        if (size_ + extra > capacity_ || !data_) resize_memory(std::max<size_t>(size_ + extra, 2 * capacity_));
        return data_ + size_;
    }
    void set_size(size_t size) { size_ = size; }
    void append(const uint8_t* from, size_t n) {
        if (n) std::memcpy(reserve(n), from, n);
        size_ += n;
    }
    uint8_t* release() {
        resize_memory(size_);
        size_ = capacity_ = 0;
        return std::exchange(data_, nullptr);
    }

  private:
    void swap(Bytes& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(size_, other.size_);
        std::swap(capacity_, other.capacity_);
    }
    void resize_memory(size_t capacity) {
        capacity = std::max<size_t>(capacity, 1);
        void* moved = std::realloc(data_, capacity);
        if (!moved) throw std::bad_alloc();
        data_ = static_cast<uint8_t*>(moved);
        capacity_ = capacity;
    }

    uint8_t* data_ = nullptr;
    size_t size_ = 0, capacity_ = 0;
};

// ---- fasta.cpp

// Records in file order: headers end to end (header_ends[i] is where the i-th ends), residues likewise.
struct RecordBatch {
    std::string headers;
    std::vector<size_t> header_ends;
    std::vector<int64_t> lines;  // of each header, from 1
    Bytes residues;
    std::vector<int64_t> residue_ends;
};

// Turns FASTA bytes, fed in pieces cut anywhere, into records. Residues are upper-cased and lose their white space
// (as bytes.split has it); every other byte is kept for the tokeniser to judge. Parsing ends at a record of more than
// `limit` bytes, header and residues, so that memory stays within it.
class FastaParser {
  public:
    explicit FastaParser(size_t limit = SIZE_MAX) : limit_(limit) {}
    void feed(const uint8_t* data, size_t size);
    void finish();       // no more bytes: the open record is complete
    RecordBatch take();  // the complete records since the last call; the open one stays

    size_t ready() const { return ready_; }  // bytes held by complete records, headers included (at least 1 each)

    // Text before the first '>': its line (0: there is none) and its first bytes.
    int64_t stray_line() const { return stray_line_; }
    const std::string& stray_text() const { return stray_text_; }

    // The record that is too large: the line of its header (0: there is none) and the first bytes of that.
    int64_t large_line() const { return large_line_; }
    std::string large_header() const;

  private:
    void text(const uint8_t* begin, const uint8_t* end);
    void close();
    void check_bom();

    RecordBatch batch_;
    size_t limit_;
    int64_t line_ = 1, large_line_ = 0;
    size_t bom_ = 0;  // bytes of the byte-order mark seen, at the start
    size_t ready_ = 0, closed_ = 0;  // bytes of the complete records; closed_ without their ends
    bool at_start_ = true, in_record_ = false, in_header_ = false, line_start_ = true, after_cr_ = false;
    int64_t stray_line_ = 0;
    std::string stray_text_;
};

// ---- tokenize.cpp

struct Text {
    const uint8_t* data;
    size_t size;
};

// The first unknown run of a text, [begin, end); none where begin == end.
struct Run {
    size_t begin = 0, end = 0;
};

// Texts encoded as fair-esm does: text i has counts[i] ids from starts[i] on; they end at unknown[i], if set.
struct EncodedTexts {
    Bytes ids;
    std::vector<size_t> starts, counts;
    std::vector<Run> unknown;
};
EncodedTexts encode_texts(const std::vector<Text>& texts);

// Row i of `out` (n, width) becomes <cls>, the ids of text i, <eos>, <pad>...; width >= the largest count + 2.
void fill_rows(const EncodedTexts& encoded, size_t width, int64_t* out);

// What encode_records found out about a record.
struct RecordCheck {
    int64_t unknown = 0;        // bytes that are no residue (each became X)
    int64_t first_unknown = 0;  // column of the first, from 0
    bool stop = false;          // a final '*' was dropped
};

// Encodes upper-cased residues, record i between offsets[i] and offsets[i + 1], end to end into `ids`, and writes the
// n + 1 offsets there.
void encode_records(const uint8_t* residues, const int64_t* offsets, size_t n, Bytes& ids, int64_t* offsets_out,
                    RecordCheck* checks);

// ---- pack.cpp

// Fills `order` with the indices of `lengths`, longest first, ties by index; returns where each batch ends in it.
// A batch takes the next sequence while its sum stays within the budget; it has at least one.
std::vector<size_t> plan(const int64_t* lengths, size_t n, int64_t budget, int64_t* order);

// Packing b sequences of residue ids: the i-th is ids[starts[s]] and the lengths[s] - 1 after it, where s = order[i].
struct PackSource {
    const uint8_t* ids;
    int64_t n_ids;
    const int64_t *starts, *lengths;
    int64_t n;
    const int64_t* order;
    size_t b;
};

// Writes the b + 1 ends of the packed sequences, <cls> and <eos> included; returns the length of the longest.
// Throws std::out_of_range where a sequence is not there or lies outside ids, or 2^31 tokens are passed.
int64_t pack_offsets(const PackSource& source, int32_t* cu_seqlens);

// Writes the tokens and positions (2, 3, ... in each sequence) of cu_seqlens[b] places.
void pack(const PackSource& source, const int32_t* cu_seqlens, int32_t* tokens, int32_t* positions);

}  // namespace esm
