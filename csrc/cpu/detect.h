// Which instruction-set levels a machine runs. What CPUID and the system say is plain data, so that a test can make
// machines up; machine() asks the real ones.
#pragma once

#include <cstdint>
#include <string>

namespace esm {
namespace cpu {

struct Machine {
    unsigned leaf1_ecx = 0, leaf7_ebx = 0, leaf7_ecx = 0, leaf7_edx = 0, leaf7_1_eax = 0;
    uint64_t saved = 0;                        // register files the system saves: XCR0
    std::string tiles = "not asked for";  // why the system does not lend the tile registers; empty if it does
};

const Machine& machine();

// What a machine lacks for a level, in words; empty if it runs it. Every level needs what those before it need.
std::string missing(const std::string& level, const Machine& machine);

// Whether a level is another one or a better one, by the order of what they need; built in or not.
bool at_least(const std::string& level, const std::string& other);

}  // namespace cpu
}  // namespace esm
