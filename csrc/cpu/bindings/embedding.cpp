#include "bind.h"

namespace esm {
namespace cpu {
namespace {

void embedding(const Tensor& tokens, const Tensor& positions, const Tensor& cu_seqlens, const Tensor& token_table,
               const Tensor& position_table, const std::optional<Tensor>& ln_weight,
               const std::optional<Tensor>& ln_bias, bool token_dropout, int64_t mask, float kept,
               const std::optional<Tensor>& scale, float eps, const Tensor& result) {
    const Arguments is("embedding");
    const Element plain = token_table.element;
    const int64_t n = tokens.size(0), n_tokens = token_table.size(0), n_positions = position_table.size(0);
    const int width = is.columns(token_table.size(1), "width");
    is.require(!ln_weight == !ln_bias, "ln_weight and ln_bias go together");
    const int32_t* ends = token_dropout ? is.offsets(cu_seqlens, "cu_seqlens", n) : nullptr;
    const int64_t sequences = cu_seqlens.size(0) - 1;
    run(EmbeddingCall{is.places(tokens, "tokens", n, n_tokens),
                      is.places(positions, "positions", n, n_positions),
                      ends,
                      n,
                      sequences,
                      is.in(token_table, "token_table", plain, {n_tokens, width}),
                      is.in(position_table, "position_table", plain, {n_positions, width}),
                      ln_weight ? is.in(*ln_weight, "ln_weight", plain, {width}) : nullptr,
                      ln_bias ? is.in(*ln_bias, "ln_bias", plain, {width}) : nullptr,
                      type_of(token_table, is),
                      width,
                      token_dropout,
                      mask,
                      kept,
                      scale ? is.floats(*scale, "scale", {sequences}) : nullptr,
                      eps,
                      is.floats_out(result, "result", {n, width})});
}

const Binding binding([](py::module_& module) {
    module.def("embedding", &embedding, py::kw_only(), "tokens"_a, "positions"_a, "cu_seqlens"_a, "token_table"_a,
               "position_table"_a, "ln_weight"_a, "ln_bias"_a, "token_dropout"_a, "mask"_a, "kept"_a, "scale"_a,
               "eps"_a, "result"_a);
});

}  // namespace
}  // namespace cpu
}  // namespace esm
