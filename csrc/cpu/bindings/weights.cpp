// Prepacked weights in Python.
#include "bind.h"

namespace esm {
namespace cpu {
namespace {

constexpr const char* kPrepack = "prepack";

// Where the parts of an (out, in) matrix begin, one for each that its format names.
template <class Address>
std::vector<Address> addresses(const Arguments& arguments, const std::vector<Tensor>& parts, Type type, int out, int in) {
    const std::vector<Part> wanted = layout_of(type).parts(in);
    arguments.require(parts.size() == wanted.size(), std::string("a matrix of ") + name_of(type) + " is made of " +
                                                         std::to_string(wanted.size()) + " tensors, not " +
                                                         std::to_string(parts.size()));
    std::vector<Address> begins;
    for (size_t i = 0; i < parts.size(); ++i)
        begins.push_back(arguments.out(parts[i], "a part", wanted[i].element, {out, wanted[i].columns}));
    return begins;
}

std::unique_ptr<Weights> prepack(const std::vector<Tensor>& parts, const std::string& dtype) {
    const Arguments arguments(kPrepack);
    const Type type = type_named(dtype);
    arguments.require(!parts.empty() && parts[0].dims == 2, "a matrix is (out, in)");
    const int out = arguments.columns(parts[0].size(0), "out"), in = arguments.columns(parts[0].size(1), "in");
    const auto begins = addresses<const void*>(arguments, parts, type, out, in);
    py::gil_scoped_release release;
    return std::make_unique<Weights>(type, begins.data(), out, in);
}

std::unique_ptr<Weights> prepack_rows(const py::function& rows, const std::string& dtype, int64_t all, int64_t inputs) {
    const Arguments arguments("prepack_rows");
    const Type type = type_named(dtype);
    const int out = arguments.columns(all, "out"), in = arguments.columns(inputs, "in");
    py::object held;  // until the next rows are asked for
    return Weights::in_turns(type, out, in, [&](int first, int last) {
        held = rows(first, last);
        return addresses<const void*>(arguments, held.cast<std::vector<Tensor>>(), type, last - first, in);
    });
}

void unpack(const Weights& weights, const std::vector<Tensor>& parts) {
    const Prepacked& matrix = weights.prepacked();
    const auto begins = addresses<void*>(Arguments("unpack"), parts, matrix.type, matrix.out, matrix.in);
    py::gil_scoped_release release;
    weights.unpack(begins.data());
}

size_t size_of(const std::string& dtype, int64_t out, int64_t in) {
    const Arguments arguments(kPrepack);
    return prepacked_size(type_named(dtype), arguments.columns(out, "out"), arguments.columns(in, "in"));
}

// Bytes that were packed before, such as those of a mapped file: viewed, and kept alive.
std::unique_ptr<Weights> view(const py::buffer& buffer, const std::string& dtype, int64_t out, int64_t in) {
    const size_t bytes = size_of(dtype, out, in);
    auto* held = new py::buffer_info(buffer.request());
    const std::shared_ptr<const void> memory(held->ptr, [held](const void*) {
        py::gil_scoped_acquire gil;
        delete held;
    });
    const bool in_order = held->ndim == 1 && (held->size < 2 || held->strides[0] == held->itemsize);
    if (!in_order || size_t(held->size * held->itemsize) != bytes)
        throw py::value_error("a prepacked " + dtype + " matrix of " + std::to_string(out) + " x " + std::to_string(in) +
                              " takes " + std::to_string(bytes) + " contiguous bytes, these are " +
                              std::to_string(held->size * held->itemsize));
    if (reinterpret_cast<uintptr_t>(held->ptr) % kAlignment)
        throw py::value_error("prepacked weights must be aligned to " + std::to_string(kAlignment) + " bytes");
    return std::make_unique<Weights>(memory, int(out), int(in), type_named(dtype));
}

py::buffer_info bytes_of(const Weights& weights) {
    const py::ssize_t bytes = py::ssize_t(weights.bytes());
    return {const_cast<void*>(weights.prepacked().data), 1, "B", 1, {bytes}, {1}, true};
}

std::vector<uint64_t> checksums_of(const std::vector<Tensor>& tensors) {
    const Arguments arguments("checksums");
    std::vector<Bytes> all;
    for (const Tensor& tensor : tensors) {
        arguments.require(tensor.contiguous && tensor.element != Element::other, "takes contiguous tensors of a known dtype");
        size_t count = tensor.data ? 1 : 0;
        for (int i = 0; i < tensor.dims; ++i) count *= size_t(tensor.shape[i]);
        all.push_back({tensor.data, count * size_of(tensor.element)});
    }
    py::gil_scoped_release release;
    return checksums(all);
}

const Binding binding([](py::module_& module) {
    py::class_<Weights>(module, "Weights", py::buffer_protocol())
        .def_property_readonly("out", [](const Weights& weights) { return weights.prepacked().out; })
        .def_property_readonly("in_", [](const Weights& weights) { return weights.prepacked().in; })
        .def_property_readonly("dtype", [](const Weights& weights) { return name_of(weights.prepacked().type); })
        .def_property_readonly("nbytes", &Weights::bytes)
        .def("unpack", &unpack, "parts"_a)
        .def_buffer(&bytes_of);
    module.attr("LAYOUT") = kLayout;
    module.attr("GROUP") = kGroup;  // inputs that share a scale in int8 weights
    module.def("prepack", &prepack, "parts"_a, "dtype"_a);
    module.def("prepack_rows", &prepack_rows, "rows"_a, "dtype"_a, "out"_a, "in_"_a);
    module.def("view_weights", &view, "prepacked"_a, "dtype"_a, "out"_a, "in_"_a);
    module.def("prepacked_size", &size_of, "dtype"_a, "out"_a, "in_"_a);
    module.def("checksums", &checksums_of, "tensors"_a);
});

}  // namespace
}  // namespace cpu
}  // namespace esm
