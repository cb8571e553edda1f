// What csrc/cpu/detect.cpp makes of a made-up machine. Arguments: a level; then in hexadecimal CPUID's leaf 1 ecx,
// leaf 7 ebx, ecx, edx and subleaf 1 eax; the registers the system saves; why it refuses the tile registers.
#include "detect.h"

#include <cstdio>
#include <cstdlib>

int main(int, char** argv) {
    const auto word = [&](int i) { return unsigned(std::strtoul(argv[i], nullptr, 16)); };
    const esm::cpu::Machine machine{word(2), word(3), word(4), word(5), word(6), word(7), argv[8]};
    std::printf("%s\n", esm::cpu::missing(argv[1], machine).c_str());
}
