// The small operators of the moments backend on the CPU, each of which stands for dozens of tensor operations:
// edge_strips, patch_gram and add_edges. Their meaning is documented in acnet_kernels/steps/moments_algebra.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "autocorrelation.h"
#include "check.h"

namespace acnet::moments {
namespace {

constexpr int64_t kSides = 4;  // top, bottom, left, right

// body(T{}, A{}) for the maps' type T, a float, and the type A of sums.
template <class Body>
void dispatch(ScalarType type, const Body& body) {
  if (type == ScalarType::Float) body(float{}, float{});
  else if (type == ScalarType::Double) body(double{}, double{});
  else if (type == ScalarType::BFloat16) body(c10::BFloat16{}, float{});
  else body(c10::Half{}, float{});
}

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

Tensor edge_strips(Tensor x, Tensor pivot, int64_t kernel, int64_t groups) {
  constexpr Check check("edge_strips");
  const View map(x), pivots(pivot);
  check.map(map, "x");
  check.kernel(kernel);
  const int64_t n = map.sizes[0], c = map.sizes[1], h = map.sizes[2], w = map.sizes[3];
  const int64_t r = kernel / 2, length = std::max(h, w) + r;
  check.groups(groups, c, "x's");
  check.readable(pivots, "pivot");
  check.shape(pivots, "pivot", {c});
  check.type(pivots, "pivot", sums_of(map.type()), "the dtype sums are kept in");
  check.contiguous(pivots, "pivot");
  Tensor strips = torch::stable::new_empty(pivot, {n, length, kSides, groups, r, c / groups});
  dispatch(x.scalar_type(), [&](auto t, auto a) {
    using T = decltype(t);
    using A = decltype(a);
    const int64_t cg = c / groups, line = kSides * groups * r * cg, channel = x.stride(1);
    const A* centre = data<A>(pivot);
    torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
      for (int64_t image = begin; image < end; ++image)
        for (int64_t side = 0; side < kSides; ++side) {
          const bool across = side < 2;  // the line is a row
          const int64_t size = across ? w : h, depth = across ? h : w;
          const int64_t along = x.stride(across ? 3 : 2), inwards = x.stride(across ? 2 : 3);
          for (int64_t i = 0; i < r; ++i) {
            const T* from = data<T>(x) + image * x.stride(0) + (side % 2 ? depth - 1 - i : i) * inwards;
            for (int64_t l = 0; l < length; ++l)
              for (int64_t g = 0; g < groups; ++g) {
                A* to = static_cast<A*>(strips.mutable_data_ptr()) + (image * length + l) * line +
                        ((side * groups + g) * r + i) * cg;
                if (l >= size || i >= depth) {
                  std::fill_n(to, cg, A(0));
                  continue;
                }
                const T* pixel = from + l * along + g * cg * channel;
                if (channel == 1)  // for the compiler: whole vectors
                  for (int64_t k = 0; k < cg; ++k) to[k] = static_cast<A>(pixel[k]) - centre[g * cg + k];
                else
                  for (int64_t k = 0; k < cg; ++k) to[k] = static_cast<A>(pixel[k * channel]) - centre[g * cg + k];
              }
          }
        }
    });
  });
  return strips;
}

// What a pair of taps sees from output pixels beyond an edge, along one axis: by line `i` with the one and line `j`
// with the other, counted from the edge.
struct Beyond {
  int64_t far, i, j;
};
std::vector<Beyond> beyond(int64_t r, int64_t tap, int64_t other) {
  std::vector<Beyond> found;
  for (int64_t far = 0; far < 2; ++far) {
    const int64_t t = far ? r - tap : tap - r, u = far ? r - other : other - r;
    for (int64_t d = 1; d <= std::min(t, u); ++d) found.push_back({far, t - d, u - d});
  }
  return found;
}

// Corner pixels' Gram matrices, 2×2×g×(r·r·Cg)×(r·r·Cg), from the edge strips.
template <class A>
std::vector<double> corner_grams(const Tensor& strips, int64_t width) {
  const int64_t n = strips.size(0), length = strips.size(1), groups = strips.size(3), r = strips.size(4),
                cg = strips.size(5), size = r * r * cg, line = kSides * groups * r * cg;
  std::vector<double> grams(4 * groups * size * size);
  torch::stable::parallel_for(0, 4 * groups * r * r, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t a = task % (r * r), g = task / (r * r) % groups, corner = task / (r * r * groups);
      const int64_t side = corner / 2, right = corner % 2;
      // Pixel p = (line from the edge)·r + (place from the corner) of an image, or null where there is none.
      const auto pixel = [&](int64_t image, int64_t p) -> const A* {
        const int64_t i = p / r, j = p % r;
        if (j >= width) return nullptr;
        return data<A>(strips) + (image * length + (right ? width - 1 - j : j)) * line +
               ((side * groups + g) * r + i) * cg;
      };
      double* gram = grams.data() + ((corner * groups + g) * size + a * cg) * size;
      for (int64_t image = 0; image < n; ++image)
        for (int64_t b = 0; b < r * r; ++b) {
          const A *p = pixel(image, a), *q = pixel(image, b);
          if (p == nullptr || q == nullptr) continue;
          for (int64_t c = 0; c < cg; ++c) {
            const double factor = p[c];
            double* to = gram + c * size + b * cg;
            for (int64_t d = 0; d < cg; ++d) to[d] += factor * q[d];
          }
        }
    }
  });
  return grams;
}

template <class A>
void assemble(const Tensor& half, const Tensor& edges, const Tensor& strips, const Tensor& sums, const Tensor& cross,
              const Tensor& pivot, const Tensor& seen, int64_t k, int64_t width, double count, double* gram) {
  const int64_t r = k / 2, taps = k * k, groups = half.size(1), cg = half.size(2), size = taps * cg, rc = r * cg;
  const std::vector<double> corners = corner_grams<A>(strips, width);
  torch::stable::parallel_for(0, groups * taps * cg, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t c = row % cg, t = row / cg % taps, g = row / (cg * taps);
      const double *s = data<double>(sums) + g * size, *h = data<double>(cross) + g * taps * size,
                   *v = data<double>(pivot) + g * cg;
      for (int64_t u = t; u < taps; ++u) {  // the taps behind t; those before it are this one's transpose
        double* to = gram + row * size + u * cg;
        const int64_t dr = u / k - t / k, dc = u % k - t % k;
        std::fill_n(to, cg, 0.0);
        if (data<double>(seen)[t * taps + u] > 0) {
          const A* from = data<A>(half) + ((dr * (2 * k - 1) + dc) * groups + g) * cg * cg + c * cg;
          for (int64_t d = 0; d < cg; ++d) to[d] = from[d];
          const std::vector<Beyond> rows = beyond(r, t / k, u / k), columns = beyond(r, t % k, u % k);
          const auto subtract = [&](int64_t side, const Beyond& b, int64_t shift) {
            const A* block = data<A>(edges) + (std::abs(shift) * kSides * groups + side * groups + g) * rc * rc;
            const int64_t own = b.i * cg + c, first = b.j * cg;
            for (int64_t d = 0; d < cg; ++d)
              to[d] -= shift < 0 ? block[(first + d) * rc + own] : block[own * rc + first + d];
          };
          for (const Beyond& b : rows) subtract(b.far, b, dc);
          for (const Beyond& b : columns) subtract(2 + b.far, b, dr);
          for (const Beyond& b : rows)
            for (const Beyond& e : columns) {
              const double* block = corners.data() + ((b.far * 2 + e.far) * groups + g) * r * rc * r * rc;
              const double* line = block + ((b.i * r + e.i) * cg + c) * r * rc + (b.j * r + e.j) * cg;
              for (int64_t d = 0; d < cg; ++d) to[d] += line[d];
            }
        }
        const double mean = s[t * cg + c] / count, shifted = h[(t * taps + u) * cg + c], own = v[c];
        for (int64_t d = 0; d < cg; ++d)
          to[d] += shifted * v[d] + h[(u * taps + t) * cg + d] * own - mean * s[u * cg + d];
      }
    }
  });
  torch::stable::parallel_for(0, groups * taps, 1, [&](int64_t begin, int64_t end) {
    constexpr int64_t kTile = 8;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t u = i % taps;
      double* matrix = gram + i / taps * size * size;
      for (int64_t c = u * cg; c < (u + 1) * cg; c += kTile)
        for (int64_t d = 0; d < u * cg; d += kTile)
          for (int64_t a = c; a < std::min(c + kTile, (u + 1) * cg); ++a)
            for (int64_t b = d; b < std::min(d + kTile, u * cg); ++b) matrix[a * size + b] = matrix[b * size + a];
    }
  });
}

Tensor patch_gram(Tensor half, Tensor edges, Tensor strips, Tensor sums, Tensor cross, Tensor pivot, Tensor seen,
                  int64_t kernel, int64_t width, double count) {
  constexpr Check check("patch_gram");
  check.kernel(kernel);
  const View first(half), lines(strips);
  check(first.dim == 4, "half must have shape (shifts, groups, channels, channels), got ", first.shape());
  const int64_t groups = first.sizes[1], cg = first.sizes[2], taps = kernel * kernel, r = kernel / 2, rc = r * cg;
  check(groups > 0 && cg > 0, "half must have groups and channels, got ", first.shape());
  const ScalarType type = first.type();
  check(type == ScalarType::Float || type == ScalarType::Double, "half must be float32 or float64, got ", first.dtype->name);
  const auto fits = [&](const View& v, const char* name, ScalarType wanted, std::initializer_list<int64_t> sizes) {
    check.readable(v, name);
    check.shape(v, name, sizes);
    check.type(v, name, wanted, wanted == type ? "half's dtype" : "dtype float64");
    check.contiguous(v, name);
  };
  fits(first, "half", type, {2 * taps - 2 * kernel + 1, groups, cg, cg});
  // Without edges, for a kernel of one tap, they may be empty of any shape.
  if (r > 0) fits(View(edges), "edges", type, {kernel, kSides * groups, rc, rc});
  check(lines.dim == 6, "strips must have six dimensions, got ", lines.shape());
  fits(lines, "strips", type, {lines.sizes[0], lines.sizes[1], kSides, groups, r, cg});
  fits(View(sums), "sums", ScalarType::Double, {groups, taps * cg});
  fits(View(cross), "cross", ScalarType::Double, {groups, taps, taps, cg});
  fits(View(pivot), "pivot", ScalarType::Double, {groups, cg});
  fits(View(seen), "seen", ScalarType::Double, {taps, taps});
  check(width >= 1 && width <= lines.sizes[1] - r, "width must be from 1 to the strips' ", lines.sizes[1], " less ", r,
        ", got ", width);
  check(count > 0 && std::isfinite(count), "count must be positive, got ", count);
  Tensor gram = torch::stable::new_empty(sums, {groups, taps * cg, taps * cg});
  double* to = static_cast<double*>(gram.mutable_data_ptr());
  if (type == ScalarType::Double)
    assemble<double>(half, edges, strips, sums, cross, pivot, seen, kernel, width, count, to);
  else
    assemble<float>(half, edges, strips, sums, cross, pivot, seen, kernel, width, count, to);
  return gram;
}

// out = value + constant + edges; value is overwritten.
void add_edges(Tensor out, Tensor value, Tensor constant, Tensor edges) {
  constexpr Check check("add_edges");
  const View target(out), maps(value), constants(constant), lines(edges);
  check.map(target, "out");
  check.map(maps, "value");
  const int64_t n = maps.sizes[0], c = maps.sizes[1], h = maps.sizes[2], w = maps.sizes[3], row = w * c;
  check.shape(target, "out", {n, c, h, w});
  check.readable(constants, "constant");
  check.shape(constants, "constant", {1, c, h, w});
  check.readable(lines, "edges");
  check(lines.dim == 6, "edges must have six dimensions, got ", lines.shape());
  const int64_t length = lines.sizes[1], groups = lines.sizes[3], r = lines.sizes[4], cg = lines.sizes[5];
  check(length >= std::max(h, w), "edges must hold lines of at least ", std::max(h, w), " places, got ", lines.shape());
  check.groups(groups, c, "value's");
  check.shape(lines, "edges", {n, length, kSides, groups, r, c / groups});
  check.contiguous(lines, "edges");
  check(target.dense(true), "out must be in channels_last layout");
  check(maps.dense(true) && constants.dense(true), "value and constant must be in channels_last layout");
  const std::pair<const View&, const char*> read[] = {{maps, "value"}, {constants, "constant"}, {lines, "edges"}};
  for (const auto& [v, name] : read) {
    check.type(v, name, sums_of(target.type()), "the dtype that sums over out are kept in");
    check.apart(target, "out", v, name);
    if (&v != &maps) check.apart(maps, "value", v, name);
  }
  dispatch(target.type(), [&](auto t, auto a) {
    using T = decltype(t);
    using A = decltype(a);
    torch::stable::parallel_for(0, n * h, std::max<int64_t>(1, 4096 / std::max<int64_t>(row, 1)),
                                [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t image = i / h, y = i % h;
        A* from = static_cast<A*>(value.mutable_data_ptr()) + i * row;
        const auto add = [&](int64_t side, int64_t line, int64_t place, A* pixel) {
          const A* edge = data<A>(edges) + ((image * length + place) * kSides + side) * groups * r * cg + line * cg;
          for (int64_t g = 0; g < groups; ++g)
            for (int64_t k = 0; k < cg; ++k) pixel[g * cg + k] += edge[g * r * cg + k];
        };
        if (y < r)
          for (int64_t x = 0; x < w; ++x) add(0, y, x, from + x * c);
        if (h - 1 - y < r)
          for (int64_t x = 0; x < w; ++x) add(1, h - 1 - y, x, from + x * c);
        for (int64_t x = 0; x < std::min(r, w); ++x) add(2, x, y, from + x * c);
        for (int64_t x = 0; x < std::min(r, w); ++x) add(3, x, y, from + (w - 1 - x) * c);
        autocorrelation::passes<T, A>().sum(from, data<A>(constant) + y * row, row,
                                            static_cast<T*>(out.mutable_data_ptr()) + i * row);
      }
    });
  });
}

}  // namespace
}  // namespace acnet::moments

STABLE_TORCH_LIBRARY_FRAGMENT(acnet_kernels, m) {
  m.def("edge_strips(Tensor x, Tensor pivot, int kernel, int groups) -> Tensor");
  m.def(
      "patch_gram(Tensor half, Tensor edges, Tensor strips, Tensor sums, Tensor cross, Tensor pivot, Tensor seen,"
      " int kernel, int width, float count) -> Tensor");
  m.def("add_edges(Tensor(a!) out, Tensor(b!) value, Tensor constant, Tensor edges) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(acnet_kernels, CPU, m) {
  m.impl("edge_strips", TORCH_BOX(&acnet::moments::edge_strips));
  m.impl("patch_gram", TORCH_BOX(&acnet::moments::patch_gram));
  m.impl("add_edges", TORCH_BOX(&acnet::moments::add_edges));
}
