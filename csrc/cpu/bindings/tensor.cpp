#include "tensor.h"

#include <algorithm>
#include <cstring>

#include "dlpack.h"

namespace py = pybind11;

namespace esm {
namespace cpu {
namespace {

// torch.Tensor and what it says of its instances; null as long as torch was not imported, when there are none.
struct Torch {
    PyTypeObject* tensor = nullptr;
    const dlpack::ExchangeApi* api = nullptr;
};

const Torch& torch() {
    static Torch found;
    if (found.api) return found;
    const py::dict modules = py::module_::import("sys").attr("modules");
    if (!modules.contains("torch")) return found;
    const py::object type = py::module_::import("torch").attr("Tensor");
    const char* const capsule = "dlpack_exchange_api";
    const py::object offered = py::getattr(type, "__dlpack_c_exchange_api__", py::none());
    const auto* api = PyCapsule_IsValid(offered.ptr(), capsule)
                          ? static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(offered.ptr(), capsule))
                          : nullptr;
    // An older version of the same is behind a newer one.
    while (api && api->version.major > dlpack::kMajorVersion) api = api->previous;
    if (!api || !api->view_of_object)
        throw py::import_error("esm_fast needs a torch whose tensors offer DLPack's interface for C (torch 2.10 or newer)");
    found.tensor = reinterpret_cast<PyTypeObject*>(type.ptr());  // torch's for as long as the process
    found.api = api;
    return found;
}

Element element_of(const dlpack::DataType& type) {
    if (type.lanes != 1) return Element::other;
    switch (type.code << 8 | type.bits) {
        case dlpack::kFloat << 8 | 32: return Element::float32;
        case dlpack::kBfloat << 8 | 16: return Element::bfloat16;
        case dlpack::kInt << 8 | 8: return Element::int8;
        case dlpack::kInt << 8 | 32: return Element::int32;
        case dlpack::kInt << 8 | 64: return Element::int64;
        case dlpack::kBool << 8 | 8: return Element::boolean;
    }
    return Element::other;
}

bool lies_in_order(const dlpack::Tensor& view) {
    int64_t step = 1;
    bool fits = true;
    for (int i = view.ndim - 1; i >= 0; step *= view.shape[i--]) {
        if (view.shape[i] == 0) return true;
        fits = fits && (view.shape[i] == 1 || !view.strides || view.strides[i] == step);
    }
    return fits;
}

const char* name_of(Element element) {
    static const char* const kNames[] = {"float32", "bfloat16", "int8", "int32", "int64", "bool", "of another dtype"};
    return kNames[int(element)];
}

std::string shape_text(const int64_t* begin, size_t dims) {
    std::string text = "(";
    for (size_t i = 0; i < dims; ++i) text += (i ? ", " : "") + std::to_string(begin[i]);
    return text + (dims == 1 ? ",)" : ")");
}

}  // namespace

bool is_tensor(py::handle object) {
    PyTypeObject* const type = torch().tensor;
    return type && PyObject_TypeCheck(object.ptr(), type);
}

Tensor tensor_of(py::handle object) {
    dlpack::Tensor view;
    if (torch().api->view_of_object(object.ptr(), &view)) {
        PyErr_Clear();
        throw py::value_error("the CPU kernels take dense tensors in memory, not one of layout " +
                              std::string(py::str(object.attr("layout"))) + " on " +
                              std::string(py::str(object.attr("device"))) + " (" + Py_TYPE(object.ptr())->tp_name + ")");
    }
    if (view.device.type != dlpack::kCpu && view.device.type != dlpack::kCpuPinned)
        throw py::value_error("the CPU kernels take tensors on the CPU, this one is on " +
                              std::string(py::str(object.attr("device"))));
    char* const data = static_cast<char*>(view.data);
    return {data ? data + view.byte_offset : nullptr, element_of(view.dtype), view.ndim, view.shape, lies_in_order(view)};
}

void Arguments::refuse(const std::string& problem) const { throw py::value_error(std::string(call_) + ": " + problem); }

void Arguments::refuse_tensor(const Tensor& tensor, const char* name, Element element,
                              std::initializer_list<int64_t> shape) const {
    std::string is = std::string(name_of(tensor.element)) + " " + shape_text(tensor.shape, size_t(tensor.dims));
    if (!tensor.contiguous) is += " with other strides";
    if (!tensor.data) is += " without memory";
    refuse(std::string(name) + " must be " + name_of(element) + " " + shape_text(shape.begin(), shape.size()) +
           ", contiguous, and is " + is);
}

const int32_t* Arguments::offsets(const Tensor& tensor, const char* name, int64_t rows) const {
    const int64_t count = tensor.size(0);
    const auto* ends = static_cast<const int32_t*>(in(tensor, name, Element::int32, {count}));
    if (count < 1 || ends[0] != 0 || ends[count - 1] != rows || !std::is_sorted(ends, ends + count))
        refuse(std::string(name) + " must rise from 0 to the number of rows, " + std::to_string(rows));
    return ends;
}

const int64_t* Arguments::places(const Tensor& tensor, const char* name, int64_t n, int64_t size, int64_t also) const {
    const auto* begin = static_cast<const int64_t*>(in(tensor, name, Element::int64, {n}));
    const auto wrong = std::find_if(begin, begin + n, [=](int64_t id) { return (id < 0 || id >= size) && id != also; });
    if (wrong != begin + n)
        throw py::index_error(std::string(name, std::strlen(name) - 1) + " " + std::to_string(*wrong) + " (number " +
                              std::to_string(wrong - begin) + ") is not in the table, which has rows 0 to " +
                              std::to_string(size - 1));
    return begin;
}

int Arguments::columns(int64_t count, const char* name) const {
    if (count < 0 || count > kMostColumns)
        refuse(std::string(name) + " must be from 0 to " + std::to_string(kMostColumns) + ", not " + std::to_string(count));
    return int(count);
}

int Arguments::head_dim(int64_t width, int64_t heads) const {
    const int64_t dim = heads > 0 && width % heads == 0 ? width / heads : 0;
    if (dim < 2 || dim % 2 || dim > kMostHeadDim)
        refuse("heads of even size from 2 to " + std::to_string(kMostHeadDim) + " must fill the width, " +
               std::to_string(width) + ", and there are " + std::to_string(heads));
    return int(dim);
}

size_t size_of(Element element) {
    static constexpr size_t kSizes[] = {4, 2, 1, 4, 8, 1, 0};
    return kSizes[int(element)];
}

Type type_of(const Tensor& tensor, const Arguments& arguments) {
    if (tensor.element == Element::float32) return Type::float32;
    if (tensor.element == Element::bfloat16) return Type::bfloat16;
    arguments.refuse(std::string("the CPU kernels take float32 and bfloat16, not ") + name_of(tensor.element));
}

}  // namespace cpu
}  // namespace esm
