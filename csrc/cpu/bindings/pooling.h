// What the bindings of poolings share, and that of a stack which pools its stream.
#pragma once

#include <string>

#include "bind.h"

namespace esm {
namespace cpu {

inline Pooling pooling_named(const Arguments& is, const std::string& name) {
#define X(op, rows, element, vectors) \
    if (name == #op) return Pooling::op;
    ESM_POOLINGS(X)
#undef X
    is.refuse("there is no pooling " + name);
}

struct StreamShape {
    int64_t rows;
    int width;
};

// x and cu_seqlens are of that shape, and right.
inline PoolingCall pooling_call(const Arguments& is, Pooling op, const float* x, StreamShape shape,
                                const int32_t* cu_seqlens, int64_t sequences, const Tensor& rows, const Tensor& result) {
    const auto call = [&](const char* name, Element element, int vectors) {
        float* to = vectors == 1 ? is.floats_out(result, "result", {sequences, shape.width})
                                 : is.floats_out(result, "result", {sequences, vectors, shape.width});
        return PoolingCall{x, is.in(rows, name, element, {shape.rows}), cu_seqlens, sequences, shape.width, to};
    };
    switch (op) {
#define X(op, rows, element, vectors) \
    case Pooling::op:                 \
        return call(#rows, Element::element, vectors);
        ESM_POOLINGS(X)
#undef X
    }
    is.refuse("there is no such pooling");
}

// The whole binding of the op that has such calls.
template <class Call>
void run_pooling(const char* name, const Tensor& x, const Tensor& cu_seqlens, const Tensor& rows, const Tensor& result) {
    const Arguments is(name);
    const StreamShape shape{x.size(0), is.columns(x.size(1), "width")};
    const int32_t* ends = is.offsets(cu_seqlens, "cu_seqlens", shape.rows);
    const float* from = is.floats(x, "x", {shape.rows, shape.width});
    run(Call{pooling_call(is, pooling_named(is, name), from, shape, ends, cu_seqlens.size(0) - 1, rows, result)});
}

}  // namespace cpu
}  // namespace esm
