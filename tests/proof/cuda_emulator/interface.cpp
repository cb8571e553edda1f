// What Python calls, and the replay of launches for the sanitizers. Its launch takes what cuLaunchKernel takes.
#include "interface.h"

#include <cstring>
#include <string>

#include "kernel.h"

namespace emulator {

const Kernel* kernels;

namespace {

std::string message;

const char* problem(const std::string& text) {
    message = text;
    return message.c_str();
}

const Kernel* find(const std::string& name, const std::string& scalar) {
    const Kernel* kernel = kernels;
    while (kernel && (name != kernel->name || scalar != kernel->scalar)) kernel = kernel->next;
    return kernel;
}

// Null, a P, is a tensor of any type.
bool fits(const std::string& given, const std::string& taken) {
    if (given.size() != taken.size()) return false;
    for (size_t i = 0; i < given.size(); ++i)
        if (given[i] != taken[i] && !(given[i] == 'P' && taken[i] < 'a')) return false;
    return true;
}

}  // namespace
}  // namespace emulator

const char* emulator_launch(const Launch* launch, Result* result) {
    using namespace emulator;
    const Kernel* kernel = find(launch->kernel, launch->scalar);
    const std::string name = launch->kernel;
    if (!kernel)
        return problem(std::string("no kernel ") + launch->kernel + " for " + launch->scalar);
    if (!fits(launch->signature, kernel->signature))
        return problem(name + " takes " + kernel->signature + ", not " + launch->signature);
    const Index block{launch->block[0], launch->block[1], launch->block[2]};
    if (block.x * block.y * block.z > kernel->threads)
        return problem(name + " is bounded to " + std::to_string(kernel->threads) + " threads a block");
    struct Call {
        const Kernel* kernel;
        void** parameters;
    } call{kernel, launch->parameters};
    begin_tensors(launch->tensors, launch->tensor_count, launch->count_traffic);
    const char* error = run(
        launch->kernel, {launch->grid[0], launch->grid[1], launch->grid[2]}, block, launch->dynamic_bytes, launch->seed,
        [](void* context) {
            const Call& call = *static_cast<Call*>(context);
            call.kernel->call(call.kernel->function, call.parameters);
        },
        &call);
    end_tensors(&result->loads, &result->stores);
    result->shared_bytes = shared_bytes();
    return error;
}
