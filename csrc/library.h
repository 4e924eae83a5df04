// PyTorch's own operators on the CPU, called from C++ past Python: convolutions and matrix products.
// Nothing here is differentiated or cast: whoever calls is below autograd, and autocast lists none of these.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <array>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

#include "check.h"

// The convolution that adds to its output; not in builds without oneDNN.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_cpu_mkldnn__convolution_pointwise_binary_(
    AtenTensorHandle other, AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* bias, const int64_t* padding,
    int64_t padding_length, const int64_t* stride, int64_t stride_length, const int64_t* dilation, int64_t dilation_length,
    int64_t groups, const char* binary, double* alpha, const char** unary, const double** scalars, int64_t scalars_length,
    const char** algorithm, AtenTensorHandle* result);

namespace acnet::library {

using Pair = std::array<int64_t, 2>;

inline int32_t number_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return aoti_torch_dtype_float32();
    case ScalarType::Double: return aoti_torch_dtype_float64();
    case ScalarType::BFloat16: return aoti_torch_dtype_bfloat16();
    default: return aoti_torch_dtype_float16();
  }
}

inline void succeed(AOTITorchError error, const char* what) {
  if (error != AOTI_TORCH_SUCCESS) throw std::runtime_error(std::string("acnet_kernels: ") + what + " failed");
}

// A tensor over memory that the caller keeps.
inline Tensor over(const void* data, ScalarType type, std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides) {
  AtenTensorHandle made;
  succeed(aoti_torch_create_tensor_from_blob(const_cast<void*>(data), static_cast<int64_t>(sizes.size()), sizes.begin(),
                                             strides.begin(), 0, number_of(type), aoti_torch_device_type_cpu(), 0, &made),
          "a view of memory");
  return Tensor(made);
}

// n×c×h×w over channels_last memory.
inline Tensor map_over(const void* data, ScalarType type, int64_t n, int64_t c, int64_t h, int64_t w) {
  return over(data, type, {n, c, h, w}, {h * w * c, 1, w * c, c});
}

inline Tensor empty_map(ScalarType type, int64_t n, int64_t c, int64_t h, int64_t w, bool channels_last) {
  const int64_t sizes[] = {n, c, h, w}, dense[] = {c * h * w, h * w, w, 1}, last[] = {h * w * c, 1, w * c, c};
  AtenTensorHandle made;
  if (aoti_torch_empty_strided(4, sizes, channels_last ? last : dense, number_of(type), aoti_torch_device_type_cpu(), 0,
                               &made) != AOTI_TORCH_SUCCESS)
    throw std::bad_alloc();
  return Tensor(made);
}

// t itself where it is dense in channels_last.
inline Tensor in_channels_last(const Tensor& t) {
  const View v(t);
  if (v.dense(true)) return t;
  Tensor copy = empty_map(v.type(), v.sizes[0], v.sizes[1], v.sizes[2], v.sizes[3], true);
  torch::stable::copy_(copy, t);
  return copy;
}

struct Convolution {
  Pair padding, dilation{1, 1};
  int64_t groups = 1;
};

// So few multiplications that the library's call would take longer than they do.
constexpr int64_t kDirect = 1 << 14;

// out (+)= x convolved at stride 1, all dense in channels_last; whether there was so little to do that it did it.
inline bool convolve_directly(const Tensor& x, const Tensor& weight, const Tensor* bias, const Convolution& how, bool adds, Tensor& out) {
  const View in(x), kernel(weight), to(out);
  const int64_t taps = kernel.sizes[2] * kernel.sizes[3], outputs = kernel.sizes[0], cg = kernel.sizes[1], kg = outputs / how.groups;
  if (to.numel() * taps * cg > kDirect) return false;
  const auto run = [&](auto element, auto accumulator) {
    using T = decltype(element);
    using A = decltype(accumulator);
    const int64_t height = in.sizes[2], width = in.sizes[3], pixels = to.sizes[2] * to.sizes[3];
    std::vector<A> sums(outputs);
    for (int64_t i = 0; i < to.sizes[0] * pixels; ++i) {
      T* own = static_cast<T*>(to.data) + i * outputs;
      for (int64_t o = 0; o < outputs; ++o) {
        sums[o] = adds ? static_cast<A>(own[o]) : A(0);
        if (bias != nullptr) sums[o] += static_cast<A>(static_cast<const T*>(bias->const_data_ptr())[o]);
      }
      for (int64_t t = 0; t < taps; ++t) {
        const int64_t row = i % pixels / to.sizes[3] + t / kernel.sizes[3] * how.dilation[0] - how.padding[0];
        const int64_t column = i % to.sizes[3] + t % kernel.sizes[3] * how.dilation[1] - how.padding[1];
        if (row < 0 || row >= height || column < 0 || column >= width) continue;
        const T* from = static_cast<const T*>(in.data) + ((i / pixels * height + row) * width + column) * cg * how.groups;
        const T* numbers = static_cast<const T*>(kernel.data) + t * cg;
        for (int64_t g = 0; g < how.groups; ++g)
          for (int64_t c = 0; c < cg; ++c) {
            const A value = static_cast<A>(from[g * cg + c]);
            for (int64_t o = g * kg; o < (g + 1) * kg; ++o) sums[o] += value * static_cast<A>(numbers[o * taps * cg + c]);
          }
      }
      for (int64_t o = 0; o < outputs; ++o) own[o] = static_cast<T>(sums[o]);
    }
  };
  switch (to.type()) {
    case ScalarType::Float: run(float{}, float{}); break;
    case ScalarType::Double: run(double{}, double{}); break;
    case ScalarType::BFloat16: run(c10::BFloat16{}, float{}); break;
    default: run(c10::Half{}, float{});
  }
  return true;
}

// x convolved at stride 1, dense in channels_last, as x and the weight are.
inline Tensor convolution(const Tensor& x, const Tensor& weight, const Tensor* bias, const Convolution& how) {
  const View in(x), kernel(weight);
  const auto reach = [&](int d) { return in.sizes[2 + d] + 2 * how.padding[d] - how.dilation[d] * (kernel.sizes[2 + d] - 1); };
  if (in.sizes[0] * kernel.sizes[0] * reach(0) * reach(1) <= kDirect) {
    Tensor out = empty_map(in.type(), in.sizes[0], kernel.sizes[0], reach(0), reach(1), true);
    if (convolve_directly(x, weight, bias, how, false, out)) return out;
  }
  constexpr int64_t ones[] = {1, 1}, zeros[] = {0, 0};
  AtenTensorHandle made, shift = bias == nullptr ? nullptr : bias->get();
  succeed(aoti_torch_cpu_convolution(x.get(), weight.get(), bias == nullptr ? nullptr : &shift, ones, 2, how.padding.data(), 2,
                                     how.dilation.data(), 2, 0, zeros, 2, how.groups, &made),
          "a convolution");
  return in_channels_last(Tensor(made));
}

// out += x convolved at stride 1 without dilation, in one pass; whether it can.
inline bool add_convolution(Tensor& out, const Tensor& x, const Tensor& weight, const Convolution& how) {
  if (convolve_directly(x, weight, nullptr, how, true, out)) return true;
  if (aoti_torch_cpu_mkldnn__convolution_pointwise_binary_ == nullptr || out.scalar_type() == ScalarType::Double) return false;
  constexpr int64_t ones[] = {1, 1};
  double alpha = 1;
  AtenTensorHandle made;
  const char* algorithm = "";
  succeed(aoti_torch_cpu_mkldnn__convolution_pointwise_binary_(out.get(), x.get(), weight.get(), nullptr, how.padding.data(), 2,
                                                               ones, 2, ones, 2, how.groups, "add", &alpha, nullptr, nullptr, 0,
                                                               &algorithm, &made),
          "a convolution that adds");
  const Tensor same(made);
  return true;
}

// out (rows×columns) = a·b, all but a contiguous: a's element (i, j) is at a[i·step + j·stride].
template <class F>
void multiply(const F* a, int64_t step, int64_t stride, const F* b, int64_t rows, int64_t inner, int64_t columns, F* out) {
  constexpr int64_t kSmall = 1 << 14;  // multiplications that take less time than the call
  if (rows * inner * columns <= kSmall) {
    for (int64_t i = 0; i < rows; ++i) {
      F* to = out + i * columns;
      for (int64_t j = 0; j < columns; ++j) to[j] = 0;
      for (int64_t l = 0; l < inner; ++l) {
        const F factor = a[i * step + l * stride];
        for (int64_t j = 0; j < columns; ++j) to[j] += factor * b[l * columns + j];
      }
    }
    return;
  }
  const ScalarType type = sizeof(F) == sizeof(double) ? ScalarType::Double : ScalarType::Float;
  const Tensor first = over(a, type, {rows, inner}, {step, stride}), second = over(b, type, {inner, columns}, {columns, 1});
  const Tensor result = over(out, type, {rows, columns}, {columns, 1});
  succeed(aoti_torch_cpu_mm_out(result.get(), first.get(), second.get()), "a matrix product");
}

}  // namespace acnet::library
