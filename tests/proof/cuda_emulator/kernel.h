// How a kernel gets a name that Python can launch it by.
#pragma once

#include <type_traits>
#include <utility>

#include "emulator.h"

template <typename T>
class Global;
struct __half;
struct __nv_bfloat16;

namespace emulator {

struct Kernel {
    const char *name, *scalar, *signature;  // a letter a parameter, as in kernels/cuda/launch.py; capitals are tensors
    unsigned threads;                       // the most a block may have
    void (*call)(void* function, void** parameters);
    void* function;
    const Kernel* next;
};
extern const Kernel* kernels;  // a list of all (interface.cpp)

template <typename T>
struct Letter;
#define EMULATOR_LETTER(type, letter)           \
    template <>                                 \
    struct Letter<type> {                       \
        static constexpr char kLetter = letter; \
    }
EMULATOR_LETTER(float, 'f');
EMULATOR_LETTER(__half, 'h');
EMULATOR_LETTER(__nv_bfloat16, 'b');
EMULATOR_LETTER(unsigned char, 'c');
EMULATOR_LETTER(int, 'i');
EMULATOR_LETTER(long long, 'l');
EMULATOR_LETTER(unsigned long long, 'u');
EMULATOR_LETTER(double, 'd');

template <typename T>
struct Parameter {
    static_assert(sizeof(T) >= 4, "a parameter is a Global, or a number of 4 or 8 bytes");
    static constexpr char kLetter = Letter<T>::kLetter;
    static T from(void* at) { return *static_cast<T*>(at); }
};
template <typename T>
struct Parameter<Global<T>> {
    static constexpr char kLetter = Letter<std::remove_const_t<T>>::kLetter - 'a' + 'A';
    static Global<T> from(void* at) {
        T* address = *static_cast<T**>(at);
        return {address, tensor_of(address)};
    }
};

template <typename... P>
struct Caller {
    static constexpr char kSignature[] = {Parameter<P>::kLetter..., 0};

    template <size_t... I>
    static void call(void* function, void** parameters, std::index_sequence<I...>) {
        reinterpret_cast<void (*)(P...)>(function)(Parameter<P>::from(parameters[I])...);
    }
    static void call(void* function, void** parameters) { call(function, parameters, std::index_sequence_for<P...>()); }
};

struct Registration {
    template <typename... P>
    Registration(const char* name, const char* scalar, unsigned threads, void (*function)(P...))
        : kernel{name, scalar, Caller<P...>::kSignature, threads, Caller<P...>::call,
                 reinterpret_cast<void*>(function), kernels} {
        kernels = &kernel;
    }
    const Kernel kernel;
};

}  // namespace emulator

#define EMULATOR_TEXT_OF(x) #x
#define EMULATOR_TEXT(x) EMULATOR_TEXT_OF(x)
#define KERNEL(threads, blocks, name, params)                                                               \
    static void name params;                                                                                \
    static const emulator::Registration name##_registration(#name, EMULATOR_TEXT(ESM_SCALAR), threads, &name); \
    static void name params
