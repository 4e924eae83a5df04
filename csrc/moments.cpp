// The small operators of the moments backend on the CPU, each of which stands for dozens of tensor operations:
// edge_strips, patch_gram and add_edges. Their meaning is documented in acnet_kernels/backends/moments_algebra.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <vector>

#include "autocorrelation.h"

namespace acnet::moments {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kSides = 4;  // top, bottom, left, right

// body(T{}, A{}) for the maps' type T and the type A of sums.
template <class Body>
void dispatch(ScalarType type, const Body& body) {
  if (type == ScalarType::Float) body(float{}, float{});
  else if (type == ScalarType::Double) body(double{}, double{});
  else if (type == ScalarType::BFloat16) body(c10::BFloat16{}, float{});
  else if (type == ScalarType::Half) body(c10::Half{}, float{});
  else STD_TORCH_CHECK(false, "maps must be float32, float64, bfloat16 or float16");
}

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

Tensor edge_strips(Tensor x, Tensor pivot, int64_t kernel, int64_t groups) {
  const int64_t n = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3), r = kernel / 2, length = std::max(h, w) + r;
  STD_TORCH_CHECK(pivot.is_contiguous() && pivot.numel() == c && c % groups == 0, "pivot must be one number a channel");
  Tensor strips = torch::stable::new_empty(pivot, {n, length, kSides, groups, r, c / groups});
  dispatch(x.scalar_type(), [&](auto t, auto a) {
    using T = decltype(t);
    using A = decltype(a);
    const int64_t thin = c / groups, line = kSides * groups * r * thin, channel = x.stride(1);
    const A* level = data<A>(pivot);
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
                        ((side * groups + g) * r + i) * thin;
                if (l >= size || i >= depth) {
                  std::fill_n(to, thin, A(0));
                  continue;
                }
                const T* pixel = from + l * along + g * thin * channel;
                if (channel == 1)  // for the compiler: whole vectors
                  for (int64_t k = 0; k < thin; ++k) to[k] = static_cast<A>(pixel[k]) - level[g * thin + k];
                else
                  for (int64_t k = 0; k < thin; ++k) to[k] = static_cast<A>(pixel[k * channel]) - level[g * thin + k];
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
                thin = strips.size(5), size = r * r * thin, line = kSides * groups * r * thin;
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
               ((side * groups + g) * r + i) * thin;
      };
      double* gram = grams.data() + ((corner * groups + g) * size + a * thin) * size;
      for (int64_t image = 0; image < n; ++image)
        for (int64_t b = 0; b < r * r; ++b) {
          const A *p = pixel(image, a), *q = pixel(image, b);
          if (p == nullptr || q == nullptr) continue;
          for (int64_t c = 0; c < thin; ++c) {
            const double factor = p[c];
            double* to = gram + c * size + b * thin;
            for (int64_t d = 0; d < thin; ++d) to[d] += factor * q[d];
          }
        }
    }
  });
  return grams;
}

template <class A>
void assemble(const Tensor& half, const Tensor& edges, const Tensor& strips, const Tensor& sums, const Tensor& cross,
              const Tensor& level, const Tensor& seen, int64_t k, int64_t width, double count, double* gram) {
  const int64_t r = k / 2, taps = k * k, groups = half.size(1), thin = half.size(2), size = taps * thin, rc = r * thin;
  const std::vector<double> corners = corner_grams<A>(strips, width);
  torch::stable::parallel_for(0, groups * taps * thin, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t c = row % thin, t = row / thin % taps, g = row / (thin * taps);
      const double *s = data<double>(sums) + g * size, *h = data<double>(cross) + g * taps * size,
                   *v = data<double>(level) + g * thin;
      for (int64_t u = t; u < taps; ++u) {  // the taps behind t; those before it are this one's transpose
        double* to = gram + row * size + u * thin;
        const int64_t dr = u / k - t / k, dc = u % k - t % k;
        std::fill_n(to, thin, 0.0);
        if (data<double>(seen)[t * taps + u] > 0) {
          const A* from = data<A>(half) + ((dr * (2 * k - 1) + dc) * groups + g) * thin * thin + c * thin;
          for (int64_t d = 0; d < thin; ++d) to[d] = from[d];
          const std::vector<Beyond> rows = beyond(r, t / k, u / k), columns = beyond(r, t % k, u % k);
          const auto subtract = [&](int64_t side, const Beyond& b, int64_t shift) {
            const A* block = data<A>(edges) + (std::abs(shift) * kSides * groups + side * groups + g) * rc * rc;
            const int64_t own = b.i * thin + c, first = b.j * thin;
            for (int64_t d = 0; d < thin; ++d)
              to[d] -= shift < 0 ? block[(first + d) * rc + own] : block[own * rc + first + d];
          };
          for (const Beyond& b : rows) subtract(b.far, b, dc);
          for (const Beyond& b : columns) subtract(2 + b.far, b, dr);
          for (const Beyond& b : rows)
            for (const Beyond& e : columns) {
              const double* block = corners.data() + ((b.far * 2 + e.far) * groups + g) * r * rc * r * rc;
              const double* line = block + ((b.i * r + e.i) * thin + c) * r * rc + (b.j * r + e.j) * thin;
              for (int64_t d = 0; d < thin; ++d) to[d] += line[d];
            }
        }
        const double mean = s[t * thin + c] / count, shifted = h[(t * taps + u) * thin + c], own = v[c];
        for (int64_t d = 0; d < thin; ++d)
          to[d] += shifted * v[d] + h[(u * taps + t) * thin + d] * own - mean * s[u * thin + d];
      }
    }
  });
  torch::stable::parallel_for(0, groups * taps, 1, [&](int64_t begin, int64_t end) {
    constexpr int64_t kTile = 8;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t u = i % taps;
      double* matrix = gram + i / taps * size * size;
      for (int64_t c = u * thin; c < (u + 1) * thin; c += kTile)
        for (int64_t d = 0; d < u * thin; d += kTile)
          for (int64_t a = c; a < std::min(c + kTile, (u + 1) * thin); ++a)
            for (int64_t b = d; b < std::min(d + kTile, u * thin); ++b) matrix[a * size + b] = matrix[b * size + a];
    }
  });
}

Tensor patch_gram(Tensor half, Tensor edges, Tensor strips, Tensor sums, Tensor cross, Tensor level, Tensor seen,
                  int64_t kernel, int64_t width, double count) {
  const int64_t groups = half.size(1), thin = half.size(2), taps = kernel * kernel;
  const auto shaped = [&](const Tensor& t, ScalarType type, int64_t numel, const char* name) {
    STD_TORCH_CHECK(t.is_contiguous() && t.scalar_type() == type && t.numel() == numel, name, " does not fit half");
  };
  const int64_t rc = kernel / 2 * thin;
  shaped(half, half.scalar_type(), (taps * 4 - kernel * 4 + 2) / 2 * groups * thin * thin, "half");
  shaped(edges, half.scalar_type(), kernel * kSides * groups * rc * rc, "edges");
  STD_TORCH_CHECK(strips.dim() == 6 && strips.size(3) == groups && strips.size(5) == thin, "strips do not fit half");
  shaped(strips, half.scalar_type(), strips.numel(), "strips");
  shaped(sums, ScalarType::Double, groups * taps * thin, "sums");
  shaped(cross, ScalarType::Double, groups * taps * taps * thin, "cross");
  shaped(level, ScalarType::Double, groups * thin, "level");
  shaped(seen, ScalarType::Double, taps * taps, "seen");
  Tensor gram = torch::stable::new_empty(sums, {groups, taps * thin, taps * thin});
  double* to = static_cast<double*>(gram.mutable_data_ptr());
  if (half.scalar_type() == ScalarType::Double)
    assemble<double>(half, edges, strips, sums, cross, level, seen, kernel, width, count, to);
  else
    assemble<float>(half, edges, strips, sums, cross, level, seen, kernel, width, count, to);
  return gram;
}

// out = value + constant + edges; value is overwritten.
void add_edges(Tensor out, Tensor value, Tensor constant, Tensor edges) {
  const int64_t n = value.size(0), c = value.size(1), h = value.size(2), w = value.size(3), row = w * c;
  const int64_t length = edges.size(1), groups = edges.size(3), r = edges.size(4), thin = edges.size(5);
  dispatch(out.scalar_type(), [&](auto t, auto a) {
    using T = decltype(t);
    using A = decltype(a);
    const ScalarType sums = out.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    for (const Tensor* map : {&value, &constant})
      STD_TORCH_CHECK(autocorrelation::is_channels_last(*map) && map->scalar_type() == sums,
                      "value and constant must be in channels_last layout, in the dtype sums are kept in");
    STD_TORCH_CHECK(autocorrelation::is_channels_last(out) && out.numel() == value.numel() &&
                        constant.numel() == h * row && edges.is_contiguous() && edges.scalar_type() == sums &&
                        edges.size(0) == n && groups * thin == c && length >= std::max(h, w),
                    "out, constant and edges must fit value");
    torch::stable::parallel_for(0, n * h, std::max<int64_t>(1, 4096 / std::max<int64_t>(row, 1)),
                                [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t image = i / h, y = i % h;
        A* from = static_cast<A*>(value.mutable_data_ptr()) + i * row;
        const auto add = [&](int64_t side, int64_t line, int64_t place, A* pixel) {
          const A* edge = data<A>(edges) + ((image * length + place) * kSides + side) * groups * r * thin + line * thin;
          for (int64_t g = 0; g < groups; ++g)
            for (int64_t k = 0; k < thin; ++k) pixel[g * thin + k] += edge[g * r * thin + k];
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
      "patch_gram(Tensor half, Tensor edges, Tensor strips, Tensor sums, Tensor cross, Tensor level, Tensor seen,"
      " int kernel, int width, float count) -> Tensor");
  m.def("add_edges(Tensor(a!) out, Tensor(b!) value, Tensor constant, Tensor edges) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(acnet_kernels, CPU, m) {
  m.impl("edge_strips", TORCH_BOX(&acnet::moments::edge_strips));
  m.impl("patch_gram", TORCH_BOX(&acnet::moments::patch_gram));
  m.impl("add_edges", TORCH_BOX(&acnet::moments::add_edges));
}
