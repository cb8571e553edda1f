#include "bind.h"

namespace esm {
namespace cpu {
namespace {

void masked_lm_head(const Tensor& x, const std::optional<Tensor>& rows, const std::optional<Tensor>& targets, float eps,
                    const Weights& dense, const Tensor& dense_bias, const Tensor& ln_weight, const Tensor& ln_bias,
                    const Weights& table, const Tensor& bias, const Tensor& logits, const std::optional<Tensor>& loss) {
    const Arguments is("masked_lm_head");
    const auto [data, out, width, type] = dense.prepacked();
    const Element plain = layout_of(type).plain;
    const int64_t all = x.size(0), n = rows ? rows->size(0) : all, tokens = table.prepacked().out;
    is.require(!targets == !loss, "targets and loss go together");
    run(MaskedLmHeadCall{is.floats(x, "x", {all, width}),
                         n,
                         rows ? is.places(*rows, "rows", n, all) : nullptr,
                         targets ? is.places(*targets, "targets", n, tokens, kIgnored) : nullptr,
                         eps,
                         is.in(dense_bias, "dense_bias", plain, {width}),
                         is.in(ln_weight, "ln_weight", plain, {width}),
                         is.in(ln_bias, "ln_bias", plain, {width}),
                         is.in(bias, "bias", plain, {tokens}),
                         matrix(is, dense, "dense", type, width, width),
                         matrix(is, table, "table", type, tokens, width),
                         is.out(logits, "logits", plain, {n, tokens}),
                         loss ? is.floats_out(*loss, "loss", {}) : nullptr});
}

// What both directions of training take: no input or result of the forward pass but for `middle` and `wrong`.
MaskedLmHeadTrainCall train_call(const Arguments& is, float eps, const Tensor& dense_weight, const Tensor& dense_bias,
                                 const Tensor& ln_weight, const Tensor& ln_bias, const Tensor& token_table,
                                 const Tensor& bias, const Tensor& middle, const std::optional<Tensor>& wrong) {
    const Type type = type_of(dense_weight, is);
    const Element plain = dense_weight.element;
    const int64_t n = middle.size(0);
    const int width = is.columns(dense_weight.size(0), "width"), tokens = is.columns(token_table.size(0), "tokens");
    return {nullptr,
            n,
            width,
            tokens,
            eps,
            type,
            is.in(dense_weight, "dense_weight", plain, {width, width}),
            is.in(dense_bias, "dense_bias", plain, {width}),
            is.in(ln_weight, "ln_weight", plain, {width}),
            is.in(ln_bias, "ln_bias", plain, {width}),
            is.in(token_table, "token_table", plain, {tokens, width}),
            is.in(bias, "bias", plain, {tokens}),
            nullptr,
            is.out(middle, "middle", plain, {n, width}),
            wrong ? is.floats_out(*wrong, "wrong", {n, tokens}) : nullptr,
            nullptr,
            nullptr};
}

void masked_lm_head_train(const Tensor& x, const std::optional<Tensor>& targets, float eps, const Tensor& dense_weight,
                          const Tensor& dense_bias, const Tensor& ln_weight, const Tensor& ln_bias,
                          const Tensor& token_table, const Tensor& bias, const Tensor& middle,
                          const std::optional<Tensor>& wrong, const Tensor& logits, const std::optional<Tensor>& loss) {
    const Arguments is("masked_lm_head_train");
    MaskedLmHeadTrainCall call =
        train_call(is, eps, dense_weight, dense_bias, ln_weight, ln_bias, token_table, bias, middle, wrong);
    is.require(!targets == !loss && !targets == !wrong, "targets, softmax_minus_onehot and loss go together");
    call.x = is.floats(x, "x", {call.rows, call.width});
    call.targets = targets ? is.places(*targets, "targets", call.rows, call.tokens, kIgnored) : nullptr;
    call.logits = is.out(logits, "logits", dense_weight.element, {call.rows, call.tokens});
    call.loss = loss ? is.floats_out(*loss, "loss", {}) : nullptr;
    run_steps(call);
}

void masked_lm_head_backward(float eps, const Tensor& dense_weight, const Tensor& dense_bias, const Tensor& ln_weight,
                             const Tensor& ln_bias, const Tensor& token_table, const Tensor& bias, const Tensor& middle,
                             const std::optional<Tensor>& wrong, float dloss, const Tensor& dlogits, const Tensor& dx,
                             const Tensor& dvectors, const Tensor& normed, const Tensor& dmiddle,
                             const Tensor& dscores) {
    const Arguments is("masked_lm_head_backward");
    const MaskedLmHeadTrainCall forward =
        train_call(is, eps, dense_weight, dense_bias, ln_weight, ln_bias, token_table, bias, middle, wrong);
    const Element plain = dense_weight.element;
    const int64_t n = forward.rows, width = forward.width, tokens = forward.tokens;
    run_steps(MaskedLmHeadBackwardCall{forward, dloss, is.in(dlogits, "dlogits", plain, {n, tokens}),
                                       is.floats_out(dx, "dx", {n, width}),
                                       is.floats_out(dvectors, "dvectors", {3 * width + tokens}),
                                       is.out(normed, "normed", plain, {n, width}),
                                       is.out(dmiddle, "dmiddle", plain, {n, width}),
                                       is.out(dscores, "dscores", plain, {n, tokens})});
}

const Binding binding([](py::module_& module) {
    module.def("masked_lm_head", &masked_lm_head, py::kw_only(), "x"_a, "rows"_a, "targets"_a, "eps"_a, "dense"_a,
               "dense_bias"_a, "ln_weight"_a, "ln_bias"_a, "table"_a, "bias"_a, "logits"_a, "loss"_a);
    module.def("masked_lm_head_train", &masked_lm_head_train, py::kw_only(), "x"_a, "targets"_a, "eps"_a,
               "dense_weight"_a, "dense_bias"_a, "ln_weight"_a, "ln_bias"_a, "token_table"_a, "bias"_a, "middle"_a,
               "softmax_minus_onehot"_a, "logits"_a, "loss"_a);
    module.def("masked_lm_head_backward", &masked_lm_head_backward, py::kw_only(), "eps"_a, "dense_weight"_a,
               "dense_bias"_a, "ln_weight"_a, "ln_bias"_a, "token_table"_a, "bias"_a, "middle"_a,
               "softmax_minus_onehot"_a, "dloss"_a, "dlogits"_a, "dx"_a, "dvectors"_a, "normed"_a, "dmiddle"_a,
               "dscores"_a);
});

}  // namespace
}  // namespace cpu
}  // namespace esm
