// The tile instructions in plain C++, for machines without AMX: tests/test_amx.py compiles amx.h on top of them, with
// ESM_EMULATE_AMX. No build of the package defines it. They follow Intel's manual, volume 2: what each register holds
// after an instruction, and what a CPU answers with a fault, which here ends the program with a message.
#pragma once

#include <cstdio>
#include <cstdlib>

#include "vec.h"

namespace esm {
namespace cpu {
namespace {
namespace emulated {

constexpr int kRegisters = 8, kMostRows = 16, kMostBytes = 64;

struct Register {
    int rows = 0, bytes = 0;  // as configured
    uint8_t data[kMostRows][kMostBytes] = {};

    void clear() { std::memset(data, 0, sizeof data); }
};

struct State {
    bool configured = false;
    Register registers[kRegisters];
};
thread_local State state;

[[noreturn]] inline void fault(const char* why) {
    std::fprintf(stderr, "AMX emulator: %s\n", why);
    std::abort();
}

inline Register& use(int number) {
    if (!state.configured) fault("a tile is used without a configuration");
    if (number < 0 || number >= kRegisters) fault("there are eight tiles");
    if (!state.registers[number].rows) fault("a tile is used that the configuration leaves out");
    return state.registers[number];
}

inline void release() { state = State(); }

inline void load_config(const void* from) {
    uint8_t config[64];
    std::memcpy(config, from, sizeof config);
    release();
    if (config[0] == 0) return;
    if (config[0] != 1) fault("only palette 1 exists");
    for (int i = 1; i < 16; ++i)
        if (config[i]) fault("start_row and the reserved bytes must be 0");
    for (int i = 0; i < 16; ++i) {
        const int rows = config[48 + i], bytes = config[16 + 2 * i] | config[17 + 2 * i] << 8;
        if (i >= kRegisters && (rows || bytes)) fault("there are eight tiles");
        if (rows > kMostRows || bytes > kMostBytes) fault("a tile has at most 16 rows of 64 bytes");
        if (!rows != !bytes) fault("a tile has rows and bytes, or neither");
        if (i < kRegisters) state.registers[i].rows = rows, state.registers[i].bytes = bytes;
    }
    state.configured = true;
}

inline void load(int to, const void* from, size_t stride) {
    Register& t = use(to);
    t.clear();
    for (int row = 0; row < t.rows; ++row)
        std::memcpy(t.data[row], static_cast<const uint8_t*>(from) + row * stride, size_t(t.bytes));
}

inline void store(int from, void* to, size_t stride) {
    const Register& t = use(from);
    for (int row = 0; row < t.rows; ++row)
        std::memcpy(static_cast<uint8_t*>(to) + row * stride, t.data[row], size_t(t.bytes));
}

inline void zero(int number) { use(number).clear(); }

// The checks every product makes: sums (rows x columns) += a (rows x groups of 4 bytes) times b (groups x columns).
struct Operands {
    Register& sums;
    const Register &a, &b;
    int rows, groups, columns;

    Operands(int to, int left, int right) : sums(use(to)), a(use(left)), b(use(right)) {
        if (to == left || to == right || left == right) fault("a product needs three different tiles");
        if (sums.bytes % 4 || a.bytes % 4 || b.bytes % 4) fault("a product's rows are multiples of 4 bytes");
        if (a.bytes / 4 != b.rows) fault("a product's tiles disagree on the inputs");
        if (sums.rows != a.rows) fault("a product's tiles disagree on the rows");
        if (sums.bytes != b.bytes) fault("a product's tiles disagree on the outputs");
        rows = a.rows, groups = b.rows, columns = b.bytes / 4;
    }
};

// Denormals count as zero, coming and going.
inline float flush(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    bits &= bits & 0x7f800000u ? 0xffffffffu : 0x80000000u;
    std::memcpy(&x, &bits, 4);
    return x;
}

// The halves of a pair are summed apart, in the order of the inputs and one rounding a product; then together, then on
// top of what was there.
inline void dpbf16ps(int to, int left, int right) {
    const Operands o(to, left, right);
    for (int row = 0; row < o.rows; ++row) {
        float halves[2][kMostBytes / 4] = {}, sums[kMostBytes / 4] = {};
        bf16 a[2], b[2 * (kMostBytes / 4)];
        for (int group = 0; group < o.groups; ++group) {
            std::memcpy(a, o.a.data[row] + 4 * group, sizeof a);
            std::memcpy(b, o.b.data[group], sizeof b);
            for (int half = 0; half < 2; ++half) {
                const float x = flush(widen(a[half]));
                for (int n = 0; n < o.columns; ++n)
                    halves[half][n] = flush(__builtin_fmaf(x, flush(widen(b[2 * n + half])), halves[half][n]));
            }
        }
        std::memcpy(sums, o.sums.data[row], sizeof sums);
        for (int n = 0; n < o.columns; ++n) sums[n] = flush(flush(sums[n]) + flush(halves[0][n] + halves[1][n]));
        std::memcpy(o.sums.data[row], sums, sizeof sums);
    }
}

// Unsigned bytes of the left tile times signed ones of the right, exact.
inline void dpbusd(int to, int left, int right) {
    const Operands o(to, left, right);
    for (int row = 0; row < o.rows; ++row) {
        uint32_t sums[kMostBytes / 4];
        std::memcpy(sums, o.sums.data[row], sizeof sums);
        for (int group = 0; group < o.groups; ++group)
            for (int n = 0; n < o.columns; ++n)
                for (int i = 0; i < 4; ++i)
                    sums[n] += uint32_t(o.a.data[row][4 * group + i] * int8_t(o.b.data[group][4 * n + i]));
        std::memcpy(o.sums.data[row], sums, sizeof sums);
    }
}

}  // namespace emulated
}  // namespace
}  // namespace cpu
}  // namespace esm

#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_dpbusd
#define _tile_loadconfig(from) emulated::load_config(from)
#define _tile_release() emulated::release()
#define _tile_zero(number) emulated::zero(number)
#define _tile_loadd(to, from, stride) emulated::load(to, from, stride)
#define _tile_stream_loadd(to, from, stride) emulated::load(to, from, stride)
#define _tile_stored(from, to, stride) emulated::store(from, to, stride)
#define _tile_dpbf16ps(to, left, right) emulated::dpbf16ps(to, left, right)
#define _tile_dpbusd(to, left, right) emulated::dpbusd(to, left, right)
