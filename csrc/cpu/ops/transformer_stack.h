// transformer_stack: the halves of all layers, one after the other.
#pragma once

#include "../pooling.h"

namespace esm {
namespace cpu {

// What is pooled of the stream after a layer.
struct StackPool {
    Pooling op;
    PoolingCall call;
};

// Layers of one shape over the same rows. The first reads the caller's x; every other reads the result, in place.
struct LayerCall {
    PreLnAttentionCall attention;
    GeluFfnCall ffn;
    float* copy;  // where the stream after this layer goes too, or null
    const StackPool* pools;
    int64_t pool_count;
};
struct TransformerStackCall {
    const LayerCall* layers;
    int64_t count;
};

}  // namespace cpu
}  // namespace esm

#if defined(ESM_LEVEL)
#include "gelu_ffn.h"
#include "pool.h"
#include "pool_max.h"
#include "pool_moments.h"
#include "pre_ln_attention.h"

namespace esm {
namespace cpu {
namespace {

void copy_stream(const LayerCall& layer, int64_t first, int64_t last) {
    const size_t width = size_t(layer.ffn.fc1.in), at = size_t(first) * width;
    if (layer.copy) std::memcpy(layer.copy + at, layer.ffn.result + at, size_t(last - first) * width * sizeof(float));
}

void pool_strip_of(const StackPool& pool, const Strip& strip) {
    switch (pool.op) {
#define X(op, rows, element, vectors) \
    case Pooling::op:                 \
        return op##_strip(pool.call, strip);
        ESM_POOLINGS(X)
#undef X
    }
}

// The stream after a layer stays as it is until the next attention is added to it.
void pool_stream(const LayerCall& layer) {
    if (!layer.pool_count) return;
    each_strip(layer.pools->call, [&](const Strip& strip) {
        for (int64_t i = 0; i < layer.pool_count; ++i) pool_strip_of(layer.pools[i], strip);
    });
}

// From one attention to the next a block of rows goes through all steps without meeting the others.
template <class W>
void transformer_stack_of(const TransformerStackCall& call) {
    int64_t attention_floats = 0, ffn_floats = 0;
    for (int64_t i = 0; i < call.count; ++i) {
        attention_floats = larger(attention_floats, Attention<W>::vectors(call.layers[i].attention));
        ffn_floats = larger(ffn_floats, Ffn<W>::vectors(call.layers[i].ffn));
    }
    float* memory = buffer<float>(Layer::vectors, 2 * attention_floats + ffn_floats, 1);
    const auto attention_of = [&](int64_t i) {
        return Attention<W>(call.layers[i].attention, memory + i % 2 * attention_floats);
    };
    const int64_t rows = call.layers->attention.rows;
    const bool by_panels = few<W>(rows);

    Attention<W> attention = attention_of(0);
    if (by_panels)
        attention.project_by_panels();
    else
        each_block<typename FormatOf<W>::Activation>(rows, [&](int64_t first, int64_t last) { attention.project(first, last); });
    for (int64_t i = 0; i < call.count; ++i) {
        attention.attend();
        const LayerCall& layer = call.layers[i];
        const bool more = i + 1 < call.count;
        const Attention<W> next = more ? attention_of(i + 1) : attention;
        const Ffn<W> ffn(layer.ffn, memory + 2 * attention_floats);
        if (by_panels) {
            attention.finish_by_panels();
            ffn.by_panels();
            copy_stream(layer, 0, rows);
            if (more) next.project_by_panels();
        } else {
            each_block<typename FormatOf<W>::Activation>(rows, [&](int64_t first, int64_t last) {
                attention.finish(first, last);
                ffn.rows(first, last);
                copy_stream(layer, first, last);
                if (more) next.project(first, last);
            });
        }
        pool_stream(layer);
        attention = next;
    }
}

}  // namespace
}  // namespace cpu
}  // namespace esm
#endif
