// What the kernels need from outside, compiled for the oldest CPU: threads, memory, a clock.
#pragma once

#include <cstddef>

namespace esm {
namespace cpu {

// body(context, begin, end) over pieces of about `grain` that cover [0, n); see threads.h.
void parallel(size_t n, size_t grain, void (*body)(void*, size_t, size_t), void* context);
int parallel_width();
// This thread's memory number `slot` (see workspace.h), at least `bytes`, aligned to a cache line; it lives until a call
// for that slot with another number of bytes. Contents are undefined.
void* scratch(int slot, size_t bytes);
double seconds();

}  // namespace cpu
}  // namespace esm
