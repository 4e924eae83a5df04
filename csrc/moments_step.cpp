// The operators moments_step and moments_step_backward on the CPU: checks, statistics, the one convolution, the
// gradients of all but x. Their meaning is documented once, in acnet_kernels/ops/moments.py.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <utility>
#include <vector>

#include "functions.h"
#include "library.h"
#include "moments.h"
#include "moments_maps.h"

namespace acnet::moments {

double element(const View& v, int64_t offset) {
  return dispatch(v.type(), [&](auto e, auto) { return static_cast<double>(static_cast<const decltype(e)*>(v.data)[offset]); });
}

namespace {

constexpr int64_t kPivotSamples = 2048;
// Half-precision maps are centred only where x − pivot is exact, so only where the mean is far above the spread.
constexpr double kHalfPrecisionRatio = 16;
// Pixels of a channel below which float32 products lose digits for good: their rounding does not average away, and a
// variance much smaller than its terms, got from their squares, loses twice the digits that a map's own would.
constexpr int64_t kFewPixels = 256;
constexpr double kMostNumbers = 1e12;  // of a matrix: more than any memory holds, and sizes do not overflow

BranchList branch_list(const Check& check, const View& x, const std::vector<View>& weights, int64_t norms,
                       const std::vector<int64_t>& branches, const std::vector<int64_t>& geometry) {
  check.map(x, "x");
  check(geometry.size() == 9, "geometry must hold 9 numbers, got ", geometry.size());
  check.kernel(geometry[0]);
  for (int i = 0; i < 2; ++i)
    check(geometry[i] == geometry[0] && geometry[2 + i] == 1 && geometry[4 + i] == geometry[0] / 2 && geometry[6 + i] == 1,
          "geometry must have a square kernel, stride 1, a padding that keeps the size and dilation 1");
  check(!weights.empty() && weights[0].dim == 4 && weights[0].sizes[0] >= 1, "weights must hold kernels of K×C/groups×rows×columns");
  const int64_t outputs = weights[0].sizes[0], channels = x.sizes[1], groups = geometry[8];
  check.groups(groups, channels, "x's");
  check.groups(groups, outputs, "the output's");
  return {check, branches, weights, outputs, channels / groups, geometry.data(), channels == outputs, false, norms};
}

}  // namespace

Problem::Problem(const char* name, const Tensor& x_, const Tensors& weights_, const Tensors& gammas_, int64_t norms_,
                 const std::vector<int64_t>& branches, const std::vector<int64_t>& geometry, ScalarType compute_)
    : check(name),
      x(x_),
      weights(weights_.begin(), weights_.end()),
      gammas(gammas_.begin(), gammas_.end()),
      list(branch_list(check, x, weights, norms_, branches, geometry)),
      n(x.sizes[0]),
      c(x.sizes[1]),
      h(x.sizes[2]),
      w(x.sizes[3]),
      outputs(weights[0].sizes[0]),
      groups(geometry[8]),
      kernel(geometry[0]),
      radius(kernel / 2),
      taps(kernel * kernel),
      cg(c / groups),
      kg(outputs / groups),
      size(taps * cg),
      pixels(std::max<int64_t>(n * h * w, 1)),
      norms(norms_),
      compute(compute_) {
  check_affine(check, gammas, norms, outputs, "gammas");
  check(compute == x.type() || (is_half() && compute == ScalarType::Float), "dtype must be that of x, or float32 for half precision");
  const double patch = static_cast<double>(size), all = static_cast<double>(groups) * patch * patch;
  const double strips = 4.0 * static_cast<double>(std::max(h, w) + kernel) * static_cast<double>(c * kernel);
  check(std::max(all, strips * static_cast<double>(std::max<int64_t>(n, 1))) < kMostNumbers, "geometry and x of shape ", x.shape(),
        " need matrices too large for any memory");
}

double Problem::gamma(int64_t norm, int64_t output) const {
  return gammas.empty() ? 1 : element(gammas[norm], output * gammas[norm].strides[0]);
}

Buffer<double> Problem::numbers_of(const Kernel& own) const {
  const int64_t count = static_cast<int64_t>(own.places.size());
  Buffer<double> numbers(outputs * count * cg);
  std::fill_n(numbers.data(), outputs * count * cg, 0.0);
  const auto add = [&](const Branch& branch) {
    for (size_t t = 0; t < branch.places.size(); ++t) {
      const int64_t place = summed() ? branch.places[t] : static_cast<int64_t>(t), tap = static_cast<int64_t>(t);
      if (branch.weight < 0) {
        for (int64_t o = 0; o < outputs; ++o) numbers[(o * count + place) * cg + o % cg] += 1;
        continue;
      }
      const View& v = weights[branch.weight];
      const int64_t first = tap / branch.columns * v.strides[2] + tap % branch.columns * v.strides[3];
      dispatch(v.type(), [&](auto e, auto) {
        const auto* from = static_cast<const decltype(e)*>(v.data) + first;
        for (int64_t o = 0; o < outputs; ++o)
          for (int64_t i = 0; i < cg; ++i)
            numbers[(o * count + place) * cg + i] += static_cast<double>(from[o * v.strides[0] + i * v.strides[1]]);
      });
    }
  };
  if (!summed()) add(list.branches[own.branch]);
  else
    for (const Branch& branch : list.branches) add(branch);
  return numbers;
}

namespace {

double* doubles(Tensor& t) { return written<double>(t); }

// About the mean of each channel, from a sample of pixels; of half-precision maps 0 unless the mean is far above the
// spread: only then is x − pivot exact.
template <class T, class A>
void find_pivot(const Problem& p, const T* x, A* pivot) {
  std::fill_n(pivot, p.c, A(0));
  if (p.n == 0) return;
  const int64_t step = std::max<int64_t>(1, p.pixels / kPivotSamples);
  const int64_t rows = std::min(p.h, static_cast<int64_t>(std::sqrt(static_cast<double>(step))));
  const int64_t images = std::min(p.n, (step + rows - 1) / rows);
  const auto each = [&](const auto& body) {
    for (int64_t i = 0; i < p.n; i += images)
      for (int64_t r = 0; r < p.h; r += rows)
        for (int64_t j = 0; j < p.w; ++j) body(x + ((i * p.h + r) * p.w + j) * p.c);
  };
  std::vector<double> mean(p.c), spread(p.c);
  double count = 0;
  each([&](const T* pixel) {
    ++count;
    for (int64_t c = 0; c < p.c; ++c) mean[c] += static_cast<double>(pixel[c]);
  });
  for (double& m : mean) m /= count;
  if constexpr (!std::is_same_v<T, A>)
    each([&](const T* pixel) {
      for (int64_t c = 0; c < p.c; ++c) spread[c] += std::abs(static_cast<double>(pixel[c]) - mean[c]);
    });
  for (int64_t c = 0; c < p.c; ++c)
    if (std::is_same_v<T, A> || std::abs(mean[c]) > kHalfPrecisionRatio * spread[c] / count)
      pivot[c] = static_cast<A>(static_cast<T>(mean[c]));
}

// What a forward step finds about x, and keeps.
struct Found {
  Tensor means, variances, rstds, pivot, sums, centred;
};

// W̃·G of each kernel on its own taps, K×(taps·Cg).
Buffer<double> times_gram(const Problem& p, const Kernel& kernel, const Buffer<double>& numbers, const double* gram) {
  const int64_t count = static_cast<int64_t>(kernel.places.size()), own = count * p.cg;
  Buffer<double> product(p.outputs * own), picked(count == p.taps ? 0 : own * own);
  for (int64_t g = 0; g < p.groups; ++g) {
    const double* table = gram + g * p.size * p.size;
    if (count < p.taps) {
      for (int64_t i = 0; i < own; ++i) {
        const double* row = table + (kernel.places[i / p.cg] * p.cg + i % p.cg) * p.size;
        for (int64_t j = 0; j < count; ++j) std::copy_n(row + kernel.places[j] * p.cg, p.cg, picked.data() + i * own + j * p.cg);
      }
      table = picked.data();
    }
    library::multiply(numbers.data() + g * p.kg * own, own, 1, table, p.kg, own, own, product.data() + g * p.kg * own);
  }
  return product;
}

// Variances of 0 where ε is 0 and rounding alone may have made them: of float32 maps, and of a constant pivot.
template <class A>
void without_rounding(const Problem& p, const std::vector<Buffer<double>>& kernels, const std::vector<double>& eps,
                      const PatchMoments& moments, const A* pivot, double* variances) {
  for (int64_t b = 0; b < p.norms; ++b) {
    if (eps[b] != 0) continue;
    const std::vector<int>& places = p.list.kernels[b].places;
    for (int64_t o = 0; o < p.outputs; ++o) {
      double bound = 0;
      for (size_t t = 0; t < places.size(); ++t)
        for (int64_t c = 0; c < p.cg; ++c) {
          const int64_t g = o / p.kg, at = places[t] * p.cg + c;
          const double square = moments.gram[(g * p.size + at) * p.size + at] / static_cast<double>(p.pixels);
          const double noise = 1e-7 * std::sqrt(std::max(square, 0.0)) + 1e-13 * std::abs(static_cast<double>(pivot[g * p.cg + c]));
          bound += std::abs(kernels[b][(o * static_cast<int64_t>(places.size()) + static_cast<int64_t>(t)) * p.cg + c]) * noise;
        }
      double& variance = variances[b * p.outputs + o];
      if (variance <= bound * bound) variance = 0;
    }
  }
}

// Means and variances by the definition, for an x that is not finite: of what a branch does not see, and of which
// means are infinite and which NaN, sums over all patches know nothing.
template <class T>
void define_statistics(const Problem& p, const std::vector<Buffer<double>>& kernels, const T* x, double* means, double* variances) {
  for (int64_t b = 0; b < p.norms; ++b) {
    const Branch whole{0, 0, p.kernel, p.kernel, 1, {}, -1};
    const Branch& branch = p.summed() ? whole : p.list.branches[p.list.kernels[b].branch];
    const int64_t height = p.h + (branch.rows - 1) * branch.step, width = p.w + (branch.columns - 1) * branch.step;
    Buffer<double> seen(p.n * height * width * p.c);
    std::fill_n(seen.data(), p.n * height * width * p.c, 0.0);
    for (int64_t i = 0; i < p.n * p.h * p.w; ++i) {
      const int64_t row = i / p.w % p.h + p.radius - branch.row, column = i % p.w + p.radius - branch.column;
      if (row < 0 || row >= height || column < 0 || column >= width) continue;
      double* to = seen.data() + ((i / (p.h * p.w) * height + row) * width + column) * p.c;
      for (int64_t c = 0; c < p.c; ++c) to[c] = static_cast<double>(x[i * p.c + c]);
    }
    const Tensor maps = library::map_over(seen.data(), ScalarType::Double, p.n, p.c, height, width);
    const Tensor weight = library::map_over(kernels[b].data(), ScalarType::Double, p.outputs, p.cg, branch.rows, branch.columns);
    const Tensor y = library::convolution(maps, weight, nullptr, {{0, 0}, {branch.step, branch.step}, p.groups});
    const double *values = data<double>(y), count = static_cast<double>(p.pixels);
    for (int64_t o = 0; o < p.outputs; ++o) {
      double sum = 0, squares = 0;
      for (int64_t i = 0; i < p.pixels; ++i) sum += values[i * p.outputs + o];
      const double mean = sum / count;
      for (int64_t i = 0; i < p.pixels; ++i) squares += (values[i * p.outputs + o] - mean) * (values[i * p.outputs + o] - mean);
      means[b * p.outputs + o] = mean;
      variances[b * p.outputs + o] = squares / count;
    }
  }
}

template <class T, class A>
PatchMoments find_moments(const Problem& p, const T* x, const A* pivot, bool in_double) {
  bool finite = true;
  if constexpr (!std::is_same_v<T, double>) {
    if (!in_double && p.n * p.h * p.w >= kFewPixels) {
      PatchMoments found = moments_of(p, x, pivot, finite);
      if (finite) return found;
    }
    Buffer<double> wide(p.n * p.h * p.w * p.c);
    for (int64_t i = 0; i < p.n * p.h * p.w * p.c; ++i) wide[i] = static_cast<double>(x[i]);
    const std::vector<double> centre(pivot, pivot + p.c);
    return moments_of(p, static_cast<const double*>(wide.data()), centre.data(), finite);
  } else {
    return moments_of(p, x, pivot, finite);
  }
}

template <class T, class A>
void find_statistics(const Problem& p, const std::vector<Buffer<double>>& kernels, const T* x, const std::vector<double>& eps,
                     Found& found) {
  A* pivot = written<A>(found.pivot);
  find_pivot(p, x, pivot);
  const bool hides_nothing = std::find(eps.begin(), eps.end(), 0.0) != eps.end();
  const PatchMoments moments = find_moments(p, x, static_cast<const A*>(pivot), hides_nothing);
  double *means = doubles(found.means), *variances = doubles(found.variances), *rstds = doubles(found.rstds);
  std::copy_n(moments.sums.data(), p.groups * p.size, doubles(found.sums));
  const double count = static_cast<double>(p.pixels);
  std::vector<Buffer<double>> products;
  bool finite = true;
  for (int64_t b = 0; b < p.norms; ++b) {
    const Kernel& kernel = p.list.kernels[b];
    const int64_t taps = static_cast<int64_t>(kernel.places.size()), own = taps * p.cg;
    products.push_back(times_gram(p, kernel, kernels[b], moments.gram.data()));
    for (int64_t o = 0; o < p.outputs; ++o) {
      const double *weight = kernels[b].data() + o * own, *product = products[b].data() + o * own;
      const double* sums = moments.sums.data() + o / p.kg * p.size;
      double first = 0, second = 0;
      for (int64_t t = 0; t < taps; ++t)
        for (int64_t c = 0; c < p.cg; ++c) {
          first += weight[t * p.cg + c] * sums[kernel.places[t] * p.cg + c];
          second += weight[t * p.cg + c] * product[t * p.cg + c];
        }
      const int64_t at = b * p.outputs + o;
      means[at] = first / count;
      variances[at] = second < 0 ? 0 : second / count;
      finite = finite && std::isfinite(means[at]);
    }
  }
  if (hides_nothing) without_rounding(p, kernels, eps, moments, static_cast<const A*>(pivot), variances);
  if (!finite && p.n > 0) define_statistics(p, kernels, x, means, variances);
  A* centred = written<A>(found.centred);
  for (int64_t b = 0; b < p.norms; ++b) {
    const int64_t own = static_cast<int64_t>(p.list.kernels[b].places.size()) * p.cg;
    for (int64_t o = 0; o < p.outputs; ++o) {
      const int64_t at = b * p.outputs + o;
      const double spread = variances[at] + eps[b];
      rstds[at] = spread == 0 ? 0 : 1 / std::sqrt(spread);  // as in nn.BatchNorm2d, whose ε may be 0
      // With one rstd at once: the other may be as large, and the product beyond float32.
      for (int64_t i = 0; i < own; ++i)
        centred[o * p.numbers() + p.list.kernels[b].first * p.cg + i] = static_cast<A>(products[b][o * own + i] * rstds[at]);
    }
  }
}

// x * Σ_b s_b·W̃_b + Σ_b (β_b − μ_b·s_b).
template <class T, class A>
Tensor convolve(const Problem& p, const std::vector<Buffer<double>>& kernels, const T* x, const std::vector<View>& betas,
                const Found& found, bool channels_last) {
  Buffer<double> fused(p.outputs * p.size);
  std::fill_n(fused.data(), p.outputs * p.size, 0.0);
  const double *rstds = data<double>(found.rstds), *sums = data<double>(found.sums);
  for (int64_t b = 0; b < p.norms; ++b) {
    const std::vector<int>& places = p.list.kernels[b].places;
    for (int64_t o = 0; o < p.outputs; ++o) {
      const double scale = p.gamma(b, o) * rstds[b * p.outputs + o];
      const double* from = kernels[b].data() + o * static_cast<int64_t>(places.size()) * p.cg;
      for (size_t t = 0; t < places.size(); ++t, from += p.cg)
        for (int64_t c = 0; c < p.cg; ++c) fused[o * p.size + places[t] * p.cg + c] += scale * from[c];
    }
  }
  const Rounded kernel = rounded(fused.data(), p.outputs, p.cg, p.kernel, p.kernel, p.compute);
  // The mean of what the rounded weights give, not of what the exact ones would: it cancels exactly.
  std::vector<double> bias(p.outputs);
  dispatch(p.compute, [&](auto e, auto) {
    const auto* exact = data<decltype(e)>(kernel.weight);
    for (int64_t i = 0; i < p.outputs * p.size; ++i) fused[i] = static_cast<double>(exact[i]) * kernel.unit;
  });
  for (int64_t o = 0; o < p.outputs; ++o) {
    double mean = 0;
    for (int64_t i = 0; i < p.size; ++i) mean += fused[o * p.size + i] * sums[o / p.kg * p.size + i];
    for (const View& beta : betas) bias[o] += element(beta, o * beta.strides[0]);
    bias[o] -= mean / static_cast<double>(p.pixels);
  }
  const library::Convolution how{{p.radius, p.radius}, {1, 1}, p.groups};
  const auto in_layout = [&](Tensor map) {
    if (channels_last || View(map).dense(false)) return map;
    Tensor dense = library::empty_map(p.x.type(), p.n, p.outputs, p.h, p.w, false);
    torch::stable::copy_(dense, map);
    return dense;
  };
  const int64_t map = p.h * p.w * p.c, out_map = p.h * p.w * p.outputs;
  if constexpr (std::is_same_v<T, A>) {
    const std::vector<A> shifts(bias.begin(), bias.end());
    const Tensor vector = library::over(shifts.data(), p.compute, {p.outputs}, {1});
    return in_layout(library::convolution(library::map_over(x, p.compute, p.n, p.c, p.h, p.w), kernel.weight, &vector, how));
  } else if (p.computes_in_own()) {
    // Half precision rounds so coarsely that nothing but the maps' spread may go through the convolution: what the
    // pivot and the bias leave, one image, cancels in float64 and is added in float32.
    const A* pivot = data<A>(found.pivot);
    std::vector<A> image(out_map);
    for (int64_t i = 0; i < out_map; ++i) image[i] = static_cast<A>(bias[i % p.outputs]);
    const bool centres = std::any_of(pivot, pivot + p.c, [](A v) { return v != 0; });
    Buffer<T> moved(centres ? p.n * map : 0);
    if (centres) {
      const std::vector<double> wide(pivot, pivot + p.c);
      std::vector<int> places(p.taps);
      for (int64_t t = 0; t < p.taps; ++t) places[t] = static_cast<int>(t);
      const Buffer<double> level = level_image(p, places, fused.data(), wide.data());
      for (int64_t i = 0; i < out_map; ++i) image[i] = static_cast<A>(bias[i % p.outputs] + level[i]);
      const std::vector<A> row = repeated(pivot, p.c, p.w, A(-1));
      shift_images<A>(x, A(1), row.data(), More::row, p.n, p.h, p.w * p.c, moved.data());
      x = moved.data();
    }
    Tensor out = library::convolution(library::map_over(x, p.compute, p.n, p.c, p.h, p.w), kernel.weight, nullptr, how);
    T* values = written<T>(out);
    shift_images<A>(values, static_cast<A>(kernel.unit), image.data(), More::image, p.n, p.h, p.w * p.outputs, values);
    return in_layout(std::move(out));
  } else {
    Tensor out = library::empty_map(p.x.type(), p.n, p.outputs, p.h, p.w, channels_last);
    const int64_t images = images_at_a_time(p);
    const std::vector<A> numbers(bias.begin(), bias.end()), row = repeated(numbers.data(), p.outputs, p.w, A(1));
    const bool direct = View(out).dense(true);
    Buffer<A> wide(images * map);
    Buffer<T> narrow(direct ? 0 : images * out_map);
    for (int64_t first = 0; first < p.n; first += images) {
      const int64_t count = std::min(images, p.n - first);
      shift_images<A>(x + first * map, A(1), static_cast<const A*>(nullptr), More::row, count, p.h, p.w * p.c, wide.data());
      const Tensor z = library::convolution(library::map_over(wide.data(), p.compute, count, p.c, p.h, p.w), kernel.weight, nullptr, how);
      T* to = direct ? written<T>(out) + first * out_map : narrow.data();
      shift_images<A>(data<A>(z), A(1), row.data(), More::row, count, p.h, p.w * p.outputs, to);
      if (direct) continue;
      Tensor target = torch::stable::narrow(out, 0, first, count);
      torch::stable::copy_(target, library::map_over(to, p.x.type(), count, p.outputs, p.h, p.w));
    }
    return out;
  }
}

std::vector<Buffer<double>> all_numbers(const Problem& p) {
  std::vector<Buffer<double>> kernels;
  for (const Kernel& kernel : p.list.kernels) kernels.push_back(p.numbers_of(kernel));
  return kernels;
}

template <class T, class A>
std::tuple<Tensor, Tensor> differentiate(const Problem& p, const T* grad, const T* x, const std::vector<View>& kept,
                                         const Tensor& like, const std::vector<bool>& need_weights, bool accumulates, Tensor* dx,
                                         Tensors& dws, bool need_gammas) {
  const auto number = [&](int i) { return static_cast<const double*>(kept[i].data); };
  const double *means = number(0), *rstds = number(1), *sums = number(3);
  const A *pivot = static_cast<const A*>(kept[2].data), *centred = static_cast<const A*>(kept[4].data);
  const int64_t K = p.outputs, taps = p.taps, cg = p.cg;
  const ScalarType wide = sums_of(p.x.type());
  Tensor dbeta = torch::stable::new_empty(like, {K}, wide);
  Tensor dgammas = need_gammas ? torch::stable::new_empty(like, {p.norms, K}, wide) : torch::stable::new_empty(like, {0}, wide);
  const bool needs = dx != nullptr || !dws.empty() || need_gammas;
  const autocorrelation::Maps maps{p.n, p.h, p.w, p.c, K, p.groups};
  const std::vector<A> zeros(K);
  Buffer<A> total(p.h * p.w * K);
  autocorrelation::sum_images(grad, zeros.data(), maps, total.data());
  const RunSums seen(total.data(), p.h, p.w, K, needs ? p.radius : 0);
  std::vector<double> offset(K);
  for (int64_t o = 0; o < K; ++o) {
    const double sum = seen.of(seeing(0), seeing(0))[o];
    written<A>(dbeta)[o] = static_cast<A>(sum);
    offset[o] = sum;
  }
  if (!needs) return {dgammas, dbeta};
  // A = Σ_p g[p]·P_pᵀ, K×size.
  std::vector<int64_t> rows, columns;
  for (int64_t t = 0; t < taps; ++t) rows.push_back(p.row(t)), columns.push_back(p.column(t));
  Buffer<A> products(taps * p.groups * p.kg * cg);
  autocorrelation::correlate(x, pivot, grad, zeros.data(), maps, rows, columns, products.data());
  Buffer<double> patches(K * p.size);
  for (int64_t t = 0; t < taps; ++t) {
    const double* sum = seen.of(seeing(p.row(t)), seeing(p.column(t)));
    for (int64_t o = 0; o < K; ++o)
      for (int64_t c = 0; c < cg; ++c)
        patches[o * p.size + t * cg + c] =
            static_cast<double>(products[(t * K + o) * cg + c]) + static_cast<double>(pivot[o / p.kg * cg + c]) * sum[o];
  }
  const std::vector<Buffer<double>> kernels = all_numbers(p);
  InputGradient given{kernels, std::vector<double>(p.norms * K), std::vector<double>(p.norms * K),
                      std::vector<double>(means, means + p.norms * K), {}, accumulates};
  std::vector<Buffer<double>> dkernels;
  for (int64_t b = 0; b < p.norms; ++b) {
    const std::vector<int>& places = p.list.kernels[b].places;
    const int64_t count = static_cast<int64_t>(places.size());
    if (!dws.empty()) dkernels.emplace_back(K * count * cg);
    for (int64_t o = 0; o < K; ++o) {
      const int64_t at = b * K + o;
      double inner = 0;
      for (int64_t t = 0; t < count; ++t)
        for (int64_t c = 0; c < cg; ++c) inner += patches[o * p.size + places[t] * cg + c] * kernels[b][(o * count + t) * cg + c];
      const double dgamma = rstds[at] * (inner - means[at] * offset[o]), slope = dgamma / static_cast<double>(p.pixels);
      if (need_gammas) written<A>(dgammas)[at] = static_cast<A>(dgamma);
      const double scale = p.gamma(b, o) * rstds[at], level = offset[o] / static_cast<double>(p.pixels);
      given.scale[at] = scale;
      given.y_factor[at] = slope * rstds[at];
      if (dws.empty()) continue;
      const A* own = centred + o * p.numbers() + p.list.kernels[b].first * cg;
      const double* sum = sums + o / p.kg * p.size;
      for (int64_t t = 0; t < count; ++t)
        for (int64_t c = 0; c < cg; ++c) {
          const int64_t patch = places[t] * cg + c;
          dkernels[b][(o * count + t) * cg + c] =
              scale * (patches[o * p.size + patch] - level * sum[patch] - slope * static_cast<double>(own[t * cg + c]));
        }
    }
  }
  for (double& o : offset) o /= static_cast<double>(p.pixels);
  given.offset = std::move(offset);
  size_t next = 0;
  for (size_t b = 0; b < p.list.branches.size() && !dws.empty(); ++b) {
    const Branch& branch = p.list.branches[b];
    if (branch.weight < 0 || !need_weights[branch.weight]) continue;
    Tensor& dw = dws[next++];
    const View v(dw);
    const Buffer<double>& from = dkernels[p.summed() ? 0 : b];
    const int64_t count = p.summed() ? taps : static_cast<int64_t>(branch.places.size());
    dispatch(v.type(), [&](auto e, auto) {
      using W = decltype(e);
      W* to = written<W>(dw);
      for (int64_t o = 0; o < K; ++o)
        for (int64_t c = 0; c < cg; ++c)
          for (size_t t = 0; t < branch.places.size(); ++t) {
            const int64_t tap = static_cast<int64_t>(t), place = p.summed() ? branch.places[t] : tap;
            to[o * v.strides[0] + c * v.strides[1] + tap / branch.columns * v.strides[2] + tap % branch.columns * v.strides[3]] =
                static_cast<W>(from[(o * count + place) * cg + c]);
          }
    });
  }
  if (dx != nullptr && p.n > 0) write_input_gradient(p, grad, x, pivot, given, *dx);
  return {dgammas, dbeta};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> step(Tensor x, Tensors weights, Tensors gammas, Tensors betas,
                                                                        std::vector<double> eps, std::vector<int64_t> taps,
                                                                        std::vector<int64_t> geometry, ScalarType dtype,
                                                                        bool channels_last) {
  const Problem p("moments_step", x, weights, gammas, static_cast<int64_t>(eps.size()), taps, geometry, dtype);
  const std::vector<View> shifts(betas.begin(), betas.end());
  check_affine(p.check, shifts, p.norms, p.outputs, "betas");
  const ScalarType wide = sums_of(p.x.type());
  const auto make = [&](std::vector<int64_t> sizes, ScalarType type) { return torch::stable::new_empty(x, sizes, type); };
  Found found{make({p.norms, p.outputs}, ScalarType::Double), make({p.norms, p.outputs}, ScalarType::Double),
              make({p.norms, p.outputs}, ScalarType::Double), make({p.c}, wide), make({p.groups, p.size}, ScalarType::Double),
              make({p.outputs, p.numbers()}, wide)};
  const std::vector<Buffer<double>> kernels = all_numbers(p);
  const Tensor maps = library::in_channels_last(x);
  Tensor out = dispatch(p.x.type(), [&](auto t, auto a) {
    using T = decltype(t);
    using A = decltype(a);
    find_statistics<T, A>(p, kernels, data<T>(maps), eps, found);
    return convolve<T, A>(p, kernels, data<T>(maps), shifts, found, channels_last);
  });
  return {out, found.means, found.variances, found.rstds, found.pivot, found.sums, found.centred};
}

std::tuple<Tensor, Tensors, Tensor, Tensor> step_backward(Tensor grad, Tensor x, Tensors weights, Tensors gammas, Tensor means,
                                                          Tensor rstds, Tensor pivot, Tensor sums, Tensor centred,
                                                          std::vector<int64_t> taps, std::vector<int64_t> geometry,
                                                          ScalarType dtype, bool accumulates, bool need_x,
                                                          std::vector<bool> need_weights, bool need_gammas) {
  const View given(means);
  const Problem p("moments_step_backward", x, weights, gammas, given.dim == 2 ? given.sizes[0] : -1, taps, geometry, dtype);
  const Check& check = p.check;
  const ScalarType wide = sums_of(p.x.type());
  const std::vector<View> kept{View(means), View(rstds), View(pivot), View(sums), View(centred)};
  const auto fits = [&](int i, const char* name, ScalarType type, std::initializer_list<int64_t> sizes) {
    check.readable(kept[i], name);
    check.shape(kept[i], name, sizes);
    check.type(kept[i], name, type, "the dtype moments_step returns it in");
    check.contiguous(kept[i], name);
  };
  fits(0, "means", ScalarType::Double, {p.norms, p.outputs});
  fits(1, "rstds", ScalarType::Double, {p.norms, p.outputs});
  fits(2, "pivot", wide, {p.c});
  fits(3, "sums", ScalarType::Double, {p.groups, p.size});
  fits(4, "centred", wide, {p.outputs, p.numbers()});
  const View gradient(grad);
  check.readable(gradient, "grad");
  check.shape(gradient, "grad", {p.n, p.outputs, p.h, p.w});
  check.type(gradient, "grad", p.x.type(), "the dtype of x");
  check(need_weights.size() == weights.size(), "need_weights must have one entry a weight, ", weights.size(), " here, got ",
        need_weights.size());
  Tensor dx = need_x ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  Tensors dws;
  for (size_t i = 0; i < weights.size(); ++i)
    if (need_weights[i]) dws.push_back(torch::stable::empty_like(weights[i]));
  const Tensor maps = library::in_channels_last(x), grads = library::in_channels_last(grad);
  const auto [dgammas, dbeta] = dispatch(p.x.type(), [&](auto t, auto a) {
    using T = decltype(t);
    using A = decltype(a);
    return differentiate<T, A>(p, data<T>(grads), data<T>(maps), kept, x, need_weights, accumulates, need_x ? &dx : nullptr, dws,
                               need_gammas);
  });
  return {dx, dws, dgammas, dbeta};
}

STABLE_TORCH_LIBRARY_FRAGMENT(acnet_kernels, m) {
  m.def(
      "moments_step(Tensor x, Tensor[] weights, Tensor[] gammas, Tensor[] betas, float[] eps, int[] taps, int[] geometry,"
      " ScalarType dtype, bool channels_last) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "moments_step_backward(Tensor grad, Tensor x, Tensor[] weights, Tensor[] gammas, Tensor means, Tensor rstds,"
      " Tensor pivot, Tensor sums, Tensor centred, int[] taps, int[] geometry, ScalarType dtype, bool accumulates,"
      " bool need_x, bool[] need_weights, bool need_gammas) -> (Tensor, Tensor[], Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(acnet_kernels, CPU, m) {
  m.impl("moments_step", TORCH_BOX(&step));
  m.impl("moments_step_backward", TORCH_BOX(&step_backward));
}

}  // namespace acnet::moments
