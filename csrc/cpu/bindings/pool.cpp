#include "bind.h"

namespace esm {
namespace cpu {
namespace {

void pool(const Tensor& x, const Tensor& cu_seqlens, const Tensor& weight, const Tensor& result) {
    const Arguments is("pool");
    const int64_t n = x.size(0);
    const int width = is.columns(x.size(1), "width");
    const int32_t* ends = is.offsets(cu_seqlens, "cu_seqlens", n);
    const int64_t sequences = cu_seqlens.size(0) - 1;
    run(PoolCall{is.floats(x, "x", {n, width}), is.floats(weight, "weight", {n}), ends, sequences, width,
                 is.floats_out(result, "result", {sequences, width})});
}

const Binding binding([](py::module_& module) {
    module.def("pool", &pool, py::kw_only(), "x"_a, "cu_seqlens"_a, "weight"_a, "result"_a);
});

}  // namespace
}  // namespace cpu
}  // namespace esm
