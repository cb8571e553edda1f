#include "esm.h"

namespace esm {
namespace {

constexpr uint8_t kBom[3] = {0xEF, 0xBB, 0xBF};
constexpr size_t kShown = 40;  // bytes of a text in a message

inline bool is_space(uint8_t c) { return c == ' ' || uint8_t(c - '\t') < 5; }
inline uint8_t upper(uint8_t c) { return uint8_t(c - 'a') < 26 ? c ^ 0x20 : c; }

// Copies a piece of a line, upper-cased and without white space; returns the bytes written. The first loop is the one
// that runs, and the compiler makes vectors of it; the second is for lines that do hold white space.
size_t fold(const uint8_t* in, size_t n, uint8_t* out) {
    uint8_t spaces = 0;
    for (size_t i = 0; i < n; ++i) {
        spaces |= is_space(in[i]);
        out[i] = upper(in[i]);
    }
    if (!spaces) return n;
    size_t kept = 0;
    for (size_t i = 0; i < n; ++i) {
        out[kept] = upper(in[i]);
        kept += !is_space(in[i]);
    }
    return kept;
}

const uint8_t* find(const uint8_t* begin, const uint8_t* end, uint8_t wanted) {
    const void* at = std::memchr(begin, wanted, end - begin);
    return at ? static_cast<const uint8_t*>(at) : end;
}

template <class T>
size_t last(const std::vector<T>& ends) {
    return ends.empty() ? 0 : size_t(ends.back());
}

}  // namespace

void FastaParser::feed(const uint8_t* data, size_t size) {
    const uint8_t *p = data, *end = data + size;
    if (at_start_) {
        while (bom_ < 3 && p < end && *p == kBom[bom_]) ++bom_, ++p;
        at_start_ = p == end;
        if (!at_start_) check_bom();
    }
    batch_.residues.reserve(size);               // all that these bytes can add
    const uint8_t *lf = nullptr, *cr = nullptr;  // the next of each, at p or after; each is searched for once
    while (p < end && !stray_line_ && !large_line_) {
        if (std::exchange(after_cr_, false) && *p == '\n') {
            ++p;
            continue;
        }
        if (std::exchange(line_start_, false) && *p == '>') {
            close();
            batch_.lines.push_back(line_);
            in_record_ = in_header_ = true;
            ++p;
        }
        if (!lf || lf < p) lf = find(p, end, '\n');
        if (!cr || cr < p) cr = find(p, end, '\r');
        const uint8_t* stop = std::min(lf, cr);
        text(p, stop);
        if (stop == end) break;
        after_cr_ = *stop == '\r';
        line_start_ = true;
        in_header_ = false;
        ++line_;
        p = stop + 1;
    }
}

void FastaParser::finish() {
    if (at_start_) check_bom();
    close();
}

// Half a byte-order mark is text like any other.
void FastaParser::check_bom() {
    if (bom_ > 0 && bom_ < 3) text(kBom, kBom + bom_);
}

// A piece of a line.
void FastaParser::text(const uint8_t* begin, const uint8_t* end) {
    if (!in_record_) {
        begin = std::find_if_not(begin, end, is_space);
        if (begin == end) return;
        stray_line_ = line_;
        stray_text_.assign(begin, std::min(end, begin + kShown));
        return;
    }
    Bytes& residues = batch_.residues;
    if (in_header_)
        batch_.headers.append(begin, end);
    else
        residues.set_size(residues.size() + fold(begin, end - begin, residues.reserve(end - begin)));
    if (batch_.headers.size() + residues.size() - closed_ > limit_) large_line_ = batch_.lines.back();
}

std::string FastaParser::large_header() const {
    return batch_.headers.substr(last(batch_.header_ends), kShown);
}

// The open record, if any, is complete.
void FastaParser::close() {
    if (!std::exchange(in_record_, false)) return;
    in_header_ = false;
    std::string& headers = batch_.headers;
    const size_t start = last(batch_.header_ends), residues = batch_.residues.size();
    while (headers.size() > start && is_space(headers.back())) headers.pop_back();
    headers.erase(start, std::find_if_not(headers.begin() + start, headers.end(), is_space) - headers.begin() - start);
    ready_ += headers.size() - start + residues - last(batch_.residue_ends) + 1;
    batch_.header_ends.push_back(headers.size());
    batch_.residue_ends.push_back(residues);
    closed_ = headers.size() + residues;
}

RecordBatch FastaParser::take() {
    RecordBatch done = std::exchange(batch_, RecordBatch());
    ready_ = closed_ = 0;
    if (in_record_) {
        const size_t header = last(done.header_ends), residues = last(done.residue_ends);
        batch_.headers = done.headers.substr(header);
        batch_.lines.push_back(done.lines.back());
        batch_.residues.append(done.residues.data() + residues, done.residues.size() - residues);
        done.headers.resize(header);
        done.lines.pop_back();
        done.residues.set_size(residues);
    }
    return done;
}

}  // namespace esm
