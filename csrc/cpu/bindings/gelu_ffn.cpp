#include "bind.h"

namespace esm {
namespace cpu {
namespace {

void gelu_ffn(const Tensor& x, float eps, const Tensor& ln_weight, const Tensor& ln_bias, const Weights& fc1,
              const Tensor& fc1_bias, const Weights& fc2, const Tensor& fc2_bias, const Tensor& result) {
    const Arguments is("gelu_ffn");
    const auto [data, hidden, width, type] = fc1.prepacked();
    const Element plain = layout_of(type).plain;
    const int64_t n = x.size(0);
    run_steps(GeluFfnCall{is.floats(x, "x", {n, width}), is.floats_out(result, "result", {n, width}), n, eps,
                          is.in(ln_weight, "ln_weight", plain, {width}), is.in(ln_bias, "ln_bias", plain, {width}),
                          is.in(fc1_bias, "fc1_bias", plain, {hidden}), is.in(fc2_bias, "fc2_bias", plain, {width}),
                          fc1.prepacked(), matrix(is, fc2, "fc2", type, width, hidden)});
}

// What both directions of training take; `result` is not among it.
GeluFfnTrainCall train_call(const Arguments& is, const Tensor& x, float eps, const Tensor& ln_weight,
                            const Tensor& ln_bias, const Tensor& fc1_weight, const Tensor& fc1_bias,
                            const Tensor& fc2_weight, const Tensor& fc2_bias, const Tensor& middle) {
    const Type type = type_of(fc1_weight, is);
    const Element plain = fc1_weight.element;
    const int64_t n = x.size(0);
    const int width = is.columns(x.size(1), "width"), hidden = is.columns(fc1_weight.size(0), "hidden");
    return {is.floats(x, "x", {n, width}),
            n,
            width,
            hidden,
            eps,
            type,
            is.in(ln_weight, "ln_weight", plain, {width}),
            is.in(ln_bias, "ln_bias", plain, {width}),
            is.in(fc1_weight, "fc1_weight", plain, {hidden, width}),
            is.in(fc1_bias, "fc1_bias", plain, {hidden}),
            is.in(fc2_weight, "fc2_weight", plain, {width, hidden}),
            is.in(fc2_bias, "fc2_bias", plain, {width}),
            is.out(middle, "middle", plain, {n, hidden}),
            nullptr};
}

void gelu_ffn_train(const Tensor& x, float eps, const Tensor& ln_weight, const Tensor& ln_bias,
                    const Tensor& fc1_weight, const Tensor& fc1_bias, const Tensor& fc2_weight, const Tensor& fc2_bias,
                    const Tensor& middle, const Tensor& result) {
    const Arguments is("gelu_ffn_train");
    GeluFfnTrainCall call =
        train_call(is, x, eps, ln_weight, ln_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, middle);
    call.result = is.floats_out(result, "result", {call.rows, call.width});
    run_steps(call);
}

void gelu_ffn_backward(const Tensor& x, float eps, const Tensor& ln_weight, const Tensor& ln_bias,
                       const Tensor& fc1_weight, const Tensor& fc1_bias, const Tensor& fc2_weight,
                       const Tensor& fc2_bias, const Tensor& middle, const Tensor& dout, const Tensor& dx,
                       const Tensor& dvectors, const Tensor& normed, const Tensor& dmiddle, const Tensor& activated,
                       const std::optional<Tensor>& dresult) {
    const Arguments is("gelu_ffn_backward");
    const GeluFfnTrainCall forward =
        train_call(is, x, eps, ln_weight, ln_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, middle);
    const Element plain = fc1_weight.element;
    const int64_t n = forward.rows, width = forward.width, hidden = forward.hidden;
    run_steps(GeluFfnBackwardCall{forward, is.floats(dout, "dout", {n, width}), is.floats_out(dx, "dx", {n, width}),
                                  is.floats_out(dvectors, "dvectors", {3 * width + hidden}),
                                  is.out(normed, "normed", plain, {n, width}),
                                  is.out(dmiddle, "dmiddle", plain, {n, hidden}),
                                  is.out(activated, "activated", plain, {n, hidden}),
                                  dresult ? is.out(*dresult, "dresult", plain, {n, width}) : nullptr});
}

const Binding binding([](py::module_& module) {
    module.def("gelu_ffn", &gelu_ffn, py::kw_only(), "x"_a, "eps"_a, "ln_weight"_a, "ln_bias"_a, "fc1"_a, "fc1_bias"_a,
               "fc2"_a, "fc2_bias"_a, "result"_a);
    module.def("gelu_ffn_train", &gelu_ffn_train, py::kw_only(), "x"_a, "eps"_a, "ln_weight"_a, "ln_bias"_a,
               "fc1_weight"_a, "fc1_bias"_a, "fc2_weight"_a, "fc2_bias"_a, "middle"_a, "result"_a);
    module.def("gelu_ffn_backward", &gelu_ffn_backward, py::kw_only(), "x"_a, "eps"_a, "ln_weight"_a, "ln_bias"_a,
               "fc1_weight"_a, "fc1_bias"_a, "fc2_weight"_a, "fc2_bias"_a, "middle"_a, "dout"_a, "dx"_a, "dvectors"_a,
               "normed"_a, "dmiddle"_a, "activated"_a, "dresult"_a);
});

}  // namespace
}  // namespace cpu
}  // namespace esm
