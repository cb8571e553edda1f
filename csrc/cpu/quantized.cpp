#include "quantized.h"

#include <algorithm>
#include <cstring>

namespace esm {
namespace cpu {
namespace {

constexpr int kQuad = 4;
constexpr size_t kGroupHead = kPanel * (sizeof(int32_t) + sizeof(float));

int padded(int inputs) { return (inputs + kInputs8 - 1) / kInputs8 * kInputs8; }
int panels_of(int out) { return (out + kPanel - 1) / kPanel; }
size_t panel_size(int in) { return size_t(padded(in)) * kPanel + size_t(groups_of(in)) * kGroupHead; }

// The groups of the panels [first, last): use(bytes of the group, first output, outputs, first input, inputs, group).
template <class Bytes, class Use>
void each_group(Bytes* packed, int out, int in, size_t first, size_t last, const Use& use) {
    for (size_t panel = first; panel < last; ++panel) {
        Bytes* at = packed + panel * panel_size(in);
        const int output = int(panel) * kPanel, outputs = std::min(kPanel, out - output);
        for (int group = 0; group < groups_of(in); ++group) {
            const int input = group * kGroup, inputs = std::min(kGroup, in - input);
            use(at, output, outputs, input, inputs, group);
            at += kGroupHead + size_t(padded(inputs)) * kPanel;
        }
    }
}

size_t place(int row, int input) { return size_t(input / kQuad * kPanel + row) * kQuad + size_t(input % kQuad); }

}  // namespace

size_t quantized_size(int out, int in) { return size_t(panels_of(out)) * panel_size(in); }

void pack_quantized(const int8_t* numbers, const float* scales, int out, int in, void* packed) {
    struct Work {
        const int8_t* numbers;
        const float* scales;
        int out, in;
        uint8_t* packed;

        static void run(void* context, size_t first, size_t last) {
            const Work& w = *static_cast<const Work*>(context);
            each_group(w.packed, w.out, w.in, first, last, [&](uint8_t* to, int o, int outputs, int i, int inputs, int g) {
                std::memset(to, 0, kGroupHead + size_t(padded(inputs)) * kPanel);
                for (int row = 0; row < outputs; ++row) {
                    const int8_t* from = w.numbers + size_t(o + row) * size_t(w.in) + i;
                    int32_t sum = 0;
                    for (int k = 0; k < inputs; ++k) {
                        sum += from[k];
                        to[kGroupHead + place(row, k)] = uint8_t(from[k]);
                    }
                    const int32_t correction = -kZero * sum;
                    std::memcpy(to + size_t(row) * sizeof correction, &correction, sizeof correction);
                    const float scale = w.scales[size_t(o + row) * size_t(groups_of(w.in)) + size_t(g)];
                    std::memcpy(to + (kPanel + size_t(row)) * sizeof scale, &scale, sizeof scale);
                }
            });
        }
    } work{numbers, scales, out, in, static_cast<uint8_t*>(packed)};
    parallel(size_t(panels_of(out)), 1, Work::run, &work);
}

void unpack_quantized(const void* packed, int out, int in, int8_t* numbers, float* scales) {
    const size_t panels = size_t(panels_of(out));
    const auto* bytes = static_cast<const uint8_t*>(packed);
    each_group(bytes, out, in, 0, panels, [&](const uint8_t* from, int o, int outputs, int i, int inputs, int g) {
        for (int row = 0; row < outputs; ++row) {
            int8_t* to = numbers + size_t(o + row) * size_t(in) + i;
            for (int k = 0; k < inputs; ++k) std::memcpy(to + k, from + kGroupHead + place(row, k), 1);
            std::memcpy(scales + size_t(o + row) * size_t(groups_of(in)) + size_t(g),
                        from + (kPanel + size_t(row)) * sizeof(float), sizeof(float));
        }
    });
}

}  // namespace cpu
}  // namespace esm
