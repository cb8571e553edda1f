// What the files of this folder share: an op's binding checks its tensors, makes a call of them and runs it.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <vector>

#include "../../threads.h"
#include "../table.h"
#include "../weights.h"
#include "tensor.h"

namespace py = pybind11;
using namespace py::literals;

namespace esm {
namespace cpu {

// What a file of this folder adds to the module: `const Binding binding([](py::module_& module) { ... });`
class Binding {
  public:
    explicit Binding(void (*add)(py::module_&));
};

// The name of a type in Python, and the other way round; ValueError for another name.
const char* name_of(Type type);
Type type_named(const std::string& name);

// Refuses what a kernel is not compiled for, and runs it at the active level.
template <Type... known>
bool has(Types<known...>, Type type) {
    return ((type == known) || ...);
}
#define X(kernel, Call, type, types)                                                                  \
    inline void require_type([[maybe_unused]] const Call& call) {                                     \
        if (!has(types{}, type))                                                                      \
            throw py::value_error(#kernel " has no kernel for " + std::string(name_of(type)) + " weights"); \
    }                                                                                                 \
    inline void start(const Call& call) { active().kernel(call); }
ESM_KERNELS(X)
#undef X

template <class Call>
void run(const Call& call) {
    require_type(call);
    py::gil_scoped_release release;
    start(call);
}
// The same for calls of many steps, between which the threads spin rather than sleep.
template <class Call>
void run_steps(const Call& call) {
    require_type(call);
    py::gil_scoped_release release;
    const Session session;
    start(call);
}

// A call's matrix, which must be (out, in) and of one type with its others: panels read as another type, or as more of
// them, would be read beyond their end.
inline const Prepacked& matrix(const Arguments& arguments, const Weights& weights, const char* name, Type type,
                               int64_t out, int64_t in) {
    const Prepacked& is = weights.prepacked();
    if (is.type != type)
        arguments.refuse(std::string("these prepacked weights cannot be mixed: ") + name + " is " + name_of(is.type) +
                         ", another " + name_of(type));
    if (is.out != out || is.in != in)
        arguments.refuse(std::string(name) + " must be (" + std::to_string(out) + ", " + std::to_string(in) + "), and is (" +
                         std::to_string(is.out) + ", " + std::to_string(is.in) + ")");
    return is;
}

}  // namespace cpu
}  // namespace esm
