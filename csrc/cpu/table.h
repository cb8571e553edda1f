// What the CPU kernels offer: the one header of theirs seen by both sides.
//
// kernels.cpp is compiled once per instruction-set level and holds everything in an anonymous namespace; its only
// symbol is the table below. So no function compiled for a newer CPU can replace its namesake elsewhere at link time.
// For the same reason no template function and no inline function stands where both sides see it, in types.h, host.h
// and the first part of the files in ops/ and formats/, and no kernel file includes the C++ library.
#pragma once

#include "ops.def"
#include "types.h"

#define ESM_FILES
#include "ops.def"
#undef ESM_FILES

namespace esm {
namespace cpu {

struct Table {
    const char* name;
#define X(kernel, Call, type, types) void (*kernel)(const Call&);
    ESM_KERNELS(X)
#undef X
    // GFLOP/s of the GEMM without an epilogue, on operands in the first-level cache, all threads together.
    double (*peak)(Type);
};

// Levels, best last. `select` takes a name of `level(i)`; it throws std::invalid_argument with the reason if this
// machine cannot run it. The first use selects ESM_FAST_ISA, or the best.
const Table& active();
int levels();
const char* level(int i);
bool runs(int i);
void select(const char* name);

}  // namespace cpu
}  // namespace esm
