// The CPU kernels in esm_fast._C. Tensors come as addresses: kernels/cpu/ has checked what is behind them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <map>
#include <tuple>

#include "../threads.h"
#include "addresses.h"
#include "clock.h"
#include "detect.h"
#include "weights.h"

namespace py = pybind11;
using namespace py::literals;

namespace esm {
namespace cpu {

void bind_training(py::module_& module);  // training_bindings.cpp

namespace {

Type packed_type_of(const std::string& dtype) { return dtype == "int8" ? Type::kInt8 : type_of(dtype); }

// Panels read as another type would be read beyond their end.
void require_type(Type type, std::initializer_list<const Weights*> all) {
    for (const Weights* weights : all)
        if (weights->packed().type != type) throw py::value_error("these packed weights cannot be mixed with others");
}

std::string name_of(Type type) {
    return type == Type::kFloat32 ? "float32" : type == Type::kBfloat16 ? "bfloat16" : "int8";
}

std::unique_ptr<Weights> pack(Address matrix, int out, int in, const std::string& dtype) {
    const Type type = type_of(dtype);
    py::gil_scoped_release release;
    return std::make_unique<Weights>(read_at(matrix), out, in, type);
}

std::unique_ptr<Weights> pack_quantized(Address numbers, Address scales, int out, int in) {
    py::gil_scoped_release release;
    return std::make_unique<Weights>(static_cast<const int8_t*>(read_at(numbers)), floats(scales), out, in);
}

void unpack_quantized(const Weights& weights, Address numbers, Address scales) {
    require_type(Type::kInt8, {&weights});
    py::gil_scoped_release release;
    weights.unpack(static_cast<int8_t*>(write_at(numbers)), static_cast<float*>(write_at(scales)));
}

void int8_linear(Address x, int64_t rows, const Weights& weights, Address result) {
    require_type(Type::kInt8, {&weights});
    py::gil_scoped_release release;
    active().int8_linear(floats(x), rows, weights.packed(), static_cast<float*>(write_at(result)));
}

// Bytes that were packed before, such as those of a mapped file: viewed, and kept alive.
std::unique_ptr<Weights> view(const py::buffer& buffer, int out, int in, const std::string& dtype) {
    const Type type = packed_type_of(dtype);
    auto* held = new py::buffer_info(buffer.request());
    const std::shared_ptr<const void> memory(held->ptr, [held](const void*) {
        py::gil_scoped_acquire gil;
        delete held;
    });
    if (out < 0 || in < 0) throw py::value_error("a matrix cannot have a negative size");
    const size_t bytes = packed_size(type, out, in);
    if (held->ndim != 1 || held->strides[0] != held->itemsize || size_t(held->size * held->itemsize) != bytes)
        throw py::value_error("a packed " + dtype + " matrix of " + std::to_string(out) + " x " + std::to_string(in) +
                              " takes " + std::to_string(bytes) + " contiguous bytes, these are " +
                              std::to_string(held->size * held->itemsize));
    if (reinterpret_cast<Address>(held->ptr) % kAlignment)
        throw py::value_error("packed weights must be aligned to " + std::to_string(kAlignment) + " bytes");
    return std::make_unique<Weights>(memory, out, in, type);
}

void unpack(const Weights& weights, Address matrix) {
    if (weights.packed().type == Type::kInt8) throw py::value_error("8-bit weights have unpack_quantized");
    py::gil_scoped_release release;
    weights.unpack(write_at(matrix));
}

py::buffer_info bytes_of(const Weights& weights) {
    const py::ssize_t bytes = py::ssize_t(weights.bytes());
    return {const_cast<void*>(weights.packed().data), 1, "B", 1, {bytes}, {1}, true};
}

void gelu_ffn(Address x, Address result, int64_t rows, float eps, Address ln_weight, Address ln_bias,
              const Weights& fc1, Address fc1_bias, const Weights& fc2, Address fc2_bias) {
    require_type(fc1.packed().type, {&fc2});
    py::gil_scoped_release release;
    const Session session;
    active().gelu_ffn({floats(x), static_cast<float*>(write_at(result)), rows, eps, read_at(ln_weight),
                       read_at(ln_bias), read_at(fc1_bias), read_at(fc2_bias), fc1.packed(), fc2.packed()});
}

void pre_ln_attention(Address x, Address result, int64_t rows, Address cu_seqlens, int64_t sequences, int heads,
                      float eps, Address ln_weight, Address ln_bias, const Weights& q, Address q_bias,
                      const Weights& k, Address k_bias, const Weights& v, Address v_bias, const Weights& out,
                      Address out_bias, Address rotary, Address q_result, Address k_result) {
    require_type(q.packed().type, {&k, &v, &out});
    const int32_t* ends = offsets(cu_seqlens, sequences, rows);
    py::gil_scoped_release release;
    const Session session;
    active().pre_ln_attention({floats(x), static_cast<float*>(write_at(result)), rows, ends, sequences, heads, eps,
                               read_at(ln_weight), read_at(ln_bias), read_at(q_bias), read_at(k_bias),
                               read_at(v_bias), read_at(out_bias), q.packed(), k.packed(), v.packed(), out.packed(),
                               floats(rotary), write_at(q_result), write_at(k_result)});
}

// A layer's vectors in the order of `ops.LayerWeights`, its matrices likewise, the eps of its norms, and where its
// stream is wanted too (or 0).
using Layer = std::tuple<std::array<Address, 10>, std::array<const Weights*, 6>, std::array<float, 2>, Address>;

void transformer_stack(Address x, Address result, int64_t rows, Address cu_seqlens, int64_t sequences, int heads,
                       Address rotary, const std::vector<Layer>& layers) {
    const int32_t* ends = offsets(cu_seqlens, sequences, rows);
    float* stream = static_cast<float*>(write_at(result));
    const float* from = floats(x);
    std::vector<LayerCall> calls;
    for (const auto& [vectors, weights, eps, copy] : layers) {
        for (const Weights* matrix : weights) require_type(std::get<1>(layers[0])[0]->packed().type, {matrix});
        const auto vector = [&v = vectors](int i) { return read_at(v[size_t(i)]); };
        const auto matrix = [&w = weights](int i) { return w[size_t(i)]->packed(); };
        calls.push_back({{from, stream, rows, ends, sequences, heads, eps[0], vector(0), vector(1), vector(2),
                          vector(3), vector(4), vector(5), matrix(0), matrix(1), matrix(2), matrix(3),
                          floats(rotary), nullptr, nullptr},
                         {stream, stream, rows, eps[1], vector(6), vector(7), vector(8), vector(9), matrix(4),
                          matrix(5)},
                         static_cast<float*>(write_at(copy))});
        from = stream;
    }
    if (calls.empty()) throw py::value_error("a stack has at least one layer");
    py::gil_scoped_release release;
    const Session session;
    active().transformer_stack({calls.data(), int64_t(calls.size())});
}

void contact_map(Address q, Address k, const std::string& dtype, int64_t rows, Address cu_seqlens, int64_t sequences,
                 int heads, int head_dim, Address keep, Address weight, float scale, Address result) {
    const Type type = type_of(dtype);
    const int32_t* ends = offsets(cu_seqlens, sequences, rows);
    py::gil_scoped_release release;
    active().contact_map({read_at(q), read_at(k), type, ends, sequences, heads, head_dim, static_cast<const uint8_t*>(read_at(keep)), floats(weight), scale,
                          static_cast<float*>(write_at(result))});
}

void embedding(Address tokens, Address positions, Address cu_seqlens, int64_t rows, int64_t sequences,
               Address token_table, int64_t n_tokens, Address position_table, int64_t n_positions, Address ln_weight,
               Address ln_bias, const std::string& dtype, int width, bool token_dropout, int64_t mask, float kept,
               Address scale, float eps, Address result) {
    const EmbeddingCall call{places(tokens, rows, n_tokens, "token"),
                             places(positions, rows, n_positions, "position"),
                             token_dropout ? offsets(cu_seqlens, sequences, rows) : nullptr,
                             rows,
                             sequences,
                             read_at(token_table),
                             read_at(position_table),
                             read_at(ln_weight),
                             read_at(ln_bias),
                             type_of(dtype),
                             width,
                             token_dropout,
                             mask,
                             kept,
                             floats(scale),
                             eps,
                             static_cast<float*>(write_at(result))};
    py::gil_scoped_release release;
    active().embedding(call);
}

void masked_lm_head(Address x, int64_t rows_of_x, Address row_of, int64_t rows, Address targets, float eps,
                    const Weights& dense, Address dense_bias, Address ln_weight, Address ln_bias, const Weights& table,
                    Address bias, Address logits, Address loss) {
    require_type(dense.packed().type, {&table});
    if (dense.packed().type == Type::kInt8) throw py::value_error("the language-model head has no 8-bit weights");
    const int64_t* chosen = row_of ? places(row_of, rows, rows_of_x, "row") : nullptr;
    const int64_t* wanted = targets_at(targets, rows, table.packed().out);
    py::gil_scoped_release release;
    active().masked_lm_head({floats(x), rows, chosen, wanted, eps, read_at(dense_bias), read_at(ln_weight),
                             read_at(ln_bias), read_at(bias), dense.packed(), table.packed(), write_at(logits),
                             static_cast<float*>(write_at(loss))});
}

void masked_softmax(Address scores, const std::string& dtype, Address lengths, int64_t batch, int64_t heads,
                    int64_t size, Address result) {
    const Type type = type_of(dtype);
    py::gil_scoped_release release;
    active().masked_softmax({read_at(scores), type, static_cast<const int64_t*>(read_at(lengths)), batch, heads, size,
                             static_cast<float*>(write_at(result))});
}

void pool(Address x, int64_t rows, int width, Address cu_seqlens, int64_t sequences, Address weight, Address result) {
    const int32_t* ends = offsets(cu_seqlens, sequences, rows);
    py::gil_scoped_release release;
    active().pool({floats(x), floats(weight), ends, sequences, width, static_cast<float*>(write_at(result))});
}

std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (int i = 0; i < levels(); ++i)
        if (runs(i)) names.push_back(level(i));
    return names;
}

py::dict missing_isas() {
    py::dict reasons;
    for (int i = 0; i < levels(); ++i)
        if (!runs(i)) reasons[level(i)] = missing(level(i), machine());
    return reasons;
}

double peak(const std::string& dtype) {
    const Type type = packed_type_of(dtype);
    py::gil_scoped_release release;
    return active().peak(type);
}

std::map<std::string, double> phases() {
    return {{"norm", phase_seconds(Phase::kNorm)},
            {"gemm", phase_seconds(Phase::kGemm)},
            {"attention", phase_seconds(Phase::kAttention)}};
}

}  // namespace

void bind(py::module_& module) {
    py::class_<Weights>(module, "Weights", py::buffer_protocol())
        .def_property_readonly("out", [](const Weights& weights) { return weights.packed().out; })
        .def_property_readonly("in_", [](const Weights& weights) { return weights.packed().in; })
        .def_property_readonly("dtype", [](const Weights& weights) { return name_of(weights.packed().type); })
        .def_property_readonly("nbytes", &Weights::bytes)
        .def("unpack", &unpack, "matrix"_a)
        .def("unpack_quantized", &unpack_quantized, "numbers"_a, "scales"_a)
        .def_buffer(&bytes_of);
    module.attr("LAYOUT") = kLayout;
    module.def("pack_weights", &pack, "matrix"_a, "out"_a, "in"_a, "dtype"_a);
    module.def("pack_quantized", &pack_quantized, "numbers"_a, "scales"_a, "out"_a, "in"_a);
    module.def("view_weights", &view, "packed"_a, "out"_a, "in"_a, "dtype"_a);
    module.def("packed_size", [](const std::string& dtype, int out, int in) {
        return packed_size(packed_type_of(dtype), out, in);
    }, "dtype"_a, "out"_a, "in"_a);
    module.def("fingerprint", [](Address data, size_t bytes) { return fingerprint(read_at(data), bytes); });
    module.def("gelu_ffn", &gelu_ffn);
    module.def("pre_ln_attention", &pre_ln_attention);
    module.def("transformer_stack", &transformer_stack);
    bind_training(module);
    module.def("contact_map", &contact_map);
    module.def("embedding", &embedding);
    module.def("masked_lm_head", &masked_lm_head);
    module.def("masked_softmax", &masked_softmax);
    module.def("pool", &pool);
    module.def("int8_linear", &int8_linear, "x"_a, "rows"_a, "weights"_a, "result"_a);
    module.attr("GROUP") = kGroup;  // inputs that share a scale in int8 weights
    // Instruction-set levels this machine runs, worst first; what it lacks for the others; the one in use; another one,
    // by name.
    module.def("isas", &isas);
    module.def("missing_isas", &missing_isas);
    module.def("isa", [] { return active().name; });
    module.def("set_isa", [](const std::string& name) { select(name.c_str()); }, "name"_a);
    module.def("peak", &peak, "dtype"_a);
    // Seconds of all threads together per phase since clocks were last set; see clock.h.
    module.def("set_clocks", &set_clocks, "on"_a);
    module.def("phases", &phases);
}

}  // namespace cpu
}  // namespace esm
