// Second moments of a map's zero-padded patches, from autocorrelations and what the borders owe.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "autocorrelation.h"
#include "moments.h"

namespace acnet::moments {
namespace {

// out[run][i] = Σ of lines[q][i] over the run's q, for all runs of a reach.
template <class A>
void sum_runs(const A* lines, int64_t size, int64_t reach, int64_t length, double* out) {
  const int64_t middle = std::max<int64_t>(size - 2 * reach, 0);
  parallel(length, size + 2 * reach * (reach + 1) * (reach + 1), [&](int64_t begin, int64_t end) {
    const auto add = [&](int64_t first, int64_t last, double* to) {
      for (int64_t q = first; q < last; ++q)
        for (int64_t i = begin; i < end; ++i) to[i] += static_cast<double>(lines[q * length + i]);
    };
    double* inner = out + Run{reach, reach}.index(reach) * length;
    std::fill(inner + begin, inner + end, 0.0);
    add(reach, reach + middle, inner);
    for (int64_t before = reach; before >= 0; --before)
      for (int64_t behind = reach; behind >= 0; --behind) {
        double* to = out + Run{before, behind}.index(reach) * length;
        if (to == inner) continue;
        if (size < 2 * reach) {
          std::fill(to + begin, to + end, 0.0);
          add(before, size - behind, to);
        } else {
          std::copy(inner + begin, inner + end, to + begin);
          add(before, reach, to);
          add(size - reach, size - behind, to);
        }
      }
  });
}

}  // namespace

template <class A>
RunSums::RunSums(const A* image, int64_t height, int64_t width, int64_t channels, int64_t reach)
    : reach_(reach), side_(reach + 1), channels_(channels), sums_(side_ * side_ * side_ * side_ * channels) {
  const int64_t runs = side_ * side_, row = width * channels;
  Buffer<double> lines(runs * row);
  sum_runs(image, height, reach, row, lines.data());
  for (int64_t i = 0; i < runs; ++i)
    sum_runs(lines.data() + i * row, width, reach, channels, sums_.data() + i * runs * channels);
}
template RunSums::RunSums(const float*, int64_t, int64_t, int64_t, int64_t);
template RunSums::RunSums(const double*, int64_t, int64_t, int64_t, int64_t);

std::vector<Beyond> beyond(int64_t radius, int64_t tap, int64_t other) {
  std::vector<Beyond> found;
  for (int64_t far = 0; far < 2; ++far) {
    const int64_t t = far ? radius - tap : tap - radius, u = far ? radius - other : other - radius;
    for (int64_t d = 1; d <= std::min(t, u); ++d) found.push_back({far, t - d, u - d});
  }
  return found;
}

template <class T, class A>
Buffer<A> edge_strips(const Problem& p, const T* x, const A* pivot) {
  const int64_t line = strip_line(p), length = strip_length(p);
  Buffer<A> strips(p.n * length * line);
  parallel(p.n, length * line, [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image)
      for (int64_t side = 0; side < kSides; ++side) {
        const bool across = side < 2;  // the line is a row
        const int64_t size = across ? p.w : p.h, depth = across ? p.h : p.w;
        const int64_t along = across ? p.c : p.w * p.c, inwards = across ? p.w * p.c : p.c;
        for (int64_t i = 0; i < p.radius; ++i) {
          const T* from = x + image * p.h * p.w * p.c + (side % 2 ? depth - 1 - i : i) * inwards;
          for (int64_t l = 0; l < length; ++l)
            for (int64_t g = 0; g < p.groups; ++g) {
              A* to = strips.data() + (image * length + l) * line + ((side * p.groups + g) * p.radius + i) * p.cg;
              if (l >= size || i >= depth) {
                std::fill_n(to, p.cg, A(0));
                continue;
              }
              const T* pixel = from + l * along + g * p.cg;
              for (int64_t k = 0; k < p.cg; ++k) to[k] = static_cast<A>(pixel[k]) - pivot[g * p.cg + k];
            }
        }
      }
  });
  return strips;
}

namespace {

// Corner pixels' Gram matrices, 2×2×g×(r·r·Cg)×(r·r·Cg), from the edge strips.
template <class A>
Buffer<double> corner_grams(const Problem& p, const A* strips) {
  const int64_t r = p.radius, size = r * r * p.cg, length = strip_length(p), line = strip_line(p);
  Buffer<double> grams(4 * p.groups * size * size);
  parallel(4 * p.groups * r * r, p.n * p.cg * size, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t a = task % (r * r), g = task / (r * r) % p.groups, corner = task / (r * r * p.groups);
      const int64_t side = corner / 2, right = corner % 2;
      // Pixel q = (line from the edge)·r + (place from the corner) of an image, or null where there is none.
      const auto pixel = [&](int64_t image, int64_t q) -> const A* {
        const int64_t i = q / r, j = q % r;
        if (j >= p.w) return nullptr;
        return strips + (image * length + (right ? p.w - 1 - j : j)) * line + ((side * p.groups + g) * r + i) * p.cg;
      };
      double* gram = grams.data() + ((corner * p.groups + g) * size + a * p.cg) * size;
      std::fill_n(gram, p.cg * size, 0.0);
      for (int64_t image = 0; image < p.n; ++image)
        for (int64_t b = 0; b < r * r; ++b) {
          const A *from = pixel(image, a), *other = pixel(image, b);
          if (from == nullptr || other == nullptr) continue;
          for (int64_t c = 0; c < p.cg; ++c) {
            const double factor = from[c];
            double* to = gram + c * size + b * p.cg;
            for (int64_t d = 0; d < p.cg; ++d) to[d] += factor * other[d];
          }
        }
    }
  });
  return grams;
}

// All sums over patches that G is put together from.
template <class A>
struct Parts {
  const Buffer<A>&half, &edges;     // autocorrelations: the half plane of x̃'s shifts from 0 on, and that of its strips
  const Buffer<double>& corners;    // from corner_grams
  const Buffer<double>& sums;       // Σ_p x̃[p+t], g×size
  const Buffer<double>& cross;      // X[t,u,c], g×taps×taps×Cg: X[t,u,c]·pivot[c'] and its transpose are added
  const Buffer<double>& seen;       // taps×taps: how many output pixels see a pixel inside by both
};

template <class A>
void assemble(const Problem& p, const Parts<A>& parts, const double* pivot, double* gram) {
  const int64_t k = p.kernel, r = p.radius, taps = p.taps, groups = p.groups, cg = p.cg, size = p.size, rc = r * cg;
  const double count = static_cast<double>(p.pixels);
  parallel(groups * taps * cg, taps * cg * 4, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t c = row % cg, t = row / cg % taps, g = row / (cg * taps);
      const double *s = parts.sums.data() + g * size, *h = parts.cross.data() + g * taps * size, *v = pivot + g * cg;
      for (int64_t u = t; u < taps; ++u) {  // the taps behind t; those before it are this one's transpose
        double* to = gram + row * size + u * cg;
        const int64_t dr = u / k - t / k, dc = u % k - t % k;
        std::fill_n(to, cg, 0.0);
        if (parts.seen[t * taps + u] > 0) {
          const A* from = parts.half.data() + ((dr * (2 * k - 1) + dc) * groups + g) * cg * cg + c * cg;
          for (int64_t d = 0; d < cg; ++d) to[d] = from[d];
          const std::vector<Beyond> rows = beyond(r, t / k, u / k), columns = beyond(r, t % k, u % k);
          const auto subtract = [&](int64_t side, const Beyond& b, int64_t shift) {
            const A* block = parts.edges.data() + (std::abs(shift) * kSides * groups + side * groups + g) * rc * rc;
            const int64_t own = b.i * cg + c, first = b.j * cg;
            for (int64_t d = 0; d < cg; ++d) to[d] -= shift < 0 ? block[(first + d) * rc + own] : block[own * rc + first + d];
          };
          for (const Beyond& b : rows) subtract(b.far, b, dc);
          for (const Beyond& b : columns) subtract(2 + b.far, b, dr);
          for (const Beyond& b : rows)
            for (const Beyond& e : columns) {
              const double* block = parts.corners.data() + ((b.far * 2 + e.far) * groups + g) * r * rc * r * rc;
              const double* line = block + ((b.i * r + e.i) * cg + c) * r * rc + (b.j * r + e.j) * cg;
              for (int64_t d = 0; d < cg; ++d) to[d] += line[d];
            }
        }
        const double mean = s[t * cg + c] / count, shifted = h[(t * taps + u) * cg + c], own = v[c];
        for (int64_t d = 0; d < cg; ++d) to[d] += shifted * v[d] + h[(u * taps + t) * cg + d] * own - mean * s[u * cg + d];
      }
    }
  });
  parallel(groups * taps, cg * size, [&](int64_t begin, int64_t end) {
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

}  // namespace

template <class T, class A>
PatchMoments moments_of(const Problem& p, const T* x, const A* pivot, bool& finite) {
  const int64_t k = p.kernel, taps = p.taps, centre = taps / 2;
  PatchMoments found{Buffer<double>(p.groups * p.size), Buffer<double>(p.groups * p.size * p.size)};
  std::vector<int64_t> rows, columns;
  for (int64_t i = 0; i < k; ++i)
    for (int64_t j = i == 0 ? 0 : 1 - k; j < k; ++j) rows.push_back(i), columns.push_back(j);
  const autocorrelation::Maps maps{p.n, p.h, p.w, p.c, p.c, p.groups};
  Buffer<A> half(static_cast<int64_t>(rows.size()) * p.groups * p.cg * p.cg), total(p.h * p.w * p.c);
  autocorrelation::correlate(x, pivot, x, pivot, maps, rows, columns, half.data());
  // No other sum is beyond those of its channels' squares.
  finite = true;
  for (int64_t i = 0; i < p.c; ++i)
    finite = finite && std::isfinite(half[i / p.cg * p.cg * p.cg + i % p.cg * (p.cg + 1)]);
  if (!finite && !std::is_same_v<A, double>) return found;
  autocorrelation::sum_images(x, pivot, maps, total.data());
  const Buffer<A> strips = edge_strips(p, x, pivot);
  const int64_t line = strip_line(p), side = kSides * p.groups;
  Buffer<A> edges(k * side * p.radius * p.cg * p.radius * p.cg);
  Buffer<double> corners(0);
  if (p.radius > 0) {
    const std::vector<A> zeros(line);
    std::vector<int64_t> along;
    for (int64_t i = 0; i < k; ++i) along.push_back(i);
    const autocorrelation::Maps lines{p.n, 1, strip_length(p), line, line, side};
    autocorrelation::correlate(strips.data(), zeros.data(), strips.data(), zeros.data(), lines, std::vector<int64_t>(k), along,
                               edges.data());
    corners = corner_grams(p, strips.data());
  }
  const RunSums sums(total.data(), p.h, p.w, p.c, k - 1);
  Buffer<double> seen(taps * taps), shifted(p.groups * p.size), cross(p.groups * taps * p.size), wide(p.c);
  for (int64_t c = 0; c < p.c; ++c) wide[c] = static_cast<double>(pivot[c]);
  const double images = static_cast<double>(p.n), count = static_cast<double>(p.pixels);
  const auto run = [&](int64_t t, int64_t u) {
    return std::make_pair(seen_by_both(p.row(t), p.row(u)), seen_by_both(p.column(t), p.column(u)));
  };
  for (int64_t t = 0; t < taps; ++t) {
    for (int64_t u = 0; u < taps; ++u) {
      const auto [along, across] = run(t, u);
      seen[t * taps + u] = static_cast<double>(along.count(p.h) * across.count(p.w));
    }
    const auto [along, across] = run(t, centre);
    const double *own = sums.of(along, across), pixels = images * seen[t * taps + centre];
    for (int64_t c = 0; c < p.c; ++c) {
      const int64_t at = c / p.cg * p.size + t * p.cg + c % p.cg;
      shifted[at] = own[c];
      found.sums[at] = own[c] + pixels * wide[c];
    }
  }
  parallel(taps, taps * p.c, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      for (int64_t u = 0; u < taps; ++u) {
        const auto [along, across] = run(t, u);
        const double* own = sums.of(along, across);
        // By the centre tap every output pixel sees a pixel inside.
        const double share = images * seen[u * taps + centre] / count;
        const double rest = images * seen[t * taps + u] - images * seen[t * taps + centre] * share;
        for (int64_t g = 0; g < p.groups; ++g)
          for (int64_t c = 0; c < p.cg; ++c)
            cross[((g * taps + t) * taps + u) * p.cg + c] =
                own[g * p.cg + c] - shifted[g * p.size + t * p.cg + c] * share + 0.5 * rest * wide[g * p.cg + c];
      }
  });
  assemble<A>(p, {half, edges, corners, shifted, cross, seen}, wide.data(), found.gram.data());
  return found;
}

Buffer<double> level_image(const Problem& p, const std::vector<int>& places, const double* kernel, const double* pivot) {
  const int64_t taps = static_cast<int64_t>(places.size()), near = p.radius;
  const int64_t rows = small_size(p.h, near), columns = small_size(p.w, near);
  Buffer<double> levels(taps * p.outputs), small(rows * columns * p.outputs), image(p.h * p.w * p.outputs);
  for (int64_t o = 0; o < p.outputs; ++o)
    for (int64_t t = 0; t < taps; ++t) {
      const double *own = kernel + (o * taps + t) * p.cg, *level = pivot + o / p.kg * p.cg;
      double sum = 0;
      for (int64_t c = 0; c < p.cg; ++c) sum += own[c] * level[c];
      levels[t * p.outputs + o] = sum;
    }
  std::fill_n(small.data(), rows * columns * p.outputs, 0.0);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j)
      for (int64_t t = 0; t < taps; ++t) {
        const int64_t row = i + p.row(places[t]), column = j + p.column(places[t]);
        if (row < 0 || row >= rows || column < 0 || column >= columns) continue;
        double* to = small.data() + (i * columns + j) * p.outputs;
        for (int64_t o = 0; o < p.outputs; ++o) to[o] += levels[t * p.outputs + o];
      }
  for (int64_t i = 0; i < p.h; ++i)
    for (int64_t j = 0; j < p.w; ++j)
      std::copy_n(small.data() + (alike(i, p.h, near) * columns + alike(j, p.w, near)) * p.outputs, p.outputs,
                  image.data() + (i * p.w + j) * p.outputs);
  return image;
}

#define ACNET_INSTANTIATE(T, A)                                                    \
  template Buffer<A> edge_strips(const Problem&, const T*, const A*);              \
  template PatchMoments moments_of(const Problem&, const T*, const A*, bool&);
ACNET_INSTANTIATE(float, float)
ACNET_INSTANTIATE(double, double)
ACNET_INSTANTIATE(c10::BFloat16, float)
ACNET_INSTANTIATE(c10::Half, float)
#undef ACNET_INSTANTIATE

}  // namespace acnet::moments
