// Arguments as the bindings get them: tensors as addresses, types by name.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>

#include "table.h"

namespace esm {
namespace cpu {

using Address = uintptr_t;

inline const void* read_at(Address address) { return reinterpret_cast<const void*>(address); }
inline const float* floats(Address address) { return reinterpret_cast<const float*>(address); }
inline void* write_at(Address address) { return reinterpret_cast<void*>(address); }

inline Type type_of(const std::string& dtype) {
    if (dtype == "float32") return Type::kFloat32;
    if (dtype == "bfloat16") return Type::kBfloat16;
    throw pybind11::value_error("the CPU kernels take float32 and bfloat16, not " + dtype);
}

// Wrong offsets would have the kernels read beyond the rows.
inline const int32_t* offsets(Address cu_seqlens, int64_t sequences, int64_t rows) {
    const int32_t* ends = static_cast<const int32_t*>(read_at(cu_seqlens));
    if (sequences < 0 || ends[0] != 0 || ends[sequences] != rows || !std::is_sorted(ends, ends + sequences + 1))
        throw pybind11::value_error("cu_seqlens must rise from 0 to the number of rows, " + std::to_string(rows));
    return ends;
}

// Ids are used as places in memory: one out of range must never get that far.
inline const int64_t* places(Address ids, int64_t n, int64_t size, const char* what) {
    const int64_t* begin = static_cast<const int64_t*>(read_at(ids));
    const auto wrong = std::find_if(begin, begin + n, [=](int64_t id) { return id < 0 || id >= size; });
    if (wrong != begin + n)
        throw pybind11::index_error(std::string(what) + " " + std::to_string(*wrong) + " (number " +
                              std::to_string(wrong - begin) + ") is not in the table, which has rows 0 to " +
                              std::to_string(size - 1));
    return begin;
}

// Null where there are none.
inline const int64_t* targets_at(Address targets, int64_t rows, int64_t tokens) {
    const int64_t* first = static_cast<const int64_t*>(read_at(targets));
    if (first)
        std::for_each(first, first + rows, [&](const int64_t& target) {
            if (target != kIgnored) places(Address(&target), 1, tokens, "target");
        });
    return first;
}

}  // namespace cpu
}  // namespace esm
