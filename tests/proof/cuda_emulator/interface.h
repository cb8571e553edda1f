#pragma once

#include "emulator.h"

extern "C" {

struct Launch {
    const char *kernel, *scalar, *signature;
    unsigned grid[3], block[3];
    uint64_t dynamic_bytes;
    void** parameters;
    const emulator::Tensor* tensors;
    uint64_t tensor_count;
    unsigned seed;  // of the order of blocks and threads; 0: as they are numbered
    unsigned count_traffic;
};

struct Result {
    emulator::Traffic loads, stores;
    uint64_t shared_bytes;
};

// nullptr, or what failed.
__attribute__((visibility("default"))) const char* emulator_launch(const Launch* launch, Result* result);
}
