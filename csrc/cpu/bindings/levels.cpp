// Instruction-set levels, and what the benchmarks ask, in Python.
#include <map>

#include "../clock.h"
#include "../detect.h"
#include "bind.h"

namespace esm {
namespace cpu {
namespace {

std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (int i = 0; i < levels(); ++i)
        if (runs(i)) names.push_back(level(i));
    return names;
}

py::dict missing_isas() {  // best last
    py::dict reasons;
    for (int i = 0; i < levels(); ++i)
        if (!runs(i)) reasons[level(i)] = missing(level(i), machine());
    return reasons;
}

double peak(const std::string& dtype) {
    const Type type = type_named(dtype);
    py::gil_scoped_release release;
    return active().peak(type);
}

std::map<std::string, double> phases() {
    return {{"norm", phase_seconds(Phase::kNorm)},
            {"gemm", phase_seconds(Phase::kGemm)},
            {"attention", phase_seconds(Phase::kAttention)}};
}

const Binding binding([](py::module_& module) {
    module.def("isas", &isas);
    module.def("missing_isas", &missing_isas);
    module.def("isa", [] { return active().name; });
    module.def("at_least", [](const std::string& level) { return at_least(active().name, level); }, "level"_a);
    module.def("set_isa", [](const std::string& name) { select(name.c_str()); }, "name"_a);
    module.def("peak", &peak, "dtype"_a);
    module.def("set_clocks", &set_clocks, "on"_a);
    module.def("phases", &phases);
});

}  // namespace
}  // namespace cpu
}  // namespace esm
