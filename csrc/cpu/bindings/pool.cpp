#include "pooling.h"

namespace esm {
namespace cpu {
namespace {

void pool(const Tensor& x, const Tensor& cu_seqlens, const Tensor& weight, const Tensor& result) {
    run_pooling<PoolCall>("pool", x, cu_seqlens, weight, result);
}

const Binding binding([](py::module_& module) {
    module.def("pool", &pool, py::kw_only(), "x"_a, "cu_seqlens"_a, "weight"_a, "result"_a);
});

}  // namespace
}  // namespace cpu
}  // namespace esm
