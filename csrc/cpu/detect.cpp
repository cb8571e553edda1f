#include "detect.h"

#include <cerrno>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace esm {
namespace cpu {
namespace {

bool has(uint64_t word, int bit) { return word >> bit & 1; }

// A level needs the CPU's word for its instructions and the system's for saving its registers.
struct Need {
    const char *level, *name;
    bool (*met)(const Machine&);
};

const Need kNeeds[] = {
    {"avx2", "AVX2", [](const Machine& m) { return has(m.leaf7_ebx, 5); }},
    {"avx2", "FMA", [](const Machine& m) { return has(m.leaf1_ecx, 12); }},
    {"avx2", "F16C", [](const Machine& m) { return has(m.leaf1_ecx, 29); }},
    {"avx2", "256-bit registers saved by the system", [](const Machine& m) { return (m.saved & 0x06) == 0x06; }},
    {"avx512", "AVX512F", [](const Machine& m) { return has(m.leaf7_ebx, 16); }},
    {"avx512", "AVX512DQ", [](const Machine& m) { return has(m.leaf7_ebx, 17); }},
    {"avx512", "AVX512BW", [](const Machine& m) { return has(m.leaf7_ebx, 30); }},
    {"avx512", "AVX512VL", [](const Machine& m) { return has(m.leaf7_ebx, 31); }},
    {"avx512", "512-bit registers saved by the system", [](const Machine& m) { return (m.saved & 0xe0) == 0xe0; }},
    {"avx512vnni", "AVX512_VNNI", [](const Machine& m) { return has(m.leaf7_ecx, 11); }},
    {"avx512bf16", "AVX512_BF16", [](const Machine& m) { return has(m.leaf7_1_eax, 5); }},
#if !defined(ESM_EMULATE_AMX)
    {"amx", "AMX-TILE", [](const Machine& m) { return has(m.leaf7_edx, 24); }},
    {"amx", "AMX-BF16", [](const Machine& m) { return has(m.leaf7_edx, 22); }},
    {"amx", "AMX-INT8", [](const Machine& m) { return has(m.leaf7_edx, 25); }},
    {"amx", "tile registers saved by the system", [](const Machine& m) { return has(m.saved, 17) && has(m.saved, 18); }},
#endif
};

#if defined(__x86_64__)
// Tile registers are large, and a process has to ask for them, once for all its threads; the system may refuse.
std::string ask_for_tiles() {
#if defined(__linux__)
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequest, kTileData) ? std::strerror(errno) : "";
#else
    return "asked for on Linux only";
#endif
}
#endif

Machine find() {
    Machine m;
#if defined(__x86_64__)
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return m;
    m.leaf1_ecx = c;
    if (has(c, 27)) {  // OSXSAVE: XGETBV works
        unsigned low, high;
        __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
        m.saved = uint64_t(high) << 32 | low;
    }
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return m;
    m.leaf7_ebx = b, m.leaf7_ecx = c, m.leaf7_edx = d;
    if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) m.leaf7_1_eax = a;
    if (has(m.leaf7_edx, 24) && has(m.saved, 18)) m.tiles = ask_for_tiles();
#endif
    return m;
}

// By the order of what they need; the emulated amx, which needs nothing, is last.
size_t place(const std::string& level) {
    if (level == "base") return 0;
    size_t at = 0;
    for (const Need& need : kNeeds)
        if (++at, level == need.level) return at;
    return SIZE_MAX;
}

}  // namespace

const Machine& machine() {
    static const Machine found = find();
    return found;
}

bool at_least(const std::string& level, const std::string& other) { return place(level) >= place(other); }

std::string missing(const std::string& level, const Machine& machine) {
    std::string names;
    bool reached = level == "base";
    for (const Need& need : kNeeds) {
        if (reached && level != need.level) break;
        reached = level == need.level;
        if (!need.met(machine)) names += (names.empty() ? "" : ", ") + std::string(need.name);
    }
#if !defined(ESM_EMULATE_AMX)
    if (level == "amx" && names.empty() && !machine.tiles.empty())
        names = "leave to use the tile registers (" + machine.tiles + ")";
#endif
    return names;
}

}  // namespace cpu
}  // namespace esm
