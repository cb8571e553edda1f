// Tensors as the bindings get them: what torch.Tensor tells of itself through DLPack's interface for C (version 1.3, in
// torch since 2.10). Nothing is copied, and neither torch's headers nor its libraries are needed.
#pragma once

#include <pybind11/pybind11.h>

#include <initializer_list>
#include <string>

#include "../types.h"

namespace esm {
namespace cpu {

// A view: the tensor of Python keeps the memory, and the shape, while the call lasts.
struct Tensor {
    void* data = nullptr;
    Element element = Element::float32;
    int dims = 0;
    const int64_t* shape = nullptr;
    bool contiguous = false;

    // Of a dimension that it may lack: -1 then.
    int64_t size(int dim) const { return dim < dims ? shape[dim] : -1; }
};

// Throws ValueError where it is no tensor that lies in this machine's memory, or one of a type that has no Element.
Tensor tensor_of(pybind11::handle object);
// Whether an object is a torch.Tensor at all.
bool is_tensor(pybind11::handle object);

// The checks of a call's tensors. Each returns where one begins, or throws ValueError with the call, the argument, what
// it must be and what it is: what passes is read and written within its bounds, whatever the arguments are.
class Arguments {
  public:
    explicit Arguments(const char* call) : call_(call) {}

    const void* in(const Tensor& tensor, const char* name, Element element,
                   std::initializer_list<int64_t> shape) const {
        return address(tensor, name, element, shape);
    }
    void* out(const Tensor& tensor, const char* name, Element element, std::initializer_list<int64_t> shape) const {
        return address(tensor, name, element, shape);
    }
    const float* floats(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape) const {
        return static_cast<const float*>(address(tensor, name, Element::float32, shape));
    }
    float* floats_out(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape) const {
        return static_cast<float*>(address(tensor, name, Element::float32, shape));
    }
    // (sequences + 1,) offsets that rise from 0 to `rows`: others would have a kernel read beyond the rows.
    const int32_t* offsets(const Tensor& tensor, const char* name, int64_t rows) const;
    // (n,) numbers in [0, size), or `also`: they are used as places in memory. name: a plural.
    const int64_t* places(const Tensor& tensor, const char* name, int64_t n, int64_t size, int64_t also = 0) const;

    // The number of columns of a row, or of something else that kernels count in 32 bits.
    int columns(int64_t count, const char* name) const;
    // The size of a head, of so many.
    int head_dim(int64_t width, int64_t heads) const;
    void require(bool fits, const std::string& problem) const {
        if (!fits) refuse(problem);
    }
    [[noreturn]] void refuse(const std::string& problem) const;

  private:
    void* address(const Tensor& tensor, const char* name, Element element, std::initializer_list<int64_t> shape) const {
        bool fits = tensor.element == element && tensor.contiguous && tensor.dims == int(shape.size());
        bool empty = false;
        int dim = 0;
        for (const int64_t size : shape) {
            fits = fits && tensor.shape[dim++] == size;
            empty |= size == 0;
        }
        if (!fits || (!tensor.data && !empty)) refuse_tensor(tensor, name, element, shape);
        return tensor.data;
    }
    [[noreturn]] void refuse_tensor(const Tensor& tensor, const char* name, Element element,
                                    std::initializer_list<int64_t> shape) const;

    const char* call_;
};

// Bytes of an element that is known.
size_t size_of(Element element);
// The type of kernels that a tensor's elements ask for; throws ValueError where there is none.
Type type_of(const Tensor& tensor, const Arguments& arguments);

}  // namespace cpu
}  // namespace esm

namespace pybind11 {
namespace detail {

template <>
struct type_caster<esm::cpu::Tensor> {
    PYBIND11_TYPE_CASTER(esm::cpu::Tensor, const_name("torch.Tensor"));

    bool load(handle object, bool) {
        if (!esm::cpu::is_tensor(object)) return false;
        value = esm::cpu::tensor_of(object);
        return true;
    }
};

}  // namespace detail
}  // namespace pybind11
