// The four passes of bn_sum.h for one instruction set. Included once by each bn_sum_<isa>.cpp, behind rows_<isa>.h.
// Vectors are GCC's and Clang's own vector types, so the same lines compile to SSE2, NEON, AVX2 and AVX-512.
// Nothing here may call an inline function from elsewhere: compiled for this instruction set, it could be the copy
// that the linker keeps for everybody.

#include "activation_kernels.h"

namespace acnet::bn_sum::ACNET_ISA {
namespace {

using namespace activations::ACNET_ISA;
using namespace rows::ACNET_ISA;

template <class A>
struct Simd {
  typedef A Vec __attribute__((vector_size(ACNET_BYTES)));
  static constexpr int64_t lanes = ACNET_BYTES / sizeof(A);
};
template <class A>
using Vec = typename Simd<A>::Vec;
typedef uint16_t Bits16 __attribute__((vector_size(ACNET_BYTES / 2)));
typedef uint32_t Bits32 __attribute__((vector_size(ACNET_BYTES)));

// A whole vector at p.
inline Vec<float> load(const float* p) {
  Vec<float> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline Vec<double> load(const double* p) {
  Vec<double> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline Vec<float> load(const c10::BFloat16* p) {
  Bits16 bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return (Vec<float>)(__builtin_convertvector(bits, Bits32) << 16);
}
inline Vec<float> load(const c10::Half* p) { return load_half(p); }

inline void store(float* p, Vec<float> v) { __builtin_memcpy(p, &v, sizeof v); }
inline void store(double* p, Vec<double> v) { __builtin_memcpy(p, &v, sizeof v); }
inline void store(c10::BFloat16* p, Vec<float> v) {
  // Round to nearest even; a NaN stays one.
  const Bits32 bits = (Bits32)v;
  const Bits32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Bits16 half = __builtin_convertvector(v == v ? rounded : (bits >> 16) | 0x40, Bits16);
  __builtin_memcpy(p, &half, sizeof half);
}
inline void store(c10::Half* p, Vec<float> v) { store_half(p, v); }

// The first n < lanes elements at p; the others are zero.
template <class A, class T>
inline Vec<A> load_part(const T* p, int64_t n) {
  T buffer[Simd<A>::lanes];
  __builtin_memset(buffer, 0, sizeof buffer);
  __builtin_memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
}
template <class A, class T>
inline void store_part(T* p, Vec<A> v, int64_t n) {
  T buffer[Simd<A>::lanes];
  store(buffer, v);
  __builtin_memcpy(p, buffer, n * sizeof(T));
}

template <int N>
struct Count {
  static constexpr int value = N;
};

// Four vectors at a time: what a loop over the maps costs besides its arithmetic is spread over them, so that no pass
// need be compiled for each number of maps.
constexpr int kGroup = 4;

// body(column, Count<vectors>, load, store) for each group of vectors of a row of `width` columns, then for each
// vector; the last one may be partial.
template <class A, int Group = kGroup, class Body>
inline __attribute__((always_inline)) void for_vectors(int64_t width, const Body& body) {
  constexpr int64_t lanes = Simd<A>::lanes;
  const auto get = [](auto* p) __attribute__((always_inline)) { return load(p); };
  const auto put = [](auto* p, Vec<A> v) __attribute__((always_inline)) { store(p, v); };
  int64_t c = 0;
  if constexpr (Group > 1)
    for (; c + Group * lanes <= width; c += Group * lanes) body(c, Count<Group>{}, get, put);
  for (; c + lanes <= width; c += lanes) body(c, Count<1>{}, get, put);
  if (const int64_t n = width - c; n > 0)
    body(c, Count<1>{}, [n](auto* p) { return load_part<A>(p, n); }, [n](auto* p, Vec<A> v) { store_part<A>(p, v, n); });
}

template <class V>
inline V group_sum(const V (&v)[kGroup]) {
  return (v[0] + v[1]) + (v[2] + v[3]);
}
template <class V>
inline V group_sum(const V (&v)[1]) {
  return v[0];
}

template <class A>
inline A lane_sum(Vec<A> v) {
  A total = 0;
  for (int64_t i = 0; i < Simd<A>::lanes; ++i) total += v[i];
  return total;
}

// g·act'(z): `kept` reads what Slope keeps, `again` computes z but for the residual.
template <class A, class Kept, class Again>
inline __attribute__((always_inline)) Vec<A> sloped(Vec<A> g, const Slope<A>& slope, const Kept& kept, const Again& again) {
  if (!is_clamp(slope.activation)) {
    Vec<A> z = again();
    if (slope.kept != nullptr) z += kept();
    return g * smooth_slope<A>(z, slope.activation);
  }
  return where_steep<A>(g, kept(), flat_from<A>(slope.activation));
}

// Chan's rule: (mean, m2) of `count` elements merged with those of `more` elements. In double, as means are kept
// wherever they leave their piece: rounding a mean to float costs more digits than summing a piece in float does.
inline void merge(double& mean, double& m2, int64_t count, double mean_more, double m2_more, int64_t more) {
  const double delta = mean_more - mean, share = double(more) / double(count + more);
  mean += delta * share;
  m2 += m2_more + delta * delta * double(count) * share;
}

// statistics() reads a piece twice, the second time from the cache; a piece of fewer rows would be mostly merging.
constexpr int64_t kPieceBytes = 32 << 10, kLeastRows = 32;

// Sums go over a piece, then over the pieces: no float accumulator adds up more than a thousand terms.
constexpr int64_t kRowPiece = 256, kPlanePiece = 4096;

// ---- channels_last: rows of width() columns ----

// mean and M2 of V·lanes columns of `rows` rows, `width` apart, at y, less the columns' pivots; get() reads a vector.
// Sums stay in registers, four rows are added before they join one.
template <class T, class A, int V, class Get>
inline __attribute__((always_inline)) void block_moments(const T* y, int64_t rows, int64_t width, const A* pivots,
                                                         A* mean, A* m2, const Get& get) {
  constexpr int64_t lanes = Simd<A>::lanes;
  Vec<A> pivot[V], sum[V], sums2[V];
  for (int v = 0; v < V; ++v) {
    pivot[v] = get(pivots + v * lanes);
    sum[v] = sums2[v] = Vec<A>{};
  }
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4)
    for (int v = 0; v < V; ++v) {
      const T* p = y + r * width + v * lanes;
      sum[v] += ((get(p) - pivot[v]) + (get(p + width) - pivot[v])) +
                ((get(p + 2 * width) - pivot[v]) + (get(p + 3 * width) - pivot[v]));
    }
  for (; r < rows; ++r)
    for (int v = 0; v < V; ++v) sum[v] += get(y + r * width + v * lanes) - pivot[v];
  for (int v = 0; v < V; ++v) {
    store(mean + v * lanes, sum[v]);
    sum[v] = sum[v] / A(rows);
  }
  for (r = 0; r + 4 <= rows; r += 4)
    for (int v = 0; v < V; ++v) {
      const T* p = y + r * width + v * lanes;
      const Vec<A> d0 = get(p) - pivot[v] - sum[v], d1 = get(p + width) - pivot[v] - sum[v];
      const Vec<A> d2 = get(p + 2 * width) - pivot[v] - sum[v], d3 = get(p + 3 * width) - pivot[v] - sum[v];
      sums2[v] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3);
    }
  for (; r < rows; ++r)
    for (int v = 0; v < V; ++v) {
      const Vec<A> d = get(y + r * width + v * lanes) - pivot[v] - sum[v];
      sums2[v] += d * d;
    }
  for (int v = 0; v < V; ++v) store(m2 + v * lanes, sums2[v]);
}

// mean and M2 of each column of rows×width at y, less the column's pivot.
template <class T, class A>
void column_moments(const T* y, int64_t rows, int64_t width, const A* pivot, double* mean, double* m2) {
  constexpr int64_t lanes = Simd<A>::lanes, wide = 4 * lanes;
  A sums[wide], sums2[wide];
  for (int64_t c = 0, n; c < width; c += n) {
    n = width - c >= wide ? wide : width - c >= lanes ? lanes : width - c;
    const auto whole = [](auto* p) __attribute__((always_inline)) { return load(p); };
    if (n == wide)
      block_moments<T, A, 4>(y + c, rows, width, pivot + c, sums, sums2, whole);
    else if (n == lanes)
      block_moments<T, A, 1>(y + c, rows, width, pivot + c, sums, sums2, whole);
    else
      block_moments<T, A, 1>(y + c, rows, width, pivot + c, sums, sums2, [n](auto* p) { return load_part<A>(p, n); });
    for (int64_t i = 0; i < n; ++i) {
      mean[c + i] = double(sums[i]) / double(rows);
      m2[c + i] = double(sums2[i]);
    }
  }
}

// The rows of chunk i: [first, last), and how many pixels beyond whole rows belong to it.
struct Rows {
  int64_t first, last, rest;
};
inline Rows rows_of(const MapLayout& layout, int64_t i) {
  const int64_t total = layout.images * layout.pixels;
  const int64_t rest = i == layout.chunks - 1 ? total % layout.pixels_per_row : 0;
  return {i * layout.chunk, layout.end(i, total / layout.pixels_per_row), rest};
}

// Scratch memory of one task.
template <class A>
struct Scratch {
  explicit Scratch(int64_t n) : data(static_cast<A*>(__builtin_malloc(n * sizeof(A)))) {}
  ~Scratch() { __builtin_free(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  A* data;
};

template <class T, class A>
void statistics_rows(const MapLayout& layout, const void* const* y, const A* pivots, double* mean, double* m2, int64_t begin,
                     int64_t end) {
  const int64_t width = layout.width(), channels = layout.channels;
  int64_t piece = kPieceBytes / (width * int64_t(sizeof(T)));
  piece = piece < kLeastRows ? kLeastRows : piece;
  const Scratch<double> scratch(4 * width);
  double *piece_mean = scratch.data, *piece_m2 = piece_mean + width, *wide_mean = piece_m2 + width,
         *wide_m2 = wide_mean + width;
  for (int64_t i = begin; i < end; ++i) {
    const Rows rows = rows_of(layout, i);
    for (int b = 0; b < layout.maps; ++b) {
      const T* map = static_cast<const T*>(y[b]);
      const A* pivot = pivots + b * width;
      int64_t count = 0;
      for (int64_t r = rows.first; r < rows.last; r += piece) {
        const int64_t more = rows.last - r < piece ? rows.last - r : piece;
        if (count == 0) {
          column_moments(map + r * width, more, width, pivot, wide_mean, wide_m2);
        } else {
          column_moments(map + r * width, more, width, pivot, piece_mean, piece_m2);
          for (int64_t c = 0; c < width; ++c)
            merge(wide_mean[c], wide_m2[c], count, piece_mean[c], piece_m2[c], more);
        }
        count += more;
      }
      // The `pixels_per_row` pixels of a row are pixels of the same channels.
      const int64_t at = (i * layout.maps + b) * channels;
      double *chunk_mean = mean + at, *chunk_m2 = m2 + at;
      int64_t pixels = 0;
      if (count > 0) {
        __builtin_memcpy(chunk_mean, wide_mean, channels * sizeof(double));
        __builtin_memcpy(chunk_m2, wide_m2, channels * sizeof(double));
        pixels = count;
        for (int64_t f = 1; f < layout.pixels_per_row; ++f, pixels += count)
          for (int64_t c = 0; c < channels; ++c)
            merge(chunk_mean[c], chunk_m2[c], pixels, wide_mean[f * channels + c], wide_m2[f * channels + c], count);
      }
      if (rows.rest > 0) {
        const T* rest = map + rows.last * width;
        if (pixels == 0) {
          column_moments(rest, rows.rest, channels, pivot, chunk_mean, chunk_m2);
        } else {
          column_moments(rest, rows.rest, channels, pivot, piece_mean, piece_m2);
          for (int64_t c = 0; c < channels; ++c)
            merge(chunk_mean[c], chunk_m2[c], pixels, piece_mean[c], piece_m2[c], rows.rest);
        }
      }
    }
  }
}

// row(at, columns) for the rows of chunks [begin, end), backwards: the end of the maps is what the pass before left in
// the cache.
template <class Row>
inline __attribute__((always_inline)) void for_rows(const MapLayout& layout, int64_t begin, int64_t end, const Row& row) {
  const int64_t width = layout.width();
  for (int64_t i = end - 1; i >= begin; --i) {
    const Rows rows = rows_of(layout, i);
    if (rows.rest > 0) row(rows.last * width, rows.rest * layout.channels);
    for (int64_t r = rows.last - 1; r >= rows.first; --r) row(r * width, width);
  }
}

template <class T, class O, class A>
void apply_rows(const MapLayout& layout, const void* const* y, const A* center, const A* scale, const A* shift,
                const void* residual, Activation activation, void* out, int64_t begin, int64_t end) {
  constexpr int64_t lanes = Simd<A>::lanes;
  const int64_t width = layout.width();
  for_rows(layout, begin, end, [&](int64_t at, int64_t columns) __attribute__((always_inline)) {
    for_vectors<A>(columns, [&](int64_t c, auto group, auto get, auto put) __attribute__((always_inline)) {
      constexpr int V = decltype(group)::value;
      Vec<A> sum[V];
      for (int v = 0; v < V; ++v) sum[v] = get(shift + c + v * lanes);
      for (int b = 0; b < layout.maps; ++b) {
        const T* map = static_cast<const T*>(y[b]) + at + c;
        const A *s = scale + b * width + c, *m = center + b * width + c;
        for (int v = 0; v < V; ++v) sum[v] += get(s + v * lanes) * (get(map + v * lanes) - get(m + v * lanes));
      }
      if (residual != nullptr)
        for (int v = 0; v < V; ++v) sum[v] += get(static_cast<const O*>(residual) + at + c + v * lanes);
      if (activation != Activation::none)
        for (int v = 0; v < V; ++v) sum[v] = activated<A>(sum[v], activation);
      for (int v = 0; v < V; ++v) put(static_cast<O*>(out) + at + c + v * lanes, sum[v]);
    });
  });
}

// g·act'(z) of the vector at column c of the row at `at`.
template <class T, class O, class A, class Get>
inline __attribute__((always_inline)) Vec<A> sloped_row(Vec<A> g, const MapLayout& layout, const void* const* y,
                                                        const A* center, const Slope<A>& slope, int64_t at, int64_t c,
                                                        const Get& get) {
  return sloped<A>(
      g, slope, [&]() __attribute__((always_inline)) { return get(static_cast<const O*>(slope.kept) + at + c); },
      [&]() __attribute__((always_inline)) {
        const int64_t width = layout.width();
        Vec<A> z = get(slope.shift + c);
        for (int b = 0; b < layout.maps; ++b)
          z += get(slope.scale + b * width + c) * (get(static_cast<const T*>(y[b]) + at + c) - get(center + b * width + c));
        return z;
      });
}

template <class T, class O, class A>
void reduce_rows(const MapLayout& layout, const void* grad, const void* const* y, const A* center, const Slope<A>& slope,
                 A* sums, int64_t begin, int64_t end) {
  const int64_t width = layout.width(), channels = layout.channels, size = (layout.maps + 1) * width;
  const O* g = static_cast<const O*>(grad);
  const Scratch<A> scratch(2 * size);
  A *piece = scratch.data, *chunk = piece + size;
  const auto add_rows = [&](int64_t at, int64_t columns, auto unroll) __attribute__((always_inline)) {
    constexpr int U = decltype(unroll)::value;
    for_vectors<A, 1>(columns, [&](int64_t c, auto, auto get, auto put) __attribute__((always_inline)) {
      Vec<A> v[U], total = get(piece + layout.maps * width + c);
      for (int u = 0; u < U; ++u) v[u] = get(g + at + u * width + c);
      if (slope.activation != Activation::none)
        for (int u = 0; u < U; ++u) {
          v[u] = sloped_row<T, O, A>(v[u], layout, y, center, slope, at + u * width, c, get);
          if (slope.grad != nullptr) put(static_cast<O*>(slope.grad) + at + u * width + c, v[u]);
        }
      for (int u = 0; u < U; ++u) total += v[u];
      put(piece + layout.maps * width + c, total);
      for (int b = 0; b < layout.maps; ++b) {
        const T* map = static_cast<const T*>(y[b]) + at + c;
        const Vec<A> m = get(center + b * width + c);
        Vec<A> sum = get(piece + b * width + c);
        for (int u = 0; u < U; ++u) sum += v[u] * (get(map + u * width) - m);
        put(piece + b * width + c, sum);
      }
    });
  };
  for (int64_t i = begin; i < end; ++i) {
    const Rows rows = rows_of(layout, i);
    __builtin_memset(chunk, 0, size * sizeof(A));
    for (int64_t first = rows.first; first < rows.last; first += kRowPiece) {
      const int64_t last = rows.last - first < kRowPiece ? rows.last : first + kRowPiece;
      __builtin_memset(piece, 0, size * sizeof(A));
      int64_t r = first;
      for (; r + 4 <= last; r += 4) add_rows(r * width, width, Count<4>{});
      for (; r < last; ++r) add_rows(r * width, width, Count<1>{});
      for (int64_t c = 0; c < size; ++c) chunk[c] += piece[c];
    }
    if (rows.rest > 0) {
      __builtin_memset(piece, 0, size * sizeof(A));
      add_rows(rows.last * width, rows.rest * channels, Count<1>{});
      for (int64_t c = 0; c < size; ++c) chunk[c] += piece[c];
    }
    for (int b = 0; b <= layout.maps; ++b)
      for (int64_t c = 0; c < channels; ++c) {
        A sum = 0;
        for (int64_t f = 0; f < layout.pixels_per_row; ++f) sum += chunk[b * width + f * channels + c];
        sums[(i * (layout.maps + 1) + b) * channels + c] = sum;
      }
  }
}

template <class T, class O, class A>
void gradient_rows(const MapLayout& layout, const void* grad, const void* const* y, const A* center, const Slope<A>& slope,
                   const A* scale, const A* y_factor, const A* offset, void* const* dy, int64_t begin, int64_t end) {
  constexpr int64_t lanes = Simd<A>::lanes;
  const int64_t width = layout.width();
  const O* g = static_cast<const O*>(grad);
  for_rows(layout, begin, end, [&](int64_t at, int64_t columns) __attribute__((always_inline)) {
    for_vectors<A>(columns, [&](int64_t c, auto group, auto get, auto put) __attribute__((always_inline)) {
      constexpr int V = decltype(group)::value;
      Vec<A> value[V], found[V];
      for (int v = 0; v < V; ++v) value[v] = get(g + at + c + v * lanes);
      if (slope.activation != Activation::none)
        for (int v = 0; v < V; ++v)
          value[v] = sloped_row<T, O, A>(value[v], layout, y, center, slope, at, c + v * lanes, get);
      for (int b = 0; b < layout.maps; ++b) {
        if (dy[b] == nullptr) continue;
        const T* map = static_cast<const T*>(y[b]) + at + c;
        T* target = static_cast<T*>(dy[b]) + at + c;
        const int64_t first = b * width + c;
        for (int v = 0; v < V; ++v) {
          const int64_t column = first + v * lanes;
          const Vec<A> d = get(map + v * lanes) - get(center + column);
          found[v] = get(scale + column) * value[v] + get(offset + column) + get(y_factor + column) * d;
        }
        for (int v = 0; v < V; ++v) put(target + v * lanes, found[v]);
      }
    });
  });
}

// ---- NCHW: planes of `pixels` ----

// mean and M2 of n elements less the pivot: two passes, the second of which also corrects the first's mean.
template <class T, class A>
void plane_moments(const T* y, int64_t n, A pivot, double& means, double& m2) {
  const int64_t whole = n / Simd<A>::lanes * Simd<A>::lanes;
  Vec<A> sums = {}, sums2 = {};
  for (int64_t c = 0; c < whole; c += Simd<A>::lanes) sums += load(y + c) - pivot;
  A sum = lane_sum<A>(sums), sum2 = 0;
  for (int64_t c = whole; c < n; ++c) sum += load_part<A>(y + c, 1)[0] - pivot;
  const A mean = sum / A(n);
  sums = Vec<A>{};
  for (int64_t c = 0; c < whole; c += Simd<A>::lanes) {
    const Vec<A> d = load(y + c) - pivot - mean;
    sums += d;
    sums2 += d * d;
  }
  sum = lane_sum<A>(sums);
  sum2 = lane_sum<A>(sums2);
  for (int64_t c = whole; c < n; ++c) {
    const A d = load_part<A>(y + c, 1)[0] - pivot - mean;
    sum += d;
    sum2 += d * d;
  }
  const double left = double(sum) / double(n);
  means = double(mean) + left;
  m2 = double(sum2) - double(sum) * left;
}

// body(image) for the images of task t, in order.
template <class Body>
inline __attribute__((always_inline)) void for_planes(const MapLayout& layout, int64_t t, const Body& body) {
  const int64_t chunk = t / layout.channels, channel = t % layout.channels;
  for (int64_t n = chunk * layout.chunk; n < layout.end(chunk, layout.images); ++n)
    body((n * layout.channels + channel) * layout.pixels);
}

template <class T, class A>
void statistics_planes(const MapLayout& layout, const void* const* y, const A* pivots, double* mean, double* m2,
                       int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t)
    for (int b = 0; b < layout.maps; ++b) {
      const A pivot = pivots[b * layout.channels + t % layout.channels];
      double chunk_mean = 0, chunk_m2 = 0;
      int64_t count = 0;
      for_planes(layout, t, [&](int64_t at) {
        for (int64_t p = 0; p < layout.pixels; p += kPlanePiece) {
          const int64_t more = layout.pixels - p < kPlanePiece ? layout.pixels - p : kPlanePiece;
          double piece_mean, piece_m2;
          plane_moments(static_cast<const T*>(y[b]) + at + p, more, pivot, piece_mean, piece_m2);
          merge(chunk_mean, chunk_m2, count, piece_mean, piece_m2, more);
          count += more;
        }
      });
      const int64_t at = (t / layout.channels * layout.maps + b) * layout.channels + t % layout.channels;
      mean[at] = chunk_mean;
      m2[at] = chunk_m2;
    }
}

template <class T, class O, class A>
void apply_planes(const MapLayout& layout, const void* const* y, const A* center, const A* scale, const A* shift,
                  const void* residual, Activation activation, void* out, int64_t begin, int64_t end) {
  constexpr int64_t lanes = Simd<A>::lanes;
  for (int64_t t = end - 1; t >= begin; --t) {
    const int64_t k = t % layout.channels;
    for_planes(layout, t, [&](int64_t at) {
      for_vectors<A>(layout.pixels, [&](int64_t c, auto group, auto get, auto put) __attribute__((always_inline)) {
        constexpr int V = decltype(group)::value;
        Vec<A> sum[V];
        for (int v = 0; v < V; ++v) sum[v] = shift[k] - Vec<A>{};
        for (int b = 0; b < layout.maps; ++b) {
          const T* map = static_cast<const T*>(y[b]) + at + c;
          const A s = scale[b * layout.channels + k], m = center[b * layout.channels + k];
          for (int v = 0; v < V; ++v) sum[v] += s * (get(map + v * lanes) - m);
        }
        if (residual != nullptr)
          for (int v = 0; v < V; ++v) sum[v] += get(static_cast<const O*>(residual) + at + c + v * lanes);
        if (activation != Activation::none)
          for (int v = 0; v < V; ++v) sum[v] = activated<A>(sum[v], activation);
        for (int v = 0; v < V; ++v) put(static_cast<O*>(out) + at + c + v * lanes, sum[v]);
      });
    });
  }
}

// g·act'(z) of the vector at `at`, of channel k.
template <class T, class O, class A, class Get>
inline __attribute__((always_inline)) Vec<A> sloped_plane(Vec<A> g, const MapLayout& layout, const void* const* y,
                                                          const A* center, const Slope<A>& slope, int64_t at, int64_t k,
                                                          const Get& get) {
  return sloped<A>(
      g, slope, [&]() __attribute__((always_inline)) { return get(static_cast<const O*>(slope.kept) + at); },
      [&]() __attribute__((always_inline)) {
        Vec<A> z = slope.shift[k] - Vec<A>{};
        for (int b = 0; b < layout.maps; ++b) {
          const int64_t bk = b * layout.channels + k;
          z += slope.scale[bk] * (get(static_cast<const T*>(y[b]) + at) - center[bk]);
        }
        return z;
      });
}

template <class T, class O, class A>
void reduce_planes(const MapLayout& layout, const void* grad, const void* const* y, const A* center, const Slope<A>& slope,
                   A* sums, int64_t begin, int64_t end) {
  constexpr int64_t lanes = Simd<A>::lanes;
  const O* g = static_cast<const O*>(grad);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t k = t % layout.channels;
    double chunk[kMaxMaps + 1] = {};
    Vec<A> piece[kMaxMaps + 1] = {};
    int64_t filled = 0;  // elements in the piece: small planes share one
    const auto end_piece = [&] {
      for (int b = 0; b <= layout.maps; ++b) {
        chunk[b] += double(lane_sum<A>(piece[b]));
        piece[b] = Vec<A>{};
      }
      filled = 0;
    };
    for_planes(layout, t, [&](int64_t plane) {
      for (int64_t p = 0; p < layout.pixels; p += kPlanePiece) {
        const int64_t at = plane + p;
        const int64_t n = layout.pixels - p < kPlanePiece ? layout.pixels - p : kPlanePiece;
        const int64_t taken = (n + lanes - 1) / lanes * lanes;
        if (filled + taken > kPlanePiece) end_piece();
        filled += taken;
        // Lanes beyond the plane have g = 0 and add nothing.
        for_vectors<A>(n, [&](int64_t c, auto group, auto get, auto put) __attribute__((always_inline)) {
          constexpr int V = decltype(group)::value;
          Vec<A> value[V], term[V];
          for (int v = 0; v < V; ++v) value[v] = get(g + at + c + v * lanes);
          if (slope.activation != Activation::none)
            for (int v = 0; v < V; ++v) {
              value[v] = sloped_plane<T, O, A>(value[v], layout, y, center, slope, at + c + v * lanes, k, get);
              if (slope.grad != nullptr) put(static_cast<O*>(slope.grad) + at + c + v * lanes, value[v]);
            }
          piece[layout.maps] += group_sum(value);
          for (int b = 0; b < layout.maps; ++b) {
            const T* map = static_cast<const T*>(y[b]) + at + c;
            const A m = center[b * layout.channels + k];
            for (int v = 0; v < V; ++v) term[v] = value[v] * (get(map + v * lanes) - m);
            piece[b] += group_sum(term);
          }
        });
      }
    });
    end_piece();
    A* chunk_sums = sums + t / layout.channels * (layout.maps + 1) * layout.channels + k;
    for (int b = 0; b <= layout.maps; ++b) chunk_sums[b * layout.channels] = A(chunk[b]);
  }
}

template <class T, class O, class A>
void gradient_planes(const MapLayout& layout, const void* grad, const void* const* y, const A* center,
                     const Slope<A>& slope, const A* scale, const A* y_factor, const A* offset, void* const* dy,
                     int64_t begin, int64_t end) {
  constexpr int64_t lanes = Simd<A>::lanes;
  const O* g = static_cast<const O*>(grad);
  for (int64_t t = end - 1; t >= begin; --t) {
    const int64_t k = t % layout.channels;
    for_planes(layout, t, [&](int64_t at) {
      for_vectors<A>(layout.pixels, [&](int64_t c, auto group, auto get, auto put) __attribute__((always_inline)) {
        constexpr int V = decltype(group)::value;
        Vec<A> value[V], found[V];
        for (int v = 0; v < V; ++v) value[v] = get(g + at + c + v * lanes);
        if (slope.activation != Activation::none)
          for (int v = 0; v < V; ++v)
            value[v] = sloped_plane<T, O, A>(value[v], layout, y, center, slope, at + c + v * lanes, k, get);
        for (int b = 0; b < layout.maps; ++b) {
          if (dy[b] == nullptr) continue;
          const T* map = static_cast<const T*>(y[b]) + at + c;
          T* target = static_cast<T*>(dy[b]) + at + c;
          const int64_t bk = b * layout.channels + k;
          const A m = center[bk], factor = scale[bk], start = offset[bk], rise = y_factor[bk];
          for (int v = 0; v < V; ++v) found[v] = factor * value[v] + start + rise * (get(map + v * lanes) - m);
          for (int v = 0; v < V; ++v) put(target + v * lanes, found[v]);
        }
      });
    });
  }
}

// ---- choice of the layout ----

template <class T, class A>
void statistics(const MapLayout& layout, const void* const* y, const A* pivot, double* mean, double* m2, int64_t begin,
                int64_t end) {
  if (layout.channels_last)
    statistics_rows<T, A>(layout, y, pivot, mean, m2, begin, end);
  else
    statistics_planes<T, A>(layout, y, pivot, mean, m2, begin, end);
}
template <class T, class O, class A>
void apply(const MapLayout& layout, const void* const* y, const A* center, const A* scale, const A* shift,
           const void* residual, Activation activation, void* out, int64_t begin, int64_t end) {
  (layout.channels_last ? apply_rows<T, O, A> : apply_planes<T, O, A>)(layout, y, center, scale, shift, residual, activation,
                                                                    out, begin, end);
}
template <class T, class O, class A>
void reduce(const MapLayout& layout, const void* grad, const void* const* y, const A* center, const Slope<A>& slope, A* sums,
            int64_t begin, int64_t end) {
  (layout.channels_last ? reduce_rows<T, O, A> : reduce_planes<T, O, A>)(layout, grad, y, center, slope, sums, begin, end);
}
template <class T, class O, class A>
void gradient(const MapLayout& layout, const void* grad, const void* const* y, const A* center, const Slope<A>& slope,
              const A* scale, const A* y_factor, const A* offset, void* const* dy, int64_t begin, int64_t end) {
  (layout.channels_last ? gradient_rows<T, O, A> : gradient_planes<T, O, A>)(layout, grad, y, center, slope, scale, y_factor,
                                                                          offset, dy, begin, end);
}

}  // namespace

template <class T, class O, class A>
Passes<A> passes() {
  return {statistics<T, A>, apply<T, O, A>, reduce<T, O, A>, gradient<T, O, A>};
}
template Passes<float> passes<float, float, float>();
template Passes<float> passes<float, c10::BFloat16, float>();
template Passes<float> passes<float, c10::Half, float>();
template Passes<double> passes<double, double, double>();
template Passes<float> passes<c10::BFloat16, c10::BFloat16, float>();
template Passes<float> passes<c10::Half, c10::Half, float>();

}  // namespace acnet::bn_sum::ACNET_ISA
