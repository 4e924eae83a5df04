// The activations of activation.h and their slopes, a vector at a time, for one instruction set. Included by kernels
// that define ACNET_ISA and ACNET_BYTES; as there, nothing here may call an inline function from elsewhere.

#ifndef ACNET_ACTIVATION_KERNELS
#define ACNET_ACTIVATION_KERNELS

namespace acnet::activations::ACNET_ISA {
namespace {

template <class A>
struct Register {
  typedef A Type __attribute__((vector_size(ACNET_BYTES)));
};
template <class A>
using Vector = typename Register<A>::Type;

template <class A>
struct Exp;
template <>
struct Exp<float> {
  typedef int32_t Int __attribute__((vector_size(ACNET_BYTES)));
  static constexpr float most = 87, magic = 0x1.8p23f, high = 0x1.62e4p-1f, low = 0x1.7f7d1cp-20f;
  static constexpr int terms = 8, digits = 23, bias = 127;
};
template <>
struct Exp<double> {
  typedef int64_t Int __attribute__((vector_size(ACNET_BYTES)));
  static constexpr double most = 708, magic = 0x1.8p52, high = 0x1.62e42fefa38p-1, low = 0x1.ef35793c7673p-45;
  static constexpr int terms = 14, digits = 52, bias = 1023;
};

// e^x to a unit or two of the last place, x cut to ±most: 2^n times the series of what is left of x, |r| ≤ ln 2 / 2.
template <class A>
inline Vector<A> exponential(Vector<A> x) {
  using E = Exp<A>;
  using Int = typename E::Int;
  x = x > E::most ? Vector<A>{} + E::most : x;
  x = x < -E::most ? Vector<A>{} - E::most : x;
  const Vector<A> shifted = x * A(1.44269504088896340736) + E::magic, n = shifted - E::magic;  // rounded to a whole number
  const Vector<A> r = x - n * E::high - n * E::low;
  Vector<A> series = Vector<A>{} + 1;
  for (int i = E::terms; i > 0; --i) series = series * r / A(i) + 1;
  const Int power = ((Int)shifted - (Int)(Vector<A>{} + E::magic) + E::bias) << E::digits;
  return series * (Vector<A>)power;
}

template <class A>
inline Vector<A> sigmoid(Vector<A> z) {
  const Vector<A> found = 1 / (1 + exponential<A>(-z));
  return z < -Exp<A>::most ? Vector<A>{} : found;
}

template <class A>
inline Vector<A> clamp(Vector<A> z, A most) {  // NaN stays
  z = z < 0 ? Vector<A>{} : z;
  return z > most ? Vector<A>{} + most : z;
}

// hardswish or silu of z, and their derivatives. Calls: inlined into every pass they would be most of the library.
template <class A>
__attribute__((noinline)) Vector<A> smooth(Vector<A> z, Activation activation) {
  return activation == Activation::silu ? z * sigmoid<A>(z) : z * clamp<A>(z + 3, 6) / 6;
}
template <class A>
__attribute__((noinline)) Vector<A> smooth_slope(Vector<A> z, Activation activation) {
  if (activation == Activation::silu) {
    const Vector<A> s = sigmoid<A>(z);
    return s * (1 + z * (1 - s));
  }
  const Vector<A> between = z / 3 + A(0.5), right = z > 3 ? Vector<A>{} + 1 : between;
  return z < -3 ? Vector<A>{} : right;
}

template <class A>
inline A most_of(Activation activation) {
  return activation == Activation::relu6 ? A(6) : A(__builtin_inf());
}

// From which output on a clamp is flat: relu nowhere, as not even infinity is at or beyond NaN.
template <class A>
inline A flat_from(Activation activation) {
  return activation == Activation::relu6 ? A(6) : A(__builtin_nan(""));
}

template <class A>
inline __attribute__((always_inline)) Vector<A> activated(Vector<A> z, Activation activation) {
  return is_clamp(activation) ? clamp<A>(z, most_of<A>(activation)) : smooth<A>(z, activation);
}

// g where a clamp whose output this is is steep.
template <class A>
inline __attribute__((always_inline)) Vector<A> where_steep(Vector<A> g, Vector<A> out, A flat) {
  return (out <= 0) | (out >= flat) ? Vector<A>{} : g;
}

}  // namespace
}  // namespace acnet::activations::ACNET_ISA

#endif
