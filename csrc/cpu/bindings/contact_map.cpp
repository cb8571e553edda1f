#include "bind.h"

namespace esm {
namespace cpu {
namespace {

void contact_map(const Tensor& q, const Tensor& k, const Tensor& cu_seqlens, const Tensor& keep, const Tensor& weight,
                 float scale, const Tensor& result) {
    const Arguments is("contact_map");
    const int64_t n = q.size(0), heads = q.size(1), dim = q.size(2);
    is.head_dim(int64_t(is.columns(heads, "heads")) * is.columns(dim, "head_dim"), heads);
    const int32_t* ends = is.offsets(cu_seqlens, "cu_seqlens", n);
    const int64_t sequences = cu_seqlens.size(0) - 1;
    int64_t size = 0;
    for (int64_t i = 0; i < sequences; ++i) size += int64_t(ends[i + 1] - ends[i]) * (ends[i + 1] - ends[i]);
    run(ContactMapCall{is.in(q, "q", q.element, {n, heads, dim}), is.in(k, "k", q.element, {n, heads, dim}),
                       type_of(q, is), ends, sequences, int(heads), int(dim),
                       static_cast<const uint8_t*>(is.in(keep, "keep", Element::boolean, {n})),
                       is.floats(weight, "weight", {heads}), scale, is.floats_out(result, "result", {size})});
}

const Binding binding([](py::module_& module) {
    module.def("contact_map", &contact_map, py::kw_only(), "q"_a, "k"_a, "cu_seqlens"_a, "keep"_a, "weight"_a,
               "scale"_a, "result"_a);
});

}  // namespace
}  // namespace cpu
}  // namespace esm
