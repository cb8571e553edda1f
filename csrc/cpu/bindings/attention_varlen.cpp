#include "bind.h"

namespace esm {
namespace cpu {
namespace {

// What both directions take; `out` is not among it.
AttentionVarlenCall call_of(const Arguments& is, const Tensor& q, const Tensor& k, const Tensor& v,
                            const Tensor& cu_seqlens, float scale, const std::optional<Tensor>& log_sums) {
    const int64_t n = q.size(0), heads = q.size(1), dim = q.size(2);
    const Element plain = q.element;
    is.head_dim(int64_t(is.columns(heads, "heads")) * is.columns(dim, "head_dim"), heads);
    return {is.in(q, "q", plain, {n, heads, dim}),
            is.in(k, "k", plain, {n, heads, dim}),
            is.in(v, "v", plain, {n, heads, dim}),
            type_of(q, is),
            n,
            is.offsets(cu_seqlens, "cu_seqlens", n),
            cu_seqlens.size(0) - 1,
            int(heads),
            int(dim),
            scale,
            nullptr,
            log_sums ? is.floats_out(*log_sums, "log_sums", {heads, n}) : nullptr};
}

void attention_varlen(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens, float scale,
                      const std::optional<Tensor>& log_sums, const Tensor& out) {
    const Arguments is("attention_varlen");
    AttentionVarlenCall call = call_of(is, q, k, v, cu_seqlens, scale, log_sums);
    call.out = is.out(out, "out", q.element, {call.rows, call.heads, call.head_dim});
    run(call);
}

void attention_varlen_backward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens, float scale,
                               const Tensor& log_sums, const Tensor& out, const Tensor& dout, const Tensor& dq,
                               const Tensor& dk, const Tensor& dv) {
    const Arguments is("attention_varlen_backward");
    const AttentionVarlenCall forward = call_of(is, q, k, v, cu_seqlens, scale, log_sums);
    const int64_t n = forward.rows, heads = forward.heads, dim = forward.head_dim;
    run(AttentionVarlenBackwardCall{forward, is.in(out, "out", q.element, {n, heads, dim}),
                                    is.in(dout, "dout", q.element, {n, heads, dim}),
                                    is.out(dq, "dq", q.element, {n, heads, dim}),
                                    is.out(dk, "dk", q.element, {n, heads, dim}),
                                    is.out(dv, "dv", q.element, {n, heads, dim})});
}

const Binding binding([](py::module_& module) {
    module.def("attention_varlen", &attention_varlen, py::kw_only(), "q"_a, "k"_a, "v"_a, "cu_seqlens"_a, "scale"_a,
               "log_sums"_a, "out"_a);
    module.def("attention_varlen_backward", &attention_varlen_backward, py::kw_only(), "q"_a, "k"_a, "v"_a,
               "cu_seqlens"_a, "scale"_a, "log_sums"_a, "out"_a, "dout"_a, "dq"_a, "dk"_a, "dv"_a);
});

}  // namespace
}  // namespace cpu
}  // namespace esm
