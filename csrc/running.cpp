// The operator update_running_ on the CPU: nn.BatchNorm2d's running statistics and counters of all norms in one call.
// Its meaning is documented once, in acnet_kernels/ops/running.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <vector>

namespace acnet::running {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

template <class T>
void move_as(Tensor& target, const double* value, double scale, double factor) {
  T* t = static_cast<T*>(target.mutable_data_ptr());
  const int64_t channels = target.numel(), stride = target.stride(0);
  for (int64_t k = 0; k < channels; ++k) {
    // Not before + factor·(value − before): a factor of 1 must leave nothing of what was before.
    t[k * stride] = static_cast<T>((1 - factor) * static_cast<double>(t[k * stride]) + factor * (value[k] * scale));
  }
}

// target moves towards value·scale by the factor, in double.
void move(Tensor& target, const double* value, double scale, double factor, int64_t channels) {
  STD_TORCH_CHECK(target.is_cpu() && target.dim() == 1 && target.size(0) == channels,
                  "running statistics must be CPU vectors of ", channels, " channels");
  switch (target.scalar_type()) {
    case ScalarType::Float:
      return move_as<float>(target, value, scale, factor);
    case ScalarType::Double:
      return move_as<double>(target, value, scale, factor);
    case ScalarType::BFloat16:
      return move_as<c10::BFloat16>(target, value, scale, factor);
    case ScalarType::Half:
      return move_as<c10::Half>(target, value, scale, factor);
    default:
      STD_TORCH_CHECK(false, "running statistics must be float32, float64, bfloat16 or float16");
  }
}

void update_running_(Tensors running_means, Tensors running_vars, Tensors counters, Tensor means, Tensor variances,
                     std::vector<double> momenta, int64_t count) {
  const size_t norms = momenta.size();
  for (Tensor& counter : counters) {
    STD_TORCH_CHECK(counter.is_cpu() && counter.numel() == 1 && counter.scalar_type() == ScalarType::Long,
                    "counters must be int64 CPU tensors of one element");
    ++*static_cast<int64_t*>(counter.mutable_data_ptr());
  }
  if (norms == 0 || count == 0) return;
  const int64_t channels = means.size(1);
  for (const Tensor* t : {&means, &variances})
    STD_TORCH_CHECK(t->is_cpu() && t->dim() == 2 && t->size(0) == static_cast<int64_t>(norms) &&
                        t->size(1) == channels && t->is_contiguous() && t->scalar_type() == ScalarType::Double,
                    "means and variances must be contiguous float64 CPU tensors, norms×channels");
  STD_TORCH_CHECK(running_means.size() == norms && running_vars.size() == norms && count > 1,
                  "running_means, running_vars and momenta must have one entry a norm, count must be above 1");
  const double* mean = static_cast<const double*>(means.const_data_ptr());
  const double* variance = static_cast<const double*>(variances.const_data_ptr());
  const double unbiased = static_cast<double>(count) / static_cast<double>(count - 1);
  for (size_t b = 0; b < norms; ++b) {
    double factor = momenta[b];
    if (std::isnan(factor)) {
      STD_TORCH_CHECK(norms == 1 && counters.size() == 1, "a cumulative average is moved alone, with its counter");
      factor = 1 / static_cast<double>(*static_cast<const int64_t*>(counters[0].const_data_ptr()));
    }
    move(running_means[b], mean + b * channels, 1, factor, channels);
    move(running_vars[b], variance + b * channels, unbiased, factor, channels);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(acnet_kernels, m) {
  m.def(
      "update_running_(Tensor(a!)[] running_means, Tensor(b!)[] running_vars, Tensor(c!)[] counters, Tensor means,"
      " Tensor variances, float[] momenta, int count) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(acnet_kernels, CPU, m) { m.impl("update_running_", TORCH_BOX(&update_running_)); }

}  // namespace acnet::running
