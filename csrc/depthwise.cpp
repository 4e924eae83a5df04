// The operators of depthwise blocks on the CPU: checks, tasks, threads and merging. Their meaning
// is documented once, in acnet_kernels/steps/depthwise.py. The passes are in depthwise_kernels.h.
#include "depthwise.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "activation_argument.h"
#include "branch_list.h"
#include "buffer.h"
#include "check.h"
#include "cpu.h"
#include "depthwise_tables.h"
#include "functions.h"

namespace acnet::depthwise {
namespace {

constexpr int64_t kMostLines = int64_t(1) << 24;  // of an image, each of which has an entry in a table
// A task's pixels, where there are not more tasks than that: few enough that the blocks of a channels_last run of rows
// find it in cache, of the moments more, as each task leaves its sums behind.
constexpr int64_t kTaskPixels = 1024, kMomentPixels = 4096, kMostTasks = 256;
constexpr int64_t kSerialElements = 16 << 10;            // a thread's share is worth its start from here on
// Pixels of a channel below which float32 products lose digits for good: their rounding does not average away, and a
// variance much smaller than its terms, got from their squares, loses twice the digits that a map's own would.
constexpr int64_t kFewPixels = 256;
constexpr int64_t kPivotRows = 16;  // whose mean is a channel's pivot

template <class T, class A>
struct Kernels {
  Passes<T, A> pass;
  Algebra<A> algebra;
};

template <class T, class A>
const Kernels<T, A>& kernels() {
  static const Kernels<T, A> chosen = [] {
    switch (best_isa()) {
#if defined(__x86_64__)
      case Isa::avx512: return Kernels<T, A>{avx512::passes<T, A>(), avx512::algebra<A>()};
      case Isa::avx2: return Kernels<T, A>{avx2::passes<T, A>(), avx2::algebra<A>()};
#endif
      default: return Kernels<T, A>{generic::passes<T, A>(), generic::algebra<A>()};
    }
  }();
  return chosen;
}

// body(T{}, A{}) for the maps' type T, a float, and the type A of sums.
template <class Body>
auto dispatch(ScalarType type, const Body& body) {
  switch (type) {
    case ScalarType::Float: return body(float{}, float{});
    case ScalarType::Double: return body(double{}, double{});
    case ScalarType::BFloat16: return body(c10::BFloat16{}, float{});
    default: return body(c10::Half{}, float{});
  }
}

// What both operators are given, checked.
struct Problem {
  Check check;
  View x;
  std::vector<View> weights, gammas, betas;
  std::vector<Branch> branches;
  std::vector<Kernel> kernels;
  int64_t numbers = 0;  // of all kernels
  bool nested;          // a batch norm follows the sum of branches of which some have their own
  int64_t channels, outputs;
  std::shared_ptr<const PlanTables> tables;

  Problem(const char* name, const Tensor& x_, const Tensors& weights_, const Tensors& gammas_, int64_t norms,
          const std::vector<int64_t>& taps, const std::vector<int64_t>& geometry, bool nests, const Tensors& betas_ = {})
      : check(name),
        x(x_),
        weights(weights_.begin(), weights_.end()),
        gammas(gammas_.begin(), gammas_.end()),
        betas(betas_.begin(), betas_.end()) {
    check.map(x, "x");
    check(geometry.size() == 9, "geometry must hold 9 numbers, got ", geometry.size());
    for (const int64_t number : geometry) check(number >= 0 && number < (int64_t(1) << 31), "geometry must hold numbers from 0 to 2³¹ − 1, got ", number);
    const int64_t kernel[] = {geometry[0], geometry[1]};
    check(std::min(kernel[0], kernel[1]) >= 1 && std::max(kernel[0], kernel[1]) <= kMostTaps,
          "geometry must have a kernel of 1 to ", kMostTaps, " taps a side, got ", kernel[0], " and ", kernel[1]);
    check(std::min(geometry[2], geometry[3]) >= 1, "geometry must have strides of at least 1");
    check(std::max(geometry[4], geometry[5]) <= kMostPadding, "geometry must have a padding of at most ", kMostPadding);
    check(std::min(geometry[6], geometry[7]) >= 1, "geometry must have dilations of at least 1");
    channels = x.sizes[1];
    check(geometry[8] == channels, "geometry must have a group for each of x's ", channels, " channels, got ", geometry[8]);
    check(!weights.empty() && weights[0].dim == 4 && weights[0].sizes[0] >= 1, "weights must hold kernels of K×1×rows×columns");
    outputs = weights[0].sizes[0];
    check(outputs % channels == 0 && outputs / channels <= kMostMultiplier, "weights must have 1 to ", kMostMultiplier,
          " output channels for each of x's ", channels, ", got ", outputs);
    int64_t out[2];
    for (int i = 0; i < 2; ++i) {
      check(x.sizes[2 + i] <= kMostLines, "x must have at most 2²⁴ rows and columns, got ", x.shape());
      const int64_t free = x.sizes[2 + i] + 2 * geometry[4 + i] - geometry[6 + i] * (kernel[i] - 1) - 1;
      check(free >= 0, "geometry leaves no output of an x of ", x.shape());
      out[i] = free / geometry[2 + i] + 1;
    }
    BranchList list(check, taps, weights, outputs, 1, kernel, outputs == channels && geometry[2] == 1 && geometry[3] == 1,
                    nests, norms);
    nested = list.nested();
    branches = std::move(list.branches);
    kernels = std::move(list.kernels);
    numbers = list.numbers;
    check_affine(check, gammas, this->norms(), outputs, "gammas");
    check_affine(check, betas, this->norms(), outputs, "betas");
    tables = plan_of({x.sizes[0], x.sizes[2], out[0], kernel[0], geometry[2], geometry[4], geometry[6], x.sizes[3], out[1],
                      kernel[1], geometry[3], geometry[5], geometry[7], outputs / channels});
  }

  const Plan& plan() const { return tables->plan; }
  int64_t norms() const { return static_cast<int64_t>(kernels.size()); }
  int64_t norm_of(const Kernel& kernel) const { return &kernel - kernels.data(); }
  // Whether its kernel depends on the statistics of the branches' batch norms.
  bool is_outer(const Kernel& kernel) const { return nested && kernel.of_sum; }
};

template <class T>
Map<const T> channels_of(const View& v, int64_t first, int64_t step, int64_t count) {
  int64_t last = 0;
  for (int i = 0; i < 4; ++i) last += (v.sizes[i] - 1) * v.strides[i];
  const T* data = static_cast<const T*>(v.data);
  return {data + first * v.strides[1], data + last + 1, v.strides[0], step * v.strides[1], v.strides[2], v.strides[3],
          static_cast<int>(count)};
}

template <class T>
Map<T> written(Tensor& t, const View& v, int64_t first, int64_t step, int64_t count) {
  T* data = static_cast<T*>(t.mutable_data_ptr());
  return {data + first * v.strides[1], nullptr, v.strides[0], step * v.strides[1], v.strides[2], v.strides[3],
          static_cast<int>(count)};
}

// Blocks of channels, a vector's lanes, times runs of rows: depends on shapes alone.
struct Tasks {
  int64_t blocks, chunks, rows, grain;

  Tasks(const Problem& problem, int64_t lanes, int64_t all_rows, int64_t columns, int64_t at_least) : rows(all_rows) {
    blocks = (problem.channels + lanes - 1) / lanes;
    const int64_t pixels = all_rows * columns;
    chunks = std::clamp<int64_t>(pixels / at_least, 1, std::max<int64_t>(1, kMostTasks / blocks));
    grain = std::max<int64_t>(1, blocks * chunks * kSerialElements / std::max<int64_t>(1, pixels * problem.channels));
  }
  int64_t count() const { return blocks * chunks; }
  int64_t begin(int64_t chunk) const { return chunk * rows / chunks; }

  // body(block, first row, last row, chunk), chunk after chunk or, to begin with what is still in cache, backwards.
  template <class Body>
  void run(bool backwards, const Body& body) const {
    torch::stable::parallel_for(0, count(), grain, [&](int64_t first, int64_t last) {
      body([&](const auto& each) {
        for (int64_t i = first; i < last; ++i) {
          const int64_t task = backwards ? count() - 1 - i : i, chunk = task / blocks;
          each(task % blocks, begin(chunk), begin(chunk + 1), chunk);
        }
      });
    });
  }
  // body for each of the blocks' small algebra.
  template <class Body>
  void run_blocks(int64_t work, const Body& body) const {
    const int64_t at_once = std::max<int64_t>(1, kSerialElements / std::max<int64_t>(1, work));
    torch::stable::parallel_for(0, blocks, at_once, body);
  }
};

template <class E>
double element(const View& v, int64_t offset) {
  return static_cast<double>(static_cast<const E*>(v.data)[offset]);
}
double element_of(const View& v, int64_t offset) {
  return dispatch(v.type(), [&](auto e, auto) { return element<decltype(e)>(v, offset); });
}

double per_channel(const std::vector<View>& values, int64_t norm, int64_t channel, double missing) {
  return values.empty() ? missing : element_of(values[norm], channel * values[norm].strides[0]);
}

// γ·rstd of a batch norm, rstds being norms × K.
double scale_of(const Problem& problem, int64_t norm, int64_t channel, const double* rstds) {
  return per_channel(problem.gammas, norm, channel, 1) * rstds[norm * problem.outputs + channel];
}

// The taps of one kernel, count × lanes, for output channels first, first + step, … The kernel of a sum has those of its
// branches' that have batch norms of their own scaled by γ·rstd.
void gather(const Problem& problem, const Kernel& kernel, int64_t first, int64_t step, int64_t count, int64_t lanes,
            const double* rstds, double* to) {
  std::fill_n(to, static_cast<int64_t>(kernel.places.size()) * lanes, 0.0);
  Buffer<double> scales(count);
  const auto add = [&](const Branch& branch) {
    const bool is_scaled = kernel.of_sum && branch.norm >= 0;
    for (int64_t l = 0; l < count; ++l) scales[l] = is_scaled ? scale_of(problem, branch.norm, first + l * step, rstds) : 1;
    for (size_t t = 0; t < branch.places.size(); ++t) {
      double* at = to + (kernel.of_sum ? branch.places[t] : static_cast<int64_t>(t)) * lanes;
      if (branch.weight < 0) {
        for (int64_t l = 0; l < count; ++l) at[l] += scales[l];
        continue;
      }
      const View& w = problem.weights[branch.weight];
      const int64_t tap = static_cast<int64_t>(t) / branch.columns * w.strides[2] + static_cast<int64_t>(t) % branch.columns * w.strides[3];
      dispatch(w.type(), [&](auto e, auto) {
        for (int64_t l = 0; l < count; ++l) at[l] += scales[l] * element<decltype(e)>(w, (first + l * step) * w.strides[0] + tap);
      });
    }
  };
  if (!kernel.of_sum) return add(problem.branches[kernel.branch]);
  for (const Branch& branch : problem.branches) add(branch);
}

// What a forward step finds about x: by channel, then by kernel.
struct Statistics {
  double *means, *variances, *rstds;  // norms × K
  double* pivot;                      // C
  double* sums;                       // C × taps
};

// The kernels and constants that `convolve` takes, of blocks of channels, one output channel of an input channel after
// another.
template <class A>
struct Folded {
  Buffer<A> all;
  int64_t numbers, of_weights;

  const A* weights(int64_t at) const { return all.data() + at * numbers; }
  const A* init(int64_t at) const { return weights(at) + of_weights; }
};

// Of one channel, of the map of this kernel.
void note(const Problem& problem, const Kernel& kernel, int64_t o, const std::vector<double>& eps, double mean, double variance,
          const Statistics& found) {
  const int64_t norm = problem.norm_of(kernel), K = problem.outputs, at = norm * K + o;
  if (problem.is_outer(kernel)) {  // of the sum itself, with what the batch norms in it add
    for (int64_t b = 0; b < norm; ++b)
      mean += per_channel(problem.betas, b, o, 0) - scale_of(problem, b, o, found.rstds) * found.means[b * K + o];
  }
  found.means[at] = mean;
  found.variances[at] = variance;
  const double spread = variance + eps[norm];
  found.rstds[at] = spread == 0 ? 0 : 1 / std::sqrt(spread);  // as in nn.BatchNorm2d, whose ε may be 0
}

// The mean of the map of this kernel, of which these are the taps, lanes apart.
double mean_of(const Problem& problem, const Kernel& kernel, int64_t o, const double* means, const double* sums,
               const double* weight, int64_t lanes) {
  if (!problem.is_outer(kernel)) return means[problem.norm_of(kernel) * problem.outputs + o];
  const Plan& plan = problem.plan();
  const double values = static_cast<double>(plan.images * plan.rows.out * plan.columns.out);
  double sum = 0;
  for (int64_t t = 0; t < plan.taps; ++t) sum += weight[t * lanes] * sums[o / plan.multiplier * plan.taps + t];
  return values > 0 ? sum / values : 0;
}

// About the mean of each channel, from a few rows.
template <class T, class A>
void find_pivots(const View& x, int64_t channels, double* pivot) {
  const int64_t rows = x.sizes[0] * x.sizes[2], columns = x.sizes[3], taken = std::min(rows, kPivotRows);
  for (int64_t c = 0; c < channels; ++c) pivot[c] = 0;
  for (int64_t i = 0; i < taken; ++i) {
    const int64_t row = i * rows / taken, step = std::max<int64_t>(1, columns / 16);
    const T* from = static_cast<const T*>(x.data) + row / x.sizes[2] * x.strides[0] + row % x.sizes[2] * x.strides[2];
    const double share = 1.0 / static_cast<double>(taken * ((columns + step - 1) / step));
    for (int64_t j = 0; j < columns; j += step)
      for (int64_t c = 0; c < channels; ++c)
        pivot[c] += share * static_cast<double>(from[j * x.strides[3] + c * x.strides[1]]);
  }
  for (int64_t c = 0; c < channels; ++c) pivot[c] = static_cast<double>(static_cast<A>(pivot[c]));
}

template <class T, class A, class C>
void find_statistics(const Problem& problem, const View& x, const std::vector<double>& eps, const Statistics& found, C* centred) {
  const Plan& plan = problem.plan();
  const Kernels<T, A>& kernel = kernels<T, A>();
  const int64_t lanes = kernel.pass.lanes, channels = problem.channels, m = plan.multiplier;
  find_pivots<T, A>(x, channels, found.pivot);
  const Axis& rows = plan.rows;
  const Tasks tasks(problem, lanes, plan.images * (plan.by_kind ? rows.size : rows.out),
                    plan.by_kind ? plan.columns.size : plan.columns.out, kMomentPixels);
  const int64_t products = plan.products * lanes, numbers = products + plan.sums * lanes;
  Buffer<double> partial(tasks.count() * numbers);
  tasks.run(false, [&](const auto& each) {
    Buffer<A> scratch(plan.scratch * lanes), pivot(lanes);
    each([&](int64_t block, int64_t begin, int64_t end, int64_t chunk) {
      const int64_t first = block * lanes, count = std::min(lanes, channels - first);
      std::fill_n(pivot.data(), lanes, A(0));
      std::copy_n(found.pivot + first, count, pivot.data());
      double* own = partial.data() + (block * tasks.chunks + chunk) * numbers;
      std::fill_n(own, numbers, 0.0);
      kernel.pass.moments(plan, channels_of<T>(x, first, 1, count), pivot.data(), begin, end, scratch.data(), own, own + products);
    });
  });
  const int64_t taps = plan.taps;
  tasks.run_blocks(lanes * taps * taps * (plan.rows.coarse_kinds + 4), [&](int64_t begin, int64_t end) {
    Buffer<double> gram(taps * taps * lanes), sums(taps * lanes), weight(taps * lanes), product(taps * lanes), level(3 * lanes);
    Buffer<double> scratch(plan.algebra * lanes);
    double *pivot = level.data(), *mean = pivot + lanes, *variance = mean + lanes;
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * lanes, count = std::min(lanes, channels - first);
      double* own = partial.data() + block * tasks.chunks * numbers;
      for (int64_t chunk = 1; chunk < tasks.chunks; ++chunk)
        for (int64_t i = 0; i < numbers; ++i) own[i] += own[chunk * numbers + i];
      std::fill_n(pivot, lanes, 0.0);
      std::copy_n(found.pivot + first, count, pivot);
      kernel.algebra.covariance(plan, own, own + products, pivot, scratch.data(), gram.data(), sums.data());
      for (int64_t l = 0; l < count; ++l)
        for (int64_t t = 0; t < taps; ++t) found.sums[(first + l) * taps + t] = sums.data()[t * lanes + l];
      for (const Kernel& k : problem.kernels)
        for (int64_t j = 0; j < m; ++j) {
          const int64_t size = static_cast<int64_t>(k.places.size());
          gather(problem, k, first * m + j, m, count, lanes, found.rstds, weight.data());
          kernel.algebra.statistics(plan, k.places.data(), static_cast<int>(size), weight.data(), gram.data(), sums.data(), mean,
                                    variance, product.data());
          for (int64_t l = 0; l < count; ++l) {
            const int64_t o = (first + l) * m + j;
            note(problem, k, o, eps, mean[l], variance[l], found);
            for (int64_t t = 0; t < size; ++t)
              centred[o * problem.numbers + k.first + t] = static_cast<C>(product.data()[t * lanes + l]);
          }
        }
    }
  });
}

Tensor empty_out(const Problem& problem, const Tensor& x, bool channels_last) {
  using torch::headeronly::MemoryFormat;
  const Plan& plan = problem.plan();
  const std::vector<int64_t> sizes = {plan.images, problem.outputs, plan.rows.out, plan.columns.out};
  try {
    return torch::stable::empty(sizes, x.scalar_type(), std::nullopt, std::nullopt, std::nullopt,
                                channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  } catch (const std::exception&) {  // whose words name a file of the machine that built torch
    problem.check.fail("there is no memory for an output of shape ", Shape{sizes.data(), 4});
  }
}

double* doubles(Tensor& t) { return static_cast<double*>(t.mutable_data_ptr()); }
const double* doubles_of(const View& v) { return static_cast<const double*>(v.data); }

bool finite(const double* values, int64_t count) {
  return std::all_of(values, values + count, [](double v) { return std::isfinite(v); });
}

// (mean, variance) of one channel's map by the definition, for an x that is not finite: of what a branch does not see,
// and of which means are infinite and which NaN, sums over all patches know nothing.
template <class T>
std::pair<double, double> by_definition(const Problem& problem, const Kernel& kernel, int64_t o, const double* weight, int64_t lanes) {
  const Plan& plan = problem.plan();
  const Axis &rows = plan.rows, &columns = plan.columns;
  const View& x = problem.x;
  const T* from = static_cast<const T*>(x.data) + o / plan.multiplier * x.strides[1];
  const auto value = [&](int64_t n, int64_t p, int64_t c) {
    double y = 0;
    for (size_t i = 0; i < kernel.places.size(); ++i) {
      const int64_t row = p * rows.stride + kernel.places[i] / columns.taps * rows.dilation - rows.padding;
      const int64_t column = c * columns.stride + kernel.places[i] % columns.taps * columns.dilation - columns.padding;
      if (row < 0 || row >= rows.size || column < 0 || column >= columns.size) continue;
      y += weight[static_cast<int64_t>(i) * lanes] * static_cast<double>(from[n * x.strides[0] + row * x.strides[2] + column * x.strides[3]]);
    }
    return y;
  };
  const double count = static_cast<double>(plan.images * rows.out * columns.out);
  double sum = 0, squares = 0;
  for (int64_t n = 0; n < plan.images; ++n)
    for (int64_t p = 0; p < rows.out; ++p)
      for (int64_t c = 0; c < columns.out; ++c) sum += value(n, p, c);
  const double mean = sum / count;
  for (int64_t n = 0; n < plan.images; ++n)
    for (int64_t p = 0; p < rows.out; ++p)
      for (int64_t c = 0; c < columns.out; ++c) squares += (value(n, p, c) - mean) * (value(n, p, c) - mean);
  return {mean, squares / count};
}

template <class T>
void define_statistics(const Problem& problem, const std::vector<double>& eps, const Statistics& found) {
  for (const Kernel& k : problem.kernels) {
    std::vector<double> weight(k.places.size());
    for (int64_t o = 0; o < problem.outputs; ++o) {
      const int64_t at = problem.norm_of(k) * problem.outputs + o;
      if (std::isfinite(found.means[at]) && std::isfinite(found.variances[at])) continue;
      gather(problem, k, o, 1, 1, 1, found.rstds, weight.data());
      const auto [mean, variance] = by_definition<T>(problem, k, o, weight.data(), 1);
      note(problem, k, o, eps, mean, variance, found);
    }
  }
}

// Variances of 0 where ε is 0 and rounding alone may have made them.
void without_rounding(const Problem& problem, const std::vector<double>& eps, const Statistics& found) {
  const Plan& plan = problem.plan();
  for (const Kernel& k : problem.kernels) {
    const int64_t norm = problem.norm_of(k);
    if (eps[norm] != 0) continue;
    std::vector<double> weight(k.places.size());
    for (int64_t o = 0; o < problem.outputs; ++o) {
      gather(problem, k, o, 1, 1, 1, found.rstds, weight.data());
      double size = 0;
      for (const double w : weight) size += std::abs(w);
      const double bound = 1e-13 * size * std::abs(found.pivot[o / plan.multiplier]);
      const int64_t at = norm * problem.outputs + o;
      if (found.variances[at] <= bound * bound) note(problem, k, o, eps, found.means[at], 0, found);
    }
  }
}

// By these statistics, of which variances are not looked at.
template <class T, class A>
Folded<A> fold(const Problem& problem, const Tasks& tasks, const double* means, const double* rstds, const double* pivots,
               const double* sums) {
  const Plan& plan = problem.plan();
  const Algebra<A>& algebra = kernels<T, A>().algebra;
  const int64_t lanes = algebra.lanes, channels = problem.channels, m = plan.multiplier, taps = plan.taps;
  const int64_t kinds = int64_t(plan.rows.out_kinds) * plan.columns.out_kinds, numbers = (taps + kinds) * lanes;
  Folded<A> folded{Buffer<A>(tasks.blocks * m * numbers), numbers, taps * lanes};
  tasks.run_blocks(lanes * taps * (kinds + 2 * problem.norms()), [&](int64_t begin, int64_t end) {
    Buffer<double> weight(taps * lanes), whole(taps * lanes), bias(lanes), pivot(lanes);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * lanes, count = std::min(lanes, channels - first);
      std::fill_n(pivot.data(), lanes, 0.0);
      std::copy_n(pivots + first, count, pivot.data());
      for (int64_t j = 0; j < m; ++j) {
        std::fill_n(whole.data(), taps * lanes, 0.0);
        std::fill_n(bias.data(), lanes, 0.0);
        for (const Kernel& k : problem.kernels) {
          if (problem.nested && !k.of_sum) continue;
          const int64_t norm = problem.norm_of(k);
          gather(problem, k, first * m + j, m, count, lanes, rstds, weight.data());
          for (int64_t l = 0; l < count; ++l) {
            const int64_t o = (first + l) * m + j;
            const double scale = scale_of(problem, norm, o, rstds);
            const double mean = mean_of(problem, k, o, means, sums, weight.data() + l, lanes);
            bias.data()[l] += per_channel(problem.betas, norm, o, 0) - scale * mean;
            for (size_t t = 0; t < k.places.size(); ++t)
              whole.data()[k.places[t] * lanes + l] += scale * weight.data()[t * lanes + l];
          }
        }
        A* own = folded.all.data() + (block * m + j) * numbers;
        algebra.fold(plan, whole.data(), bias.data(), pivot.data(), own, own + taps * lanes);
      }
    }
  });
  return folded;
}

// What follows the sum, checked: a map like out, or null.
struct Following {
  Activation activation = Activation::none;
  const void* residual = nullptr;
};

template <class T, class A>
void convolve(const Problem& problem, const Statistics& found, const Following& following, Tensor& out) {
  const Plan& plan = problem.plan();
  const Kernels<T, A>& kernel = kernels<T, A>();
  const int64_t lanes = kernel.pass.lanes, channels = problem.channels, m = plan.multiplier;
  const Tasks tasks(problem, lanes, plan.images * plan.rows.out, plan.columns.out, kTaskPixels);
  const Folded<A> folded = fold<T, A>(problem, tasks, found.means, found.rstds, found.pivot, found.sums);
  const View target(out);
  View added(out);
  added.data = const_cast<void*>(following.residual);  // read alone
  tasks.run(true, [&](const auto& each) {
    Buffer<A> scratch(plan.scratch * lanes), pivot(lanes);
    each([&](int64_t block, int64_t begin, int64_t end, int64_t) {
      const int64_t first = block * lanes, count = std::min(lanes, channels - first);
      std::fill_n(pivot.data(), lanes, A(0));
      std::copy_n(found.pivot + first, count, pivot.data());
      for (int64_t j = 0; j < m; ++j) {
        After<T> after{following.activation};
        if (following.residual != nullptr) after.residual = channels_of<T>(added, first * m + j, m, count);
        kernel.pass.convolve(plan, channels_of<T>(problem.x, first, 1, count), pivot.data(), folded.weights(block * m + j),
                             folded.init(block * m + j), after, written<T>(out, target, first * m + j, m, count), begin, end,
                             scratch.data());
      }
    });
  });
}

// What autograd keeps besides the tensors it is given.
struct Found {
  Tensor means, variances, rstds, pivot, sums, centred;

  Statistics statistics() { return {doubles(means), doubles(variances), doubles(rstds), doubles(pivot), doubles(sums)}; }
};

Found statistics_of(const Problem& problem, const Tensor& x, const std::vector<double>& eps) {
  const Plan& plan = problem.plan();
  const int64_t K = problem.outputs, norms = problem.norms();
  const auto make = [&](std::vector<int64_t> sizes, ScalarType type) { return torch::stable::new_empty(x, sizes, type); };
  Found all{make({norms, K}, ScalarType::Double), make({norms, K}, ScalarType::Double), make({norms, K}, ScalarType::Double),
            make({problem.channels}, ScalarType::Double), make({problem.channels, plan.taps}, ScalarType::Double),
            make({K, problem.numbers}, sums_of(problem.x.type()))};
  dispatch(problem.x.type(), [&](auto element, auto accumulator) {
    using T = decltype(element);
    using A = decltype(accumulator);
    const Statistics found = all.statistics();
    A* products = static_cast<A*>(all.centred.mutable_data_ptr());
    const auto in_double = [&] {
      Tensor wide = torch::stable::to(x, ScalarType::Double);
      const View view(wide);
      find_statistics<double, double>(problem, view, eps, found, products);
    };
    const bool hides_nothing = std::find(eps.begin(), eps.end(), 0.0) != eps.end();
    const bool few = plan.images * plan.rows.size * plan.columns.size < kFewPixels;
    if (std::is_same_v<T, double> || !(few || hides_nothing)) {
      find_statistics<T, A>(problem, problem.x, eps, found, products);
      // Squares may be beyond float32 where their values are not.
      if (!std::is_same_v<T, double> && !finite(found.variances, norms * K)) in_double();
    } else {
      in_double();
    }
    if (plan.images > 0 && !finite(found.variances, norms * K)) define_statistics<T>(problem, eps, found);
    if (hides_nothing) without_rounding(problem, eps, found);
  });
  return all;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> statistics(Tensor x, Tensors weights, std::vector<double> eps,
                                                              std::vector<int64_t> taps, std::vector<int64_t> geometry) {
  const Problem problem("depthwise_statistics", x, weights, {}, static_cast<int64_t>(eps.size()), taps, geometry, false);
  Found found = statistics_of(problem, x, eps);
  return {found.means, found.variances, found.pivot, found.sums, found.centred};
}

void check_double(const Check& check, const Tensor& t, const char* name, std::initializer_list<int64_t> sizes) {
  const View v(t);
  check.readable(v, name);
  check.shape(v, name, sizes);
  check.type(v, name, ScalarType::Double, "dtype float64");
  check.contiguous(v, name);
}

Tensor normalise(const Problem& problem, const Tensor& x, const Statistics& found, const Following& following,
                 bool channels_last) {
  Tensor out = empty_out(problem, x, channels_last);
  dispatch(problem.x.type(), [&](auto element, auto accumulator) {
    convolve<decltype(element), decltype(accumulator)>(problem, found, following, out);
  });
  return out;
}

// A map like out, of the layout that others of it have.
void check_outer_map(const Problem& problem, const View& map, const char* name, bool channels_last) {
  const Plan& plan = problem.plan();
  const Check& check = problem.check;
  check.readable(map, name);
  check.shape(map, name, {plan.images, problem.outputs, plan.rows.out, plan.columns.out});
  check.type(map, name, problem.x.type(), "the dtype of x");
  check(map.dense(channels_last), name, " must be dense in the layout of out, ", channels_last ? "channels_last" : "contiguous");
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> step(Tensor x, Tensors weights, Tensors gammas,
                                                                        Tensors betas, std::vector<double> eps,
                                                                        std::vector<int64_t> taps,
                                                                        std::vector<int64_t> geometry, bool channels_last,
                                                                        std::optional<Tensor> residual, int64_t activation) {
  const Problem problem("depthwise_step", x, weights, gammas, static_cast<int64_t>(eps.size()), taps, geometry, true, betas);
  for (const double e : eps) problem.check(!problem.nested || e > 0, "eps must be positive where batch norms are nested, got ", e);
  Following following{activation_of(problem.check, activation)};
  if (residual) {
    const View map(*residual);
    check_outer_map(problem, map, "residual", channels_last);
    following.residual = map.data;
  }
  Found found = statistics_of(problem, x, eps);
  Tensor out = normalise(problem, x, found.statistics(), following, channels_last);
  return {out, found.means, found.variances, found.rstds, found.pivot, found.sums, found.centred};
}

namespace {

Tensor apply(Tensor x, Tensors weights, Tensors gammas, Tensors betas, Tensor means, Tensor rstds, Tensor pivot,
             std::vector<int64_t> taps, std::vector<int64_t> geometry, bool channels_last) {
  const View given(means);
  const Problem problem("depthwise_apply", x, weights, gammas, given.dim == 2 ? given.sizes[0] : -1, taps, geometry, false, betas);
  check_double(problem.check, means, "means", {problem.norms(), problem.outputs});
  check_double(problem.check, rstds, "rstds", {problem.norms(), problem.outputs});
  check_double(problem.check, pivot, "pivot", {problem.channels});
  return normalise(problem, x, {doubles(means), nullptr, doubles(rstds), doubles(pivot), nullptr}, {}, channels_last);
}

// ---- backward ----

struct Kept {  // by forward, checked
  View means, rstds, pivot, sums, centred;

  Kept(const Problem& problem, const Tensor& means_, const Tensor& rstds_, const Tensor& pivot_, const Tensor& sums_,
       const Tensor& centred_)
      : means(means_), rstds(rstds_), pivot(pivot_), sums(sums_), centred(centred_) {
    const Check& check = problem.check;
    const auto fits = [&](const View& v, const char* name, ScalarType type, std::initializer_list<int64_t> sizes) {
      check.readable(v, name);
      check.shape(v, name, sizes);
      check.type(v, name, type, "the dtype that depthwise_step returns it in");
      check.contiguous(v, name);
    };
    fits(means, "means", ScalarType::Double, {problem.norms(), problem.outputs});
    fits(rstds, "rstds", ScalarType::Double, {problem.norms(), problem.outputs});
    fits(pivot, "pivot", ScalarType::Double, {problem.channels});
    fits(sums, "sums", ScalarType::Double, {problem.channels, problem.plan().taps});
    fits(centred, "centred", sums_of(problem.x.type()), {problem.outputs, problem.numbers});
  }
};

// Of the gradients, what is wanted, else null.
struct Wanted {
  std::vector<void*> weights;  // one a convolution
  std::vector<View> layouts;
  void *gammas, *beta;         // norms × K and K, of the type of sums
  bool x;
  const double* averages;      // Σ g·ŷ_b and then Σ g of every channel by the number of values, or null: by these maps
};

template <class E>
void put(void* data, int64_t offset, double value) {
  static_cast<E*>(data)[offset] = static_cast<E>(value);
}

// The gradient of what comes after the sum, checked, and what it is told by.
struct Upstream {
  View grad;
  Activation activation = Activation::none;
  const void* kept = nullptr;  // as Slope has it
  Tensor* sloped = nullptr;    // where g·act'(z) goes, if anywhere
};

template <class T>
const T* channel_of(const void* data, const View& layout, int64_t channel) {
  return data == nullptr ? nullptr : static_cast<const T*>(data) + channel * layout.strides[1];
}

template <class T, class A>
void differentiate(const Problem& problem, const Upstream& upstream, const Kept& kept, const Wanted& wanted, Tensor& dx) {
  const Plan& plan = problem.plan();
  const Kernels<T, A>& kernel = kernels<T, A>();
  const int64_t lanes = kernel.pass.lanes, channels = problem.channels, m = plan.multiplier, taps = plan.taps, K = problem.outputs;
  const Tasks tasks(problem, lanes, plan.images * plan.rows.out, plan.columns.out, kTaskPixels);
  const int64_t kinds = int64_t(plan.rows.out_kinds) * plan.columns.out_kinds, products = taps * lanes;
  const int64_t numbers = products + kinds * lanes;
  const View& grad = upstream.grad;
  const bool again = upstream.activation != Activation::none && !is_clamp(upstream.activation);
  std::optional<Folded<A>> folds;
  if (again)
    folds.emplace(fold<T, A>(problem, tasks, doubles_of(kept.means), doubles_of(kept.rstds), doubles_of(kept.pivot), doubles_of(kept.sums)));
  const View sloped = upstream.sloped == nullptr ? grad : View(*upstream.sloped);
  Buffer<double> partial(tasks.count() * m * numbers);
  const auto pivot_of = [&](int64_t first, int64_t count, auto* to) {
    std::fill_n(to, lanes, 0);
    for (int64_t l = 0; l < count; ++l) to[l] = static_cast<std::remove_reference_t<decltype(*to)>>(doubles_of(kept.pivot)[first + l]);
  };
  tasks.run(false, [&](const auto& each) {
    Buffer<A> scratch(plan.scratch * lanes), pivot(lanes);
    each([&](int64_t block, int64_t begin, int64_t end, int64_t chunk) {
      const int64_t first = block * lanes, count = std::min(lanes, channels - first);
      pivot_of(first, count, pivot.data());
      for (int64_t j = 0; j < m; ++j) {
        double* own = partial.data() + ((block * m + j) * tasks.chunks + chunk) * numbers;
        std::fill_n(own, numbers, 0.0);
        const int64_t channel = first * m + j, at = block * m + j;
        Slope<T, A> slope{upstream.activation, channel_of<T>(upstream.kept, grad, channel)};
        if (again) {
          slope.weights = folds->weights(at);
          slope.init = folds->init(at);
        }
        Map<T> target{};
        if (upstream.sloped != nullptr) target = written<T>(*upstream.sloped, sloped, channel, m, count);
        kernel.pass.correlate(plan, channels_of<T>(problem.x, first, 1, count), pivot.data(),
                              channels_of<T>(grad, channel, m, count), slope, target, begin, end, scratch.data(), own,
                              own + products);
      }
    });
  });
  const int64_t per_block = (taps * taps + taps) * lanes;  // of Q and the levels
  const int64_t inits = plan.sums * lanes, per_table = plan.correction * lanes + inits;
  Buffer<A> tables(wanted.x ? tasks.blocks * per_table : 0);  // of what `gradient` takes
  Buffer<A> folded(wanted.x ? tasks.blocks * m * products : 0);
  const double values = static_cast<double>(plan.images * plan.rows.out * plan.columns.out), share = values > 0 ? 1 / values : 0;
  tasks.run_blocks(lanes * taps * taps * problem.norms(), [&](int64_t begin, int64_t end) {
    Buffer<double> patch(products), weight(products), whole(products), handed(products), level(4 * lanes), squares(per_block);
    Buffer<double> scratch(plan.algebra * lanes);
    double *pivot = level.data(), *total = pivot + lanes, *slope = total + lanes, *shift = slope + lanes;
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * lanes, count = std::min(lanes, channels - first);
      pivot_of(first, count, pivot);
      double *q = squares.data(), *levels = q + taps * taps * lanes;
      if (wanted.x) std::fill_n(q, per_block, 0.0);
      for (int64_t j = 0; j < m; ++j) {
        double* own = partial.data() + (block * m + j) * tasks.chunks * numbers;
        for (int64_t chunk = 1; chunk < tasks.chunks; ++chunk)
          for (int64_t i = 0; i < numbers; ++i) own[i] += own[chunk * numbers + i];
        kernel.algebra.patch_gradient(plan, own, own + products, pivot, patch.data(), total);
        std::fill_n(whole.data(), products, 0.0);
        // The batch norm of a sum comes first: what it hands on takes the place of grad's, and sums to 0.
        for (int64_t norm = problem.norms() - 1; norm >= 0; --norm) {
          const Kernel& k = problem.kernels[norm];
          const int64_t size = static_cast<int64_t>(k.places.size());
          const double* rstds = doubles_of(kept.rstds);
          gather(problem, k, first * m + j, m, count, lanes, rstds, weight.data());
          std::fill_n(slope, lanes, 0.0);
          std::fill_n(shift, lanes, 0.0);
          for (int64_t l = 0; l < count; ++l) {
            const int64_t c = first + l, o = c * m + j, at = norm * K + o;
            const double rstd = rstds[at], scale = scale_of(problem, norm, o, rstds);
            const double mean = mean_of(problem, k, o, doubles_of(kept.means), doubles_of(kept.sums), weight.data() + l, lanes);
            double inner = 0;
            for (int64_t t = 0; t < size; ++t) inner += weight.data()[t * lanes + l] * patch.data()[k.places[t] * lanes + l];
            const double of_ones = problem.nested && !k.of_sum ? 0 : total[l];
            const double dgamma = rstd * (inner - mean * of_ones);
            if (wanted.gammas != nullptr) put<A>(wanted.gammas, at, dgamma);
            double projection = dgamma * share, offset = of_ones * share;
            if (wanted.averages != nullptr) {
              projection = wanted.averages[at];
              offset = wanted.averages[problem.norms() * K + o];
            }
            const double factor = projection * rstd;
            slope[l] = scale * factor;
            shift[l] = scale * (factor * mean - offset);
            const double* sums = doubles_of(kept.sums) + c * taps;
            const A* centred = static_cast<const A*>(kept.centred.data) + o * problem.numbers + k.first;
            const auto gradient = [&](int place, int64_t tap) {  // of the scaled kernel's tap
              return scale * (patch.data()[place * lanes + l] - offset * sums[place] - factor * static_cast<double>(centred[tap]));
            };
            const auto dweight = [&](const Branch& branch) {
              if (branch.weight < 0 || wanted.weights[branch.weight] == nullptr) return;
              const View& target = wanted.layouts[branch.weight];
              for (size_t t = 0; t < branch.places.size(); ++t) {
                const double d = gradient(branch.places[t], k.of_sum ? branch.places[t] : static_cast<int64_t>(t));
                const int64_t r = static_cast<int64_t>(t) / branch.columns, s = static_cast<int64_t>(t) % branch.columns;
                const int64_t offset_of = o * target.strides[0] + r * target.strides[2] + s * target.strides[3];
                dispatch(target.type(), [&](auto e, auto) { put<decltype(e)>(wanted.weights[branch.weight], offset_of, d); });
              }
            };
            if (!k.of_sum) dweight(problem.branches[k.branch]);
            else
              for (const Branch& branch : problem.branches)
                if (branch.norm < 0) dweight(branch);
            if (problem.is_outer(k))
              for (int t = 0; t < taps; ++t) handed[t * lanes + l] = gradient(t, t);
            if (problem.nested && !k.of_sum) continue;
            for (int64_t t = 0; t < size; ++t) whole.data()[k.places[t] * lanes + l] += scale * weight.data()[t * lanes + l];
          }
          if (problem.is_outer(k)) std::copy_n(handed.data(), products, patch.data());
          if (!wanted.x) continue;
          for (int64_t t = 0; t < size; ++t) {
            const double* w = weight.data() + t * lanes;
            for (int64_t l = 0; l < lanes; ++l) levels[k.places[t] * lanes + l] += shift[l] * w[l];
            for (int64_t u = 0; u < size; ++u) {
              double* to = q + (k.places[t] * taps + k.places[u]) * lanes;
              const double* v = weight.data() + u * lanes;
              for (int64_t l = 0; l < lanes; ++l) to[l] += slope[l] * w[l] * v[l];
            }
          }
        }
        for (int64_t l = 0; l < count; ++l) put<A>(wanted.beta, (first + l) * m + j, total[l]);
        if (wanted.x) std::copy_n(whole.data(), products, folded.data() + (block * m + j) * products);
      }
      A* table = tables.data() + block * per_table;
      if (wanted.x) kernel.algebra.correct(plan, q, levels, pivot, scratch.data(), table + inits, table);
    }
  });
  if (!wanted.x) return;
  const View target(dx);
  const Tasks back(problem, lanes, plan.images * plan.rows.size, plan.columns.size, kTaskPixels);
  back.run(true, [&](const auto& each) {
    Buffer<A> scratch(plan.scratch * lanes), pivot(lanes);
    each([&](int64_t block, int64_t begin, int64_t end, int64_t) {
      const int64_t first = block * lanes, count = std::min(lanes, channels - first);
      pivot_of(first, count, pivot.data());
      const A* table = tables.data() + block * per_table;
      Map<const T> grads[kMostMultiplier];
      const T* told[kMostMultiplier];
      for (int64_t j = 0; j < m; ++j) {
        grads[j] = channels_of<T>(sloped, first * m + j, m, count);
        told[j] = channel_of<T>(upstream.kept, grad, first * m + j);
      }
      const Activation clamp = upstream.sloped == nullptr ? upstream.activation : Activation::none;
      kernel.pass.gradient(plan, channels_of<T>(problem.x, first, 1, count), pivot.data(), grads, clamp, told,
                           folded.data() + block * m * products, table + inits, table,
                           written<T>(dx, target, first, 1, count), begin, end, scratch.data());
    });
  });
}

}  // namespace

std::tuple<Tensor, Tensors, Tensor, Tensor, Tensor> step_backward(Tensor grad, Tensor x, Tensors weights, Tensors gammas,
                                                          Tensors betas, Tensor means,
                                                          Tensor rstds, Tensor pivot, Tensor sums, Tensor centred,
                                                          std::optional<Tensor> averages, std::vector<int64_t> taps,
                                                          std::vector<int64_t> geometry, bool need_x,
                                                          std::vector<bool> need_weights, bool need_gammas,
                                                          std::optional<Tensor> outer, int64_t activation,
                                                          bool need_residual) {
  const View given(means);
  const Problem problem("depthwise_step_backward", x, weights, gammas, given.dim == 2 ? given.sizes[0] : -1, taps, geometry, true, betas);
  const Check& check = problem.check;
  const Kept kept(problem, means, rstds, pivot, sums, centred);
  const Plan& plan = problem.plan();
  check(!averages.has_value() || !problem.nested, "averages must be None where batch norms are nested: there it is two after another");
  if (averages.has_value()) check_double(check, *averages, "averages", {problem.norms() + 1, problem.outputs});
  const View gradient(grad);
  check.readable(gradient, "grad");
  check.shape(gradient, "grad", {plan.images, problem.outputs, plan.rows.out, plan.columns.out});
  check.type(gradient, "grad", problem.x.type(), "the dtype of x");
  Upstream upstream{gradient, activation_of(check, activation)};
  const bool clamps = is_clamp(upstream.activation), again = upstream.activation != Activation::none && !clamps;
  if (upstream.activation != Activation::none) {
    const bool channels_last = !gradient.dense(false);
    check_outer_map(problem, gradient, "grad", channels_last);
    check(outer.has_value() || !clamps, "kept must be out, which tells where a clamp is flat, got None");
    if (outer.has_value()) {
      const View map(*outer);
      check_outer_map(problem, map, "kept", channels_last);
      upstream.kept = map.data;
    }
  }
  check(upstream.activation != Activation::none || !need_residual, "need_residual must be false without an activation: the residual's gradient is grad");
  check(need_weights.size() == weights.size(), "need_weights must have one entry a weight, ", weights.size(), " here, got ",
        need_weights.size());
  return dispatch(problem.x.type(), [&](auto element, auto accumulator) {
    using T = decltype(element);
    using A = decltype(accumulator);
    const ScalarType wide = sums_of(problem.x.type());
    Tensor dx = need_x ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
    Tensor dgammas = need_gammas ? torch::stable::new_empty(x, {problem.norms(), problem.outputs}, wide)
                                 : torch::stable::new_empty(x, {0}, wide);
    Tensor dbeta = torch::stable::new_empty(x, {problem.outputs}, wide);
    Tensors dws;
    Wanted wanted{{}, {}, need_gammas ? dgammas.mutable_data_ptr() : nullptr, dbeta.mutable_data_ptr(), need_x,
                  averages.has_value() ? doubles(*averages) : nullptr};
    for (size_t i = 0; i < weights.size(); ++i) {
      if (need_weights[i]) dws.push_back(torch::stable::empty_like(weights[i]));
      wanted.weights.push_back(need_weights[i] ? dws.back().mutable_data_ptr() : nullptr);
      wanted.layouts.emplace_back(need_weights[i] ? dws.back() : weights[i]);
    }
    Tensor sloped = torch::stable::new_empty(x, {0});
    if (need_residual || (again && need_x)) {
      sloped = torch::stable::empty_like(grad);
      upstream.sloped = &sloped;
    }
    differentiate<T, A>(problem, upstream, kept, wanted, dx);
    return std::make_tuple(dx, dws, dgammas, dbeta, need_residual ? sloped : torch::stable::new_empty(x, {0}));
  });
}

STABLE_TORCH_LIBRARY_FRAGMENT(acnet_kernels, m) {
  // Without defaults: PyTorch of torch 2.10 hides an argument at its default from an operator's autograd.
  m.def(
      "depthwise_step(Tensor x, Tensor[] weights, Tensor[] gammas, Tensor[] betas, float[] eps, int[] taps,"
      " int[] geometry, bool channels_last, Tensor? residual, int activation)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "depthwise_statistics(Tensor x, Tensor[] weights, float[] eps, int[] taps, int[] geometry)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "depthwise_apply(Tensor x, Tensor[] weights, Tensor[] gammas, Tensor[] betas, Tensor means, Tensor rstds,"
      " Tensor pivot, int[] taps, int[] geometry, bool channels_last) -> Tensor");
  m.def(
      "depthwise_step_backward(Tensor grad, Tensor x, Tensor[] weights, Tensor[] gammas, Tensor[] betas, Tensor means,"
      " Tensor rstds, Tensor pivot, Tensor sums, Tensor centred, Tensor? averages, int[] taps, int[] geometry,"
      " bool need_x, bool[] need_weights, bool need_gammas, Tensor? kept=None, int activation=0,"
      " bool need_residual=False) -> (Tensor, Tensor[], Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(acnet_kernels, CPU, m) {
  m.impl("depthwise_step", TORCH_BOX(&step));
  m.impl("depthwise_statistics", TORCH_BOX(&statistics));
  m.impl("depthwise_apply", TORCH_BOX(&apply));
  m.impl("depthwise_step_backward", TORCH_BOX(&step_backward));
}

}  // namespace acnet::depthwise
