// 64 bits that tell whether bytes are those that were written, at the speed of memory: against damage, not against intent.
#pragma once

#include <cstddef>
#include <cstdint>

namespace esm {

constexpr uint64_t kChecksumFactor = 0x9e3779b97f4a7c15ull;

uint64_t checksum(const char* data, size_t size);

}  // namespace esm
