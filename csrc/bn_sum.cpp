// The operators bn_sum_* on the CPU: checks, chunks, threads and merging. Their meaning is documented once, in
// acnet_kernels/ops/bn_sum.py and epilogue.py. The passes are in bn_sum_kernels.h.
#include "bn_sum.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "activation_argument.h"
#include "check.h"
#include "cpu.h"
#include "functions.h"

namespace acnet::bn_sum {
namespace {

constexpr int64_t kChunkElements = 16 << 10;  // a chunk is worth a task of its own from here on
constexpr int64_t kMostChunks = 64;
constexpr int64_t kWidestRow = 512;  // of more than one pixel

template <class T, class O, class A>
const Passes<A>& passes() {
  static const Passes<A> chosen = [] {
    switch (best_isa()) {
#if defined(__x86_64__)
      case Isa::avx512: return avx512::passes<T, O, A>();
      case Isa::avx2: return avx2::passes<T, O, A>();
#endif
      default: return generic::passes<T, O, A>();
    }
  }();
  return chosen;
}

// body(T{}, A{}) for the maps' type T, a float, and the type A of statistics and coefficients.
template <class Body>
auto dispatch(ScalarType type, const Body& body) {
  switch (type) {
    case ScalarType::Float:
      return body(float{}, float{});
    case ScalarType::Double:
      return body(double{}, double{});
    case ScalarType::BFloat16:
      return body(c10::BFloat16{}, float{});
    default:
      return body(c10::Half{}, float{});
  }
}

// body(T{}, O{}, A{}) where out and grad, of type O, may be narrower than the maps.
template <class Body>
auto dispatch(ScalarType maps, ScalarType outer, const Body& body) {
  if (maps == outer) return dispatch(maps, [&](auto element, auto accumulator) { return body(element, element, accumulator); });
  return outer == ScalarType::BFloat16 ? body(float{}, c10::BFloat16{}, float{}) : body(float{}, c10::Half{}, float{});
}

void check_like(const Check& check, const View& map, const Entry& name, const View& y) {
  check(map.type() == y.type() && map.has_shape({y.sizes[0], y.sizes[1], y.sizes[2], y.sizes[3]}), name,
        " must agree in shape and dtype with ys[0], ", y.dtype->name, " of ", y.shape(), ", got ", map.dtype->name, " of ",
        map.shape());
}

// The maps, checked but for their layout.
std::vector<View> maps_of(const Check& check, const Tensors& ys) {
  check(!ys.empty() && ys.size() <= kMaxMaps, "ys must hold 1 to ", kMaxMaps, " maps, got ", ys.size());
  std::vector<View> views(ys.begin(), ys.end());
  const View& y = views[0];
  check(y.dim == 4 && !y.empty(), "ys must be non-empty N×K×H×W maps, got ", y.shape());
  check.floats(y, "ys");
  for (size_t b = 0; b < views.size(); ++b) {
    const Entry name{"ys", b};
    check.readable(views[b], name);
    check_like(check, views[b], name, y);
  }
  return views;
}

// How maps lie and are cut.
MapLayout layout_of(const Check& check, const std::vector<View>& maps) {
  const View& y = maps[0];
  MapLayout layout{};
  layout.maps = static_cast<int>(maps.size());
  layout.images = y.sizes[0];
  layout.channels = y.sizes[1];
  layout.pixels = y.sizes[2] * y.sizes[3];
  // Where both layouts describe the memory, the one with the longer runs.
  layout.channels_last = y.dense(true) && !(y.dense(false) && layout.pixels >= layout.channels);
  for (const View& map : maps) check(map.dense(layout.channels_last), "ys must all be contiguous or all channels_last");
  if (layout.channels_last) {
    // Rows of whole groups of four 64-byte vectors of float, or of whole vectors, unless that takes too many pixels.
    for (const int64_t columns : {64, 16}) {
      layout.pixels_per_row = std::lcm(layout.channels, columns) / layout.channels;
      if (layout.width() <= kWidestRow) break;
    }
    if (layout.width() > kWidestRow) layout.pixels_per_row = std::max<int64_t>(1, 64 / layout.channels);
    const int64_t rows = layout.images * layout.pixels / layout.pixels_per_row;
    const int64_t least = std::max<int64_t>(1, kChunkElements / layout.width());
    layout.chunk = std::max(least, (rows + kMostChunks - 1) / kMostChunks);
    layout.chunks = std::max<int64_t>(1, rows / layout.chunk);
  } else {
    layout.pixels_per_row = 1;
    const int64_t least = std::max<int64_t>(1, kChunkElements / layout.pixels);
    const int64_t most = std::max<int64_t>(1, kMostChunks / layout.channels);
    layout.chunk = std::max(least, (layout.images + most - 1) / most);
    layout.chunks = std::max<int64_t>(1, layout.images / layout.chunk);
  }
  return layout;
}

template <class F>
void run(const MapLayout& layout, const F& pass) {
  const int64_t elements = layout.images * layout.channels * layout.pixels;
  const int64_t grain = std::max<int64_t>(1, layout.tasks() * kChunkElements / std::max<int64_t>(1, elements));
  torch::stable::parallel_for(0, layout.tasks(), grain, pass);
}

std::vector<const void*> pointers(const std::vector<View>& maps) {
  std::vector<const void*> p;
  for (const View& map : maps) p.push_back(map.data);
  return p;
}

// γ or β of every map, of any strides: one vector of K channels each, or none at all.
std::vector<View> affine_of(const Check& check, const char* name, const Tensors& values, const MapLayout& layout) {
  check(values.empty() || values.size() == static_cast<size_t>(layout.maps), name, " must have one entry per map, ",
        layout.maps, " here, or none, got ", values.size());
  std::vector<View> views(values.begin(), values.end());
  for (size_t b = 0; b < views.size(); ++b) {
    check.readable(views[b], Entry{name, b});
    check.shape(views[b], Entry{name, b}, {layout.channels});
    check.floats(views[b], Entry{name, b});
  }
  return views;
}

void check_outer(const Check& check, const View& y, ScalarType outer) {
  check(outer == y.type() || (y.type() == ScalarType::Float && (outer == ScalarType::BFloat16 || outer == ScalarType::Half)),
        "out and grad must have the dtype of ys, ", y.dtype->name, ", or bfloat16 or float16 where ys are float32");
}

// The K values of map b as A; `missing` where there are none at all.
template <class A>
std::vector<A> channel_values(const std::vector<View>& all, size_t b, int64_t channels, A missing) {
  std::vector<A> values(channels, missing);
  if (all.empty()) return values;
  const View& v = all[b];
  dispatch(v.type(), [&](auto element, auto) {
    const auto* p = static_cast<const decltype(element)*>(v.data);
    for (int64_t k = 0; k < channels; ++k) values[k] = static_cast<A>(p[k * v.strides[0]]);
    return 0;
  });
  return values;
}

// Repeats every K values `pixels_per_row` times: one coefficient a column.
template <class A>
std::vector<A> widen(const MapLayout& layout, const std::vector<A>& values) {
  if (layout.pixels_per_row == 1) return values;
  std::vector<A> wide;
  wide.reserve(values.size() * layout.pixels_per_row);
  for (auto from = values.begin(); from != values.end(); from += layout.channels)
    for (int64_t f = 0; f < layout.pixels_per_row; ++f) wide.insert(wide.end(), from, from + layout.channels);
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

}  // namespace

namespace {

// Of every map's channels, [maps][channels].
struct Statistics {
  std::vector<double> mean, variance, rstd;
};

// E, the maps' type; their chunks' statistics merged by Chan's rule, chunk after chunk, in double.
template <class E, class A>
Statistics statistics_of(const Passes<A>& pass, const Tensors& ys, const std::vector<View>& maps, const MapLayout& layout,
                         const std::vector<double>& eps) {
  const std::vector<const void*> y = pointers(maps);
  const int64_t channels = layout.channels, per_chunk = layout.maps * channels;
  std::vector<double> chunk_mean(layout.chunks * per_chunk), chunk_m2(layout.chunks * per_chunk);
  std::vector<A> pivot(per_chunk);
  for (size_t b = 0; b < maps.size(); ++b)
    for (int64_t k = 0; k < channels; ++k)
      pivot[b * channels + k] = static_cast<A>(static_cast<const E*>(y[b])[k * maps[b].strides[1]]);
  const std::vector<A> wide_pivot = widen(layout, pivot);
  run(layout, [&](int64_t begin, int64_t end) {
    pass.statistics(layout, y.data(), wide_pivot.data(), chunk_mean.data(), chunk_m2.data(), begin, end);
  });
  Statistics found{std::vector<double>(per_chunk), std::vector<double>(per_chunk), std::vector<double>(per_chunk)};
  std::vector<double>&mean = found.mean, m2(per_chunk);
  double count = 0;
  for (int64_t i = 0; i < layout.chunks; ++i) {
    const double more = static_cast<double>(layout.count(i)), share = more / (count + more);
    for (int64_t c = 0; c < per_chunk; ++c) {
      const double delta = chunk_mean[i * per_chunk + c] - mean[c];
      mean[c] += delta * share;
      m2[c] += chunk_m2[i * per_chunk + c] + delta * delta * count * share;
    }
    count += more;
  }
  for (int64_t c = 0; c < per_chunk; ++c) {
    mean[c] += pivot[c];
    if (!std::isfinite(mean[c])) mean[c] = plain_mean<E>(ys[c / channels], c % channels);
    found.variance[c] = m2[c] / count;
    const double spread = found.variance[c] + eps[c / channels];
    found.rstd[c] = spread == 0 ? 0 : 1 / std::sqrt(spread);  // as in nn.BatchNorm2d, whose ε may be 0
  }
  return found;
}

void check_eps(const Check& check, const std::vector<double>& eps, const std::vector<View>& maps) {
  check(eps.size() == maps.size(), "eps must have one entry per map, ", maps.size(), " here, got ", eps.size());
}

}  // namespace

namespace {

// What a map is normalised by: Σ_b scale_b (y_b − center_b) + shift.
template <class A>
struct Affine {
  std::vector<A> center, scale, shift;

  // The passes subtract the mean rounded to A; what that leaves of a mean far larger than the deviation is made up for
  // in the shift, here, and in the offset, in the gradient.
  Affine(const MapLayout& layout, const std::vector<View>& gammas, const std::vector<View>& betas, const double* mean,
         const double* rstd)
      : center(mean, mean + layout.maps * layout.channels), scale(center.size()) {
    const int64_t channels = layout.channels;
    std::vector<double> sum(channels);
    for (int b = 0; b < layout.maps; ++b) {
      const std::vector<A> gamma = channel_values<A>(gammas, b, channels, 1);
      const std::vector<A> beta = channel_values<A>(betas, b, channels, 0);
      for (int64_t k = 0; k < channels; ++k) {
        const int64_t c = b * channels + k;
        scale[c] = static_cast<A>(gamma[k] * rstd[c]);
        sum[k] += beta[k] - scale[c] * (mean[c] - center[c]);
      }
    }
    shift.assign(sum.begin(), sum.end());
  }

  // One coefficient a column.
  Affine widened(const MapLayout& layout) && {
    center = widen(layout, center);
    scale = widen(layout, scale);
    shift = widen(layout, shift);
    return std::move(*this);
  }
};

// A map like out or grad, of type O.
void check_outer_map(const Check& check, const View& map, const char* name, const View& y, ScalarType type,
                     const MapLayout& layout) {
  check.readable(map, name);
  check(map.has_shape({y.sizes[0], y.sizes[1], y.sizes[2], y.sizes[3]}) && map.dense(layout.channels_last), name,
        " must agree with ys in shape and layout, got ", map.shape(), ", ys have ", y.shape());
  check(map.type() == type, name, " must have the dtype of out, got ", map.dtype->name);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_with(const Check& check, const Tensors& ys, const Tensors& gammas,
                                                        const Tensors& betas, const std::vector<double>& eps,
                                                        std::optional<ScalarType> dtype,
                                                        const std::optional<Tensor>& residual, Activation activation) {
  const std::vector<View> maps = maps_of(check, ys);
  const MapLayout layout = layout_of(check, maps);
  const std::vector<View> scales = affine_of(check, "gammas", gammas, layout), shifts = affine_of(check, "betas", betas, layout);
  check_eps(check, eps, maps);
  const ScalarType type = maps[0].type(), outer_type = dtype.value_or(type);
  check_outer(check, maps[0], outer_type);
  const void* added = nullptr;
  if (residual) {
    const View map(*residual);
    check_outer_map(check, map, "residual", maps[0], outer_type, layout);
    added = map.data;
  }
  return dispatch(type, outer_type, [&](auto element, auto outer, auto accumulator) {
    using E = decltype(element);
    using A = decltype(accumulator);
    const Passes<A>& pass = passes<E, decltype(outer), A>();
    Tensor out = empty_map(ys[0], outer_type);
    const Statistics found = statistics_of<E>(pass, ys, maps, layout, eps);
    const Affine<A> affine = Affine<A>(layout, scales, shifts, found.mean.data(), found.rstd.data()).widened(layout);
    Tensor means = make_tensor(ys[0], {layout.maps, layout.channels}, found.mean);
    Tensor variances = make_tensor(ys[0], {layout.maps, layout.channels}, found.variance);
    Tensor rstds = make_tensor(ys[0], {layout.maps, layout.channels}, found.rstd);
    const std::vector<const void*> y = pointers(maps);
    run(layout, [&](int64_t begin, int64_t end) {
      pass.apply(layout, y.data(), affine.center.data(), affine.scale.data(), affine.shift.data(), added, activation,
                 out.mutable_data_ptr(), begin, end);
    });
    return std::make_tuple(out, means, variances, rstds);
  });
}

}  // namespace

// (means, variances, rstds, centres, scales, shift)
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> affine(Tensors ys, Tensors gammas, Tensors betas,
                                                                  std::vector<double> eps) {
  constexpr Check check("bn_sum_affine");
  const std::vector<View> maps = maps_of(check, ys);
  const MapLayout layout = layout_of(check, maps);
  const std::vector<View> scales = affine_of(check, "gammas", gammas, layout), shifts = affine_of(check, "betas", betas, layout);
  check_eps(check, eps, maps);
  return dispatch(maps[0].type(), [&](auto element, auto accumulator) {
    using E = decltype(element);
    using A = decltype(accumulator);
    const Statistics found = statistics_of<E>(passes<E, E, A>(), ys, maps, layout, eps);
    const Affine<A> by(layout, scales, shifts, found.mean.data(), found.rstd.data());
    const auto of_maps = [&](const auto& values) { return make_tensor(ys[0], {layout.maps, layout.channels}, values); };
    return std::make_tuple(of_maps(found.mean), of_maps(found.variance), of_maps(found.rstd), of_maps(by.center),
                           of_maps(by.scale), make_tensor(ys[0], {layout.channels}, by.shift));
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(Tensors ys, Tensors gammas, Tensors betas, std::vector<double> eps,
                                                   std::optional<ScalarType> dtype) {
  return forward_with(Check("bn_sum_forward"), ys, gammas, betas, eps, dtype, std::nullopt, Activation::none);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> epilogue_forward(Tensors ys, Tensors gammas, Tensors betas,
                                                            std::vector<double> eps, std::optional<ScalarType> dtype,
                                                            std::optional<Tensor> residual, int64_t activation) {
  constexpr Check check("bn_sum_epilogue_forward");
  return forward_with(check, ys, gammas, betas, eps, dtype, residual, activation_of(check, activation));
}

namespace {

// What a gradient is computed from, checked.
struct Gradient {
  std::vector<View> maps, scales;
  MapLayout layout;
  View grad, means, rstds;

  Gradient(const Check& check, const Tensor& out_grad, const Tensors& ys, const Tensor& mean, const Tensor& rstd,
           const Tensors& gammas, const std::vector<bool>& needs_dy)
      : maps(maps_of(check, ys)), layout(layout_of(check, maps)), grad(out_grad), means(mean), rstds(rstd) {
    const View& y = maps[0];
    check(needs_dy.size() == ys.size(), "needs_dy must have one entry per map, ", ys.size(), " here, got ", needs_dy.size());
    check_outer_map(check, grad, "grad", y, grad.type(), layout);
    check_outer(check, y, grad.type());
    scales = affine_of(check, "gammas", gammas, layout);
    for (const auto& [v, name] : {std::pair<const View&, const char*>{means, "means"}, {rstds, "rstds"}}) {
      check.readable(v, name);
      check.shape(v, name, {layout.maps, layout.channels});
      check.type(v, name, ScalarType::Double, "dtype float64");
      check.contiguous(v, name);
    }
  }
};

// What comes after the sum, checked: what Slope keeps of it, and where the residual's gradient goes, or null.
struct After {
  Activation activation = Activation::none;
  std::vector<View> betas;
  const void* kept = nullptr;
  void* grad = nullptr;
};

// dγ (maps×K), dβ (K), and what a gradient is: dy_b = scale_b·g + y_factor_b·(y_b − center_b) + offset_b.
template <class A>
struct Slopes {
  std::vector<A> dgamma, dbeta, scale, y_factor, offset;

  // `rounded`: the centers; `slope`: what turns grad into g.
  Slopes(const Passes<A>& pass, const Gradient& from, const std::vector<A>& rounded, const Slope<A>& slope)
      : dgamma(rounded.size()), scale(rounded.size()), y_factor(rounded.size()), offset(rounded.size()) {
    const MapLayout& layout = from.layout;
    const int64_t channels = layout.channels, per_chunk = (layout.maps + 1) * channels;
    const std::vector<const void*> y = pointers(from.maps);
    const std::vector<A> center = widen(layout, rounded);
    std::vector<A> chunk_sums(layout.chunks * per_chunk);
    run(layout, [&](int64_t begin, int64_t end) {
      pass.reduce(layout, from.grad.data, y.data(), center.data(), slope, chunk_sums.data(), begin, end);
    });
    std::vector<double> sums(per_chunk);
    for (int64_t i = 0; i < layout.chunks; ++i)
      for (int64_t c = 0; c < per_chunk; ++c) sums[c] += chunk_sums[i * per_chunk + c];
    const double* mean = static_cast<const double*>(from.means.data);
    const double* rstd = static_cast<const double*>(from.rstds.data);
    const double count = static_cast<double>(layout.images) * static_cast<double>(layout.pixels);
    const double* total = sums.data() + layout.maps * channels;
    dbeta.assign(total, total + channels);
    for (int b = 0; b < layout.maps; ++b) {
      const std::vector<A> gamma = channel_values<A>(from.scales, b, channels, 1);
      for (int64_t k = 0; k < channels; ++k) {
        const int64_t c = b * channels + k;
        const double left = mean[c] - rounded[c], d = (sums[c] - left * total[k]) * rstd[c];
        dgamma[c] = static_cast<A>(d);
        scale[c] = static_cast<A>(gamma[k] * rstd[c]);
        y_factor[c] = static_cast<A>(-double(scale[c]) * rstd[c] * d / count);
        offset[c] = static_cast<A>(-double(scale[c]) * total[k] / count - y_factor[c] * left);
      }
    }
  }
};

// dγ (maps×K) and dβ (K); dy_b into dys[b] wherever that is not null.
std::tuple<Tensor, Tensor> backward_into(const Gradient& from, const Tensor& grad, const std::vector<void*>& dys,
                                         const After& after = {}) {
  const MapLayout& layout = from.layout;
  return dispatch(from.maps[0].type(), from.grad.type(), [&](auto element, auto outer, auto accumulator) {
    using A = decltype(accumulator);
    const Passes<A>& pass = passes<decltype(element), decltype(outer), A>();
    const std::vector<const void*> y = pointers(from.maps);
    const double* mean = static_cast<const double*>(from.means.data);
    const double* rstd = static_cast<const double*>(from.rstds.data);
    const std::vector<A> rounded(mean, mean + layout.maps * layout.channels), center = widen(layout, rounded);
    Slope<A> slope{after.activation, after.kept, nullptr, nullptr, after.grad};
    std::optional<Affine<A>> affine;
    if (after.activation != Activation::none && !is_clamp(after.activation)) {
      affine.emplace(Affine<A>(layout, from.scales, after.betas, mean, rstd).widened(layout));
      slope.scale = affine->scale.data();
      slope.shift = affine->shift.data();
    }
    const Slopes<A> found(pass, from, rounded, slope);
    Tensor dgammas = make_tensor(grad, {layout.maps, layout.channels}, found.dgamma);
    Tensor dbetas = make_tensor(grad, {layout.channels}, found.dbeta);
    if (std::any_of(dys.begin(), dys.end(), [](const void* p) { return p != nullptr; })) {
      const std::vector<A> scale = widen(layout, found.scale), y_factor = widen(layout, found.y_factor),
                           offset = widen(layout, found.offset);
      const void* g = from.grad.data;
      if (after.grad != nullptr) {  // the residual's gradient is what this needs
        g = after.grad;
        slope = {};
      }
      run(layout, [&](int64_t begin, int64_t end) {
        pass.gradient(layout, g, y.data(), center.data(), slope, scale.data(), y_factor.data(), offset.data(), dys.data(),
                      begin, end);
      });
    }
    return std::make_tuple(dgammas, dbetas);
  });
}

}  // namespace

std::tuple<Tensors, Tensor, Tensor> backward(Tensor grad, Tensors ys, Tensor means, Tensor rstds,
                                             Tensors gammas, std::vector<bool> needs_dy) {
  const Gradient from(Check("bn_sum_backward"), grad, ys, means, rstds, gammas, needs_dy);
  Tensors dys;
  std::vector<void*> targets(ys.size(), nullptr);
  for (size_t b = 0; b < ys.size(); ++b)
    if (needs_dy[b]) {
      dys.push_back(torch::stable::empty_like(ys[b]));
      targets[b] = dys.back().mutable_data_ptr();
    }
  auto [dgammas, dbeta] = backward_into(from, grad, targets);
  return {std::move(dys), std::move(dgammas), std::move(dbeta)};
}

// (dgammas, dbeta, scales, factors, offsets)
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> slopes(Tensor grad, Tensors ys, Tensor means, Tensor rstds, Tensors gammas) {
  const Gradient from(Check("bn_sum_slopes"), grad, ys, means, rstds, gammas, std::vector<bool>(ys.size(), true));
  const MapLayout& layout = from.layout;
  return dispatch(from.maps[0].type(), from.grad.type(), [&](auto element, auto outer, auto accumulator) {
    using A = decltype(accumulator);
    const double* mean = static_cast<const double*>(from.means.data);
    const std::vector<A> rounded(mean, mean + layout.maps * layout.channels);
    const Slopes<A> found(passes<decltype(element), decltype(outer), A>(), from, rounded, {});
    const auto of_maps = [&](const std::vector<A>& values) { return make_tensor(grad, {layout.maps, layout.channels}, values); };
    return std::make_tuple(of_maps(found.dgamma), make_tensor(grad, {layout.channels}, found.dbeta), of_maps(found.scale),
                           of_maps(found.y_factor), of_maps(found.offset));
  });
}

namespace {

// Where dy_b of every map goes, or null, checked: over y_b itself, or apart from everything that is read.
std::vector<void*> targets_of(const Check& check, const Gradient& from, const Tensors& gammas,
                              const std::vector<bool>& needs_dy, const Tensors& dys) {
  const auto wanted = static_cast<size_t>(std::count(needs_dy.begin(), needs_dy.end(), true));
  check(dys.size() == wanted, "dys must have one entry per true entry of needs_dy, ", wanted, " here, got ", dys.size());
  const std::vector<View> written(dys.begin(), dys.end());
  std::vector<void*> targets(needs_dy.size(), nullptr);
  for (size_t b = 0, i = 0; b < needs_dy.size(); ++b) {
    if (!needs_dy[b]) continue;
    const Entry name{"dys", i};
    const View& dy = written[i];
    check.readable(dy, name);
    check_like(check, dy, name, from.maps[0]);
    check(dy.dense(from.layout.channels_last), name, " must have the layout of ys");
    for (size_t other = 0; other < from.maps.size(); ++other)
      if (other != b || dy.data != from.maps[b].data) check.apart(dy, name, from.maps[other], Entry{"ys", other});
    for (size_t other = 0; other < i; ++other) check.apart(dy, name, written[other], Entry{"dys", other});
    check.apart(dy, name, from.grad, "grad");
    check.apart(dy, name, from.means, "means");
    check.apart(dy, name, from.rstds, "rstds");
    for (size_t other = 0; other < gammas.size(); ++other)
      check.apart(dy, name, from.scales[other], Entry{"gammas", other});
    targets[b] = dys[i++].mutable_data_ptr();
  }
  return targets;
}

}  // namespace

std::tuple<Tensor, Tensor> backward_(Tensor grad, Tensors ys, Tensor means, Tensor rstds, Tensors gammas,
                                     std::vector<bool> needs_dy, Tensors dys) {
  constexpr Check check("bn_sum_backward_");
  const Gradient from(check, grad, ys, means, rstds, gammas, needs_dy);
  return backward_into(from, grad, targets_of(check, from, gammas, needs_dy, dys));
}

std::tuple<Tensor, Tensor> epilogue_backward_(Tensor grad, Tensors ys, Tensor means, Tensor rstds, Tensors gammas,
                                              Tensors betas, std::vector<bool> needs_dy, std::optional<Tensor> kept,
                                              int64_t activation, Tensors dys, std::optional<Tensor> dresidual) {
  constexpr Check check("bn_sum_epilogue_backward_");
  const Gradient from(check, grad, ys, means, rstds, gammas, needs_dy);
  After after{activation_of(check, activation), affine_of(check, "betas", betas, from.layout)};
  check(after.activation != Activation::none, "activation must be one: without, the residual's gradient is grad");
  check(kept.has_value() || !is_clamp(after.activation), "kept must be out, which tells where a clamp is flat, got None");
  const std::vector<void*> targets = targets_of(check, from, gammas, needs_dy, dys);
  std::vector<std::pair<View, const char*>> others;
  if (kept) {
    others.emplace_back(View(*kept), "kept");
    check_outer_map(check, others[0].first, "kept", from.maps[0], from.grad.type(), from.layout);
    after.kept = others[0].first.data;
  }
  for (size_t i = 0; i < dys.size(); ++i) {
    const View dy(dys[i]);
    for (const auto& [other, name] : others) check.apart(dy, Entry{"dys", i}, other, name);
    for (size_t b = 0; b < betas.size(); ++b) check.apart(dy, Entry{"dys", i}, after.betas[b], Entry{"betas", b});
  }
  if (dresidual) {
    const View dr(*dresidual);
    check_outer_map(check, dr, "dresidual", from.maps[0], from.grad.type(), from.layout);
    for (const auto& [v, name] : {std::pair<const View&, const char*>{from.grad, "grad"}, {from.means, "means"}, {from.rstds, "rstds"}})
      others.emplace_back(v, name);
    for (const auto& [other, name] : others) check.apart(dr, "dresidual", other, name);
    for (size_t b = 0; b < from.maps.size(); ++b) check.apart(dr, "dresidual", from.maps[b], Entry{"ys", b});
    for (size_t i = 0; i < dys.size(); ++i) check.apart(dr, "dresidual", View(dys[i]), Entry{"dys", i});
    for (size_t b = 0; b < gammas.size(); ++b) check.apart(dr, "dresidual", from.scales[b], Entry{"gammas", b});
    for (size_t b = 0; b < betas.size(); ++b) check.apart(dr, "dresidual", after.betas[b], Entry{"betas", b});
    after.grad = dresidual->mutable_data_ptr();
  }
  return backward_into(from, grad, targets, after);
}

STABLE_TORCH_LIBRARY_FRAGMENT(acnet_kernels, m) {
  m.def("bn_sum_affine(Tensor[] ys, Tensor[] gammas, Tensor[] betas, float[] eps)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("bn_sum_slopes(Tensor grad, Tensor[] ys, Tensor means, Tensor rstds, Tensor[] gammas)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("bn_sum_forward(Tensor[] ys, Tensor[] gammas, Tensor[] betas, float[] eps, ScalarType? dtype)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "bn_sum_backward(Tensor grad, Tensor[] ys, Tensor means, Tensor rstds, Tensor[] gammas, bool[] needs_dy)"
      " -> (Tensor[], Tensor, Tensor)");
  m.def(
      "bn_sum_backward_(Tensor grad, Tensor[] ys, Tensor means, Tensor rstds, Tensor[] gammas, bool[] needs_dy,"
      " Tensor(a!)[] dys) -> (Tensor, Tensor)");
  m.def("bn_sum_epilogue_forward(Tensor[] ys, Tensor[] gammas, Tensor[] betas, float[] eps, ScalarType? dtype,"
      " Tensor? residual, int activation) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "bn_sum_epilogue_backward_(Tensor grad, Tensor[] ys, Tensor means, Tensor rstds, Tensor[] gammas, Tensor[] betas,"
      " bool[] needs_dy, Tensor? kept, int activation, Tensor(a!)[] dys, Tensor(b!)? dresidual) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(acnet_kernels, CPU, m) {
  m.impl("bn_sum_affine", TORCH_BOX(&affine));
  m.impl("bn_sum_slopes", TORCH_BOX(&slopes));
  m.impl("bn_sum_forward", TORCH_BOX(&forward));
  m.impl("bn_sum_backward", TORCH_BOX(&backward));
  m.impl("bn_sum_backward_", TORCH_BOX(&backward_));
  m.impl("bn_sum_epilogue_forward", TORCH_BOX(&epilogue_forward));
  m.impl("bn_sum_epilogue_backward_", TORCH_BOX(&epilogue_backward_));
}

}  // namespace acnet::bn_sum

extern "C" const acnet::Functions* acnet::acnet_functions() {
  static constexpr Functions functions{&bn_sum::forward, &bn_sum::backward, &bn_sum::backward_,
                                       &bn_sum::epilogue_forward, &bn_sum::epilogue_backward_, &running::update_running_, &fuse_blocks, &moments::step, &moments::step_backward,
                                       &depthwise::step, &depthwise::step_backward, &direct::maps, &direct::gradients, &launch::replay};
  return &functions;
}
