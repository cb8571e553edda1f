// A block's shared memory.
#include <cstdlib>
#include <unordered_map>

#include "threads.h"

namespace emulator {

namespace {

size_t dynamic_size;
const char dynamic_key = 0;

// One of the block's shared arrays.
struct Array {
    void* memory;
    size_t bytes;
    bool used;  // by this block
};
std::unordered_map<const void*, Array> arrays;

// From the heap, whose limits AddressSanitizer knows; to ThreadSanitizer a thread that allocates writes, so that there
// it is memory of the emulator's own.
#ifdef ESM_TSAN
alignas(128) char arena[256 * 1024];
size_t arena_used;

void* allocate(size_t bytes) {
    void* memory = arena + arena_used;
    arena_used += (bytes + 127) / 128 * 128;
    if (arena_used > sizeof arena) fail("no GPU has that much shared memory");
    return memory;
}
void free_all() {
    arena_used = 0;
    arrays.clear();
}
#else
void* allocate(size_t bytes) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 128, bytes)) std::abort();
    return memory;
}
void free_all() {
    for (auto& [key, array] : arrays) std::free(array.memory);
    arrays.clear();
}
#endif

}  // namespace

void free_arrays(size_t dynamic_bytes) {
    free_all();
    dynamic_size = dynamic_bytes;
}

void begin_arrays() {
    for (auto& [key, array] : arrays) array.used = false;
}

void* shared(const void* key, size_t bytes) {
    Array& array = arrays.try_emplace(key, Array{nullptr, bytes, false}).first->second;
    if (!array.memory) array.memory = allocate(bytes);
    if (!array.used) {
        volatile unsigned char* byte = static_cast<unsigned char*>(array.memory);  // not memset, which TSan would watch
        for (size_t i = 0; i < bytes; ++i) byte[i] = 0xff;
        array.used = true;
    }
    return array.memory;
}

void* dynamic_shared() { return shared(&dynamic_key, dynamic_size); }

size_t shared_bytes() {
    size_t sum = 0;
    for (const auto& [key, array] : arrays) sum += array.bytes * array.used;
    return sum;
}

}  // namespace emulator
