#include "bind.h"

namespace esm {
namespace cpu {
namespace {

void masked_softmax(const Tensor& scores, const Tensor& lengths, const Tensor& result) {
    const Arguments is("masked_softmax");
    const int64_t batch = scores.size(0), heads = scores.size(1), size = is.columns(scores.size(3), "tokens");
    run(MaskedSoftmaxCall{is.in(scores, "scores", scores.element, {batch, heads, size, size}), type_of(scores, is),
                          static_cast<const int64_t*>(is.in(lengths, "lengths", Element::int64, {batch})), batch, heads,
                          size, is.floats_out(result, "result", {batch, heads, size, size})});
}

const Binding binding([](py::module_& module) {
    module.def("masked_softmax", &masked_softmax, py::kw_only(), "scores"_a, "lengths"_a, "result"_a);
});

}  // namespace
}  // namespace cpu
}  // namespace esm
