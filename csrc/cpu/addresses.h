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

}  // namespace cpu
}  // namespace esm
