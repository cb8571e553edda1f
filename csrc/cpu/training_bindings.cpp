// The CPU kernels of training in esm_fast._C.
#include <pybind11/stl.h>

#include <array>

#include "../threads.h"
#include "addresses.h"

namespace py = pybind11;

namespace esm {
namespace cpu {
namespace {

VarlenCall varlen(Address q, Address k, Address v, const std::string& dtype, int64_t rows, Address cu_seqlens,
                  int64_t sequences, int heads, int head_dim, float scale, Address out, Address log_sums) {
    return {read_at(q), read_at(k), read_at(v), type_of(dtype), rows, offsets(cu_seqlens, sequences, rows), sequences,
            heads, head_dim, scale, write_at(out), static_cast<float*>(write_at(log_sums))};
}

void attention_varlen(Address q, Address k, Address v, const std::string& dtype, int64_t rows, Address cu_seqlens,
                      int64_t sequences, int heads, int head_dim, float scale, Address log_sums, Address out) {
    const VarlenCall call =
        varlen(q, k, v, dtype, rows, cu_seqlens, sequences, heads, head_dim, scale, out, log_sums);
    py::gil_scoped_release release;
    active().attention_varlen(call);
}

void attention_backward(Address q, Address k, Address v, const std::string& dtype, int64_t rows, Address cu_seqlens,
                        int64_t sequences, int heads, int head_dim, float scale, Address log_sums, Address out,
                        Address dout, Address dq, Address dk, Address dv) {
    const VarlenCall forward =
        varlen(q, k, v, dtype, rows, cu_seqlens, sequences, heads, head_dim, scale, 0, log_sums);
    py::gil_scoped_release release;
    active().attention_backward({forward, read_at(out), read_at(dout), write_at(dq), write_at(dk), write_at(dv)});
}

using Three = std::array<Address, 3>;

InputsCall inputs_call(Address x, int64_t rows, int width, float eps, const std::string& dtype, Address ln_weight,
                       Address ln_bias, const Three& weights, const Three& biases, const Three& results) {
    InputsCall call{floats(x), rows, width, eps, type_of(dtype), read_at(ln_weight), read_at(ln_bias), {}, {}, {}};
    for (size_t i = 0; i < 3; ++i) {
        call.weight[i] = read_at(weights[i]);
        call.bias[i] = read_at(biases[i]);
        call.result[i] = write_at(results[i]);
    }
    return call;
}

void attention_inputs(Address x, int64_t rows, int width, float eps, const std::string& dtype, Address ln_weight,
                      Address ln_bias, const Three& weights, const Three& biases, const Three& results) {
    const InputsCall call = inputs_call(x, rows, width, eps, dtype, ln_weight, ln_bias, weights, biases, results);
    py::gil_scoped_release release;
    const Session session;
    active().attention_inputs(call);
}

void attention_inputs_backward(Address x, int64_t rows, int width, float eps, const std::string& dtype,
                               Address ln_weight, Address ln_bias, const Three& weights, const Three& biases,
                               const Three& gradients, Address beside, Address dx, Address dvectors, Address normed) {
    const InputsCall call = inputs_call(x, rows, width, eps, dtype, ln_weight, ln_bias, weights, biases, gradients);
    py::gil_scoped_release release;
    const Session session;
    active().attention_inputs_backward({call, floats(beside), static_cast<float*>(write_at(dx)),
                                        static_cast<float*>(write_at(dvectors)), write_at(normed)});
}

void attention_output(Address x, int64_t rows, int width, const std::string& dtype, Address mixed, Address weight,
                      Address bias, Address result) {
    const Type type = type_of(dtype);
    py::gil_scoped_release release;
    const Session session;
    active().attention_output({floats(x), rows, width, type, read_at(mixed), read_at(weight), read_at(bias),
                               static_cast<float*>(write_at(result))});
}

void attention_output_backward(Address dout, int64_t rows, int width, const std::string& dtype, Address weight,
                               Address bias, Address dbias, Address dmixed, Address dresult) {
    const Type type = type_of(dtype);
    py::gil_scoped_release release;
    const Session session;
    active().attention_output_backward({{nullptr, rows, width, type, nullptr, read_at(weight), read_at(bias), nullptr},
                                        floats(dout),
                                        static_cast<float*>(write_at(dbias)),
                                        write_at(dmixed),
                                        write_at(dresult)});
}

// Addresses in the order of the call's members.
FfnTrainingCall ffn_call(Address x, int64_t rows, int width, int hidden, float eps, const std::string& dtype,
                         const std::array<Address, 6>& weights, Address middle, Address result) {
    const auto weight = [&](size_t i) { return read_at(weights[i]); };
    return {floats(x), rows, width, hidden, eps, type_of(dtype), weight(0), weight(1), weight(2), weight(3), weight(4),
            weight(5), write_at(middle), static_cast<float*>(write_at(result))};
}

void ffn_training(Address x, int64_t rows, int width, int hidden, float eps, const std::string& dtype,
                  const std::array<Address, 6>& weights, Address middle, Address result) {
    const FfnTrainingCall call = ffn_call(x, rows, width, hidden, eps, dtype, weights, middle, result);
    py::gil_scoped_release release;
    const Session session;
    active().ffn_training(call);
}

void ffn_backward(Address x, int64_t rows, int width, int hidden, float eps, const std::string& dtype,
                  const std::array<Address, 6>& weights, Address middle, Address dout, Address dx, Address dvectors,
                  Address normed, Address dmiddle, Address activated, Address dresult) {
    const FfnTrainingCall forward = ffn_call(x, rows, width, hidden, eps, dtype, weights, middle, 0);
    py::gil_scoped_release release;
    const Session session;
    active().ffn_backward({forward, floats(dout), static_cast<float*>(write_at(dx)),
                           static_cast<float*>(write_at(dvectors)), write_at(normed), write_at(dmiddle),
                           write_at(activated), write_at(dresult)});
}

// Addresses in the order of the call's members.
HeadTrainingCall head_call(Address x, int64_t rows, int width, int tokens, float eps, const std::string& dtype,
                           const std::array<Address, 6>& weights, Address targets, Address middle, Address wrong,
                           Address logits, Address loss) {
    const auto weight = [&](size_t i) { return read_at(weights[i]); };
    return {floats(x), rows, width, tokens, eps, type_of(dtype), weight(0), weight(1), weight(2), weight(3), weight(4),
            weight(5), targets_at(targets, rows, tokens), write_at(middle), static_cast<float*>(write_at(wrong)),
            write_at(logits), static_cast<float*>(write_at(loss))};
}

void head_training(Address x, int64_t rows, int width, int tokens, float eps, const std::string& dtype,
                   const std::array<Address, 6>& weights, Address targets, Address middle, Address wrong,
                   Address logits, Address loss) {
    const HeadTrainingCall call =
        head_call(x, rows, width, tokens, eps, dtype, weights, targets, middle, wrong, logits, loss);
    py::gil_scoped_release release;
    const Session session;
    active().head_training(call);
}

void head_backward(int64_t rows, int width, int tokens, float eps, const std::string& dtype,
                   const std::array<Address, 6>& weights, Address middle, Address wrong, float dloss, Address dlogits,
                   Address dx, Address dvectors, Address normed, Address dmiddle, Address dscores) {
    const HeadTrainingCall forward =
        head_call(0, rows, width, tokens, eps, dtype, weights, 0, middle, wrong, 0, 0);
    py::gil_scoped_release release;
    const Session session;
    active().head_backward({forward, dloss, read_at(dlogits), static_cast<float*>(write_at(dx)),
                            static_cast<float*>(write_at(dvectors)), write_at(normed), write_at(dmiddle),
                            write_at(dscores)});
}

}  // namespace

void bind_training(py::module_& module) {
    module.def("attention_varlen", &attention_varlen);
    module.def("attention_backward", &attention_backward);
    module.def("attention_inputs", &attention_inputs);
    module.def("attention_inputs_backward", &attention_inputs_backward);
    module.def("attention_output", &attention_output);
    module.def("attention_output_backward", &attention_output_backward);
    module.def("ffn_training", &ffn_training);
    module.def("ffn_backward", &ffn_backward);
    module.def("head_training", &head_training);
    module.def("head_backward", &head_backward);
}

}  // namespace cpu
}  // namespace esm
