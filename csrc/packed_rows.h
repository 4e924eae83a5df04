// Rows of maps as kernels take them, for one instruction set: packed, one vector a pixel, a lane a channel. Included by
// kernels after rows_<isa>.h, which defines
//   ACNET_ISA     the namespace, in it multiply_add() of three vectors and spread() of one number,
//   ACNET_BYTES   the bytes of a vector register,
//   ACNET_ROW     the pixels whose sums fill the registers,
//   load_half / store_half  for c10::Half.
// Nothing here may call an inline function from elsewhere: compiled for this instruction set, it could be the copy
// that the linker keeps for everybody.

#include "activation_kernels.h"
#include "rows.h"

namespace acnet::rows::ACNET_ISA {
namespace {

using namespace activations::ACNET_ISA;

template <class A>
struct Simd {
  typedef A Vec __attribute__((vector_size(ACNET_BYTES)));
  static constexpr int lanes = ACNET_BYTES / sizeof(A);
};
template <class A>
using Vec = typename Simd<A>::Vec;
template <class A>
constexpr int kLanes = Simd<A>::lanes;
typedef uint16_t Bits16 __attribute__((vector_size(ACNET_BYTES / 2)));
typedef uint32_t Bits32 __attribute__((vector_size(ACNET_BYTES)));

inline Vec<float> widen(const float* p) {
  Vec<float> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline Vec<float> widen(const c10::BFloat16* p) {
  Bits16 bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return (Vec<float>)(__builtin_convertvector(bits, Bits32) << 16);
}
inline Vec<float> widen(const c10::Half* p) { return load_half(p); }

// A whole vector at p.
template <class A, class T>
inline Vec<A> load(const T* p) {
  if constexpr (sizeof(A) == sizeof(T)) {
    Vec<A> v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  } else if constexpr (sizeof(A) == 4) {
    return widen(p);
  } else {
    T buffer[kLanes<float>] = {};
    __builtin_memcpy(buffer, p, kLanes<A> * sizeof(T));
    const Vec<float> narrow = widen(buffer);
    Vec<A> v;
    for (int i = 0; i < kLanes<A>; ++i) v[i] = narrow[i];
    return v;
  }
}

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

// The first n elements at p; the others are zero.
template <class A, class T>
inline Vec<A> load_part(const T* p, int64_t n) {
  T buffer[kLanes<A>];
  __builtin_memset(buffer, 0, sizeof buffer);
  __builtin_memcpy(buffer, p, n * sizeof(T));
  return load<A>(buffer);
}
template <class T, class A>
inline void store_part(T* p, Vec<A> v, int64_t n) {
  T buffer[kLanes<A>];
  store(buffer, v);
  __builtin_memcpy(p, buffer, n * sizeof(T));
}

// ---- rows in and out: kLanes planes ↔ one vector a pixel ----

#if defined(__clang__) || __GNUC__ >= 12
template <class V, int... I>
struct Zip {
  static V of(V a, V b) { return __builtin_shufflevector(a, b, I...); }
};
template <int lanes, class V>
struct Halves;
template <class V>
struct Halves<2, V> {
  using Low = Zip<V, 0, 2>;
  using High = Zip<V, 1, 3>;
};
template <class V>
struct Halves<4, V> {
  using Low = Zip<V, 0, 4, 1, 5>;
  using High = Zip<V, 2, 6, 3, 7>;
};
template <class V>
struct Halves<8, V> {
  using Low = Zip<V, 0, 8, 1, 9, 2, 10, 3, 11>;
  using High = Zip<V, 4, 12, 5, 13, 6, 14, 7, 15>;
};
template <class V>
struct Halves<16, V> {
  using Low = Zip<V, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23>;
  using High = Zip<V, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31>;
};

template <class A>
inline void transpose(Vec<A> (&v)[kLanes<A>]) {
  constexpr int lanes = kLanes<A>;
  using H = Halves<lanes, Vec<A>>;
#pragma GCC unroll 4
  for (int round = 1; round < lanes; round *= 2) {
    Vec<A> w[lanes];
#pragma GCC unroll 8
    for (int i = 0; i < lanes / 2; ++i) {
      w[2 * i] = H::Low::of(v[i], v[i + lanes / 2]);
      w[2 * i + 1] = H::High::of(v[i], v[i + lanes / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) v[i] = w[i];
  }
}
#else
template <class A>
inline void transpose(Vec<A> (&v)[kLanes<A>]) {
  for (int i = 0; i < kLanes<A>; ++i)
    for (int j = 0; j < i; ++j) {
      const A kept = v[i][j];
      v[i][j] = v[j][i];
      v[j][i] = kept;
    }
}
#endif

// What a clamp that follows a map made of it, null for nothing, where the map is and with its strides: elements are
// zeros where the clamp is flat.
template <class T, class A>
struct Told {
  const T* out = nullptr;
  A flat = 0;
};

// Into the second cache: a channels_last row's lines share few sets of the first, where they would drive each other out.
// (GCC takes a loop of __builtin_prefetch for one that does nothing, and leaves it out.)
inline void fetch(const void* p) {
#if defined(__x86_64__)
  __asm__ volatile("prefetcht1 %0" : : "m"(*static_cast<const char*>(p)));
#else
  __builtin_prefetch(p, 0, 2);
#endif
}

template <class T, class M>
void fetch_row(const M& map, const T* p, int64_t columns) {
  constexpr int64_t line = 64 / sizeof(T);
  if (map.channel == 1) {
    for (int64_t j = 0; j < columns; ++j) fetch(p + j * map.column);
  } else if (map.column == 1) {
    for (int l = 0; l < map.lanes; ++l)
      for (int64_t j = 0; j < columns; j += line) fetch(p + l * map.channel + j);
  }
}

// The row after the one at p, if there is one before `limit`.
template <class T, class M>
void fetch_next(const M& map, const T* p, const T* limit, int64_t columns) {
  if (p + map.row < limit) fetch_row<T>(map, p + map.row, columns);
}

// Compiled with and without a clamp: a choice within the loops keeps the planes' vectors out of registers.
template <bool clamps, class T, class A>
void pack_row_of(const Map<const T>& map, const T* p, int64_t columns, Vec<A> pivot, const Told<T, A>& told, A* to) {
  constexpr int lanes = kLanes<A>;
  const int64_t apart = clamps ? told.out - map.data : 0;
  if (map.channel == 1 && map.lanes == lanes) {
    for (int64_t j = 0; j < columns; ++j) {
      const T* from = p + j * map.column;
      Vec<A> v = load<A>(from);
      if (clamps) v = where_steep<A>(v, load<A>(from + apart), told.flat);
      store(to + j * lanes, v - pivot);
    }
  } else if (map.column == 1 && sizeof(T) <= sizeof(A) && (sizeof(A) == 4 || sizeof(T) == sizeof(A))) {
    for (int64_t j = 0; j < columns; j += lanes) {
      if (j + lanes > columns && columns >= lanes) j = columns - lanes;  // once more what is there already
      const int64_t n = columns - j < lanes ? columns - j : lanes;
      Vec<A> v[lanes];
      for (int l = 0; l < lanes; ++l) {
        const T* from = p + l * map.channel + j;
        const bool whole = n == lanes || from + lanes <= map.limit;
        if (l >= map.lanes) v[l] = Vec<A>{};
        else v[l] = whole ? load<A>(from) : load_part<A>(from, n);
        if (clamps && l < map.lanes)
          v[l] = where_steep<A>(v[l], whole ? load<A>(from + apart) : load_part<A>(from + apart, n), told.flat);
      }
      transpose<A>(v);
      for (int64_t i = 0; i < n; ++i) store(to + (j + i) * lanes, v[i] - pivot);
    }
  } else {
    T pixel[lanes], out[lanes];
    __builtin_memset(pixel, 0, sizeof pixel);
    __builtin_memset(out, 0, sizeof out);
    for (int64_t j = 0; j < columns; ++j) {
      for (int l = 0; l < map.lanes; ++l) pixel[l] = p[j * map.column + l * map.channel];
      Vec<A> v = load<A>(pixel);
      if (clamps) {
        for (int l = 0; l < map.lanes; ++l) out[l] = p[apart + j * map.column + l * map.channel];
        v = where_steep<A>(v, load<A>(out), told.flat);
      }
      store(to + j * lanes, v - pivot);
    }
  }
}

template <class T, class A>
void pack_row(const Map<const T>& map, const T* p, int64_t columns, Vec<A> pivot, const Told<T, A>& told, A* to) {
  if (told.out != nullptr) pack_row_of<true, T, A>(map, p, columns, pivot, told, to);
  else pack_row_of<false, T, A>(map, p, columns, pivot, told, to);
}

template <class A>
inline __attribute__((always_inline)) Vec<A> finished(Vec<A> v, Activation activation) {
  return activation == Activation::none ? v : activated<A>(v, activation);
}

// `from` may be read up to a vector's pixels beyond the row. Up to `limit`, of the first plane, what follows the row is
// written later.
template <bool follows, class T, class A>
void unpack_row_of(const A* from, int64_t columns, const Map<T>& map, const After<T>& after, T* p, const T* limit) {
  constexpr int lanes = kLanes<A>;
  const T* added = follows ? after.residual.data : nullptr;
  const Activation activation = follows ? after.activation : Activation::none;
  const int64_t apart = added != nullptr ? added - map.data : 0;
  fetch_next<T>(map, p, limit, columns);
  if (added != nullptr) fetch_next<T>(map, p + apart, limit + apart, columns);
  if (map.channel == 1 && map.lanes == lanes) {
    for (int64_t j = 0; j < columns; ++j) {
      Vec<A> v = load<A>(from + j * lanes);
      if (added != nullptr) v += load<A>(static_cast<const T*>(p) + apart + j * map.column);
      store(p + j * map.column, finished<A>(v, activation));
    }
  } else if (map.column == 1) {
    for (int64_t j = 0; j < columns; j += lanes) {
      if (j + lanes > columns && columns >= lanes) j = columns - lanes;
      const int64_t n = columns - j < lanes ? columns - j : lanes;
      Vec<A> v[lanes];
#pragma GCC unroll 16
      for (int l = 0; l < lanes; ++l) v[l] = load<A>(from + (j + l) * lanes);
      transpose<A>(v);
      const bool whole = n == lanes || p + j + lanes <= limit;
      for (int l = 0; l < map.lanes; ++l) {
        T* to = p + l * map.channel + j;
        if (added != nullptr) {
          const T* more = to + apart;
          v[l] += n == lanes || more + lanes <= after.residual.limit ? load<A>(more) : load_part<A>(more, n);
        }
        v[l] = finished<A>(v[l], activation);
        if (whole) store(to, v[l]);
        else store_part<T, A>(to, v[l], n);
      }
    }
  } else {
    T pixel[lanes];
    for (int64_t j = 0; j < columns; ++j) {
      Vec<A> v = load<A>(from + j * lanes);
      if (added != nullptr) {
        __builtin_memset(pixel, 0, sizeof pixel);
        for (int l = 0; l < map.lanes; ++l) pixel[l] = p[apart + j * map.column + l * map.channel];
        v += load<A>(pixel);
      }
      store(pixel, finished<A>(v, activation));
      for (int l = 0; l < map.lanes; ++l) p[j * map.column + l * map.channel] = pixel[l];
    }
  }
}

template <class T, class A>
void unpack_row(const A* from, int64_t columns, const Map<T>& map, const After<T>& after, T* p, const T* limit) {
  if (after.activation != Activation::none || after.residual.data != nullptr)
    unpack_row_of<true, T, A>(from, columns, map, after, p, limit);
  else
    unpack_row_of<false, T, A>(from, columns, map, after, p, limit);
}

// ---- scratch ----

template <class A>
struct Memory {
  A* free;
  template <class E = A>
  E* take(int64_t numbers) {  // of E, rounded up to vectors
    E* taken = reinterpret_cast<E*>(free);
    const int64_t vectors = (numbers * int64_t(sizeof(E)) + ACNET_BYTES - 1) / ACNET_BYTES;
    free += vectors * kLanes<A>;
    return taken;
  }
};

}  // namespace
}  // namespace acnet::rows::ACNET_ISA
