// What the emulator's own files share: the threads of a block as fibers, what each of them waits for, and the order
// that ThreadSanitizer is told of.
#pragma once

#ifdef ESM_TSAN
#include <sanitizer/tsan_interface.h>
#endif

#include "emulator.h"

namespace emulator {

constexpr unsigned kMostThreads = 1024, kWarp = 32;

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

extern Fiber fibers[kMostThreads], scheduler;
extern unsigned current;  // the thread that runs
extern char start_order, end_order;
extern void (*body)(void*);
extern void* context;

// fibers.cpp: makes a fiber that runs `body(context)` once a block; goes from one to another; leaves the running one.
void create(Fiber& fiber);
void switch_stacks(Fiber& from, Fiber& to);
void pause(State state);

// shared.cpp: forgets all arrays, of which a launch may ask for one of so many bytes; poisons them for the next block.
void free_arrays(size_t dynamic_bytes);
void begin_arrays();

inline void order_release(char* token) {
#ifdef ESM_TSAN
    __tsan_release(token);
#else
    (void)token;
#endif
}
inline void order_acquire(char* token) {
#ifdef ESM_TSAN
    __tsan_acquire(token);
#else
    (void)token;
#endif
}

}  // namespace emulator
