// The scheduler: which thread runs next, and when those that wait may continue.
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "threads.h"

namespace emulator {

Index thread_index, block_index, block_size, grid_size;
Fiber fibers[kMostThreads], scheduler;
unsigned current;
char start_order, end_order;
void (*body)(void*);
void* context;

namespace {

Warp warps[kMostThreads / kWarp];
unsigned count, block_epoch;
char block_order[2];
std::string error;
const char* kernel_name;

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
    begin_arrays();
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
    free_arrays(dynamic_bytes);
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
