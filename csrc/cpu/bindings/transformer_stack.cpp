#include <array>
#include <tuple>

#include "pooling.h"

namespace esm {
namespace cpu {
namespace {

// An op that pools, what it takes for each row, and where its result goes.
using Pool = std::tuple<std::string, Tensor, Tensor>;
// A layer's vectors in the order of `ops.LayerWeights`, its matrices likewise, the eps of its norms, where its stream is
// wanted too, and what is pooled of it.
using Layer = std::tuple<std::array<Tensor, 10>, std::array<const Weights*, 6>, std::array<float, 2>,
                         std::optional<Tensor>, std::vector<Pool>>;

// What all layers of a call share.
struct Stream {
    const float* x;
    float* result;
    int64_t rows;
    const int32_t* cu_seqlens;
    int64_t sequences;
    int heads, width;
    Type type;
    const float* rotary;
};

LayerCall layer_call(const Arguments& is, const Stream& stream, const Layer& layer, const float* from) {
    const auto& [vectors, weights, eps, copy, pools] = layer;
    for (const Weights* given : weights) is.require(given, "a layer has six matrices");
    const Element plain = layout_of(stream.type).plain;
    const int width = stream.width, hidden = weights[4]->prepacked().out;
    const auto vector = [&, &v = vectors](size_t i) {
        return is.in(v[i], "a layer's vector", plain, {i == 8 ? hidden : width});
    };
    const auto square = [&, &w = weights](size_t i) {
        return matrix(is, *w[i], "a layer's matrix", stream.type, width, width);
    };
    return {{from, stream.result, stream.rows, stream.cu_seqlens, stream.sequences, stream.heads, eps[0], vector(0),
             vector(1), vector(2), vector(3), vector(4), vector(5), square(0), square(1), square(2), square(3),
             stream.rotary, nullptr, nullptr},
            {stream.result, stream.result, stream.rows, eps[1], vector(6), vector(7), vector(8), vector(9),
             matrix(is, *weights[4], "fc1", stream.type, hidden, width),
             matrix(is, *weights[5], "fc2", stream.type, width, hidden)},
            copy ? is.floats_out(*copy, "a layer's copy", {stream.rows, width}) : nullptr, nullptr, 0};
}

std::vector<StackPool> pools_of(const Arguments& is, const Stream& stream, const Layer& layer) {
    std::vector<StackPool> made;
    for (const auto& [name, rows, result] : std::get<4>(layer)) {
        const Pooling op = pooling_named(is, name);
        made.push_back({op, pooling_call(is, op, stream.result, {stream.rows, stream.width}, stream.cu_seqlens,
                                         stream.sequences, rows, result)});
    }
    return made;
}

void transformer_stack(const Tensor& x, const Tensor& cu_seqlens, int64_t heads, const std::optional<Tensor>& rotary,
                       const std::vector<Layer>& layers, const Tensor& result) {
    const Arguments is("transformer_stack");
    is.require(!layers.empty() && std::get<1>(layers[0])[0], "a stack has at least one layer, and matrices in it");
    const Prepacked& q = std::get<1>(layers[0])[0]->prepacked();
    const int64_t n = x.size(0);
    const int dim = is.head_dim(q.in, heads);
    const Stream stream{is.floats(x, "x", {n, q.in}), is.floats_out(result, "result", {n, q.in}), n,
                        is.offsets(cu_seqlens, "cu_seqlens", n), cu_seqlens.size(0) - 1, int(heads), q.in, q.type,
                        rotary ? is.floats(*rotary, "rotary", {2, n, dim}) : nullptr};
    std::vector<LayerCall> calls;
    std::vector<std::vector<StackPool>> pools;
    for (const Layer& layer : layers) {
        calls.push_back(layer_call(is, stream, layer, calls.empty() ? stream.x : stream.result));
        pools.push_back(pools_of(is, stream, layer));
        calls.back().pools = pools.back().data();  // which stay where they are when the list of them moves
        calls.back().pool_count = int64_t(pools.back().size());
    }
    run_steps(TransformerStackCall{calls.data(), int64_t(calls.size())});
}

const Binding binding([](py::module_& module) {
    module.def("transformer_stack", &transformer_stack, py::kw_only(), "x"_a, "cu_seqlens"_a, "heads"_a, "rotary"_a,
               "layers"_a, "result"_a);
});

}  // namespace
}  // namespace cpu
}  // namespace esm
