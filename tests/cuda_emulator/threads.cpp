// The threads of a block as fibers, and the scheduler. Built without ThreadSanitizer's instrumentation even where the
// kernels have it: what the emulator itself does is not theirs to answer for.
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulator.h"

#ifdef ESM_TSAN
#include <sanitizer/tsan_interface.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

// Saves the registers that a function must keep on this stack, and goes on where the other stack was left.
extern "C" void emulator_switch(void** left, void* entered);
#if !defined(__x86_64__)
#error "the emulator switches stacks on x86-64 only"
#endif
asm(R"(
.text
emulator_switch:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
)");

namespace emulator {

Index thread_index, block_index, block_size, grid_size;

namespace {

constexpr unsigned kMostThreads = 1024, kWarp = 32;
constexpr size_t kStack = 256 * 1024, kGuard = 4096;

enum class State { ready, waits_for_block, waits_for_warp, done };

struct Fiber {
    void* stack_pointer = nullptr;
    char* stack = nullptr;
    void* sanitizer = nullptr;  // what a sanitizer knows it by
    State state = State::done;
    Index index{};
    unsigned lanes = 0;  // that it waits for
    int line = 0;        // where it waits
    bool exchanges = false;
    uint64_t given = 0, received[kWarp] = {};
};

constexpr int kSide = 16;  // of a wmma tile

struct Warp {
    unsigned epoch = 0;  // how often lanes of it were released
    char order[2];       // ThreadSanitizer's handle on __syncwarp, of even and odd epochs
    float operands[2][kSide * kSide];
};

Fiber fibers[kMostThreads], scheduler;
Warp warps[kMostThreads / kWarp];
unsigned count, current, block_epoch;
char block_order[2], start_order, end_order;
void (*body)(void*);
void* context;
std::string error;
const char* kernel_name;
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
void free_arrays() {
    arena_used = 0;
    arrays.clear();
}
#else
void* allocate(size_t bytes) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 128, bytes)) std::abort();
    return memory;
}
void free_arrays() {
    for (auto& [key, array] : arrays) std::free(array.memory);
    arrays.clear();
}
#endif

void order_release(char* token) {
#ifdef ESM_TSAN
    __tsan_release(token);
#else
    (void)token;
#endif
}
void order_acquire(char* token) {
#ifdef ESM_TSAN
    __tsan_acquire(token);
#else
    (void)token;
#endif
}

void switch_stacks(Fiber& from, Fiber& to) {
#ifdef ESM_TSAN
    __tsan_switch_to_fiber(to.sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef __SANITIZE_ADDRESS__
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, to.stack, kStack);
#endif
    emulator_switch(&from.stack_pointer, to.stack_pointer);
#ifdef __SANITIZE_ADDRESS__
    const void* bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(fake, &bottom, &size);
    if (&from != &scheduler) scheduler.stack = static_cast<char*>(const_cast<void*>(bottom));
#endif
}

void pause(State state) {
    fibers[current].state = state;
    switch_stacks(fibers[current], scheduler);
}

// What a fiber does: the kernel, once a block.
[[noreturn]] void thread_main() {
#ifdef __SANITIZE_ADDRESS__
    const void* bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
    scheduler.stack = static_cast<char*>(const_cast<void*>(bottom));
#endif
    for (;;) {
        order_acquire(&start_order);
        body(context);
        order_release(&end_order);
        pause(State::done);
    }
}

void create(Fiber& fiber) {
    if (!fiber.stack) {
        void* memory = mmap(nullptr, kStack + kGuard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED || mprotect(memory, kGuard, PROT_NONE)) std::abort();
        fiber.stack = static_cast<char*>(memory) + kGuard;
    }
#ifdef ESM_TSAN
    if (fiber.sanitizer) __tsan_destroy_fiber(fiber.sanitizer);
    fiber.sanitizer = __tsan_create_fiber(0);
#endif
    // As if thread_main had been called by nobody: six saved registers, its address, and an empty return address.
    void** top = reinterpret_cast<void**>(fiber.stack + kStack) - 10;
    std::fill(top, top + 10, nullptr);
    top[6] = reinterpret_cast<void*>(thread_main);
    fiber.stack_pointer = top;
}

unsigned first_of_warp(unsigned thread) { return thread / kWarp * kWarp; }

// Lets the lanes go that wait for each other, if all of them have come. Returns whether it did.
bool release_lanes(unsigned thread) {
    const unsigned warp = first_of_warp(thread), lanes = fibers[thread].lanes;
    for (unsigned l = 0; l < kWarp; ++l) {
        if (!(lanes >> l & 1)) continue;
        current = thread;  // whose failure it would be
        if (warp + l >= count) fail("waits for lane %u, which the block does not have", l);
        const Fiber& other = fibers[warp + l];
        if (other.state == State::done) fail("waits for lane %u, which has returned", l);
        if (other.state != State::waits_for_warp) return false;
        if (other.lanes != lanes || other.line != fibers[thread].line)
            fail("line %d: lane %u takes part in another operation, at line %d with lanes %08x", fibers[thread].line, l,
                 other.line, other.lanes);
    }
    for (unsigned l = 0; l < kWarp; ++l) {
        if (!(lanes >> l & 1)) continue;
        Fiber& fiber = fibers[warp + l];
        if (fiber.exchanges)
            for (unsigned from = 0; from < kWarp; ++from)
                fiber.received[from] = lanes >> from & 1 ? fibers[warp + from].given : ~0ull;
        fiber.state = State::ready;
    }
    ++warps[warp / kWarp].epoch;
    return true;
}

// Lets the block go if all its threads wait at one barrier.
bool release_block() {
    for (unsigned t = 0; t < count; ++t)
        if (fibers[t].state != State::waits_for_block) return false;
    for (unsigned t = 0; t < count; ++t) {
        current = t;
        if (fibers[t].line != fibers[0].line)
            fail("waits at __syncthreads of line %d, thread 0 at that of line %d", fibers[t].line, fibers[0].line);
    }
    for (unsigned t = 0; t < count; ++t) fibers[t].state = State::ready;
    ++block_epoch;
    return true;
}

[[noreturn]] void deadlock() {
    const auto stuck = std::find_if(fibers, fibers + count, [](const Fiber& f) { return f.state != State::done; });
    current = unsigned(stuck - fibers);
    const auto done = std::count_if(fibers, fibers + count, [](const Fiber& f) { return f.state == State::done; });
    const char* where = stuck->state == State::waits_for_block ? "__syncthreads" : "its warp";
    fail("waits forever at line %d for %s; %d of %u threads have returned", stuck->line, where, int(done), count);
}

struct Failed {};
bool in_fiber;

void run_block(std::vector<unsigned>& order, std::minstd_rand* random) {
    for (auto& [key, array] : arrays) array.used = false;
    for (unsigned t = 0; t < count; ++t) {
        fibers[t].state = State::ready;
        fibers[t].index = {t % block_size.x, t / block_size.x % block_size.y, t / block_size.x / block_size.y};
    }
    order_release(&start_order);
    for (;;) {
        if (random) std::shuffle(order.begin(), order.end(), *random);
        bool ran = false, alive = false;
        for (const unsigned t : order) {
            if (fibers[t].state != State::ready) continue;
            ran = true;
            current = t;
            thread_index = fibers[t].index;
            in_fiber = true;
            switch_stacks(scheduler, fibers[t]);
            in_fiber = false;
            if (!error.empty()) throw Failed();
        }
        for (unsigned t = 0; t < count; ++t) {
            alive |= fibers[t].state != State::done;
            if (fibers[t].state == State::waits_for_warp) ran |= release_lanes(t);
        }
        if (!alive) break;
        if (!release_block() && !ran) deadlock();
    }
    order_acquire(&end_order);
    end_block();
}

}  // namespace

void fail(const char* format, ...) {
    char text[512], whole[768];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    const Index& b = block_index;
    const Index t = current < count ? fibers[current].index : Index{};
    std::snprintf(whole, sizeof whole, "%s, block (%u, %u, %u), thread (%u, %u, %u): %s", kernel_name, b.x, b.y, b.z,
                  t.x, t.y, t.z, text);
    error = whole;
    if (!in_fiber) throw Failed();
    switch_stacks(fibers[current], scheduler);  // for good: the fiber is made anew before it runs again
    std::abort();
}

unsigned lane() { return current % kWarp; }

void wait_for_block(int line) {
    char* order = &block_order[block_epoch % 2];
    order_release(order);
    fibers[current].line = line;
    pause(State::waits_for_block);
    order_acquire(order);
}

static void wait_for_lanes(unsigned lanes, int line, bool exchanges) {
    Fiber& fiber = fibers[current];
    if (!(lanes >> lane() & 1)) fail("line %d: lane %u is not among the lanes it waits for, %08x", line, lane(), lanes);
    fiber.lanes = lanes;
    fiber.line = line;
    fiber.exchanges = exchanges;
    pause(State::waits_for_warp);
}

void wait_for_warp(unsigned lanes, int line) {
    Warp& warp = warps[current / kWarp];
    char* order = &warp.order[warp.epoch % 2];
    order_release(order);
    wait_for_lanes(lanes, line, false);
    order_acquire(order);
}

const uint64_t* exchange(unsigned lanes, uint64_t value, int line) {
    Fiber& fiber = fibers[current];
    fiber.given = value;
    wait_for_lanes(lanes, line, true);
    return fiber.received;
}

void tile_put(int operand, int place, float value) { warps[current / kWarp].operands[operand][place] = value; }

float tile_product(int place) {
    const auto& [a, b] = warps[current / kWarp].operands;
    float sum = 0;
    for (int k = 0; k < kSide; ++k) sum += a[place / kSide * kSide + k] * b[k * kSide + place % kSide];
    return sum;
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

const char* run(const char* kernel, Index grid, Index block, size_t dynamic_bytes, unsigned seed,
                void (*thread)(void*), void* argument) {
    kernel_name = kernel;
    body = thread;
    context = argument;
    grid_size = grid;
    block_size = block;
    block_index = {};
    error.clear();
    current = count = 0;
    in_fiber = false;
#ifdef ESM_TSAN
    scheduler.sanitizer = __tsan_get_current_fiber();
#endif
    free_arrays();
    dynamic_size = dynamic_bytes;
    std::vector<unsigned> order(block.x * block.y * block.z), blocks(grid.x * grid.y * grid.z);
    std::iota(order.begin(), order.end(), 0u);
    std::iota(blocks.begin(), blocks.end(), 0u);
    std::minstd_rand random(seed);
    if (seed) std::shuffle(blocks.begin(), blocks.end(), random);
    try {
        if (order.empty() || order.size() > kMostThreads) fail("a block has 1 to %u threads", kMostThreads);
        if (blocks.empty() || grid.y > 65535 || grid.z > 65535) fail("the grid is empty, or y or z more than 65535");
        count = unsigned(order.size());
        for (unsigned t = 0; t < count; ++t)
            if (!fibers[t].stack_pointer) create(fibers[t]);
        for (const unsigned b : blocks) {
            block_index = {b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y};
            run_block(order, seed ? &random : nullptr);
        }
    } catch (const Failed&) {
        for (Fiber& fiber : fibers) fiber.stack_pointer = nullptr;
        return error.c_str();
    }
    return nullptr;
}

}  // namespace emulator
