// Rows x prepacked weights of bf16 or 8 bits on AMX's tile registers, in the place of the formats' own products where
// the CPU has them.
//
// A tile of 32 rows x 32 outputs takes all eight registers: four of sums, two of rows, two of weights, so that every
// load feeds two products. Packed weights are tiles as they stand: a step is 16 lines, of 32 outputs with 2 inputs side
// by side (bf16) or 4 (8 bits), the left 16 outputs in the first half of each line, the right 16 in the second.
#pragma once

#include "gemm.h"
#include "workspace.h"

#if defined(ESM_EMULATE_AMX)
#include "amx_emulator.h"
#endif

namespace esm {
namespace cpu {
namespace {

#if defined(__AMX_BF16__)

constexpr int kRegisterRows = 16;
constexpr size_t kLine = 128;
template <>
constexpr int kTileRows<bf16> = 2 * kRegisterRows;
template <>
constexpr int kTileRows<biased8> = 2 * kRegisterRows;

// Height of the tile that this thread's registers are configured for, 0 without a configuration.
thread_local int configured_height = 0;

// The registers of rows and sums get the very rows that a tile has: nothing beyond them is read or written.
ESM_INLINE void configure(int height) {
    if (height == configured_height) return;
    struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {};
        uint8_t rows[16] = {};
    } config;
    const int upper = height < kRegisterRows ? height : kRegisterRows, lower = height - upper;
    const int rows[8] = {upper, upper, lower, lower, upper, lower, kRegisterRows, kRegisterRows};
    for (int i = 0; i < 8; ++i) config.rows[i] = uint8_t(rows[i]), config.row_bytes[i] = rows[i] ? 64 : 0;
    asm volatile("" : : "r"(&config) : "memory");  // the intrinsic does not say that it reads all of it
    _tile_loadconfig(&config);
    configured_height = height;
}

// For the end of each piece of a thread's work (each() in work.h), whose first tile has configured the registers. A
// thread that parked or went back to Python with live tiles would have the system save and restore their 8 KB at every
// switch, and other code of the process would find our configuration in its way. (After an exception, for want of
// memory, the next piece releases them.)
ESM_INLINE void release_tiles() {
    if (configured_height) _tile_release();
    configured_height = 0;
}

// The last inputs of the rows, zeros behind them. What follows a row in memory may be NaN, or another head's queries
// while another thread is writing there.
ESM_INLINE void copy_end(const bf16* a, size_t lda, int height, int count, bf16* to, size_t ld = kInputs) {
    const __mmask32 mask = count < kInputs ? (__mmask32(1) << count) - 1 : ~__mmask32(0);
    for (int r = 0; r < height; ++r) _mm512_storeu_si512(to + r * ld, _mm512_maskz_loadu_epi16(mask, a + r * lda));
}

// The weights of so many steps stay in the first-level cache for the next tile of rows; the rest, and the rows, pass it
// by. What the epilogue touches has to fit there too.
constexpr int kKept = 14, kKept8 = 12;

// The registers of sums that a tile has: those of its upper left quarter, and these.
struct Quarters {
    bool lower, right;
};

// The loads and products of one step, the loads of each product before it: sums += rows (`stride` bytes apart) x 16
// lines of a panel. turn(register) is called for each register of sums before its product.
template <class A, class Turn>
ESM_INLINE void step(bool kept, Quarters has, const A* rows, size_t stride, const void* lines, const Turn& turn) {
    const char *upper = reinterpret_cast<const char*>(rows), *left = static_cast<const char*>(lines), *right = left + 64;
    constexpr bool kBytes = sizeof(A) == 1;
    // The intrinsics do not say what they read: all stores before this line are made before them.
    asm volatile("" : : "r"(upper), "r"(left) : "memory");
    _tile_stream_loadd(4, upper, stride);
    if (kept)
        _tile_loadd(6, left, kLine);
    else
        _tile_stream_loadd(6, left, kLine);
    turn(0);
    if constexpr (kBytes)
        _tile_dpbusd(0, 4, 6);
    else
        _tile_dpbf16ps(0, 4, 6);
    if (has.right) {
        if (kept)
            _tile_loadd(7, right, kLine);
        else
            _tile_stream_loadd(7, right, kLine);
        turn(1);
        if constexpr (kBytes)
            _tile_dpbusd(1, 4, 7);
        else
            _tile_dpbf16ps(1, 4, 7);
    }
    if (!has.lower) return;
    _tile_stream_loadd(5, upper + kRegisterRows * stride, stride);
    if (has.right) {
        turn(3);
        if constexpr (kBytes)
            _tile_dpbusd(3, 5, 7);
        else
            _tile_dpbf16ps(3, 5, 7);
    }
    turn(2);
    if constexpr (kBytes)
        _tile_dpbusd(2, 5, 6);
    else
        _tile_dpbf16ps(2, 5, 6);
}
template <class A>
ESM_INLINE void step(bool kept, Quarters has, const A* rows, size_t stride, const void* lines) {
    step(kept, has, rows, stride, lines, [](int) {});
}

// The sums, of 4 bytes each, to rows of so many elements.
template <class T>
ESM_INLINE void store_sums(Quarters has, T* c, size_t ldc) {
    const size_t stride = ldc * sizeof(T);
    _tile_stored(0, c, stride);
    if (has.right) _tile_stored(1, c + kRegisterRows, stride);
    if (has.lower) _tile_stored(2, c + kRegisterRows * ldc, stride);
    if (has.lower && has.right) _tile_stored(3, c + kRegisterRows * ldc + kRegisterRows, stride);
}

// c (height x 32, rows ldc apart) = a (height x in, rows lda apart) times one panel, and `beside` called once for
// every 32 inputs: the vector units are free meanwhile. The inputs' order is the same for every height.
template <class Beside>
ESM_INLINE void tile(int height, const bf16* a, size_t lda, const bf16* panel, int in, float* c, size_t ldc,
                     const Beside& beside) {
    const Quarters has{height > kRegisterRows, true};
    alignas(64) bf16 end[kTileRows<bf16> * kInputs];
    configure(height);
    _tile_zero(0);
    _tile_zero(1);
    if (has.lower) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int k = 0, number = 0; k < in; k += kInputs, ++number, panel += kInputs * kPanel) {
        if (in - k < kInputs) {
            copy_end(a + k, lda, height, in - k, end);
            step(number < kKept, has, end, kInputs * sizeof(bf16), panel);
        } else {
            step(number < kKept, has, a + k, lda * sizeof(bf16), panel);
        }
        beside();
    }
    store_sums(has, c, ldc);
}

ESM_INLINE void tile_of(int height, const bf16* a, size_t lda, const bf16* panel, int in, float* c, size_t ldc) {
    tile(height, a, lda, panel, in, c, ldc, [] {});
}

// A tile of sums on its way through the epilogue, some rows at a time.
struct Finishing {
    const float* c = nullptr;
    int64_t row = 0;
    int height = 0, column = 0, done = 0;

    template <class Finish>
    ESM_INLINE void advance(int rows, const Finish& finish) {
        const int more = height - done < rows ? height - done : rows;
        if (more > 0) finish(c + done * kPanel, row + done, more, column);
        done += more;
    }
};

// The registers of sums pass from one tile to the next, each between two products: its sums to where the last tile's
// belong, then its own to begin with. All stores in one place would have the next products wait, by some 300 cycles.
struct Turn {
    float* last;  // or null for nowhere
    size_t last_ld;
    const float* begin;  // kPanel apart, or null for zeros

    ESM_INLINE void operator()(int number) const {
        constexpr size_t kStride = kPanel * sizeof(float), kBelow = kRegisterRows * kPanel;
        const size_t stride = last_ld * sizeof(float);
        switch (number) {
            case 0:
                if (last) _tile_stored(0, last, stride);
                if (begin)
                    _tile_loadd(0, begin, kStride);
                else
                    _tile_zero(0);
                return;
            case 1:
                if (last) _tile_stored(1, last + kRegisterRows, stride);
                if (begin)
                    _tile_loadd(1, begin + kRegisterRows, kStride);
                else
                    _tile_zero(1);
                return;
            case 2:
                if (last) _tile_stored(2, last + kRegisterRows * last_ld, stride);
                if (begin)
                    _tile_loadd(2, begin + kBelow, kStride);
                else
                    _tile_zero(2);
                return;
            default:
                if (last) _tile_stored(3, last + kRegisterRows * last_ld + kRegisterRows, stride);
                if (begin)
                    _tile_loadd(3, begin + kBelow + kRegisterRows, kStride);
                else
                    _tile_zero(3);
        }
    }
};

// Products tile after tile. A tile's sums are in memory once the first step of the next one, or flush(), is done.
class Products {
  public:
    // c (height x 32, rows ldc apart) = begin (kPanel apart, or null for zeros) + a times one panel; beside(number) is
    // called after every step. With up to 16 `columns` the right half of c is left as it is.
    template <class Beside>
    ESM_INLINE void operator()(int height, const bf16* a, size_t lda, const bf16* panel, int in, int columns,
                               const float* begin, float* c, size_t ldc, const Beside& beside) {
        const Quarters has{height > kRegisterRows, columns > kRegisterRows};
        if (height != configured_height || has.right != has_.right) flush(), configure(height);
        alignas(64) bf16 end[kTileRows<bf16> * kInputs];
        const Turn pass_on{last_, last_ld_, begin};
        for (int k = 0, number = 0; k < in; k += kInputs, ++number, panel += kInputs * kPanel) {
            const bf16* rows = a + k;
            size_t stride = lda * sizeof(bf16);
            if (in - k < kInputs) {
                copy_end(rows, lda, height, in - k, end);
                rows = end, stride = kInputs * sizeof(bf16);
            }
            if (number)
                step(number < kKept, has, rows, stride, panel);
            else
                step(true, has, rows, stride, panel, pass_on);
            beside(number);
        }
        last_ = c, last_ld_ = ldc, has_ = has;
    }

    void flush() {
        if (last_) store_sums(has_, last_, last_ld_);
        last_ = nullptr;
    }

  private:
    float* last_ = nullptr;
    size_t last_ld_ = 0;
    Quarters has_{false, true};
};

// Steps of inputs, of a panel and of the rows, that a GEMM takes at once: with more than kMostSteps the rows would leave
// the second-level cache between two panels, and parts that small stay nearer.
constexpr int kMostSteps = 56, kPassSteps = 24;
constexpr int kMostGroups = 12, kPassGroups = 4;  // the same in groups of 8 bits
constexpr size_t kTileSums = kTileRows<bf16> * kPanel;

// What a GEMM does in which order. Every tile has the same height, so that the registers are configured once: the last
// one begins early, and its first rows are computed twice. Of many inputs some go through all panels before the next
// ones do, and the sums rest in memory meanwhile; they are the same sums.
struct Order {
    int rows, steps, tiles, height, passes;

    Order(int64_t rows_, int steps_, int most, int at_once)
        : rows(int(rows_)), steps(steps_), tiles(int((rows_ + kTileRows<bf16> - 1) / kTileRows<bf16>)),
          height((rows + tiles - 1) / tiles), passes(steps <= most ? 1 : (steps + at_once - 1) / at_once) {}
    int first_step(int pass) const { return steps * pass / passes; }
    int first_row(int tile) const { return tile + 1 < tiles ? tile * height : rows - height; }
    int known_rows(int tile) const { return tile * height - first_row(tile); }
};

// Asks for memory, some lines at a time, to be in the second-level cache when it is needed.
struct Prefetch {
    const char *at, *end;

    Prefetch(const void* from, size_t bytes) : at(static_cast<const char*>(from)), end(at + bytes) {}
    // Lines a time, of so many times; more than kMost would displace the loads.
    int share(int times) const {
        constexpr int kMost = 8;
        const int even = int((end - at) / 64 + times - 1) / times;
        return even < kMost ? even : kMost;
    }
    ESM_INLINE void advance(int lines) {
        for (int i = 0; i < lines && at < end; ++i, at += 64) _mm_prefetch(at, _MM_HINT_T1);
    }
};
// Sums that rest, of which a pass has too many for the cache.
ESM_INLINE Prefetch sums_at(const float* tile) { return {tile, tile ? kTileSums * sizeof(float) : 0}; }

// gemm.h's, but the epilogue of a tile runs beside the products of the next one, and so do prefetches of the next
// panel, which the rows' tiles share out evenly among themselves.
template <class Finish>
void gemm(const bf16* a, size_t lda, int64_t rows, const bf16* packed, int in, int first_panel, int last_panel,
          const Finish& finish) {
    if (rows <= 0) return;
    const double start = clock_start();
    const Order order(rows, int(round_up(in, kInputs) / kInputs), kMostSteps, kPassSteps);
    const int tiles = order.tiles, height = order.height, panels = last_panel - first_panel;
    float* resting = nullptr;
    if (order.passes > 1) resting = buffer<float>(Any::resting, int64_t(panels) * tiles, kTileSums);
    alignas(64) float sums[2][kTileSums];
    Products products;
    Finishing last;
    bool turn = false;
    for (int pass = 0; pass < order.passes; ++pass) {
        const int first = order.first_step(pass), steps = order.first_step(pass + 1) - first;
        const int inputs = in - first * kInputs < steps * kInputs ? in - first * kInputs : steps * kInputs;
        const bool final = pass + 1 == order.passes;
        const int rows_a_step = steps > 1 ? (height + steps - 2) / (steps - 1) : height;
        for (int panel = first_panel; panel < last_panel; ++panel) {
            const bf16* weights = packed + panel * panel_size(packed, in) + size_t(first) * kInputs * kPanel;
            const size_t size = panel + 1 < last_panel ? size_t(steps) * kInputs * kPanel * sizeof(bf16) : 0;
            Prefetch ahead(weights + panel_size(packed, in), size);
            const int lines = ahead.share(tiles * steps);
            for (int tile = 0; tile < tiles; ++tile) {
                float* rest = resting ? resting + (size_t(panel - first_panel) * tiles + tile) * kTileSums : nullptr;
                float* c = final ? sums[turn] : rest;
                Prefetch next_rest = sums_at(rest ? rest + kTileSums : nullptr);
                const int rest_lines = next_rest.share(steps);
                products(height, a + order.first_row(tile) * int64_t(lda) + first * kInputs, lda, weights, inputs,
                         kPanel, pass ? rest : nullptr, c, kPanel, [&](int number) {
                             if (number) last.advance(rows_a_step, finish);
                             ahead.advance(lines);
                             next_rest.advance(rest_lines);
                         });
                last.advance(height, finish);
                last = Finishing();
                if (final) {
                    last = Finishing{c, order.first_row(tile), height, panel * kPanel, order.known_rows(tile)};
                    turn = !turn;
                }
            }
        }
    }
    products.flush();
    last.advance(height, finish);
    clock_stop(Phase::kGemm, start);
}

#else

ESM_INLINE void release_tiles() {}

#endif

}  // namespace
}  // namespace cpu
}  // namespace esm
