// The part of DLPack's binary interface that is used here, by the names and numbers of its specification (version 1.3,
// https://dmlc.github.io/dlpack/latest/c_api.html). It is fixed within a major version.
#pragma once

#include <cstdint>

namespace esm {
namespace dlpack {

constexpr uint32_t kMajorVersion = 1;
constexpr int32_t kCpu = 1, kCpuPinned = 3;                              // DLDeviceType
constexpr uint8_t kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6;  // DLDataTypeCode

struct Device {
    int32_t type, id;
};
struct DataType {
    uint8_t code, bits;
    uint16_t lanes;
};
struct Tensor {  // DLTensor
    void* data;
    Device device;
    int32_t ndim;
    DataType dtype;
    int64_t *shape, *strides;
    uint64_t byte_offset;
};
struct ExchangeApi {  // DLPackExchangeAPI
    struct {
        uint32_t major, minor;
    } version;
    ExchangeApi* previous;
    void *managed_allocator, *managed_from_object, *managed_to_object;
    // Fills in a view of the tensor that a Python object is; -1 with a Python error set where there is none.
    int (*view_of_object)(void* object, Tensor* view);
    void* current_work_stream;
};

}  // namespace dlpack
}  // namespace esm
