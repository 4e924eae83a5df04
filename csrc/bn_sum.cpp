// The operators bn_sum_forward, bn_sum_backward and bn_sum_backward_ on the CPU: checks, slabs, threads and merging.
// Their meaning is documented once, in acnet_kernels/ops/bn_sum.py. The passes are in bn_sum_kernels.h.
#include "bn_sum.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

namespace acnet::bn_sum {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

constexpr int64_t kSlabElements = 16 << 10;  // a slab is worth a task of its own from here on
constexpr int64_t kMostSlabs = 64;

// The best instruction set of this processor, limited by ATEN_CPU_CAPABILITY (default, avx2, avx512) as in ATen.
template <class T, class O, class A>
const Passes<A>& passes() {
  static const Passes<A> chosen = [] {
#if defined(__x86_64__)
    const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
    const std::string limit = variable == nullptr ? "avx512" : variable;
    __builtin_cpu_init();
    if (limit == "avx512" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      return avx512::passes<T, O, A>();
    if (limit != "default" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c"))
      return avx2::passes<T, O, A>();
#endif
    return generic::passes<T, O, A>();
  }();
  return chosen;
}

// body(T{}, A{}) for the maps' type T and the type A of statistics and coefficients.
template <class Body>
auto dispatch(ScalarType type, const Body& body) {
  switch (type) {
    case ScalarType::Float:
      return body(float{}, float{});
    case ScalarType::Double:
      return body(double{}, double{});
    case ScalarType::BFloat16:
      return body(c10::BFloat16{}, float{});
    case ScalarType::Half:
      return body(c10::Half{}, float{});
    default:
      STD_TORCH_CHECK(false, "ys must be float32, float64, bfloat16 or float16");
  }
}

// body(T{}, O{}, A{}) where out and grad, of type O, may be narrower than the maps.
template <class Body>
auto dispatch(ScalarType maps, ScalarType outer, const Body& body) {
  if (maps == outer) return dispatch(maps, [&](auto element, auto accumulator) { return body(element, element, accumulator); });
  STD_TORCH_CHECK(maps == ScalarType::Float && (outer == ScalarType::BFloat16 || outer == ScalarType::Half),
                  "out and grad must have the dtype of ys, or bfloat16 or float16 where ys are float32");
  return outer == ScalarType::BFloat16 ? body(float{}, c10::BFloat16{}, float{}) : body(float{}, c10::Half{}, float{});
}

bool is_channels_last(const Tensor& t) {
  int64_t expected = 1;
  for (const int d : {1, 3, 2, 0}) {
    if (t.size(d) != 1 && t.stride(d) != expected) return false;
    expected *= t.size(d);
  }
  return true;
}

Plan plan_of(const Tensors& ys) {
  STD_TORCH_CHECK(!ys.empty() && ys.size() <= kMaxBranches, "ys must hold 1 to ", kMaxBranches, " maps, got ",
                  ys.size());
  const Tensor& y = ys[0];
  STD_TORCH_CHECK(y.dim() == 4 && y.numel() > 0, "ys must be non-empty N×K×H×W maps");
  Plan plan{};
  plan.branches = static_cast<int>(ys.size());
  plan.images = y.size(0);
  plan.channels = y.size(1);
  plan.pixels = y.size(2) * y.size(3);
  // Where both layouts describe the memory, the one with the longer runs.
  plan.channels_last = is_channels_last(y) && !(y.is_contiguous() && plan.pixels >= plan.channels);
  for (const Tensor& other : ys) {
    bool same = other.scalar_type() == y.scalar_type() && other.dim() == 4;
    for (int d = 0; same && d < 4; ++d) same = other.size(d) == y.size(d);
    STD_TORCH_CHECK(same, "ys must agree in shape and dtype");
    STD_TORCH_CHECK(plan.channels_last ? is_channels_last(other) : other.is_contiguous(),
                    "ys must all be contiguous or all channels_last");
  }
  if (plan.channels_last) {
    // Rows of whole 64-byte vectors of float, not narrower than four of them, unless that takes too many pixels.
    const int64_t whole = std::lcm(plan.channels, int64_t{16}) / plan.channels;
    plan.fold = whole * std::max<int64_t>(1, 64 / (whole * plan.channels));
    if (plan.width() > 512) plan.fold = std::max<int64_t>(1, 64 / plan.channels);
    const int64_t rows = plan.images * plan.pixels / plan.fold;
    const int64_t least = std::max<int64_t>(1, kSlabElements / plan.width());
    plan.slab = std::max(least, (rows + kMostSlabs - 1) / kMostSlabs);
    plan.slabs = std::max<int64_t>(1, rows / plan.slab);
  } else {
    plan.fold = 1;
    const int64_t least = std::max<int64_t>(1, kSlabElements / plan.pixels);
    const int64_t most = std::max<int64_t>(1, kMostSlabs / plan.channels);
    plan.slab = std::max(least, (plan.images + most - 1) / most);
    plan.slabs = std::max<int64_t>(1, plan.images / plan.slab);
  }
  return plan;
}

template <class F>
void run(const Plan& plan, const F& pass) {
  const int64_t elements = plan.images * plan.channels * plan.pixels;
  const int64_t grain = std::max<int64_t>(1, plan.tasks() * kSlabElements / std::max<int64_t>(1, elements));
  torch::stable::parallel_for(0, plan.tasks(), grain, pass);
}

std::vector<const void*> pointers(const Tensors& maps) {
  std::vector<const void*> p;
  for (const Tensor& map : maps) p.push_back(map.const_data_ptr());
  return p;
}

void check_affine(const char* name, const Tensors& values, size_t branches) {
  STD_TORCH_CHECK(values.empty() || values.size() == branches, name, " must have one entry per map, or none");
}

// The K values of branch b as A; `missing` where there are none at all.
template <class A>
std::vector<A> channel_values(const char* name, const Tensors& all, size_t b, int64_t channels, A missing) {
  std::vector<A> values(channels, missing);
  if (all.empty()) return values;
  const Tensor& t = all[b];
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 1 && t.size(0) == channels && t.is_contiguous(), name,
                  " must be contiguous CPU vectors of ", channels, " channels");
  dispatch(t.scalar_type(), [&](auto element, auto) {
    using E = decltype(element);
    const E* p = static_cast<const E*>(t.const_data_ptr());
    for (int64_t k = 0; k < channels; ++k) values[k] = static_cast<A>(p[k]);
    return 0;
  });
  return values;
}

// Repeats every K values `fold` times: one coefficient a column.
template <class A>
std::vector<A> widen(const Plan& plan, const std::vector<A>& values) {
  if (plan.fold == 1) return values;
  std::vector<A> wide;
  wide.reserve(values.size() * plan.fold);
  for (auto from = values.begin(); from != values.end(); from += plan.channels)
    for (int64_t f = 0; f < plan.fold; ++f) wide.insert(wide.end(), from, from + plan.channels);
  return wide;
}

template <class A>
Tensor make_tensor(const Tensor& like, std::vector<int64_t> sizes, const std::vector<A>& values) {
  Tensor t = torch::stable::new_empty(like, sizes, std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float);
  std::copy(values.begin(), values.end(), static_cast<A*>(t.mutable_data_ptr()));
  return t;
}

// An uninitialised map in y's shape and layout; not a view of one, or autograd would forbid changing it in place.
Tensor empty_map(const Tensor& y, ScalarType dtype) {
  if (dtype == y.scalar_type()) return torch::stable::empty_like(y);
  using torch::headeronly::MemoryFormat;
  const std::vector<int64_t> sizes = {y.size(0), y.size(1), y.size(2), y.size(3)};
  return torch::stable::empty(sizes, dtype, std::nullopt, std::nullopt, std::nullopt,
                              y.is_contiguous() ? MemoryFormat::Contiguous : MemoryFormat::ChannelsLast);
}

// The plain mean of one channel, in double. Where a map is not finite it says whether its mean is infinite or NaN, as
// nn.BatchNorm2d's does; what the passes merge is NaN either way.
template <class E>
double plain_mean(const Tensor& y, int64_t channel) {
  const E* p = static_cast<const E*>(y.const_data_ptr()) + channel * y.stride(1);
  double sum = 0;
  for (int64_t n = 0; n < y.size(0); ++n)
    for (int64_t i = 0; i < y.size(2); ++i)
      for (int64_t j = 0; j < y.size(3); ++j)
        sum += static_cast<double>(p[n * y.stride(0) + i * y.stride(2) + j * y.stride(3)]);
  return sum / static_cast<double>(y.numel() / y.size(1));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(Tensors ys, Tensors gammas, Tensors betas, std::vector<double> eps,
                                                   std::optional<ScalarType> dtype) {
  const Plan plan = plan_of(ys);
  const size_t branches = ys.size();
  check_affine("gammas", gammas, branches);
  check_affine("betas", betas, branches);
  STD_TORCH_CHECK(eps.size() == branches, "eps must have one entry per map");
  const ScalarType type = ys[0].scalar_type();
  return dispatch(type, dtype.value_or(type), [&](auto element, auto outer, auto accumulator) {
    using E = decltype(element);
    using A = decltype(accumulator);
    const Passes<A>& pass = passes<E, decltype(outer), A>();
    Tensor out = empty_map(ys[0], dtype.value_or(type));
    const std::vector<const void*> y = pointers(ys);
    const int64_t channels = plan.channels, per_slab = plan.branches * channels;
    std::vector<double> slab_mean(plan.slabs * per_slab), slab_m2(plan.slabs * per_slab);
    std::vector<A> pivot(per_slab);
    for (size_t b = 0; b < branches; ++b)
      for (int64_t k = 0; k < channels; ++k)
        pivot[b * channels + k] = static_cast<A>(static_cast<const E*>(y[b])[k * ys[b].stride(1)]);
    const std::vector<A> wide_pivot = widen(plan, pivot);
    run(plan, [&](int64_t begin, int64_t end) {
      pass.statistics(plan, y.data(), wide_pivot.data(), slab_mean.data(), slab_m2.data(), begin, end);
    });
    // Chan's rule, slab after slab, in double.
    std::vector<double> mean(per_slab), m2(per_slab);
    double count = 0;
    for (int64_t i = 0; i < plan.slabs; ++i) {
      const double more = static_cast<double>(plan.count(i)), share = more / (count + more);
      for (int64_t c = 0; c < per_slab; ++c) {
        const double delta = slab_mean[i * per_slab + c] - mean[c];
        mean[c] += delta * share;
        m2[c] += slab_m2[i * per_slab + c] + delta * delta * count * share;
      }
      count += more;
    }
    for (int64_t c = 0; c < per_slab; ++c) {
      mean[c] += pivot[c];
      if (!std::isfinite(mean[c])) mean[c] = plain_mean<E>(ys[c / channels], c % channels);
    }
    // The passes subtract the mean rounded to A; what that leaves of a mean far larger than the deviation is made up
    // for in the shift, here, and in the offset, in the gradient.
    std::vector<A> center(mean.begin(), mean.end()), scale(per_slab);
    std::vector<double> variance(per_slab), rstd(per_slab), sum(channels);
    for (size_t b = 0; b < branches; ++b) {
      const std::vector<A> gamma = channel_values<A>("gammas", gammas, b, channels, 1);
      const std::vector<A> beta = channel_values<A>("betas", betas, b, channels, 0);
      for (int64_t k = 0; k < channels; ++k) {
        const int64_t c = b * channels + k;
        variance[c] = m2[c] / count;
        const double spread = variance[c] + eps[b];
        rstd[c] = spread == 0 ? 0 : 1 / std::sqrt(spread);  // as in nn.BatchNorm2d, whose ε may be 0
        scale[c] = static_cast<A>(gamma[k] * rstd[c]);
        sum[k] += beta[k] - scale[c] * (mean[c] - center[c]);
      }
    }
    std::vector<A> shift(sum.begin(), sum.end());
    Tensor means = make_tensor(ys[0], {plan.branches, channels}, mean);
    Tensor variances = make_tensor(ys[0], {plan.branches, channels}, variance);
    Tensor rstds = make_tensor(ys[0], {plan.branches, channels}, rstd);
    center = widen(plan, center);
    scale = widen(plan, scale);
    shift = widen(plan, shift);
    run(plan, [&](int64_t begin, int64_t end) {
      pass.apply(plan, y.data(), center.data(), scale.data(), shift.data(), out.mutable_data_ptr(), begin, end);
    });
    return std::make_tuple(out, means, variances, rstds);
  });
}

// dγ (branches×K) and dβ (K); dy_b into dys[b] wherever that is not null.
std::tuple<Tensor, Tensor> backward_into(const Tensor& grad, const Tensors& ys, const Tensor& means,
                                         const Tensor& rstds, const Tensors& gammas,
                                         const std::vector<void*>& dys) {
  const Plan plan = plan_of(ys);
  bool same = grad.dim() == 4;
  for (int d = 0; same && d < 4; ++d) same = grad.size(d) == ys[0].size(d);
  STD_TORCH_CHECK(same && (plan.channels_last ? is_channels_last(grad) : grad.is_contiguous()),
                  "grad must agree with ys in shape and layout");
  check_affine("gammas", gammas, ys.size());
  for (const Tensor* t : {&means, &rstds})
    STD_TORCH_CHECK(t->numel() == plan.branches * plan.channels && t->is_contiguous() &&
                        t->scalar_type() == ScalarType::Double,
                    "means and rstds must be what bn_sum_forward returned");
  return dispatch(ys[0].scalar_type(), grad.scalar_type(), [&](auto element, auto outer, auto accumulator) {
    using A = decltype(accumulator);
    const Passes<A>& pass = passes<decltype(element), decltype(outer), A>();
    const std::vector<const void*> y = pointers(ys);
    const int64_t channels = plan.channels, per_slab = (plan.branches + 1) * channels;
    const double* mean = static_cast<const double*>(means.const_data_ptr());
    const double* rstd = static_cast<const double*>(rstds.const_data_ptr());
    const std::vector<A> rounded(mean, mean + plan.branches * channels), center = widen(plan, rounded);
    std::vector<A> slab_sums(plan.slabs * per_slab);
    run(plan, [&](int64_t begin, int64_t end) {
      pass.reduce(plan, grad.const_data_ptr(), y.data(), center.data(), slab_sums.data(), begin, end);
    });
    std::vector<double> sums(per_slab);
    for (int64_t i = 0; i < plan.slabs; ++i)
      for (int64_t c = 0; c < per_slab; ++c) sums[c] += slab_sums[i * per_slab + c];
    const double count = static_cast<double>(plan.images) * static_cast<double>(plan.pixels);
    const double* total = sums.data() + plan.branches * channels;
    std::vector<A> dgamma(plan.branches * channels), scale(dgamma.size()), slope(dgamma.size()), offset(dgamma.size());
    const std::vector<A> dbeta(total, total + channels);
    for (int b = 0; b < plan.branches; ++b) {
      const std::vector<A> gamma = channel_values<A>("gammas", gammas, b, channels, 1);
      for (int64_t k = 0; k < channels; ++k) {
        const int64_t c = b * channels + k;
        const double left = mean[c] - rounded[c], d = (sums[c] - left * total[k]) * rstd[c];
        dgamma[c] = static_cast<A>(d);
        scale[c] = static_cast<A>(gamma[k] * rstd[c]);
        slope[c] = static_cast<A>(-double(scale[c]) * rstd[c] * d / count);
        offset[c] = static_cast<A>(-double(scale[c]) * total[k] / count - slope[c] * left);
      }
    }
    Tensor dgammas = make_tensor(grad, {plan.branches, channels}, dgamma);
    Tensor dbetas = make_tensor(grad, {channels}, dbeta);
    if (std::any_of(dys.begin(), dys.end(), [](const void* p) { return p != nullptr; })) {
      scale = widen(plan, scale);
      slope = widen(plan, slope);
      offset = widen(plan, offset);
      run(plan, [&](int64_t begin, int64_t end) {
        pass.gradient(plan, grad.const_data_ptr(), y.data(), center.data(), scale.data(), slope.data(),
                      offset.data(), dys.data(), begin, end);
      });
    }
    return std::make_tuple(dgammas, dbetas);
  });
}

std::tuple<Tensors, Tensor, Tensor> backward(Tensor grad, Tensors ys, Tensor means, Tensor rstds,
                                             Tensors gammas, std::vector<bool> needs_dy) {
  STD_TORCH_CHECK(needs_dy.size() == ys.size(), "needs_dy must have one entry per map");
  Tensors dys;
  std::vector<void*> targets(ys.size(), nullptr);
  for (size_t b = 0; b < ys.size(); ++b)
    if (needs_dy[b]) {
      dys.push_back(torch::stable::empty_like(ys[b]));
      targets[b] = dys.back().mutable_data_ptr();
    }
  auto [dgammas, dbeta] = backward_into(grad, ys, means, rstds, gammas, targets);
  return {std::move(dys), std::move(dgammas), std::move(dbeta)};
}

std::tuple<Tensor, Tensor> backward_(Tensor grad, Tensors ys, Tensor means, Tensor rstds, Tensors gammas,
                                     std::vector<bool> needs_dy) {
  STD_TORCH_CHECK(needs_dy.size() == ys.size(), "needs_dy must have one entry per map");
  std::vector<void*> targets(ys.size(), nullptr);
  for (size_t b = 0; b < ys.size(); ++b)
    if (needs_dy[b]) targets[b] = ys[b].mutable_data_ptr();
  return backward_into(grad, ys, means, rstds, gammas, targets);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(acnet_kernels, m) {
  m.def("bn_sum_forward(Tensor[] ys, Tensor[] gammas, Tensor[] betas, float[] eps, ScalarType? dtype)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "bn_sum_backward(Tensor grad, Tensor[] ys, Tensor means, Tensor rstds, Tensor[] gammas, bool[] needs_dy)"
      " -> (Tensor[], Tensor, Tensor)");
  m.def(
      "bn_sum_backward_(Tensor grad, Tensor(a!)[] ys, Tensor means, Tensor rstds, Tensor[] gammas, bool[] needs_dy)"
      " -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(acnet_kernels, CPU, m) {
  m.impl("bn_sum_forward", TORCH_BOX(&forward));
  m.impl("bn_sum_backward", TORCH_BOX(&backward));
  m.impl("bn_sum_backward_", TORCH_BOX(&backward_));
}

}  // namespace acnet::bn_sum
