// The emulator's core, which knows nothing of CUDA's spelling: the threads of a block as fibers, what they wait for,
// and the tensors they touch. device.h dresses it as CUDA for the kernels; interface.cpp is what Python calls.
//
// Blocks run one after another, in an order that the seed shuffles. A thread runs until it waits, so between two waits
// it is alone; which thread goes next is shuffled too. What a GPU would do at once has to be checked: races between
// the threads of a block by ThreadSanitizer, for which __syncthreads and __syncwarp are the only order; races between
// blocks by the tensors' own book-keeping.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulator {

struct Index {
    unsigned x, y, z;
};

// Of the thread that is running; set by the scheduler.
extern Index thread_index, block_index, block_size, grid_size;

// Ends the launch: the caller gets the message, with the kernel, the block and the thread.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// ---- Waiting (threads.cpp). `line` is the source's, by which it is known that threads wait at the same place.

void wait_for_block(int line);
void wait_for_warp(unsigned lanes, int line);

// Gives a value, waits until all of `lanes` have given theirs, and returns the warp's 32 values.
const uint64_t* exchange(unsigned lanes, uint64_t value, int line);

unsigned lane();

// The two 16 x 16 operands of a warp that multiplies, and one element of their product. Not inline, so that no
// sanitizer takes the emulator's own memory for the kernel's.
void tile_put(int operand, int place, float value);
float tile_product(int place);

// Runs `body(context)` as every thread of every block. Returns nullptr, or what failed.
const char* run(const char* kernel, Index grid, Index block, size_t dynamic_bytes, unsigned seed,
                void (*body)(void*), void* context);

// ---- Shared memory (shared.cpp), from the heap, whose limits a sanitizer knows. A block finds all bytes 255, which
// is NaN in every float type.

void* shared(const void* key, size_t bytes);  // the block's array that goes by this key
void* dynamic_shared();
size_t shared_bytes();  // what the last block used

// ---- Global memory (memory.cpp)

struct Tensor {
    char* data;
    uint64_t bytes;
};

enum class Access { load, store, atomic };

// Checks an access: inside its tensor, aligned, no other block's business; and counts it.
void access(const void* address, size_t bytes, size_t alignment, const Tensor* tensor, Access kind);

// The tensor of this launch that begins where a parameter points; nullptr for null. Fails where there is none.
const Tensor* tensor_of(const void* parameter);

// What a launch moved. A request is one instruction of one warp; memory moves in sectors of 32 bytes.
struct Traffic {
    uint64_t requests, sectors, bytes, narrow_bytes, distinct_bytes;  // narrow: by lanes that moved less than 16 bytes
};

// The book-keeping of a launch: begins with its tensors, is told of the end of every block, and ends with the sums.
void begin_tensors(const Tensor* tensors, size_t count, bool count_traffic);
void end_block();
void end_tensors(Traffic* loads, Traffic* stores);

}  // namespace emulator
