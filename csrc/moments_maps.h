// Passes over whole channels_last maps: conversion, shifting by numbers per channel or per pixel of an image.
#pragma once

#include <type_traits>
#include <vector>

#include "autocorrelation.h"
#include "library.h"
#include "moments.h"

namespace acnet::moments {

template <class T, class A>
void shift(const T* from, A factor, const A* more, int64_t n, T* to) {
  autocorrelation::passes<T, A>().shift(from, factor, more, n, to);
}
template <class T, class A, class = std::enable_if_t<!std::is_same_v<T, A>>>
void shift(const T* from, A factor, const A* more, int64_t n, A* to) {
  autocorrelation::passes<T, A>().shift_wide(from, factor, more, n, to);
}
template <class T, class A, class = std::enable_if_t<!std::is_same_v<T, A>>>
void shift(const A* from, A factor, const A* more, int64_t n, T* to) {
  autocorrelation::passes<T, A>().shift_narrow(from, factor, more, n, to);
}

// to = from·factor + more over images of `rows` rows, `row` numbers each; `more` is a row of numbers for all rows, an
// image for all images, or nothing.
enum class More { row, image };
template <class A, class S, class U>
void shift_images(const S* from, A factor, const A* more, More what, int64_t images, int64_t rows, int64_t row, U* to) {
  parallel(images * rows, row, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      shift(from + i * row, factor, more == nullptr || what == More::row ? more : more + i % rows * row, row, to + i * row);
  });
}

// One image's row of numbers per channel.
template <class A>
std::vector<A> repeated(const A* numbers, int64_t channels, int64_t width, A sign) {
  std::vector<A> row(channels * width);
  for (int64_t i = 0; i < channels * width; ++i) row[i] = sign * numbers[i % channels];
  return row;
}

// A CPU converts and adds a few images at a time, in cache.
inline int64_t images_at_a_time(const Problem& p) {
  constexpr int64_t kBytes = 4 << 20;  // of float maps
  const int64_t image = 4 * std::max(p.c, p.outputs) * p.h * p.w;
  return std::min(std::max<int64_t>(p.n, 1), std::max<int64_t>(1, kBytes / image));
}

// A kernel for the library: rounded, with channels_last strides, and what it is to be multiplied by: 1 but for
// float16, whose exponents kernels times scales and y_factors may lie outside of; a power of two then.
struct Rounded {
  Tensor weight;
  double unit;
};

template <class F>
const F* data(const Tensor& t) {
  return static_cast<const F*>(t.const_data_ptr());
}
template <class F>
F* written(Tensor& t) {
  return static_cast<F*>(t.mutable_data_ptr());
}

// `kernel`: outputs×(rows·columns)×channels numbers.
inline Rounded rounded(const double* kernel, int64_t outputs, int64_t channels, int64_t rows, int64_t columns, ScalarType type) {
  const int64_t numbers = outputs * channels * rows * columns;
  double unit = 1;
  if (type == ScalarType::Half) {
    double most = 0;
    for (int64_t i = 0; i < numbers; ++i)
      if (std::isfinite(kernel[i])) most = std::max(most, std::abs(kernel[i]));
    int exponent = 0;
    std::frexp(most, &exponent);
    unit = std::ldexp(1.0, std::clamp(exponent - std::clamp(exponent, -6, 6), -126, 127));
  }
  Tensor weight = library::empty_map(type, outputs, channels, rows, columns, true);
  dispatch(type, [&](auto element, auto) {
    using T = decltype(element);
    T* to = written<T>(weight);
    for (int64_t i = 0; i < numbers; ++i) to[i] = static_cast<T>(kernel[i] / unit);
  });
  return {weight, unit};
}

}  // namespace acnet::moments
