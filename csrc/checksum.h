// 64 bits that tell whether bytes are those that were written, at the speed of memory: against damage, not against intent.
#pragma once

#include <cstddef>
#include <cstdint>

namespace esm {

uint64_t checksum(const char* data, size_t size);

}  // namespace esm
