// Which levels this machine runs, and the one in use. Compiled for the oldest CPU.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "detect.h"
#include "table.h"

namespace esm {
namespace cpu {

// CMake says which levels there are, best last: ESM_LEVELS is X(base) X(avx2) and so on.
#define X(level) extern const Table kernels_##level;
ESM_LEVELS
#undef X

namespace {

#define X(level) &kernels_##level,
const Table* const kLevels[] = {ESM_LEVELS};
#undef X
constexpr int kCount = int(sizeof kLevels / sizeof *kLevels);

const Table* find(const std::string& name) {
    std::string known;
    for (const Table* candidate : kLevels) {
        if (name == candidate->name) {
            const std::string lacks = missing(name, machine());
            if (lacks.empty()) return candidate;
            throw std::invalid_argument("this machine does not run the instruction set '" + name + "': it has no " + lacks);
        }
        known += (known.empty() ? "" : ", ") + std::string(candidate->name);
    }
    throw std::invalid_argument("there is no instruction set '" + name + "'; choose one of " + known);
}

const Table* first_choice() {
    const char* forced = std::getenv("ESM_FAST_ISA");
    if (forced && *forced) return find(forced);
    int best = 0;
    for (int i = 0; i < kCount; ++i)
        if (runs(i)) best = i;
    return kLevels[best];
}

const Table*& chosen() {
    static const Table* table = first_choice();
    return table;
}

}  // namespace

const Table& active() { return *chosen(); }
int levels() { return kCount; }
const char* level(int i) { return kLevels[i]->name; }
bool runs(int i) { return missing(level(i), machine()).empty(); }
void select(const char* name) { chosen() = find(name); }

}  // namespace cpu
}  // namespace esm
