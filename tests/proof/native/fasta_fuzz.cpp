// Fuzzing of FastaParser: whatever the bytes are and wherever they are cut, it must give the records of the plain
// definition below. Built with sanitizers and run by tests/test_sanitizers.py, without libFuzzer, which is clang's:
//   SECONDS SEED  mutates the corpus for that long; prints the number of inputs, or the first that went wrong
//   swallow       loses a line end at each cut, which must be found
//   overrun       says that a piece is a byte longer than it is, which AddressSanitizer must find
// libFuzzer can drive the same function: clang++ -fsanitize=fuzzer,address,undefined -DLIBFUZZER, and csrc/fasta.cpp.
#include <chrono>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "../../../csrc/esm.h"

namespace {

struct Record {
    int64_t line;
    std::string header, residues;
    bool operator==(const Record& other) const {
        return line == other.line && header == other.header && residues == other.residues;
    }
};

struct Outcome {
    std::vector<Record> records;
    int64_t stray_line = 0;
    std::string stray_text;
    bool operator==(const Outcome& other) const {
        return records == other.records && stray_line == other.stray_line && stray_text == other.stray_text;
    }
};

enum class Fault { none, swallow, overrun } fault = Fault::none;

const std::string kSpaces = " \t\n\v\f\r";

std::string stripped(const std::string& text) {
    const size_t begin = text.find_first_not_of(kSpaces);
    return begin == std::string::npos ? "" : text.substr(begin, text.find_last_not_of(kSpaces) + 1 - begin);
}

// Line by line over the whole text; nothing follows a line that stands before the first '>'.
Outcome definition(std::string text) {
    if (text.compare(0, 3, "\xEF\xBB\xBF") == 0) text.erase(0, 3);
    Outcome outcome;
    int64_t number = 0;
    for (size_t at = 0; at < text.size();) {
        const size_t end = std::min(text.find_first_of("\r\n", at), text.size());
        const std::string line = text.substr(at, end - at);
        at = end + (text.compare(end, 2, "\r\n") == 0 ? 2 : 1);
        ++number;
        if (line.compare(0, 1, ">") == 0) {
            outcome.records.push_back({number, stripped(line.substr(1)), ""});
        } else if (!outcome.records.empty()) {
            for (char c : line)
                if (kSpaces.find(c) == std::string::npos)
                    outcome.records.back().residues += c >= 'a' && c <= 'z' ? char(c - 32) : c;
        } else if (!stripped(line).empty()) {
            outcome.stray_line = number;
            outcome.stray_text = line.substr(line.find_first_not_of(kSpaces));
            break;
        }
    }
    return outcome;
}

void collect(esm::RecordBatch batch, std::vector<Record>& records) {
    size_t header = 0, residue = 0;
    for (size_t i = 0; i < batch.lines.size(); ++i) {
        const size_t header_end = batch.header_ends.at(i), residue_end = size_t(batch.residue_ends.at(i));
        const auto* residues = reinterpret_cast<const char*>(batch.residues.data());
        records.push_back({batch.lines[i], batch.headers.substr(header, header_end - header),
                           std::string(residues + residue, residue_end - residue)});
        header = header_end, residue = residue_end;
    }
}

// In pieces of random lengths, each in memory of its own, so that a read beyond its end is one; taken at random times.
Outcome parsed(const std::string& text, std::mt19937& random) {
    esm::FastaParser parser;
    Outcome outcome;
    const size_t longest = size_t(1) << random() % 8;
    for (size_t at = 0; at < text.size();) {
        const size_t size = std::min<size_t>(1 + random() % longest, text.size() - at);
        std::vector<uint8_t> piece(text.begin() + at, text.begin() + at + size);
        at += size;
        if (fault == Fault::swallow && at < text.size() && piece.back() == '\n') piece.pop_back();
        parser.feed(piece.data(), piece.size() + (fault == Fault::overrun));
        if (random() % 4 == 0) collect(parser.take(), outcome.records);
    }
    parser.finish();
    collect(parser.take(), outcome.records);
    outcome.stray_line = parser.stray_line();
    outcome.stray_text = parser.stray_text();
    return outcome;
}

// Of a stray line the parser keeps the beginning, of which it promises no length.
void shorten(Outcome& expected, const Outcome& got) {
    const size_t shown = got.stray_text.size();
    if (shown && shown < expected.stray_text.size()) expected.stray_text.resize(shown);
}

void print(const char* what, const std::string& text) {
    std::printf("%s ", what);
    for (unsigned char c : text) std::printf("%02x", c);
    std::printf("\n");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    const std::string text(reinterpret_cast<const char*>(data), size);
    std::mt19937 random(uint32_t(std::hash<std::string>()(text)));
    const Outcome got = parsed(text, random);
    Outcome expected = definition(text);
    shorten(expected, got);
    if (got == expected) return 0;
    print("wrong for the bytes", text);
    std::fflush(stdout);
    std::abort();
}

#ifndef LIBFUZZER
namespace {

using namespace std::string_literals;

const std::vector<std::string> kCorpus = {
    "\xEF\xBB\xBF>sp|P1|N name\r\nMKT VRQ\r\n\r\nACD*\r\n>b\r\nMK",
    ">a\nMKTVRQGLLS\nmktvrq\n>\n>c d \n\nA\n",
    ">old mac\rMK\rT\r>b\rA\r\r>c",
    "\n \t\r\n>a>b\nM>K\n >c\n;note\n",
    ">a\0b\nM\0K\n\0>c\n"s,
    "MKT\n>a\nMK\n",
    ">caf\xE9\nM\xFFK\n>" + std::string(300, 'h') + "\n" + std::string(500, 'A') + "\n",
    "",
};
const std::vector<std::string> kTokens = {">", "\n>", "\r>", "\r\n", "\n", "\r", " ", "\t", "\v", "\f", "\0"s, "a",
                                          "\xEF\xBB\xBF", "\xEF\xBB", "*", "<mask>", "\x85", "\xA0", "\xFF"};

template <class T>
const T& any(const std::vector<T>& items, std::mt19937& random) {
    return items[random() % items.size()];
}

// One change: a byte, a token put in, a stretch taken out or doubled, or the rest of another text.
void mutate(std::string& text, std::mt19937& random) {
    const size_t at = random() % (text.size() + 1), some = random() % 16;
    switch (random() % 5) {
        case 0: if (at < text.size()) text[at] = char(random()); break;
        case 1: text.insert(at, any(kTokens, random)); break;
        case 2: text.erase(at, some); break;
        case 3: text.insert(at, text.substr(at, some)); break;
        default: {
            const std::string& other = any(kCorpus, random);
            text = text.substr(0, at) + other.substr(random() % (other.size() + 1));
        }
    }
}

}  // namespace

int main(int count, char** arguments) {
    const std::string first = count > 1 ? arguments[1] : "1";
    if (first == "swallow") fault = Fault::swallow;
    if (first == "overrun") fault = Fault::overrun;
    const double seconds = fault == Fault::none ? std::stod(first) : 1;
    std::mt19937 random(count > 2 ? uint32_t(std::stoul(arguments[2])) : 1);
    const auto clock = [] { return std::chrono::steady_clock::now(); };
    const auto end = clock() + std::chrono::duration<double>(seconds);
    size_t inputs = 0;
    for (; inputs < kCorpus.size() || clock() < end; ++inputs) {
        std::string text = inputs < kCorpus.size() ? kCorpus[inputs] : any(kCorpus, random);
        for (size_t i = inputs < kCorpus.size() ? 0 : 1 + random() % 8; i > 0; --i) mutate(text, random);
        LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(text.data()), text.size());
    }
    std::printf("right %zu\n", inputs);
}
#endif
