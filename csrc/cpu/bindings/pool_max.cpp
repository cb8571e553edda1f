#include "pooling.h"

namespace esm {
namespace cpu {
namespace {

void pool_max(const Tensor& x, const Tensor& cu_seqlens, const Tensor& counted, const Tensor& result) {
    run_pooling<PoolMaxCall>("pool_max", x, cu_seqlens, counted, result);
}

const Binding binding([](py::module_& module) {
    module.def("pool_max", &pool_max, py::kw_only(), "x"_a, "cu_seqlens"_a, "counted"_a, "result"_a);
});

}  // namespace
}  // namespace cpu
}  // namespace esm
