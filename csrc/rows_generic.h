// What packed_rows.h and bn_sum_kernels.h need, for the compiler's default instruction set (SSE2 on x86-64, NEON on aarch64).
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#define ACNET_ISA generic
#define ACNET_BYTES 16
#define ACNET_ROW 8

namespace acnet::rows::generic {
namespace {
typedef float Four __attribute__((vector_size(16)));
inline Four load_half(const c10::Half* p) {
  return Four{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]), static_cast<float>(p[3])};
}
inline void store_half(c10::Half* p, Four v) {
  for (int i = 0; i < 4; ++i) p[i] = c10::Half(v[i]);
}
inline Four spread(float value) { return Four{value, value, value, value}; }
template <class V>
inline V multiply_add(V a, V b, V c) {
  return a * b + c;
}
}  // namespace
}  // namespace acnet::rows::generic
