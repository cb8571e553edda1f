// csrc/cpu/amx.h on the emulator, and the emulator itself, against plain loops. Built and run by tests/test_amx.py:
// without an argument everything is checked; with one, that single fault is committed, and the emulator must object.
#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "attention.h"
#include "work.h"

using namespace esm::cpu;

namespace esm {
namespace cpu {
// What work.h needs from outside, on one thread.
void parallel(size_t n, size_t grain, void (*body)(void*, size_t, size_t), void* context) {
    for (size_t begin = 0; begin < n; begin += grain) body(context, begin, begin + grain < n ? begin + grain : n);
}
int parallel_width() { return 1; }
void* scratch(int slot, size_t bytes) {
    static std::vector<float> memory[16];
    memory[slot].assign(bytes / sizeof(float), __builtin_nanf(""));
    return memory[slot].data();
}
double clock_start() { return 0; }
void clock_stop(Phase, double) {}
}  // namespace cpu
}  // namespace esm

namespace {

std::mt19937 generator(1);

void require(bool ok, const std::string& what) {
    if (ok) return;
    std::printf("wrong: %s\n", what.c_str());
    std::exit(1);
}

bf16 narrow(float x) {
    bf16 result;
    store_part(&result, splat(x), 1);
    return result;
}
float bits(uint32_t word) {
    float x;
    std::memcpy(&x, &word, 4);
    return x;
}

// Normal numbers, rounded to bf16.
std::vector<bf16> random(size_t n) {
    std::normal_distribution<float> normal;
    std::vector<bf16> values(n);
    for (bf16& value : values) value = narrow(normal(generator));
    return values;
}

// --- the emulator --------------------------------------------------------------------------------------------------

struct Shape {
    int rows, bytes;
};
void configure(const std::vector<Shape>& shapes) {
    alignas(64) uint8_t config[64] = {1};
    for (size_t i = 0; i < shapes.size(); ++i)
        config[48 + i] = uint8_t(shapes[i].rows), config[16 + 2 * i] = uint8_t(shapes[i].bytes);
    _tile_loadconfig(config);
}

void check_loads() {
    uint8_t from[16 * 80], to[16 * 80];
    for (size_t i = 0; i < sizeof from; ++i) from[i] = uint8_t(i % 251 + 1);
    configure({{16, 64}, {5, 12}});
    for (int tile = 0; tile < 2; ++tile) {
        const int rows = tile ? 5 : 16, bytes = tile ? 12 : 64;
        std::memset(to, 0, sizeof to);
        _tile_loadd(tile, from, 80);
        _tile_stored(tile, to, 80);
        for (int i = 0; i < 16 * 80; ++i)
            require(to[i] == (i / 80 < rows && i % 80 < bytes ? from[i] : 0), "a stored tile");
    }
    _tile_zero(1);
    _tile_stored(1, to, 80);
    for (int i = 0; i < 12; ++i) require(to[i] == 0, "a zeroed tile");
}

// One product of every shape of whole 4-byte groups, in double: 64 products lose at most their sum's last digits.
void check_products() {
    for (int rows : {1, 7, 16})
        for (int groups : {1, 5, 16})
            for (int columns : {1, 9, 16}) {
                const std::vector<bf16> a = random(size_t(rows * groups * 2)), b = random(size_t(groups * columns * 2));
                std::vector<float> sums(size_t(rows * columns), 0.5f), got(sums.size());
                configure({{rows, columns * 4}, {rows, groups * 4}, {groups, columns * 4}});
                _tile_loadd(0, sums.data(), size_t(columns) * 4);
                _tile_loadd(1, a.data(), size_t(groups) * 4);
                _tile_loadd(2, b.data(), size_t(columns) * 4);
                _tile_dpbf16ps(0, 1, 2);
                _tile_stored(0, got.data(), size_t(columns) * 4);
                for (int m = 0; m < rows; ++m)
                    for (int n = 0; n < columns; ++n) {
                        double truth = 0.5, scale = 0.5;
                        for (int k = 0; k < 2 * groups; ++k) {
                            const double x = widen(a[size_t(m * 2 * groups + k)]);
                            const double y = widen(b[size_t((k / 2 * columns + n) * 2 + k % 2)]);
                            truth += x * y, scale += __builtin_fabs(x * y);
                        }
                        const double wrong = __builtin_fabs(got[size_t(m * columns + n)] - truth);
                        require(wrong <= 4e-6 * scale, "a product");
                    }
            }
}

// Integers, exact up to the ends of their ranges: 16 x 4 products of 255 and -128.
void check_bytes() {
    for (int rows : {1, 16})
        for (int columns : {3, 16}) {
            uint8_t a[16 * 64], b[16 * 64];
            int32_t sums[16 * 16], got[16 * 16];
            for (int i = 0; i < 16 * 64; ++i) a[i] = uint8_t(generator()), b[i] = uint8_t(generator());
            std::memset(a, 255, 64), std::memset(b, 128, 64);
            for (int32_t& sum : sums) sum = int32_t(generator() % 1000000);
            configure({{rows, columns * 4}, {rows, 64}, {16, columns * 4}});
            _tile_loadd(0, sums, 64);
            _tile_loadd(1, a, 64);
            _tile_loadd(2, b, 64);
            _tile_dpbusd(0, 1, 2);
            _tile_stored(0, got, 64);
            for (int m = 0; m < rows; ++m)
                for (int n = 0; n < columns; ++n) {
                    int32_t truth = sums[m * 16 + n];
                    for (int k = 0; k < 64; ++k) truth += a[m * 64 + k] * int8_t(b[k / 4 * 64 + n * 4 + k % 4]);
                    require(got[m * 16 + n] == truth, "a product of bytes");
                }
        }
}

// A product of single numbers: sum + (a[0] b[0] + a[2] b[2] + ...) + (a[1] b[1] + a[3] b[3] + ...).
float product(float sum, const std::vector<float>& a, const std::vector<float>& b) {
    const int groups = int(a.size()) / 2;
    std::vector<bf16> left, right;
    for (float x : a) left.push_back(narrow(x));
    for (float x : b) right.push_back(narrow(x));
    configure({{1, 4}, {1, 4 * groups}, {groups, 4}});
    _tile_loadd(0, &sum, 4);
    _tile_loadd(1, left.data(), 64);
    _tile_loadd(2, right.data(), 4);
    _tile_dpbf16ps(0, 1, 2);
    _tile_stored(0, &sum, 4);
    return sum;
}

void check_rounding() {
    const float big = 16777216.0f, least = bits(0x00800000), denormal = bits(0x00010000);
    // One chain would lose the ones one by one; the odd products' own chain keeps them.
    require(product(0, {big, 1, 0, 1}, {1, 1, 0, 1}) == big + 2, "the two chains of a product");
    require(product(big, {1, 0, 1, 0}, {1, 0, 1, 0}) == big + 2, "the sum comes last");
    require(product(0, {big, 0, 1, 0, 1, 0}, {1, 0, 1, 0, 1, 0}) == big, "a rounding per product");
    // 256 * 256 + 1: the product alone would not fit bf16, so it must not be rounded to it.
    require(product(-65536, {256, 1}, {256, 1}) == 1, "exact products");
    require(product(0, {denormal, 0}, {big, 0}) == 0, "a denormal factor");
    require(product(denormal, {0, 0}, {0, 0}) == 0, "a denormal sum");
    require(product(0, {least, 0}, {0.5f, 0}) == 0, "a denormal product");
    require(product(-least, {least, 0}, {1.5f, 0}) == 0, "a denormal result");
    require(product(0, {least, 0}, {1, 0}) == least, "the least normal number");
    require(__builtin_isnan(product(0, {__builtin_inff(), 0}, {0, 0})), "infinity times zero");
}

// --- amx.h ---------------------------------------------------------------------------------------------------------

// A matrix and its packed form, as weights.cpp packs it.
struct Matrix {
    int out, in;
    std::vector<bf16> values;
    std::vector<bf16> packed;

    Matrix(int out_, int in_) : out(out_), in(in_), values(random(size_t(out_) * size_t(in_))) {
        const size_t size = panel_size(static_cast<const bf16*>(nullptr), in);
        packed.resize(size_t(panels_of(out)) * size);
        for (int o = 0; o < out; ++o)
            for (int i = 0; i < in; ++i)
                packed[size_t(o / kPanel) * size + size_t(i / 2 * kPanel + o % kPanel) * 2 + size_t(i % 2)] =
                    values[size_t(o * in + i)];
    }
    // With one row of the other factor: the product, and the sum of its terms' sizes.
    void times(const bf16* row, int o, double& truth, double& scale) const {
        truth = scale = 0;
        for (int i = 0; i < in; ++i) {
            const double term = double(widen(row[i])) * double(widen(values[size_t(o * in + i)]));
            truth += term, scale += __builtin_fabs(term);
        }
    }
};

// Rows `ld` apart, in memory that ends with the last row's last value, NaN between the rows: what a product must not
// read, and what it must not use.
struct Rows {
    std::unique_ptr<bf16[]> memory;
    size_t ld;

    Rows(int rows, int width, size_t ld_) : ld(ld_) {
        const size_t size = size_t(rows - 1) * ld + size_t(width);
        memory.reset(new bf16[size]);
        const std::vector<bf16> values = random(size);
        for (size_t i = 0; i < size; ++i) memory[i] = i % ld < size_t(width) ? values[i] : bf16{0x7fc0};
    }
    const bf16* row(int i) const { return memory.get() + size_t(i) * ld; }
};

void check_tiles() {
    for (int in : {1, 2, 20, 31, 32, 33, 64, 95, 700}) {
        const Matrix weights(kPanel, in);
        const Rows a(32, in, size_t(in) + 3);
        float whole[32 * kPanel];
        for (int height : {32, 31, 17, 16, 15, 5, 1, 2, 20}) {
            const size_t ldc = kPanel + 5;
            std::vector<float> c(32 * ldc, -1.0f);
            tile_of(height, a.row(32 - height), a.ld, weights.packed.data(), in, c.data(), ldc);
            for (int r = 0; r < 32; ++r)
                for (int o = 0; o < int(ldc); ++o) {
                    const float got = c[size_t(r) * ldc + size_t(o)];
                    if (r >= height || o >= kPanel) {
                        require(got == -1.0f, "written beyond the tile");
                        continue;
                    }
                    double truth, scale;
                    weights.times(a.row(32 - height + r), o, truth, scale);
                    require(__builtin_fabs(got - truth) <= 1e-5 * scale, "a tile");
                    float& same = whole[(32 - height + r) * kPanel + o];
                    if (height == 32) same = got;
                    require(same == got, "the same bits at any height");
                }
        }
    }
    release_tiles();
    require(!emulated::state.configured, "released");
}

// Panels of 8 bits, with corrections and scales that fit nothing: they only have to be used.
std::vector<int8> byte_panels(int out, int in) {
    const size_t size = panel_size(static_cast<const int8*>(nullptr), in), panels = size_t(panels_of(out));
    std::vector<int8> packed(panels * size);
    for (size_t panel = 0; panel < panels; ++panel)
        for (size_t at = panel * size, first = 0; at < (panel + 1) * size; first += kGroup) {
            const size_t left = size_t(in) - first, inputs = size_t(round_up(int64_t(left < kGroup ? left : kGroup), kInputs8));
            for (int o = 0; o < kPanel; ++o) {
                const int32_t correction = int32_t(generator() % 100000) - 50000;
                const float scale = float(generator() % 1000) * 1e-3f;
                std::memcpy(&packed[at + size_t(o) * 4], &correction, 4);
                std::memcpy(&packed[at + size_t(kPanel + o) * 4], &scale, 4);
            }
            for (size_t i = 0; i < inputs * kPanel; ++i) packed[at + 256 + i].bits = int8_t(int(generator() % 255) - 127);
            at += group_size(int64_t(inputs));
        }
    return packed;
}
std::unique_ptr<biased8[]> byte_rows(int rows, int in) {
    const size_t ld = leading<biased8>(in);
    std::unique_ptr<biased8[]> a(new biased8[size_t(rows) * ld]);
    for (int r = 0; r < rows; ++r) {
        std::vector<float> row(size_t(in) + N);
        for (float& x : row) x = float(int(generator() % 2001) - 1000);
        quantize_row(row.data(), in, a.get() + size_t(r) * ld);
    }
    return a;
}

// Against int8.h's own tile, bit by bit: its sums are exact, and the rest is the same arithmetic.
void check_bytes_gemm() {
    for (int in : {40, 256, 300, 640, 2 * kMostSteps * kInputs8 + 300})
        for (int rows : {1, 16, 31, 74})
            for (int out : {32, 70}) {
                const size_t ld = leading<biased8>(in), size = panel_size(static_cast<const int8*>(nullptr), in);
                const std::vector<int8> packed = byte_panels(out, in);
                const std::unique_ptr<biased8[]> a = byte_rows(rows, in);
                std::vector<int> seen(size_t(rows * panels_of(out)));
                each(1, 1, [&](size_t, size_t) {
                    gemm(a.get(), ld, rows, packed.data(), in, 0, panels_of(out),
                         [&](const float* c, int64_t row, int height, int column) {
                             for (int64_t r = row; r < row + height; ++r, c += kPanel) {
                                 float truth[kPanel];
                                 tile<1>(a.get() + size_t(r) * ld, ld, &packed[size_t(column / kPanel) * size], in, truth, kPanel);
                                 require(!std::memcmp(c, truth, sizeof truth), "a GEMM of bytes");
                                 ++seen[size_t(r * panels_of(out) + column / kPanel)];
                             }
                         });
                });
                for (int count : seen) require(count == 1, "every output of bytes once");
                require(!emulated::state.configured, "released after the work with bytes");
            }
}

void check_gemm() {
    for (int rows : {0, 1, 16, 31, 33, 75, 97})
        for (int out : {1, 32, 70, 130}) {
            const int in = rows == 75 ? 700 : rows == 33 ? 2 * kMostSteps * kInputs + 50 : rows == 31 ? 20 : 45;
            const Matrix weights(out, in);
            const Rows a(rows ? rows : 1, in, size_t(in));
            std::vector<int> seen(size_t(rows * out));
            each(1, 1, [&](size_t, size_t) {
                gemm(a.row(0), a.ld, rows, weights.packed.data(), in, 0, panels_of(out),
                     [&](const float* c, int64_t row, int height, int column) {
                         for (int r = 0; r < height; ++r)
                             for (int o = column; o < out && o < column + kPanel; ++o) {
                                 double truth, scale;
                                 weights.times(a.row(int(row) + r), o, truth, scale);
                                 const float got = c[r * kPanel + o - column];
                                 require(__builtin_fabs(got - truth) <= 1e-5 * scale, "a GEMM");
                                 ++seen[size_t((row + r) * out + o)];
                             }
                     });
            });
            for (int count : seen) require(count == 1, "every output once");
            require(!emulated::state.configured, "released after the work");
        }
}

// Powers of two as the softmax takes them: nothing denormal, nothing where a score is too low, and a NaN for a NaN.
void check_powers() {
    for (float x = 0; x > -160; x -= 0.03125f) {
        const float got = exp2_for_bf16(splat(x))[0], truth = __builtin_exp2f(x);
        const bool right = x >= -125 ? __builtin_fabsf(got - truth) <= 4e-6f * truth : got == 0;
        require(right, "a power of two");
    }
    require(exp2_for_bf16(splat(-__builtin_inff()))[0] == 0, "a score of minus infinity");
    require(__builtin_isnan(exp2_for_bf16(splat(__builtin_nanf("")))[0]), "a score that is NaN");
}

// All queries of a head, in place and in memory that ends with the last row, against plain loops; and bit by bit against
// every query alone, whatever tiles it shares with others.
void check_attention() {
    for (int dim : {16, 40, 64})
        for (int length : {1, 17, 32, 33, 64, 70, 130}) {
            const size_t ld = size_t(dim) + 3;
            const Rows q(length, dim, ld), k(length, dim, ld), v(length, dim, ld);
            std::vector<bf16> packed(head_size<bf16>(length, dim), bf16{0x7fc0});
            pack_head(k.row(0), v.row(0), ld, length, dim, packed.data());
            const float scale = 1.0f / __builtin_sqrtf(float(dim));
            const size_t size = size_t(length - 1) * ld + size_t(dim);
            std::unique_ptr<bf16[]> whole(new bf16[size]), alone(new bf16[size]);
            std::memcpy(whole.get(), q.row(0), size * sizeof(bf16));
            std::vector<float> log_sums(static_cast<size_t>(length)), log_sum(log_sums.size());
            attend(whole.get(), packed.data(), whole.get(), ld, length, 0, length, dim, scale, log_sums.data());
            for (int i = 0; i < length; ++i) {
                attend(q.row(0), packed.data(), alone.get(), ld, length, i, i + 1, dim, scale, log_sum.data());
                double total = 0, mixed[64] = {}, sizes[64] = {};
                for (int j = 0; j < length; ++j) {
                    double score = 0;
                    for (int d = 0; d < dim; ++d) score += double(widen(q.row(i)[d])) * double(widen(k.row(j)[d]));
                    const double weight = __builtin_exp(score * double(scale));
                    total += weight;
                    for (int d = 0; d < dim; ++d) {
                        mixed[d] += weight * double(widen(v.row(j)[d]));
                        sizes[d] += weight * __builtin_fabs(double(widen(v.row(j)[d])));
                    }
                }
                require(__builtin_fabs(log_sums[size_t(i)] - __builtin_log(total)) < 1e-3, "the log of a softmax's sum");
                require(log_sums[size_t(i)] == log_sum[size_t(i)], "the same log in any tile");
                for (int d = 0; d < dim; ++d) {
                    const bf16 got = whole[size_t(i) * ld + size_t(d)];
                    const double error = __builtin_fabs(double(widen(got)) - mixed[d] / total);
                    require(error <= 0.01 * sizes[d] / total + 1e-6, "attention");
                    require(got.bits == alone[size_t(i) * ld + size_t(d)].bits, "the same bits in any tile of queries");
                }
                for (size_t d = size_t(dim); d < ld && i + 1 < length; ++d)
                    require(whole[size_t(i) * ld + d].bits == 0x7fc0, "nothing written between the rows");
            }
        }
    release_tiles();
}

void commit(const std::string& fault) {
    alignas(64) uint8_t config[64] = {1};
    float memory[256];
    if (fault == "unconfigured") _tile_zero(0);
    if (fault == "released") configure({{16, 64}}), _tile_release(), _tile_zero(0);
    if (fault == "left out") configure({{16, 64}}), _tile_loadd(1, memory, 64);
    if (fault == "palette") config[0] = 2, _tile_loadconfig(config);
    if (fault == "reserved") config[5] = 1, _tile_loadconfig(config);
    if (fault == "too many rows") configure({{17, 64}});
    if (fault == "rows too long") configure({{16, 65}});
    if (fault == "rows without bytes") configure({{16, 0}});
    if (fault == "ninth tile") config[48 + 8] = 16, config[16 + 16] = 64, _tile_loadconfig(config);
    if (fault == "same tile") configure({{16, 64}, {16, 64}}), _tile_dpbf16ps(0, 1, 1);
    if (fault == "inputs") configure({{16, 64}, {16, 32}, {16, 64}}), _tile_dpbf16ps(0, 1, 2);
    if (fault == "rows") configure({{16, 64}, {15, 64}, {16, 64}}), _tile_dpbf16ps(0, 1, 2);
    if (fault == "outputs") configure({{16, 32}, {16, 64}, {16, 64}}), _tile_dpbf16ps(0, 1, 2);
    if (fault == "odd bytes") configure({{16, 64}, {16, 62}, {16, 64}}), _tile_dpbf16ps(0, 1, 2);
}

}  // namespace

int main(int argc, char** argv) {
    if (argc > 1) {
        commit(argv[1]);
        return 0;
    }
    check_loads();
    check_products();
    check_rounding();
    check_bytes();
    check_tiles();
    check_bytes_gemm();
    check_gemm();
    check_powers();
    check_attention();
    std::printf("right\n");
}
