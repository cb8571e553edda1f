#include "bind.h"

namespace esm {
namespace cpu {
namespace {

void pre_ln_attention(const Tensor& x, const Tensor& cu_seqlens, int64_t heads, float eps, const Tensor& ln_weight,
                      const Tensor& ln_bias, const Weights& q, const Tensor& q_bias, const Weights& k,
                      const Tensor& k_bias, const Weights& v, const Tensor& v_bias, const Weights& out,
                      const Tensor& out_bias, const std::optional<Tensor>& rotary, const Tensor& result,
                      const std::optional<Tensor>& q_result, const std::optional<Tensor>& k_result) {
    const Arguments is("pre_ln_attention");
    const int width = q.prepacked().in, dim = is.head_dim(width, heads);
    const Type type = q.prepacked().type;
    const Element plain = layout_of(type).plain;
    const int64_t n = x.size(0);
    is.require(!q_result == !k_result, "q_result and k_result go together");
    run_steps(PreLnAttentionCall{
        is.floats(x, "x", {n, width}), is.floats_out(result, "result", {n, width}), n,
        is.offsets(cu_seqlens, "cu_seqlens", n), cu_seqlens.size(0) - 1, int(heads), eps,
        is.in(ln_weight, "ln_weight", plain, {width}), is.in(ln_bias, "ln_bias", plain, {width}),
        is.in(q_bias, "q_bias", plain, {width}), is.in(k_bias, "k_bias", plain, {width}),
        is.in(v_bias, "v_bias", plain, {width}), is.in(out_bias, "out_bias", plain, {width}),
        matrix(is, q, "q", type, width, width), matrix(is, k, "k", type, width, width),
        matrix(is, v, "v", type, width, width), matrix(is, out, "out", type, width, width),
        rotary ? is.floats(*rotary, "rotary", {2, n, dim}) : nullptr,
        q_result ? is.out(*q_result, "q_result", plain, {n, heads, dim}) : nullptr,
        k_result ? is.out(*k_result, "k_result", plain, {n, heads, dim}) : nullptr});
}

// What both directions take: the results, or their gradients.
PreLnAttentionInputsCall inputs_call(const Arguments& is, const Tensor& x, float eps, const Tensor& ln_weight,
                                     const Tensor& ln_bias, const std::array<Tensor, 3>& weights,
                                     const std::array<Tensor, 3>& biases, const std::array<Tensor, 3>& results) {
    const Type type = type_of(weights[0], is);
    const Element plain = weights[0].element;
    const int64_t n = x.size(0);
    const int width = is.columns(x.size(1), "width");
    PreLnAttentionInputsCall call{is.floats(x, "x", {n, width}),
                                  n,
                                  width,
                                  eps,
                                  type,
                                  is.in(ln_weight, "ln_weight", plain, {width}),
                                  is.in(ln_bias, "ln_bias", plain, {width}),
                                  {},
                                  {},
                                  {}};
    for (size_t i = 0; i < 3; ++i) {
        call.weight[i] = is.in(weights[i], "a weight", plain, {width, width});
        call.bias[i] = is.in(biases[i], "a bias", plain, {width});
        call.result[i] = is.out(results[i], "q, k, v or their gradient", plain, {n, width});
    }
    return call;
}

void inputs(const Tensor& x, float eps, const Tensor& ln_weight, const Tensor& ln_bias,
            const std::array<Tensor, 3>& weights, const std::array<Tensor, 3>& biases,
            const std::array<Tensor, 3>& results) {
    const Arguments is("pre_ln_attention_inputs");
    run_steps(inputs_call(is, x, eps, ln_weight, ln_bias, weights, biases, results));
}

void inputs_backward(const Tensor& x, float eps, const Tensor& ln_weight, const Tensor& ln_bias,
                     const std::array<Tensor, 3>& weights, const std::array<Tensor, 3>& biases,
                     const std::array<Tensor, 3>& gradients, const Tensor& beside, const Tensor& dx,
                     const Tensor& dvectors, const Tensor& normed) {
    const Arguments is("pre_ln_attention_inputs_backward");
    const PreLnAttentionInputsCall call = inputs_call(is, x, eps, ln_weight, ln_bias, weights, biases, gradients);
    const int64_t n = call.rows, width = call.width;
    run_steps(PreLnAttentionInputsBackwardCall{
        call, is.floats(beside, "beside", {n, width}), is.floats_out(dx, "dx", {n, width}),
        is.floats_out(dvectors, "dvectors", {5, width}), is.out(normed, "normed", weights[0].element, {n, width})});
}

void output(const Tensor& x, const Tensor& mixed, const Tensor& weight, const Tensor& bias, const Tensor& result) {
    const Arguments is("pre_ln_attention_output");
    const Type type = type_of(weight, is);
    const Element plain = weight.element;
    const int64_t n = x.size(0);
    const int width = is.columns(x.size(1), "width");
    run_steps(PreLnAttentionOutputCall{is.floats(x, "x", {n, width}), n, width, type,
                                       is.in(mixed, "mixed", plain, {n, width}),
                                       is.in(weight, "weight", plain, {width, width}),
                                       is.in(bias, "bias", plain, {width}),
                                       is.floats_out(result, "result", {n, width})});
}

void output_backward(const Tensor& dout, const Tensor& weight, const Tensor& bias, const Tensor& dbias,
                     const Tensor& dmixed, const std::optional<Tensor>& dresult) {
    const Arguments is("pre_ln_attention_output_backward");
    const Type type = type_of(weight, is);
    const Element plain = weight.element;
    const int64_t n = dout.size(0);
    const int width = is.columns(dout.size(1), "width");
    run_steps(PreLnAttentionOutputBackwardCall{
        {nullptr, n, width, type, nullptr, is.in(weight, "weight", plain, {width, width}),
         is.in(bias, "bias", plain, {width}), nullptr},
        is.floats(dout, "dout", {n, width}),
        is.floats_out(dbias, "dbias", {width}),
        is.out(dmixed, "dmixed", plain, {n, width}),
        dresult ? is.out(*dresult, "dresult", plain, {n, width}) : nullptr});
}

const Binding binding([](py::module_& module) {
    module.def("pre_ln_attention", &pre_ln_attention, py::kw_only(), "x"_a, "cu_seqlens"_a, "heads"_a, "eps"_a,
               "ln_weight"_a, "ln_bias"_a, "q"_a, "q_bias"_a, "k"_a, "k_bias"_a, "v"_a, "v_bias"_a, "out"_a,
               "out_bias"_a, "rotary"_a, "result"_a, "q_result"_a, "k_result"_a);
    module.def("pre_ln_attention_inputs", &inputs, py::kw_only(), "x"_a, "eps"_a, "ln_weight"_a, "ln_bias"_a,
               "weights"_a, "biases"_a, "results"_a);
    module.def("pre_ln_attention_inputs_backward", &inputs_backward, py::kw_only(), "x"_a, "eps"_a, "ln_weight"_a,
               "ln_bias"_a, "weights"_a, "biases"_a, "gradients"_a, "beside"_a, "dx"_a, "dvectors"_a, "normed"_a);
    module.def("pre_ln_attention_output", &output, py::kw_only(), "x"_a, "mixed"_a, "weight"_a, "bias"_a, "result"_a);
    module.def("pre_ln_attention_output_backward", &output_backward, py::kw_only(), "dout"_a, "weight"_a, "bias"_a,
               "dbias"_a, "dmixed"_a, "dresult"_a);
});

}  // namespace
}  // namespace cpu
}  // namespace esm
