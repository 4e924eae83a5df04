// The four passes of bn_sum.h for one instruction set. Included once by each bn_sum_<isa>.cpp, which defines
//   ACNET_ISA    the namespace,
//   ACNET_BYTES  the bytes of a vector register,
//   load_half / store_half  for c10::Half.
// Vectors are GCC's and Clang's own vector types, so the same lines compile to SSE2, NEON, AVX2 and AVX-512.
// Nothing here may call an inline function from elsewhere: compiled for this instruction set, it could be the copy
// that the linker keeps for everybody.

namespace acnet::bn_sum::ACNET_ISA {
namespace {

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

// body(column, load, store) for each vector of a row of `width` columns; the last one may be partial.
template <class A, class Body>
inline __attribute__((always_inline)) void for_vectors(int64_t width, const Body& body) {
  constexpr int64_t lanes = Simd<A>::lanes;
  int64_t c = 0;
  for (; c + lanes <= width; c += lanes)
    body(c, [](auto* p) __attribute__((always_inline)) { return load(p); },
         [](auto* p, Vec<A> v) __attribute__((always_inline)) { store(p, v); });
  if (const int64_t n = width - c; n > 0)
    body(c, [n](auto* p) { return load_part<A>(p, n); }, [n](auto* p, Vec<A> v) { store_part<A>(p, v, n); });
}

template <class A>
inline A lane_sum(Vec<A> v) {
  A total = 0;
  for (int64_t i = 0; i < Simd<A>::lanes; ++i) total += v[i];
  return total;
}

// Chan's rule: (mean, m2) of `count` elements merged with those of `more` elements. In double, as means are kept
// wherever they leave their chunk: rounding a mean to float costs more digits than summing a chunk in float does.
inline void merge(double& mean, double& m2, int64_t count, double mean_more, double m2_more, int64_t more) {
  const double delta = mean_more - mean, share = double(more) / double(count + more);
  mean += delta * share;
  m2 += m2_more + delta * delta * double(count) * share;
}

// statistics() reads a chunk twice, the second time from the cache; a chunk of fewer rows would be mostly merging.
constexpr int64_t kChunkBytes = 32 << 10, kLeastRows = 32;

// Sums go over a chunk, then over the chunks: no float accumulator adds up more than a thousand terms.
constexpr int64_t kRowChunk = 256, kPlaneChunk = 4096;

// ---- channels_last: rows of width() columns ----

// mean and M2 of V·lanes columns of `rows` rows, `width` apart, at y, less the columns' pivots; get() reads a vector.
// Sums stay in registers, four rows are added before they join one.
template <class T, class A, int V, class Get>
inline __attribute__((always_inline)) void block_moments(const T* y, int64_t rows, int64_t width, const A* pivots,
                                                         A* mean, A* m2, const Get& get) {
  constexpr int64_t lanes = Simd<A>::lanes;
  Vec<A> pivot[V], sum[V], squares[V];
  for (int v = 0; v < V; ++v) {
    pivot[v] = get(pivots + v * lanes);
    sum[v] = squares[v] = Vec<A>{};
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
      squares[v] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3);
    }
  for (; r < rows; ++r)
    for (int v = 0; v < V; ++v) {
      const Vec<A> d = get(y + r * width + v * lanes) - pivot[v] - sum[v];
      squares[v] += d * d;
    }
  for (int v = 0; v < V; ++v) store(m2 + v * lanes, squares[v]);
}

// mean and M2 of each column of rows×width at y, less the column's pivot.
template <class T, class A>
void column_moments(const T* y, int64_t rows, int64_t width, const A* pivot, double* mean, double* m2) {
  constexpr int64_t lanes = Simd<A>::lanes, wide = 4 * lanes;
  A sums[wide], squares[wide];
  for (int64_t c = 0, n; c < width; c += n) {
    n = width - c >= wide ? wide : width - c >= lanes ? lanes : width - c;
    const auto whole = [](auto* p) __attribute__((always_inline)) { return load(p); };
    if (n == wide)
      block_moments<T, A, 4>(y + c, rows, width, pivot + c, sums, squares, whole);
    else if (n == lanes)
      block_moments<T, A, 1>(y + c, rows, width, pivot + c, sums, squares, whole);
    else
      block_moments<T, A, 1>(y + c, rows, width, pivot + c, sums, squares, [n](auto* p) { return load_part<A>(p, n); });
    for (int64_t i = 0; i < n; ++i) {
      mean[c + i] = double(sums[i]) / double(rows);
      m2[c + i] = double(squares[i]);
    }
  }
}

// The rows of slab i: [first, last), and how many pixels beyond whole rows belong to it.
struct Rows {
  int64_t first, last, rest;
};
inline Rows rows_of(const Plan& plan, int64_t i) {
  const int64_t total = plan.images * plan.pixels;
  return {i * plan.slab, plan.end(i, total / plan.fold), i == plan.slabs - 1 ? total % plan.fold : 0};
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
void statistics_rows(const Plan& plan, const void* const* y, const A* pivots, double* mean, double* m2, int64_t begin,
                     int64_t end) {
  const int64_t width = plan.width(), channels = plan.channels;
  int64_t chunk = kChunkBytes / (width * int64_t(sizeof(T)));
  chunk = chunk < kLeastRows ? kLeastRows : chunk;
  const Scratch<double> scratch(4 * width);
  double *chunk_mean = scratch.data, *chunk_m2 = chunk_mean + width, *wide_mean = chunk_m2 + width,
         *wide_m2 = wide_mean + width;
  for (int64_t i = begin; i < end; ++i) {
    const Rows rows = rows_of(plan, i);
    for (int b = 0; b < plan.branches; ++b) {
      const T* map = static_cast<const T*>(y[b]);
      const A* pivot = pivots + b * width;
      int64_t count = 0;
      for (int64_t r = rows.first; r < rows.last; r += chunk) {
        const int64_t more = rows.last - r < chunk ? rows.last - r : chunk;
        if (count == 0) {
          column_moments(map + r * width, more, width, pivot, wide_mean, wide_m2);
        } else {
          column_moments(map + r * width, more, width, pivot, chunk_mean, chunk_m2);
          for (int64_t c = 0; c < width; ++c)
            merge(wide_mean[c], wide_m2[c], count, chunk_mean[c], chunk_m2[c], more);
        }
        count += more;
      }
      // The `fold` pixels of a row are pixels of the same channels.
      const int64_t at = (i * plan.branches + b) * channels;
      double *slab_mean = mean + at, *slab_m2 = m2 + at;
      int64_t pixels = 0;
      if (count > 0) {
        __builtin_memcpy(slab_mean, wide_mean, channels * sizeof(double));
        __builtin_memcpy(slab_m2, wide_m2, channels * sizeof(double));
        pixels = count;
        for (int64_t f = 1; f < plan.fold; ++f, pixels += count)
          for (int64_t c = 0; c < channels; ++c)
            merge(slab_mean[c], slab_m2[c], pixels, wide_mean[f * channels + c], wide_m2[f * channels + c], count);
      }
      if (rows.rest > 0) {
        const T* rest = map + rows.last * width;
        if (pixels == 0) {
          column_moments(rest, rows.rest, channels, pivot, slab_mean, slab_m2);
        } else {
          column_moments(rest, rows.rest, channels, pivot, chunk_mean, chunk_m2);
          for (int64_t c = 0; c < channels; ++c)
            merge(slab_mean[c], slab_m2[c], pixels, chunk_mean[c], chunk_m2[c], rows.rest);
        }
      }
    }
  }
}

template <class T, class O, class A, int B>
void apply_rows(const Plan& plan, const void* const* y, const A* center, const A* scale, const A* shift, void* out,
                int64_t begin, int64_t end) {
  const int64_t width = plan.width();
  const auto row = [&](int64_t at, int64_t columns) __attribute__((always_inline)) {
    for_vectors<A>(columns, [&](int64_t c, auto get, auto put) __attribute__((always_inline)) {
      Vec<A> sum = get(shift + c);
      for (int b = 0; b < B; ++b)
        sum += get(scale + b * width + c) * (get(static_cast<const T*>(y[b]) + at + c) - get(center + b * width + c));
      put(static_cast<O*>(out) + at + c, sum);
    });
  };
  // Backwards: the end of the maps is what the pass before left in the cache.
  for (int64_t i = end - 1; i >= begin; --i) {
    const Rows rows = rows_of(plan, i);
    if (rows.rest > 0) row(rows.last * width, rows.rest * plan.channels);
    for (int64_t r = rows.last - 1; r >= rows.first; --r) row(r * width, width);
  }
}

template <int U>
struct Unroll {
  static constexpr int value = U;
};

template <class T, class O, class A, int B>
void reduce_rows(const Plan& plan, const void* grad, const void* const* y, const A* center, A* sums, int64_t begin,
                 int64_t end) {
  const int64_t width = plan.width(), channels = plan.channels;
  const O* g = static_cast<const O*>(grad);
  const Scratch<A> scratch(2 * (B + 1) * width);
  A *chunk = scratch.data, *slab = chunk + (B + 1) * width;
  const auto add_rows = [&](int64_t at, int64_t columns, auto unroll) __attribute__((always_inline)) {
    constexpr int U = decltype(unroll)::value;
    for_vectors<A>(columns, [&](int64_t c, auto get, auto put) __attribute__((always_inline)) {
      Vec<A> v[U], total = get(chunk + B * width + c);
      for (int u = 0; u < U; ++u) {
        v[u] = get(g + at + u * width + c);
        total += v[u];
      }
      put(chunk + B * width + c, total);
      for (int b = 0; b < B; ++b) {
        const Vec<A> m = get(center + b * width + c);
        Vec<A> sum = get(chunk + b * width + c);
        for (int u = 0; u < U; ++u) sum += v[u] * (get(static_cast<const T*>(y[b]) + at + u * width + c) - m);
        put(chunk + b * width + c, sum);
      }
    });
  };
  for (int64_t i = begin; i < end; ++i) {
    const Rows rows = rows_of(plan, i);
    __builtin_memset(slab, 0, (B + 1) * width * sizeof(A));
    for (int64_t first = rows.first; first < rows.last; first += kRowChunk) {
      const int64_t last = rows.last - first < kRowChunk ? rows.last : first + kRowChunk;
      __builtin_memset(chunk, 0, (B + 1) * width * sizeof(A));
      int64_t r = first;
      for (; r + 4 <= last; r += 4) add_rows(r * width, width, Unroll<4>{});
      for (; r < last; ++r) add_rows(r * width, width, Unroll<1>{});
      for (int64_t c = 0; c < (B + 1) * width; ++c) slab[c] += chunk[c];
    }
    if (rows.rest > 0) {
      __builtin_memset(chunk, 0, (B + 1) * width * sizeof(A));
      add_rows(rows.last * width, rows.rest * channels, Unroll<1>{});
      for (int64_t c = 0; c < (B + 1) * width; ++c) slab[c] += chunk[c];
    }
    for (int b = 0; b <= B; ++b)
      for (int64_t c = 0; c < channels; ++c) {
        A sum = 0;
        for (int64_t f = 0; f < plan.fold; ++f) sum += slab[b * width + f * channels + c];
        sums[(i * (B + 1) + b) * channels + c] = sum;
      }
  }
}

template <class T, class O, class A, int B>
void gradient_rows(const Plan& plan, const void* grad, const void* const* y, const A* center, const A* scale,
                   const A* slope, const A* offset, void* const* dy, int64_t begin, int64_t end) {
  const int64_t width = plan.width();
  const O* g = static_cast<const O*>(grad);
  const auto row = [&](int64_t at, int64_t columns) __attribute__((always_inline)) {
    for_vectors<A>(columns, [&](int64_t c, auto get, auto put) __attribute__((always_inline)) {
      const Vec<A> v = get(g + at + c);
      for (int b = 0; b < B; ++b)
        if (dy[b] != nullptr) {
          const Vec<A> d = get(static_cast<const T*>(y[b]) + at + c) - get(center + b * width + c);
          const Vec<A> scaled = get(scale + b * width + c) * v + get(offset + b * width + c);
          put(static_cast<T*>(dy[b]) + at + c, scaled + get(slope + b * width + c) * d);
        }
    });
  };
  for (int64_t i = end - 1; i >= begin; --i) {
    const Rows rows = rows_of(plan, i);
    if (rows.rest > 0) row(rows.last * width, rows.rest * plan.channels);
    for (int64_t r = rows.last - 1; r >= rows.first; --r) row(r * width, width);
  }
}

// ---- NCHW: planes of `pixels` ----

// mean and M2 of n elements less the pivot: two passes, the second of which also corrects the first's mean.
template <class T, class A>
void plane_moments(const T* y, int64_t n, A pivot, double& means, double& m2) {
  const int64_t whole = n / Simd<A>::lanes * Simd<A>::lanes;
  Vec<A> sums = {}, squares = {};
  for (int64_t c = 0; c < whole; c += Simd<A>::lanes) sums += load(y + c) - pivot;
  A sum = lane_sum<A>(sums), square = 0;
  for (int64_t c = whole; c < n; ++c) sum += load_part<A>(y + c, 1)[0] - pivot;
  const A mean = sum / A(n);
  sums = Vec<A>{};
  for (int64_t c = 0; c < whole; c += Simd<A>::lanes) {
    const Vec<A> d = load(y + c) - pivot - mean;
    sums += d;
    squares += d * d;
  }
  sum = lane_sum<A>(sums);
  square = lane_sum<A>(squares);
  for (int64_t c = whole; c < n; ++c) {
    const A d = load_part<A>(y + c, 1)[0] - pivot - mean;
    sum += d;
    square += d * d;
  }
  const double left = double(sum) / double(n);
  means = double(mean) + left;
  m2 = double(square) - double(sum) * left;
}

// body(image) for the images of task t, in order.
template <class Body>
inline __attribute__((always_inline)) void for_planes(const Plan& plan, int64_t t, const Body& body) {
  const int64_t slab = t / plan.channels, channel = t % plan.channels;
  for (int64_t n = slab * plan.slab; n < plan.end(slab, plan.images); ++n)
    body((n * plan.channels + channel) * plan.pixels);
}

template <class T, class A>
void statistics_planes(const Plan& plan, const void* const* y, const A* pivots, double* mean, double* m2,
                       int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t)
    for (int b = 0; b < plan.branches; ++b) {
      const A pivot = pivots[b * plan.channels + t % plan.channels];
      double slab_mean = 0, slab_m2 = 0;
      int64_t count = 0;
      for_planes(plan, t, [&](int64_t at) {
        for (int64_t p = 0; p < plan.pixels; p += kPlaneChunk) {
          const int64_t more = plan.pixels - p < kPlaneChunk ? plan.pixels - p : kPlaneChunk;
          double chunk_mean, chunk_m2;
          plane_moments(static_cast<const T*>(y[b]) + at + p, more, pivot, chunk_mean, chunk_m2);
          merge(slab_mean, slab_m2, count, chunk_mean, chunk_m2, more);
          count += more;
        }
      });
      const int64_t at = (t / plan.channels * plan.branches + b) * plan.channels + t % plan.channels;
      mean[at] = slab_mean;
      m2[at] = slab_m2;
    }
}

template <class T, class O, class A, int B>
void apply_planes(const Plan& plan, const void* const* y, const A* center, const A* scale, const A* shift, void* out,
                  int64_t begin, int64_t end) {
  for (int64_t t = end - 1; t >= begin; --t) {
    const int64_t k = t % plan.channels;
    for_planes(plan, t, [&](int64_t at) {
      for_vectors<A>(plan.pixels, [&](int64_t c, auto get, auto put) __attribute__((always_inline)) {
        Vec<A> sum = shift[k] - Vec<A>{};
        for (int b = 0; b < B; ++b)
          sum += scale[b * plan.channels + k] *
                 (get(static_cast<const T*>(y[b]) + at + c) - center[b * plan.channels + k]);
        put(static_cast<O*>(out) + at + c, sum);
      });
    });
  }
}

template <class T, class O, class A, int B>
void reduce_planes(const Plan& plan, const void* grad, const void* const* y, const A* center, A* sums, int64_t begin,
                   int64_t end) {
  const O* g = static_cast<const O*>(grad);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t k = t % plan.channels;
    double slab[B + 1] = {};
    for_planes(plan, t, [&](int64_t plane) {
      for (int64_t p = 0; p < plan.pixels; p += kPlaneChunk) {
        const int64_t at = plane + p;
        Vec<A> chunk[B + 1] = {};
        // Lanes beyond the plane have g = 0 and add nothing.
        const int64_t n = plan.pixels - p < kPlaneChunk ? plan.pixels - p : kPlaneChunk;
        for_vectors<A>(n, [&](int64_t c, auto get, auto) __attribute__((always_inline)) {
          const Vec<A> v = get(g + at + c);
          chunk[B] += v;
          for (int b = 0; b < B; ++b)
            chunk[b] += v * (get(static_cast<const T*>(y[b]) + at + c) - center[b * plan.channels + k]);
        });
        for (int b = 0; b <= B; ++b) slab[b] += double(lane_sum<A>(chunk[b]));
      }
    });
    for (int b = 0; b <= B; ++b) sums[(t / plan.channels * (B + 1) + b) * plan.channels + k] = A(slab[b]);
  }
}

template <class T, class O, class A, int B>
void gradient_planes(const Plan& plan, const void* grad, const void* const* y, const A* center, const A* scale,
                     const A* slope, const A* offset, void* const* dy, int64_t begin, int64_t end) {
  const O* g = static_cast<const O*>(grad);
  for (int64_t t = end - 1; t >= begin; --t) {
    const int64_t k = t % plan.channels;
    for_planes(plan, t, [&](int64_t at) {
      for_vectors<A>(plan.pixels, [&](int64_t c, auto get, auto put) __attribute__((always_inline)) {
        const Vec<A> v = get(g + at + c);
        for (int b = 0; b < B; ++b)
          if (dy[b] != nullptr) {
            const int64_t bk = b * plan.channels + k;
            const Vec<A> d = get(static_cast<const T*>(y[b]) + at + c) - center[bk];
            put(static_cast<T*>(dy[b]) + at + c, scale[bk] * v + offset[bk] + slope[bk] * d);
          }
      });
    });
  }
}

// ---- choice of the layout and the number of branches ----

#define ACNET_CALL(name, ...)                                                              \
  (plan.channels_last ? (plan.branches == 1   ? name##_rows<T, O, A, 1>(__VA_ARGS__)          \
                         : plan.branches == 2 ? name##_rows<T, O, A, 2>(__VA_ARGS__)          \
                                              : name##_rows<T, O, A, 3>(__VA_ARGS__))         \
                      : (plan.branches == 1   ? name##_planes<T, O, A, 1>(__VA_ARGS__)        \
                         : plan.branches == 2 ? name##_planes<T, O, A, 2>(__VA_ARGS__)        \
                                              : name##_planes<T, O, A, 3>(__VA_ARGS__)))

template <class T, class A>
void statistics(const Plan& plan, const void* const* y, const A* pivot, double* mean, double* m2, int64_t begin,
                int64_t end) {
  if (plan.channels_last)
    statistics_rows<T, A>(plan, y, pivot, mean, m2, begin, end);
  else
    statistics_planes<T, A>(plan, y, pivot, mean, m2, begin, end);
}
template <class T, class O, class A>
void apply(const Plan& plan, const void* const* y, const A* center, const A* scale, const A* shift, void* out,
           int64_t begin, int64_t end) {
  ACNET_CALL(apply, plan, y, center, scale, shift, out, begin, end);
}
template <class T, class O, class A>
void reduce(const Plan& plan, const void* grad, const void* const* y, const A* center, A* sums, int64_t begin,
            int64_t end) {
  ACNET_CALL(reduce, plan, grad, y, center, sums, begin, end);
}
template <class T, class O, class A>
void gradient(const Plan& plan, const void* grad, const void* const* y, const A* center, const A* scale,
              const A* slope, const A* offset, void* const* dy, int64_t begin, int64_t end) {
  ACNET_CALL(gradient, plan, grad, y, center, scale, slope, offset, dy, begin, end);
}
#undef ACNET_CALL

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
