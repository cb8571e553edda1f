// Replays launches that Python recorded (emulator.py), as a program of its own that a sanitizer can watch: every tensor
// is a piece of the heap of exactly its size. Usage: replay FILE SEED. Prints how many launches it made.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "interface.h"

namespace {

std::FILE* file;

bool read(void* to, size_t bytes) { return std::fread(to, 1, bytes, file) == bytes; }

template <typename T>
T number() {
    T value;
    if (!read(&value, sizeof value)) std::fprintf(stderr, "the recording ends too early\n"), std::exit(2);
    return value;
}

std::string text() {
    std::string value(number<uint32_t>(), '\0');
    if (!read(&value[0], value.size())) std::exit(2);
    return value;
}

// Runs the launch that begins with this kernel's name.
void replay(const std::string& kernel, unsigned seed) {
    const std::string scalar = text(), signature = text();
    Launch launch{kernel.c_str(), scalar.c_str(), signature.c_str(), {}, {}, 0, nullptr, nullptr, 0, seed, 0};
    for (unsigned& size : launch.grid) size = number<uint32_t>();
    for (unsigned& size : launch.block) size = number<uint32_t>();
    launch.dynamic_bytes = number<uint64_t>();

    std::vector<emulator::Tensor> tensors(number<uint32_t>());
    for (emulator::Tensor& tensor : tensors) {
        tensor.bytes = number<uint64_t>();
        // Aligned as the GPU's allocator does it, which malloc is not; one byte, so that empty ones have an address.
        void* memory = nullptr;
        if (posix_memalign(&memory, 256, tensor.bytes ? tensor.bytes : 1)) std::exit(2);
        tensor.data = static_cast<char*>(memory);
        if (!read(tensor.data, tensor.bytes)) std::exit(2);
    }
    // A parameter is a number, or for a pointer the index of its tensor, -1 for null.
    std::vector<uint64_t> values(signature.size());
    std::vector<void*> parameters;
    for (size_t i = 0; i < values.size(); ++i) {
        values[i] = number<uint64_t>();
        if (signature[i] < 'a') values[i] = int64_t(values[i]) < 0 ? 0 : uint64_t(tensors[values[i]].data);
        parameters.push_back(&values[i]);
    }
    launch.parameters = parameters.data();
    launch.tensors = tensors.data();
    launch.tensor_count = tensors.size();
    Result result;
    if (const char* error = emulator_launch(&launch, &result)) std::fprintf(stderr, "%s\n", error), std::exit(1);
    for (emulator::Tensor& tensor : tensors) std::free(tensor.data);
}

}  // namespace

int main(int, char** arguments) {
    file = std::fopen(arguments[1], "rb");
    if (!file) return 2;
    unsigned launches = 0;
    for (uint32_t length; read(&length, sizeof length); ++launches) {
        std::string kernel(length, '\0');
        if (!read(&kernel[0], length)) return 2;
        replay(kernel, unsigned(std::atoi(arguments[2])));
    }
    std::printf("%u launches\n", launches);
}
