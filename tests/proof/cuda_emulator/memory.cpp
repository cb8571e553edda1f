// Global memory: every access of a kernel is checked and counted. Two blocks of a launch may run in any order, so a
// byte that one writes is no other's business, unless both use atomics.
#include <algorithm>
#include <map>
#include <unordered_map>
#include <utility>
#include <vector>

#include "emulator.h"

namespace emulator {
namespace {

constexpr unsigned kSector = 32, kWide = 16;
constexpr int kNobody = 0, kMany = -1, kAtomic = -2;  // else a block's number plus one

struct Book {
    Tensor tensor;
    std::vector<int> readers, writers;  // one a byte
};

// One instruction of one warp: the sectors its lanes touch.
struct Request {
    std::vector<uint64_t> sectors;
    uint64_t bytes = 0, narrow_bytes = 0;
};
using Site = std::pair<const void*, unsigned>;             // an instruction, and how often its thread came there before
using Key = std::pair<std::pair<unsigned, bool>, Site>;    // of a warp; whether it stores

std::vector<Book> books;
bool counts;
std::map<Key, Request> requests;
std::map<std::pair<unsigned, const void*>, unsigned> visits;  // of a thread at an instruction
Traffic sums[2];

unsigned block_number() {
    return block_index.x + grid_size.x * (block_index.y + grid_size.y * block_index.z);
}

unsigned thread_number() {
    return thread_index.x + block_size.x * (thread_index.y + block_size.y * thread_index.z);
}

void book(Book& book, size_t begin, size_t bytes, Access kind) {
    const int me = int(block_number()) + 1;
    for (size_t i = begin; i < begin + bytes; ++i) {
        int &reader = book.readers[i], &writer = book.writers[i];
        const bool others_write = writer != kNobody && writer != me;
        const bool others_read = reader != kNobody && reader != me;
        if (kind == Access::load) {
            if (others_write) fail("reads byte %zu of a tensor, which another block writes", i);
            reader = others_read ? kMany : me;
        } else {
            const bool both_atomic = kind == Access::atomic && writer == kAtomic;
            if ((others_write && !both_atomic) || others_read)
                fail("writes byte %zu of a tensor, which another block reads or writes", i);
            writer = kind == Access::atomic ? kAtomic : me;
        }
    }
}

void count(const char* address, size_t bytes, Access kind, const void* instruction) {
    const unsigned thread = thread_number();
    const unsigned visit = visits[{thread, instruction}]++;
    Request& request = requests[{{thread / 32, kind != Access::load}, {instruction, visit}}];
    for (uint64_t s = uint64_t(address) / kSector; s <= (uint64_t(address) + bytes - 1) / kSector; ++s)
        request.sectors.push_back(s);
    request.bytes += bytes;
    if (bytes < kWide) request.narrow_bytes += bytes;
}

}  // namespace

void access(const void* address, size_t bytes, size_t alignment, const Tensor* tensor, Access kind) {
    const char* at = static_cast<const char*>(address);
    if (!tensor) fail("a null pointer is used");
    const ptrdiff_t begin = at - tensor->data;
    if (begin < 0 || begin + bytes > tensor->bytes)
        fail("an access of bytes %td to %td of a tensor of %zu", begin, begin + ptrdiff_t(bytes),
             size_t(tensor->bytes));
    if (uintptr_t(at) % alignment) fail("an access of %zu bytes is not aligned to %zu", bytes, alignment);
    book(books[size_t(reinterpret_cast<const Book*>(tensor) - books.data())], size_t(begin), bytes, kind);
    if (counts) count(at, bytes, kind, __builtin_return_address(0));
}

const Tensor* tensor_of(const void* parameter) {
    if (!parameter) return nullptr;
    for (const Book& book : books)
        if (book.tensor.data == parameter) return &book.tensor;
    fail("a pointer to none of the launch's tensors");
}

void begin_tensors(const Tensor* tensors, size_t n, bool count_traffic) {
    books.clear();
    for (size_t i = 0; i < n; ++i)
        books.push_back({tensors[i], std::vector<int>(tensors[i].bytes), std::vector<int>(tensors[i].bytes)});
    counts = count_traffic;
    requests.clear();
    visits.clear();
    sums[0] = sums[1] = {};
}

void end_block() {
    for (auto& [key, request] : requests) {
        Traffic& sum = sums[key.first.second];
        std::sort(request.sectors.begin(), request.sectors.end());
        const auto last = std::unique(request.sectors.begin(), request.sectors.end());
        ++sum.requests;
        sum.sectors += uint64_t(last - request.sectors.begin());
        sum.bytes += request.bytes;
        sum.narrow_bytes += request.narrow_bytes;
    }
    requests.clear();
    visits.clear();
}

void end_tensors(Traffic* loads, Traffic* stores) {
    for (const Book& book : books) {
        const auto touched = [](const std::vector<int>& by) {
            return by.size() - size_t(std::count(by.begin(), by.end(), kNobody));
        };
        sums[0].distinct_bytes += touched(book.readers);
        sums[1].distinct_bytes += touched(book.writers);
    }
    *loads = sums[0];
    *stores = sums[1];
}

}  // namespace emulator
