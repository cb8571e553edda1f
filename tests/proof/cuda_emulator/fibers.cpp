// A thread of a block as a fiber: a stack of its own, and the switch from one to another. Like all of the emulator this
// is built without ThreadSanitizer's instrumentation even where the kernels have it: its doings are not theirs.
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>

#include "threads.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

// Saves the registers that a function must keep on this stack, and continues where the other stack was left.
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

constexpr size_t kStack = 256 * 1024, kGuard = 4096;

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
[[noreturn]] static void thread_main() {
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

}  // namespace emulator
