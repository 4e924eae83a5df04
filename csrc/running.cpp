// The operator update_running_ on the CPU: nn.BatchNorm2d's running statistics and counters of all norms in one call.
// Its meaning is documented once, in acnet_kernels/ops/running.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

#include "functions.h"
#include "check.h"

namespace acnet::running {
namespace {

constexpr Check check("update_running_");

// body(T{}) for a tensor of type T, a real number's.
template <class Body>
auto dispatch(ScalarType type, const Body& body) {
  switch (type) {
    case ScalarType::Long: return body(int64_t{});
    case ScalarType::Float: return body(float{});
    case ScalarType::Double: return body(double{});
    case ScalarType::BFloat16: return body(c10::BFloat16{});
    case ScalarType::Half: return body(c10::Half{});
    case ScalarType::Int: return body(int32_t{});
    case ScalarType::Short: return body(int16_t{});
    case ScalarType::Char: return body(int8_t{});
    default: return body(uint8_t{});
  }
}

// target moves towards value·scale by the factor, in double.
void move(const View& target, const double* value, double scale, double factor) {
  dispatch(target.type(), [&](auto element) {
    using T = decltype(element);
    T* t = static_cast<T*>(target.data);
    const int64_t channels = target.sizes[0], stride = target.strides[0];
    for (int64_t k = 0; k < channels; ++k) {
      // Not before + factor·(value − before): a factor of 1 must leave nothing of what was before.
      t[k * stride] = static_cast<T>((1 - factor) * static_cast<double>(t[k * stride]) + factor * (value[k] * scale));
    }
  });
}

// One more, as the dtype rounds or wraps it.
template <class T>
T next(T n) {
  if constexpr (std::is_integral_v<T>) return static_cast<T>(static_cast<uint64_t>(n) + 1);
  else return static_cast<T>(n + T(1));
}

// A counter's value after this batch.
double after(const View& counter) {
  return dispatch(counter.type(), [&](auto element) {
    return static_cast<double>(next(*static_cast<const decltype(element)*>(counter.data)));
  });
}

std::vector<View> statistics_of(const Tensors& tensors, const char* name, const View& means, const View& variances) {
  std::vector<View> views(tensors.begin(), tensors.end());
  check(static_cast<int64_t>(views.size()) == means.sizes[0], name, " must have one entry a norm, ", means.sizes[0],
        " here, got ", views.size());
  for (size_t b = 0; b < views.size(); ++b) {
    const View& v = views[b];
    check.readable(v, Entry{name, b});
    check(v.has_shape({means.sizes[1]}), "running statistics must be vectors of ", means.sizes[1], " channels, got ",
          v.shape(), " for ", Entry{name, b});
    check.floats(v, Entry{name, b});
    check(v.sizes[0] <= 1 || v.strides[0] > 0, Entry{name, b}, " must have an element of its own for every channel");
    check.apart(v, Entry{name, b}, means, "means");
    check.apart(v, Entry{name, b}, variances, "variances");
  }
  return views;
}

}  // namespace

void update_running_(Tensors running_means, Tensors running_vars, Tensors counters, Tensor means, Tensor variances,
                     std::vector<double> momenta, int64_t count) {
  const int64_t norms = static_cast<int64_t>(momenta.size());
  const View mean(means), variance(variances);
  check(mean.dim == 2 && mean.sizes[0] == norms, "means must have shape (norms, channels) of ", norms,
        " norms, as momenta, got ", mean.shape());
  check.shape(variance, "variances", {norms, mean.sizes[1]});
  for (const auto& [v, name] : {std::pair<const View&, const char*>{mean, "means"}, {variance, "variances"}}) {
    check.readable(v, name);
    check.type(v, name, ScalarType::Double, "dtype float64");
    check.contiguous(v, name);
  }
  const std::vector<View> kept_means = statistics_of(running_means, "running_means", mean, variance);
  const std::vector<View> kept_vars = statistics_of(running_vars, "running_vars", mean, variance);
  const std::vector<View> seen(counters.begin(), counters.end());
  for (size_t i = 0; i < seen.size(); ++i) {
    const View& v = seen[i];
    check.readable(v, Entry{"counters", i});
    check(v.type() != ScalarType::Undefined && v.numel() == 1, Entry{"counters", i},
          " must be one number, of a float dtype or an integer one, got ", v.dtype->name, " of shape ", v.shape());
  }
  check(count == 0 || count > 1, "count must be 0 or more than 1, got ", count);
  for (double& factor : momenta) {
    if (!std::isnan(factor)) continue;
    check(norms == 1 && seen.size() == 1, "a cumulative average (momentum NaN) is moved alone, with its counter, got ", norms,
          " norms and ", seen.size(), " counters");
    const double batches = after(seen[0]);
    check(batches != 0, "a cumulative average needs a counter that is not 0 after this batch");
    factor = 1 / batches;
  }
  for (const View& v : seen)
    dispatch(v.type(), [&](auto element) {
      auto* n = static_cast<decltype(element)*>(v.data);
      *n = next(*n);
    });
  if (count == 0) return;
  const double unbiased = static_cast<double>(count) / static_cast<double>(count - 1);
  for (int64_t b = 0; b < norms; ++b) {
    const int64_t at = b * mean.sizes[1];
    move(kept_means[b], static_cast<const double*>(mean.data) + at, 1, momenta[b]);
    move(kept_vars[b], static_cast<const double*>(variance.data) + at, unbiased, momenta[b]);
  }
}

STABLE_TORCH_LIBRARY_FRAGMENT(acnet_kernels, m) {
  m.def(
      "update_running_(Tensor(a!)[] running_means, Tensor(b!)[] running_vars, Tensor(c!)[] counters, Tensor means,"
      " Tensor variances, float[] momenta, int count) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(acnet_kernels, CPU, m) { m.impl("update_running_", TORCH_BOX(&update_running_)); }

}  // namespace acnet::running
