// Where the kernels' time goes, for the benchmarks. While clocks are off, each of the two calls returns at once.
#pragma once

namespace esm {
namespace cpu {

enum class Phase : int { kNorm, kGemm, kAttention };
constexpr int kPhases = 3;

// Around a piece of work: clock_stop(phase, clock_start()'s result). Of pieces within each other the outermost counts.
double clock_start();
void clock_stop(Phase phase, double start);

void set_clocks(bool wanted);  // also begins again at 0
double phase_seconds(Phase phase);  // all threads together

}  // namespace cpu
}  // namespace esm
