// The passes, compiled once an instruction set. The including file defines ACNET_ISA (its namespace), in it
// multiply_add(), ACNET_REGISTER (bytes of one), ACNET_TILE (x channels accumulated at a time) and, with F16C,
// ACNET_F16C.

namespace acnet::autocorrelation::ACNET_ISA {
namespace {

template <class A>
struct Register {
  typedef A type __attribute__((vector_size(ACNET_REGISTER), aligned(alignof(A)), may_alias));
};

inline void widen(const float* from, float* to, int64_t n) { std::memcpy(to, from, n * sizeof(float)); }
inline void widen(const double* from, double* to, int64_t n) { std::memcpy(to, from, n * sizeof(double)); }
inline void widen(const c10::BFloat16* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = static_cast<uint32_t>(from[i].x) << 16;
    std::memcpy(to + i, &bits, sizeof bits);
  }
}
inline void widen(const c10::Half* from, float* to, int64_t n) {
  int64_t i = 0;
#ifdef ACNET_F16C
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#endif
  for (; i < n; ++i) to[i] = static_cast<float>(from[i]);
}

inline void narrow(const float* from, float* to, int64_t n) { std::memcpy(to, from, n * sizeof(float)); }
inline void narrow(const double* from, double* to, int64_t n) { std::memcpy(to, from, n * sizeof(double)); }
inline void narrow(const float* from, c10::BFloat16* to, int64_t n) {
  // Round to nearest even; a NaN stays one.
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, from + i, sizeof bits);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    to[i].x = static_cast<uint16_t>(from[i] == from[i] ? rounded : (bits >> 16) | 0x40);
  }
}
inline void narrow(const float* from, c10::Half* to, int64_t n) {
  int64_t i = 0;
#ifdef ACNET_F16C
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; i < n; ++i) to[i] = static_cast<c10::Half>(from[i]);
}

// kWidth channels of a pixel less the pivot. Whole vectors: the compiler cannot know that the pointers differ.
typedef uint16_t Narrow __attribute__((vector_size(32), aligned(2), may_alias));
typedef uint32_t Wide __attribute__((vector_size(64)));
template <class A>
using Lanes __attribute__((vector_size(64), aligned(alignof(A)), may_alias)) = A;

template <int kWidth, class T, class A>
void centre(const T* from, const A* pivot, A* to) {
  if constexpr (kWidth == kLanes<A> && std::is_same_v<T, A>) {
    *reinterpret_cast<Lanes<A>*>(to) =
        *reinterpret_cast<const Lanes<A>*>(from) - *reinterpret_cast<const Lanes<A>*>(pivot);
  } else if constexpr (kWidth == 16 && std::is_same_v<T, c10::BFloat16>) {
    const Wide bits = __builtin_convertvector(*reinterpret_cast<const Narrow*>(from), Wide) << 16;
    *reinterpret_cast<Lanes<A>*>(to) = (Lanes<A>)bits - *reinterpret_cast<const Lanes<A>*>(pivot);
  } else {
    A wide[kWidth];
    widen(from, wide, kWidth);
    for (int c = 0; c < kWidth; ++c) to[c] = wide[c] - pivot[c];
  }
}

// `pixels` pixels of kWidth channels, `channels` of them real and less the pivot, the others zero.
template <int kWidth, class T, class A>
void pack_row(const T* from, int64_t stride, const A* pivot, int64_t channels, int64_t pixels, A* to) {
  for (int64_t p = 0; p < pixels; ++p, from += stride, to += kWidth) {
    if (channels >= kWidth) {
      centre<kWidth>(from, pivot, to);
    } else {
      A wide[kWidth] = {};
      widen(from, wide, channels);
      for (int64_t c = 0; c < channels; ++c) wide[c] -= pivot[c];
      std::memcpy(to, wide, sizeof wide);
    }
  }
}

// One tile of channels of a map, from `first` on, `reach` rows before the band to the end of the last image's span.
// A band of part of an image comes alone, with the rows around it; beyond whole images there are zero rows.
template <int kWidth, class T, class A>
void pack(const Block<T, A>& b, const T* map, int64_t pixel, const A* pivot, int64_t first, int64_t channels,
          int64_t reach, bool beyond, A* to) {
  const int64_t pitch = b.width + b.reach_columns, span = b.rows + b.reach_rows;
  const int64_t own = channels - first < kWidth ? channels - first : kWidth;
  for (int64_t q = -reach; q < b.images * span; ++q, to += pitch * kWidth) {
    const int64_t n = q < 0 ? 0 : q / span, r = q - n * span, row = b.first_row + r;
    if (row < 0 || row >= b.height || (r >= b.rows && !beyond)) {
      std::memset(to, 0, pitch * kWidth * sizeof(A));
      continue;
    }
    pack_row<kWidth>(map + (n * b.height + row) * b.width * pixel + first, pixel, pivot + first, own, b.width, to);
    std::memset(to + b.width * kWidth, 0, b.reach_columns * kWidth * sizeof(A));
  }
}

// kRows x channels times kLanes y channels over some pixels, accumulated in registers and added to the sums.
template <int kRows, class A>
void tile(const A* x, const A* y, int64_t pixels, A* sums, int64_t stride) {
  using V = typename Register<A>::type;
  constexpr int kParts = kLanes<A> * sizeof(A) / sizeof(V), kWidth = sizeof(V) / sizeof(A);
  V acc[kRows][kParts] = {};
  for (int64_t p = 0; p < pixels; ++p, x += kRows, y += kLanes<A>) {
    V v[kParts];
#pragma GCC unroll 8
    for (int j = 0; j < kParts; ++j) v[j] = *reinterpret_cast<const V*>(y + j * kWidth);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < kParts; ++j) acc[i][j] = multiply_add(x[i], v[j], acc[i][j]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kParts; ++j) *reinterpret_cast<V*>(sums + i * stride + j * kWidth) += acc[i][j];
}

// Whether the x channels of a block, packed, are y's tile of the same channels too.
template <class T, class A>
bool tile_is_shared(const Block<T, A>& b) {
  const bool same = static_cast<const void*>(b.x) == b.y && b.x_pivot == b.y_pivot;
  return same && ACNET_TILE == kLanes<A> && b.x_last - b.x_first == ACNET_TILE;
}

// One tile of x channels with every tile of y channels: all shifts while a run of pixels is in first-level cache.
template <int kRows, class T, class A>
void correlate_rows(const Block<T, A>& b, int64_t first, int64_t y_size) {
  const int64_t pitch = b.width + b.reach_columns;
  const int64_t own = b.x_last - b.x_first, ks = round_up(b.y_channels, kLanes<A>);
  const int64_t span = (b.rows + b.reach_rows) * pitch, pixels = b.rows * pitch;  // the zero rows add nothing
  const int64_t runs = (pixels + kMostRun - 1) / kMostRun, run = (pixels + runs - 1) / runs;
  const int64_t guard = b.reach_columns * kRows, rows = b.images * (b.rows + b.reach_rows) + b.reach_rows;
  std::memset(b.x_packed, 0, guard * sizeof(A));
  pack<kRows>(b, b.x, b.x_pixel, b.x_pivot, first, b.x_channels, b.reach_rows, true, b.x_packed + guard);
  std::memset(b.x_packed + guard + rows * pitch * kRows, 0, guard * sizeof(A));
  for (int64_t k = 0; k < ks; k += kLanes<A>)
    for (int64_t n = 0; n < b.images; ++n)
      for (int64_t p = 0; p < pixels; p += run) {
        const int64_t first_pixel = n * span + p, size = std::min(run, pixels - p);
        const A* y = tile_is_shared(b) && k == first
                         ? b.x_packed + guard + (b.reach_rows * pitch + first_pixel) * kRows
                         : b.y_packed + k * y_size + first_pixel * kLanes<A>;
        for (int64_t s = 0; s < b.shifts; ++s) {
          const int64_t offset = (b.shift_rows[s] + b.reach_rows) * pitch + b.shift_columns[s] + b.reach_columns;
          const A* x = b.x_packed + (first_pixel + offset) * kRows;
          tile<kRows>(x, y, size, b.block_sums + (s * own + first - b.x_first) * ks + k, ks);
        }
      }
}

template <class T, class A>
void correlate(const Block<T, A>& b) {
  const int64_t ks = round_up(b.y_channels, kLanes<A>);
  const int64_t size = b.shifts * (b.x_last - b.x_first) * ks, y_size = pixels_of(b);
  std::memset(b.block_sums, 0, size * sizeof(A));
  for (int64_t k = 0; k < ks; k += kLanes<A>)
    if (!(tile_is_shared(b) && k == b.x_first))
      pack<kLanes<A>>(b, b.y, b.y_pixel, b.y_pivot, k, b.y_channels, 0, false, b.y_packed + k * y_size);
  int64_t c = b.x_first;
  for (; c + ACNET_TILE <= b.x_last; c += ACNET_TILE) correlate_rows<ACNET_TILE>(b, c, y_size);
  for (; c < b.x_last; c += kRowTile) correlate_rows<kRowTile>(b, c, y_size);
  for (int64_t i = 0; i < size; ++i) b.sums[i] += b.block_sums[i];
}

template <class T, class A>
void sum_images(const T* from, int64_t images, int64_t stride, const A* pivot, int64_t channels, int64_t row, A* to) {
  constexpr int64_t kPiece = 4096;  // elements whose sums stay in first-level cache while images go by
  A wide[kPiece], centre[kPiece];
  std::memset(to, 0, row * sizeof(A));
  for (int64_t first = 0; first < row; first += kPiece) {
    const int64_t size = row - first < kPiece ? row - first : kPiece;
    for (int64_t i = 0; i < size; ++i) centre[i] = pivot[(first + i) % channels];
    for (int64_t n = 0; n < images; ++n) {
      widen(from + n * stride + first, wide, size);
      for (int64_t i = 0; i < size; ++i) to[first + i] += wide[i] - centre[i];
    }
  }
}

template <class T, class A>
void sum(const A* from, const A* more, int64_t n, T* to) {
  constexpr int64_t kPiece = 256;
  A total[kPiece];
  for (int64_t first = 0; first < n; first += kPiece) {
    const int64_t size = n - first < kPiece ? n - first : kPiece;
    for (int64_t i = 0; i < size; ++i) total[i] = from[first + i] + more[first + i];
    narrow(total, to + first, size);
  }
}

template <class S, class A, class T>
void shift(const S* from, A factor, const A* more, int64_t n, T* to) {
  constexpr int64_t kPiece = 256;
  A wide[kPiece];
  for (int64_t first = 0; first < n; first += kPiece) {
    const int64_t size = n - first < kPiece ? n - first : kPiece;
    widen(from + first, wide, size);
    if (factor != 1)
      for (int64_t i = 0; i < size; ++i) wide[i] *= factor;
    if (more != nullptr)
      for (int64_t i = 0; i < size; ++i) wide[i] += more[first + i];
    narrow(wide, to + first, size);
  }
}

}  // namespace

template <class T, class A>
Passes<T, A> passes() {
  return {correlate<T, A>, sum_images<T, A>, sum<T, A>, shift<T, A, T>, shift<T, A, A>, shift<A, A, T>};
}
template Passes<float, float> passes();
template Passes<double, double> passes();
template Passes<c10::BFloat16, float> passes();
template Passes<c10::Half, float> passes();

}  // namespace acnet::autocorrelation::ACNET_ISA
