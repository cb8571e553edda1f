#include "bind.h"

namespace esm {
namespace cpu {
namespace {

void int8_linear(const Tensor& x, const Weights& weights, const Tensor& result) {
    const Arguments is("int8_linear");
    const Prepacked& matrix = weights.prepacked();
    const int64_t n = x.size(0);
    run(Int8LinearCall{is.floats(x, "x", {n, matrix.in}), n, matrix, is.floats_out(result, "result", {n, matrix.out})});
}

const Binding binding([](py::module_& module) {
    module.def("int8_linear", &int8_linear, py::kw_only(), "x"_a, "weights"_a, "result"_a);
});

}  // namespace
}  // namespace cpu
}  // namespace esm
