#include "bind.h"

namespace esm {
namespace cpu {
namespace {

std::vector<void (*)(py::module_&)>& bindings() {
    static std::vector<void (*)(py::module_&)> all;
    return all;
}

}  // namespace

Binding::Binding(void (*add)(py::module_&)) { bindings().push_back(add); }

void bind(py::module_& module) {
    for (const auto add : bindings()) add(module);
}

const char* name_of(Type type) {
    static const char* const kNames[] = {
#define X(name, Element) #name,
        ESM_FORMATS(X)
#undef X
    };
    return kNames[int(type)];
}

Type type_named(const std::string& dtype) {
    std::string known;
#define X(name, Element)                        \
    if (dtype == #name) return Type::name; \
    known += (known.empty() ? "" : ", ") + std::string(#name);
    ESM_FORMATS(X)
#undef X
    throw py::value_error("weights are one of " + known + ", not " + dtype);
}

}  // namespace cpu
}  // namespace esm
