// Rows x prepacked weights of 8 bits on AMX's tile registers.
//
// Within a group of inputs the sums are integers, which begin from the group's corrections. The sums of one group are
// scaled and added up beside the products of the next one, and a tile whose last group was added goes through the
// epilogue beside the products after that.
#pragma once

#include "amx.h"

#if defined(__AMX_BF16__)

namespace esm {
namespace cpu {
namespace {

constexpr size_t kGroupHead = 2 * kPanel * sizeof(float);  // of a group in a panel: corrections and scales

// What a group's sums add to the totals of a tile, some rows at a time.
struct Scaling {
    const int32_t* sums = nullptr;
    const float* scales = nullptr;  // of the outputs
    const float* rows = nullptr;    // of the first row, the next ones' `stride` bytes apart
    size_t stride = 0;
    const float* from = nullptr;  // what the groups before add up to, or null for nothing
    float* to = nullptr;
    int height = 0, done = 0;

    ESM_INLINE void advance(int rows_now) {
        const int end = height - done < rows_now ? height : done + rows_now;
        if (done == end) return;
        const F s0 = load_as<F>(scales), s1 = load_as<F>(scales + N);
        for (; done < end; ++done) {
            const float x = load_as<float>(reinterpret_cast<const char*>(rows) + done * stride);
            const size_t at = size_t(done) * kPanel;
            const F y0 = __builtin_convertvector(load_as<I>(sums + at), F);
            const F y1 = __builtin_convertvector(load_as<I>(sums + at + N), F);
            store(to + at, fma(y0, s0 * x, from ? load(from + at) : F{}));
            store(to + at + N, fma(y1, s1 * x, from ? load(from + at + N) : F{}));
        }
    }
};

// The registers of sums pass from one group to the next, each between two products: see Turn.
struct GroupTurn {
    int32_t* last;            // or null for nowhere
    const int8* corrections;  // the same for every row: loads with a stride of 0

    ESM_INLINE void operator()(int number) const {
        constexpr size_t kStride = kPanel * sizeof(int32_t), kBelow = kRegisterRows * kPanel;
        const int8* right = corrections + kRegisterRows * sizeof(int32_t);
        switch (number) {
            case 0:
                if (last) _tile_stored(0, last, kStride);
                _tile_loadd(0, corrections, 0);
                return;
            case 1:
                if (last) _tile_stored(1, last + kRegisterRows, kStride);
                _tile_loadd(1, right, 0);
                return;
            case 2:
                if (last) _tile_stored(2, last + kBelow, kStride);
                _tile_loadd(2, corrections, 0);
                return;
            default:
                if (last) _tile_stored(3, last + kBelow + kRegisterRows, kStride);
                _tile_loadd(3, right, 0);
        }
    }
};

ESM_INLINE int inputs_of_group(int in, int group) {
    const int left = in - group * kGroup;
    return int(round_up(left < kGroup ? left : kGroup, kInputs8));
}

// A GEMM of 8 bits, group after group; tiles and passes as in amx.h's.
template <class Finish>
class GroupProducts {
  public:
    GroupProducts(const biased8* a, size_t lda, int in, int height, const Finish& finish)
        : a_(a), lda_(lda), in_(in), height_(height), has_{height > kRegisterRows, true}, finish_(&finish) {
        configure(height);
    }

    // The sums of a tile's groups from `first` to `end`, whose part of the panel begins at `part`, are going to be added
    // to `from`, or to nothing, and go to `to`. beside() is called while products run, three times for each whole group.
    template <class Beside>
    ESM_INLINE void operator()(int first_row, int first, int end, const int8* part, const float* from, float* to,
                               const Beside& beside) {
        const int steps = (end - first) * (kGroup / kInputs8);
        // Of the steps, the first group's belong to the last tile's sums, and each group's first to its own.
        const int rows_a_step = steps > 8 ? (height_ + steps - 9) / (steps * 3 / 4 - 3) + 1 : height_;
        const biased8* rows = a_ + first_row * int64_t(lda_);
        for (int group = first, number = 0; group < end; ++group) {
            const int8* lines = part + kGroupHead;
            const int steps_here = inputs_of_group(in_, group) / kInputs8;
            for (int i = 0; i < steps_here; ++i, ++number, lines += kInputs8 * kPanel) {
                const biased8* at = rows + group * kGroup + i * kInputs8;
                if (!i) {
                    step(true, has_, at, lda_, lines, GroupTurn{scaling_.sums ? sums_ : nullptr, part});
                    continue;
                }
                step(number < kKept8, has_, at, lda_, lines);
                scaling_.advance(kScaled);
                finishing_.advance(rows_a_step, *finish_);
                beside();
            }
            scaled();
            const float* scales = reinterpret_cast<const float*>(part + kPanel * sizeof(int32_t));
            scaling_ = {sums_, scales, scales_of(rows, in_) + group, lda_ * sizeof(biased8),
                        group == first ? from : to, to, height_};
            part = lines;
        }
    }
    // The tile's totals are whole when its last group is scaled.
    void finish(const float* totals, int row, int known_rows, int column) {
        next_ = {totals, row, height_, column, known_rows};
    }
    void flush() {
        if (scaling_.sums) store_sums(has_, sums_, kPanel);
        scaled();
        finishing_.advance(height_, *finish_);
    }

  private:
    static constexpr int kScaled = kTileRows<biased8> / 3 + 1;  // rows a step: a group has three after its first

    void scaled() {
        scaling_.advance(height_);
        if (!next_.c) return;
        finishing_.advance(height_, *finish_);
        finishing_ = next_, next_ = Finishing();
    }

    const biased8* a_;
    size_t lda_;
    int in_, height_;
    Quarters has_;
    const Finish* finish_;
    alignas(64) int32_t sums_[kTileRows<biased8> * kPanel];
    Scaling scaling_;
    Finishing finishing_, next_;
};

// amx.h's, for 8 bits.
template <class Finish>
void gemm(const biased8* a, size_t lda, int64_t rows, const int8* packed, int in, int first_panel, int last_panel,
          const Finish& finish) {
    if (rows <= 0) return;
    const double start = clock_start();
    const Order order(rows, groups_of(in), kMostGroups, kPassGroups);
    const int tiles = order.tiles, panels = last_panel - first_panel;
    float* resting = order.passes > 1 ? buffer<float>(Any::resting, int64_t(panels) * tiles, kTileSums) : nullptr;
    alignas(64) float totals[2][kTileSums];
    GroupProducts<Finish> products(a, lda, in, order.height, finish);
    bool turn = false;
    for (int pass = 0; pass < order.passes; ++pass) {
        const int first = order.first_step(pass), end = order.first_step(pass + 1);
        const bool final = pass + 1 == order.passes;
        for (int panel = first_panel; panel < last_panel; ++panel) {
            const int8* part = packed + panel * panel_size(packed, in) + first * group_size(kGroup);
            // The next panel's, be it another thread's: a prefetch reads nothing that is not there.
            Prefetch ahead(part + panel_size(packed, in), (end - first) * group_size(kGroup));
            const int times = (end - first) * 3, lines = ahead.share(tiles * times);
            for (int tile = 0; tile < tiles; ++tile) {
                float* rest = resting ? resting + (size_t(panel - first_panel) * tiles + tile) * kTileSums : nullptr;
                float* to = final ? totals[turn] : rest;
                Prefetch next_rest = sums_at(rest ? rest + kTileSums : nullptr);
                const int rest_lines = next_rest.share(times);
                products(order.first_row(tile), first, end, part, pass ? rest : nullptr, to, [&] {
                    ahead.advance(lines);
                    next_rest.advance(rest_lines);
                });
                if (!final) continue;
                products.finish(to, order.first_row(tile), order.known_rows(tile), panel * kPanel);
                turn = !turn;
            }
        }
    }
    products.flush();
    clock_stop(Phase::kGemm, start);
}

}  // namespace
}  // namespace cpu
}  // namespace esm

#endif
