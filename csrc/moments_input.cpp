// The gradient of x of a dense block from its input's moments: Σ_b W̃ᵀ_b * (scale_b·(g − offset − slope_b·(W̃_b * x − mean_b))),
// the convolutions on image pixels only. x is centred here too: its mean's share, one image for the batch, cancels the
// shifts in float64.
#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>
#include <vector>

#include "library.h"
#include "moments_maps.h"

namespace acnet::moments {
namespace {

using library::Pair;

constexpr int64_t kLeastChannelsByBranch = 64;  // a group: from here on dx goes through the branches' maps
constexpr double kLeastYFactor = 1e-25;  // below it products of y_factors and two kernels are beyond float's exponents

// What the composite kernel convolves, in the type of sums: kernels outputs×(rows·columns)×channels.
template <class A>
struct Composite {
  Buffer<double> plane;    // (g·Cg)×(2k−1)²×Cg, for x
  Buffer<A> strips;        // (4·g·r·Cg)×(2k−1)×(r·Cg), for its edge strips
  Buffer<A> corners;       // 2×2×g×(r·r·Cg)×(r·r·Cg)
};

// Of a symmetric T[(t,c),(u,c')] = Σ_b W̃_b[t,c]ᵀ D_b W̃_b[u,c'], g×size×size: the transpose of how G is put together.
template <class A>
Composite<A> scatter(const Problem& p, const A* table) {
  const int64_t k = p.kernel, r = p.radius, span = 2 * k - 1, cg = p.cg, size = p.size, block = r * r * cg;
  Composite<A> found{Buffer<double>(p.c * span * span * cg), Buffer<A>(kSides * p.groups * r * cg * span * r * cg),
                     Buffer<A>(4 * p.groups * block * block)};
  std::vector<std::vector<Beyond>> edges(k * k);
  for (int64_t t = 0; t < k; ++t)
    for (int64_t u = 0; u < k; ++u) edges[t * k + u] = beyond(r, t, u);
  parallel(p.c, p.taps * size, [&](int64_t begin, int64_t end) {
    std::vector<A> plane(span * span * cg);
    for (int64_t channel = begin; channel < end; ++channel) {
      const int64_t g = channel / cg, c = channel % cg;
      const auto strip = [&](int64_t side, int64_t i, int64_t shift, int64_t j) {
        return found.strips.data() + ((((side * p.groups + g) * r + i) * cg + c) * span + shift) * r * cg + j * cg;
      };
      const auto corner = [&](int64_t down, int64_t right, int64_t i, int64_t j) {
        return found.corners.data() + (((down * 2 + right) * p.groups + g) * block + i * cg + c) * block + j * cg;
      };
      std::fill(plane.begin(), plane.end(), A(0));
      for (int64_t side = 0; side < kSides; ++side)
        for (int64_t i = 0; i < r; ++i) std::fill_n(strip(side, i, 0, 0), span * r * cg, A(0));
      for (int64_t i = 0; i < 4 * r * r; ++i) std::fill_n(corner(i / (2 * r * r), i / (r * r) % 2, i % (r * r), 0), block, A(0));
      for (int64_t t = 0; t < p.taps; ++t)
        for (int64_t u = 0; u < p.taps; ++u) {
          const Run along = seen_by_both(p.row(t), p.row(u)), across = seen_by_both(p.column(t), p.column(u));
          if (along.count(p.h) == 0 || across.count(p.w) == 0) continue;  // what never sees the image together
          const A* from = table + (g * size + t * cg + c) * size + u * cg;
          const int64_t dr = u / k - t / k + k - 1, dc = u % k - t % k + k - 1;
          const auto add = [&](A* to, A sign) {
            for (int64_t d = 0; d < cg; ++d) to[d] += sign * from[d];
          };
          add(plane.data() + (dr * span + dc) * cg, 1);
          const std::vector<Beyond>&rows = edges[t / k * k + u / k], &columns = edges[t % k * k + u % k];
          for (const Beyond& b : rows) add(strip(b.far, b.i, dc, b.j), -1);
          for (const Beyond& b : columns) add(strip(2 + b.far, b.i, dr, b.j), -1);
          for (const Beyond& b : rows)
            for (const Beyond& e : columns) add(corner(b.far, e.far, b.i * r + e.i, b.j * r + e.j), 1);
        }
      std::copy(plane.begin(), plane.end(), found.plane.data() + channel * span * span * cg);
    }
  });
  return found;
}

// What the (2k−1)×(2k−1) convolution of x − pivot owes to output pixels outside the image, as edge strips.
template <class T, class A>
Tensor edge_terms(const Problem& p, const T* x, const A* pivot, const Composite<A>& composite) {
  const int64_t r = p.radius, cg = p.cg, length = strip_length(p), line = strip_line(p), block = r * r * cg;
  constexpr ScalarType type = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
  if (r == 0) return library::empty_map(type, 0, 1, 1, 1, true);
  const Buffer<A> strips = edge_strips(p, x, pivot);
  const Tensor lines = library::map_over(strips.data(), type, p.n, line, 1, length);
  const Tensor weight = library::map_over(composite.strips.data(), type, line, r * cg, 1, 2 * p.kernel - 1);
  Tensor added = library::convolution(lines, weight, nullptr, {{0, p.kernel - 1}, {1, 1}, kSides * p.groups});
  A* sums = written<A>(added);
  parallel(p.n * 4 * p.groups, block * block, [&](int64_t begin, int64_t end) {
    std::vector<A> twice(block);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t g = task % p.groups, right = task / p.groups % 2, down = task / p.groups / 2 % 2;
      const int64_t image = task / p.groups / 4;
      const auto place = [&](int64_t j) {  // of the pixel so far from the corner, its lines
        return (image * length + (right ? p.w - 1 - j : j)) * line + (down * p.groups + g) * r * cg;
      };
      std::fill(twice.begin(), twice.end(), A(0));
      for (int64_t i = 0; i < r; ++i)
        for (int64_t j = 0; j < std::min(r, p.w); ++j)
          for (int64_t c = 0; c < cg; ++c) {
            const A factor = strips[place(j) + i * cg + c];
            const A* row = composite.corners.data() +
                           (((down * 2 + right) * p.groups + g) * block + (i * r + j) * cg + c) * block;
            for (int64_t d = 0; d < block; ++d) twice[d] += factor * row[d];
          }
      for (int64_t i = 0; i < r; ++i)
        for (int64_t j = 0; j < std::min(r, p.w); ++j)
          for (int64_t c = 0; c < cg; ++c) sums[place(j) + i * cg + c] += twice[(i * r + j) * cg + c];
    }
  });
  return added;
}

// Wᵀ * (shifts − factors·(W * the image that is the pivot at every pixel)): H×W×C.
// kernels: g×Q×size, factors and shifts: g×Q.
Buffer<double> constant_image(const Problem& p, const Buffer<double>& kernels, const double* pivot, const Buffer<double>& factors,
                              const Buffer<double>& shifts, int64_t count) {
  const int64_t near = 2 * p.radius, rows = small_size(p.h, near), columns = small_size(p.w, near), cg = p.cg;
  const int64_t all = p.groups * count;
  Buffer<double> levels(p.taps * all), values(rows * columns * all), small(rows * columns * p.c), image(p.h * p.w * p.c);
  for (int64_t q = 0; q < all; ++q)
    for (int64_t t = 0; t < p.taps; ++t) {
      const double *own = kernels.data() + q * p.size + t * cg, *level = pivot + q / count * cg;
      double sum = 0;
      for (int64_t c = 0; c < cg; ++c) sum += own[c] * level[c];
      levels[t * all + q] = sum;
    }
  const auto inside = [&](int64_t i, int64_t j) { return i >= 0 && i < rows && j >= 0 && j < columns; };
  parallel(rows * columns, all * p.taps * (cg + 1), [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      double* to = values.data() + at * all;
      std::fill_n(to, all, 0.0);
      for (int64_t t = 0; t < p.taps; ++t)
        if (inside(at / columns + p.row(t), at % columns + p.column(t)))
          for (int64_t q = 0; q < all; ++q) to[q] += levels[t * all + q];
      for (int64_t q = 0; q < all; ++q) to[q] = shifts[q] - factors[q] * to[q];
    }
  });
  parallel(rows * columns, all * p.taps * (cg + 1), [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      double* to = small.data() + at * p.c;
      std::fill_n(to, p.c, 0.0);
      for (int64_t t = 0; t < p.taps; ++t) {
        const int64_t i = at / columns - p.row(t), j = at % columns - p.column(t);
        if (!inside(i, j)) continue;
        const double* from = values.data() + (i * columns + j) * all;
        for (int64_t q = 0; q < all; ++q) {
          const double* own = kernels.data() + q * p.size + t * cg;
          double* channels = to + q / count * cg;
          for (int64_t c = 0; c < cg; ++c) channels[c] += from[q] * own[c];
        }
      }
    }
  });
  for (int64_t i = 0; i < p.h; ++i)
    for (int64_t j = 0; j < p.w; ++j)
      std::copy_n(small.data() + (alike(i, p.h, near) * columns + alike(j, p.w, near)) * p.c, p.c,
                  image.data() + (i * p.w + j) * p.c);
  return image;
}

template <class A>
Buffer<A> in(const Buffer<double>& numbers, int64_t n) {
  Buffer<A> result(n);
  for (int64_t i = 0; i < n; ++i) result[i] = static_cast<A>(numbers[i]);
  return result;
}

// One type of maps, one of sums, one of the library's convolutions.
template <class T, class A, class Own>
class Gradient {
  static constexpr bool kNarrow = !std::is_same_v<Own, A>;  // convolutions in half precision
  static constexpr bool kUnits = std::is_same_v<Own, c10::Half>;
  using Sum = std::conditional_t<kUnits, A, Own>;  // what convolutions are added up in

 public:
  Gradient(const Problem& p, const T* grad, const T* x, const A* pivot, const InputGradient& given, Tensor& dx)
      : p_(p), grad_(grad), x_(x), pivot_(pivot), given_(given), dx_(dx), own_(p.compute) {
    wide_pivot_.assign(pivot, pivot + p.c);
    if (std::any_of(pivot, pivot + p.c, [](A v) { return v != 0; })) centre_ = repeated(pivot, p.c, p.w, A(-1));
  }

  void write() {
    double most = 0;
    for (size_t i = 0; i < given_.scale.size(); ++i) most = std::max(most, std::abs(given_.scale[i] * given_.y_factor[i]));
    if (p_.cg >= kLeastChannelsByBranch || most < kLeastYFactor) by_branch();
    else by_composite();
  }

 private:
  // body(first image, images, x̃, g's first number, where dx goes in channels_last)
  template <class Body>
  void each_part(const Body& body) {
    const int64_t images = images_at_a_time(p_), map = p_.h * p_.w * p_.c;
    constexpr bool converts = !std::is_same_v<T, Own>;
    const bool in_place = View(dx_).dense(true);
    Buffer<Own> moved(converts || !centre_.empty() ? images * map : 0);
    Buffer<T> result(in_place ? 0 : images * map);
    for (int64_t first = 0; first < p_.n; first += images) {
      const int64_t count = std::min(images, p_.n - first);
      const Own* part = moved.data();
      if (converts || !centre_.empty())
        shift_images<A>(x_ + first * map, A(1), centre_.empty() ? nullptr : centre_.data(), More::row, count, p_.h, p_.w * p_.c,
                        moved.data());
      else if constexpr (!converts) part = x_ + first * map;
      T* to = in_place ? written<T>(dx_) + first * map : result.data();
      body(first, count, part, grad_ + first * p_.h * p_.w * p_.outputs, to);
      if (in_place) continue;
      Tensor target = torch::stable::narrow(dx_, 0, first, count);
      torch::stable::copy_(target, library::map_over(to, p_.x.type(), count, p_.c, p_.h, p_.w));
    }
  }

  Tensor map_of(const Own* from, int64_t n, int64_t channels) const { return library::map_over(from, own_, n, channels, p_.h, p_.w); }

  // out += the convolution times its kernel's unit.
  void add(Sum* out, const Tensor& x, const Rounded& kernel, Pair padding, int64_t n, int64_t channels) {
    const library::Convolution how{padding, {1, 1}, p_.groups};
    if constexpr (!kUnits) {
      Tensor target = map_of(out, n, channels);
      if (given_.accumulates && n > 0 && library::add_convolution(target, x, kernel.weight, how)) return;
    }
    const Tensor more = library::convolution(x, kernel.weight, nullptr, how);
    const Own* from = data<Own>(more);
    const int64_t row = p_.w * channels;
    parallel(n * p_.h, row, [&](int64_t begin, int64_t end) {
      std::vector<A> wide(row);
      for (int64_t i = begin; i < end; ++i) {
        shift(out + i * row, A(1), static_cast<const A*>(nullptr), row, wide.data());
        shift(from + i * row, static_cast<A>(kernel.unit), wide.data(), row, out + i * row);
      }
    });
  }

  // Each branch's own map once more, and back: 30 taps for k = 3, no algebra.
  void by_branch() {
    struct Way {
      Rounded forth, back;
      Pair padding;
      Buffer<A> image;
    };
    std::vector<Way> ways;
    for (size_t b = 0; b < p_.list.kernels.size(); ++b) {
      const Kernel& kernel = p_.list.kernels[b];
      const Branch& branch = p_.list.branches[kernel.branch];
      // The branch's own kernel if its middle tap is the whole one's, else a whole one.
      const bool centred = !p_.summed() && branch.step == 1 && 2 * branch.row + branch.rows == p_.kernel &&
                           2 * branch.column + branch.columns == p_.kernel;
      const int64_t rows = centred ? branch.rows : p_.kernel, columns = centred ? branch.columns : p_.kernel, taps = rows * columns;
      Buffer<double> forth(p_.outputs * taps * p_.cg), back(p_.c * taps * p_.kg);
      std::fill_n(forth.data(), p_.outputs * taps * p_.cg, 0.0);
      std::fill_n(back.data(), p_.c * taps * p_.kg, 0.0);
      const double *scale = given_.scale.data() + b * p_.outputs, *factor = given_.y_factor.data() + b * p_.outputs;
      const int64_t own = static_cast<int64_t>(kernel.places.size());
      for (int64_t o = 0; o < p_.outputs; ++o)
        for (int64_t t = 0; t < own; ++t) {
          const int64_t place = centred ? t : kernel.places[t], g = o / p_.kg;
          const double* from = given_.kernels[b].data() + (o * own + t) * p_.cg;
          for (int64_t c = 0; c < p_.cg; ++c) {
            forth[(o * taps + place) * p_.cg + c] = -factor[o] * from[c];
            back[((g * p_.cg + c) * taps + taps - 1 - place) * p_.kg + o % p_.kg] = scale[o] * from[c];
          }
        }
      Buffer<double> image = level_image(p_, kernel.places, given_.kernels[b].data(), wide_pivot_.data());
      for (int64_t i = 0; i < p_.h * p_.w; ++i)
        for (int64_t o = 0; o < p_.outputs; ++o) {
          const double shift = factor[o] * given_.mean[b * p_.outputs + o] - given_.offset[o];
          image[i * p_.outputs + o] = shift - factor[o] * image[i * p_.outputs + o];
        }
      ways.push_back({rounded(forth.data(), p_.outputs, p_.cg, rows, columns, own_),
                      rounded(back.data(), p_.c, p_.kg, rows, columns, own_),
                      {rows / 2, columns / 2},
                      in<A>(image, p_.h * p_.w * p_.outputs)});
    }
    const int64_t map = p_.h * p_.w * p_.outputs, images = images_at_a_time(p_);
    Buffer<Sum> gradient(images * map), value(std::is_same_v<Sum, T> ? 0 : images * p_.h * p_.w * p_.c);
    Buffer<Own> narrow(kUnits ? images * map : 0);
    each_part([&](int64_t, int64_t n, const Own* x, const T* grad, T* to) {
      Sum* sum = value.data();
      if constexpr (std::is_same_v<Sum, T>) sum = to;
      std::fill_n(sum, n * p_.h * p_.w * p_.c, Sum(0));
      for (const Way& way : ways) {
        shift_images<A>(grad, A(1), way.image.data(), More::image, n, p_.h, p_.w * p_.outputs, gradient.data());
        add(gradient.data(), map_of(x, n, p_.c), way.forth, way.padding, n, p_.outputs);
        const Own* back = narrow.data();
        if constexpr (kUnits)
          shift_images<A>(gradient.data(), A(1), static_cast<const A*>(nullptr), More::row, n, p_.h, p_.w * p_.outputs, narrow.data());
        else back = gradient.data();
        add(sum, map_of(back, n, p_.outputs), way.back, way.padding, n, p_.c);
      }
      if constexpr (!std::is_same_v<Sum, T>)
        shift_images<A>(sum, A(1), static_cast<const A*>(nullptr), More::row, n, p_.h, p_.w * p_.c, to);
    });
  }

  // There and back in one convolution of (2k−1)² taps, besides that of g, and what it owes at the borders.
  void by_composite() {
    const int64_t k = p_.kernel, size = p_.size, cg = p_.cg, kg = p_.kg, norms = p_.norms, count = norms * kg;
    const int64_t all = p_.groups * count;
    Buffer<double> kernels(all * size), factors(all), shifts(all), back(p_.c * p_.taps * kg);
    std::fill_n(kernels.data(), all * size, 0.0);
    std::fill_n(back.data(), p_.c * p_.taps * kg, 0.0);
    for (int64_t b = 0; b < norms; ++b) {
      const Kernel& kernel = p_.list.kernels[b];
      const int64_t own = static_cast<int64_t>(kernel.places.size());
      for (int64_t o = 0; o < p_.outputs; ++o) {
        const int64_t g = o / kg, q = g * count + b * kg + o % kg, at = b * p_.outputs + o;
        factors[q] = given_.scale[at] * given_.y_factor[at];
        // Half-precision convolutions round so coarsely that g's mean does not go through them.
        shifts[q] = given_.scale[at] * (given_.y_factor[at] * given_.mean[at] - (kNarrow ? 0 : given_.offset[o]));
        for (int64_t t = 0; t < own; ++t) {
          const double* from = given_.kernels[b].data() + (o * own + t) * cg;
          for (int64_t c = 0; c < cg; ++c) {
            kernels[q * size + kernel.places[t] * cg + c] = from[c];
            back[((g * cg + c) * p_.taps + p_.taps - 1 - kernel.places[t]) * kg + o % kg] += given_.scale[at] * from[c];
          }
        }
      }
    }
    const Buffer<A> constant =
        in<A>(constant_image(p_, kernels, wide_pivot_.data(), factors, shifts, count), p_.h * p_.w * p_.c);
    Buffer<A> first(all * size), second(all * size), table(p_.groups * size * size);
    for (int64_t q = 0; q < all; ++q)
      for (int64_t i = 0; i < size; ++i) {
        first[q * size + i] = static_cast<A>(kernels[q * size + i]);
        second[q * size + i] = static_cast<A>(kernels[q * size + i] * -factors[q]);
      }
    for (int64_t g = 0; g < p_.groups; ++g)
      library::multiply(first.data() + g * count * size, 1, size, second.data() + g * count * size, size, count, size,
                        table.data() + g * size * size);
    const Composite<A> composite = scatter(p_, table.data());
    const Rounded plane = rounded(composite.plane.data(), p_.c, cg, 2 * k - 1, 2 * k - 1, own_);
    const Rounded weight = rounded(back.data(), p_.c, kg, k, k, own_);
    const Tensor edges = edge_terms(p_, x_, pivot_, composite);
    std::vector<A> level;  // g's, negative
    if constexpr (kNarrow) {
      std::vector<A> numbers(given_.offset.begin(), given_.offset.end());
      level = repeated(numbers.data(), p_.outputs, p_.w, A(-1));
    }
    constexpr bool moves = kNarrow || !std::is_same_v<T, Own>;
    const int64_t map = p_.h * p_.w * p_.outputs;
    Buffer<Own> moved(moves ? images_at_a_time(p_) * map : 0);
    each_part([&](int64_t at, int64_t n, const Own* x, const T* grad, T* to) {
      const Own* g = moved.data();
      if constexpr (moves)
        shift_images<A>(grad, A(1), level.empty() ? nullptr : level.data(), More::row, n, p_.h, p_.w * p_.outputs, moved.data());
      else g = grad;
      Tensor value = library::convolution(map_of(g, n, p_.outputs), weight.weight, nullptr, {{p_.radius, p_.radius}, {1, 1}, p_.groups});
      const Tensor maps = map_of(x, n, p_.c);
      std::optional<Tensor> other;
      if constexpr (kUnits) other = library::convolution(maps, plane.weight, nullptr, {{k - 1, k - 1}, {1, 1}, p_.groups});
      else add(written<Own>(value), maps, plane, {k - 1, k - 1}, n, p_.c);
      finish(value, static_cast<A>(weight.unit), other, static_cast<A>(plane.unit), constant, edges, at, n, to);
    });
  }

  // dx = value·unit + other·other_unit + constant + edges.
  void finish(const Tensor& value, A unit, const std::optional<Tensor>& other, A other_unit, const Buffer<A>& constant,
              const Tensor& edges, int64_t first, int64_t n, T* to) {
    const int64_t h = p_.h, w = p_.w, c = p_.c, r = p_.radius, cg = p_.cg, row = w * c;
    const int64_t length = strip_length(p_), line = strip_line(p_);
    const A* lines = data<A>(edges);
    const Own *from = data<Own>(value), *more = other.has_value() ? data<Own>(*other) : nullptr;
    parallel(n * h, row, [&](int64_t begin, int64_t end) {
      std::vector<A> sum(row);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t image = first + i / h, y = i % h;
        if (more != nullptr) {
          shift(more + i * row, other_unit, constant.data() + y * row, row, sum.data());
          shift(from + i * row, unit, static_cast<const A*>(sum.data()), row, sum.data());
        } else {
          shift(from + i * row, unit, constant.data() + y * row, row, sum.data());
        }
        const auto add = [&](int64_t side, int64_t depth, int64_t along, A* pixel) {
          const A* edge = lines + (image * length + along) * line + (side * p_.groups * r + depth) * cg;
          for (int64_t g = 0; g < p_.groups; ++g)
            for (int64_t k = 0; k < cg; ++k) pixel[g * cg + k] += edge[g * r * cg + k];
        };
        if (y < r)
          for (int64_t x = 0; x < w; ++x) add(0, y, x, sum.data() + x * c);
        if (h - 1 - y < r)
          for (int64_t x = 0; x < w; ++x) add(1, h - 1 - y, x, sum.data() + x * c);
        for (int64_t x = 0; x < std::min(r, w); ++x) add(2, x, y, sum.data() + x * c);
        for (int64_t x = 0; x < std::min(r, w); ++x) add(3, x, y, sum.data() + (w - 1 - x) * c);
        shift(static_cast<const A*>(sum.data()), A(1), static_cast<const A*>(nullptr), row, to + i * row);
      }
    });
  }

  const Problem& p_;
  const T *grad_, *x_;
  const A* pivot_;
  const InputGradient& given_;
  Tensor& dx_;
  ScalarType own_;
  std::vector<double> wide_pivot_;
  std::vector<A> centre_;  // a row of the pivot, negative; none where it is zero
};

}  // namespace

template <class T, class A>
void write_input_gradient(const Problem& p, const T* grad, const T* x, const A* pivot, const InputGradient& given, Tensor& dx) {
  if (p.computes_in_own()) Gradient<T, A, T>(p, grad, x, pivot, given, dx).write();
  else Gradient<T, A, A>(p, grad, x, pivot, given, dx).write();
}

#define ACNET_INSTANTIATE(T, A) \
  template void write_input_gradient(const Problem&, const T*, const T*, const A*, const InputGradient&, Tensor&);
ACNET_INSTANTIATE(float, float)
ACNET_INSTANTIATE(double, double)
ACNET_INSTANTIATE(c10::BFloat16, float)
ACNET_INSTANTIATE(c10::Half, float)
#undef ACNET_INSTANTIATE

}  // namespace acnet::moments
