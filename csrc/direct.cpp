// Direct convolutions as functions.h has them: checks, tasks, threads and merging. The passes are in direct_kernels.h.
#include "direct.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "branch_list.h"
#include "buffer.h"
#include "check.h"
#include "cpu.h"
#include "functions.h"
#include "library.h"

namespace acnet::direct {
namespace {

constexpr int64_t kMostPadding = 1024;
constexpr int64_t kFirstCache = 24 << 10;                          // bytes that a block's rows may take
constexpr int64_t kChunkPixels = 512;                              // whose products are added up in float32
// Chunks, and numbers of all of them unless so few are left that many threads would want.
constexpr int64_t kFewChunks = 8, kMostChunks = 64, kMostSums = int64_t(1) << 20;
constexpr int64_t kSerialProducts = int64_t(1) << 20;              // a thread's share is worth its start from here on

template <class T>
const Passes<T>& kernels() {
  static const Passes<T> chosen = [] {
    switch (best_isa()) {
#if defined(__x86_64__)
      case Isa::avx512: return avx512::passes<T>();
      case Isa::avx2: return avx2::passes<T>();
#endif
      default: return generic::passes<T>();
    }
  }();
  return chosen;
}

// body(T{}) for the maps' type.
template <class Body>
auto dispatch(ScalarType type, const Body& body) {
  switch (type) {
    case ScalarType::BFloat16: return body(c10::BFloat16{});
    case ScalarType::Half: return body(c10::Half{});
    default: return body(float{});
  }
}

template <class Body>
auto dispatch_any(ScalarType type, const Body& body) {
  return type == ScalarType::Double ? body(double{}) : dispatch(type, body);
}

struct Convolution {
  View weight;
  Taps taps;

  // Of the gradient: the kernel turned round.
  Taps turned() const {
    return {taps.rows, taps.columns, -taps.last_row(), -taps.last_column(), taps.row_step, taps.column_step};
  }
};

// What both operators are given, checked.
struct Problem {
  Check check;
  View x;
  std::vector<Convolution> convolutions;
  int64_t images, channels, outputs, height, width, out_height, out_width;

  Problem(const char* name, const Tensor& x_, const Tensors& weights_, const std::vector<int64_t>& taps,
          const std::vector<int64_t>& geometry)
      : check(name), x(x_) {
    check.map(x, "x");
    check(x.type() != ScalarType::Double, "x must be float32, bfloat16 or float16, got float64");
    check(geometry.size() == 9, "geometry must hold 9 numbers, got ", geometry.size());
    for (const int64_t number : geometry)
      check(number >= 0 && number < (int64_t(1) << 31), "geometry must hold numbers from 0 to 2³¹ − 1, got ", number);
    const int64_t kernel[] = {geometry[0], geometry[1]};
    check(std::min(kernel[0], kernel[1]) >= 1 && std::max(kernel[0], kernel[1]) <= kMostRows,
          "geometry must have a kernel of 1 to ", kMostRows, " taps a side, got ", kernel[0], " and ", kernel[1]);
    check(geometry[2] == 1 && geometry[3] == 1, "geometry must have strides of 1, got ", geometry[2], " and ",
          geometry[3]);
    check(std::max(geometry[4], geometry[5]) <= kMostPadding, "geometry must have a padding of at most ", kMostPadding);
    check(std::min(geometry[6], geometry[7]) >= 1 && std::max(geometry[6], geometry[7]) <= kMostPadding,
          "geometry must have dilations of 1 to ", kMostPadding);
    check(geometry[8] == 1, "geometry must have one group, got ", geometry[8]);
    images = x.sizes[0];
    channels = x.sizes[1];
    height = x.sizes[2];
    width = x.sizes[3];
    const std::vector<View> weights(weights_.begin(), weights_.end());
    check(!weights.empty() && weights[0].dim == 4 && weights[0].sizes[0] >= 1,
          "weights must hold kernels of K×C×rows×columns");
    outputs = weights[0].sizes[0];
    out_height = height + 2 * geometry[4] - geometry[6] * (kernel[0] - 1);
    out_width = width + 2 * geometry[5] - geometry[7] * (kernel[1] - 1);
    check(out_height >= 1 && out_width >= 1, "geometry leaves no output of an x of ", x.shape());
    int64_t norms = 1;  // what is normalised, if anything, is no matter here
    for (size_t i = kNumbers - 1; i < taps.size(); i += kNumbers) norms += taps[i] != 0;
    const BranchList list(check, taps, weights, outputs, channels, kernel, outputs == channels, true, norms);
    for (const Branch& b : list.branches) {
      if (b.weight < 0) continue;
      const int64_t down = geometry[6], right = geometry[7];
      convolutions.push_back({weights[b.weight],
                              {b.rows, b.columns, b.row * down - geometry[4], b.column * right - geometry[5],
                               b.step * down, b.step * right}});
    }
  }

  int64_t products() const {
    int64_t taps = 0;
    for (const Convolution& c : convolutions) taps += c.taps.count();
    return images * out_height * out_width * outputs * channels * taps;
  }
};

template <class T, class Data = const T>
Maps<Data> maps_of(const View& v) {
  int64_t last = 0;
  for (int i = 0; i < 4; ++i) last += (v.sizes[i] - 1) * v.strides[i];
  Data* data = static_cast<Data*>(v.data);
  return {data,         v.empty() ? data : data + last + 1,
          v.strides[0], v.strides[1],
          v.strides[2], v.strides[3],
          v.sizes[1],   v.sizes[2],
          v.sizes[3]};
}

int64_t blocks_of(int64_t channels, int64_t lanes) { return (channels + lanes - 1) / lanes; }

int64_t panel(const Taps& taps, int64_t in, int64_t out, int64_t lanes) {
  return blocks_of(in, lanes) * blocks_of(out, lanes) * taps.count() * lanes * lanes;
}

// Each run of numbers of a block of results: the first one's place in the packed kernel, where they are adjacent, its
// place in the weight, and how many there are, how far apart. `turned`: of the gradient's kernel.
template <class Body>
void each_weight(const Convolution& c, bool turned, int64_t block, int64_t lanes, const Body& body) {
  const int64_t *sizes = c.weight.sizes, *strides = c.weight.strides;
  const int out_axis = turned ? 1 : 0, in_axis = 1 - out_axis;
  const int64_t ins = sizes[in_axis], blocks = blocks_of(ins, lanes), taps = c.taps.count();
  const int64_t first = block * lanes, outs = std::min(sizes[out_axis] - first, lanes);
  std::vector<int64_t> places;
  for (int64_t t = 0; t < taps; ++t) {
    const int64_t own = turned ? taps - 1 - t : t;
    places.push_back(own / c.taps.columns * strides[2] + own % c.taps.columns * strides[3]);
  }
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t held = std::min(ins - b * lanes, lanes);
    for (int64_t i = 0; i < held; ++i) {
      const int64_t at = first * strides[out_axis] + (b * lanes + i) * strides[in_axis];
      const int64_t to = ((block * blocks + b) * taps * lanes + i) * lanes;
      for (int64_t t = 0; t < taps; ++t) body(to + t * lanes * lanes, at + places[t], outs, strides[out_axis]);
    }
  }
}

// The kernels of all convolutions, packed, and where each begins.
struct Panels {
  Buffer<float> all;
  std::vector<int64_t> begins;

  static std::vector<int64_t> begins_of(const Problem& p, int64_t lanes) {
    std::vector<int64_t> begins{0};
    for (const Convolution& c : p.convolutions)
      begins.push_back(begins.back() + panel(c.taps, p.channels, p.outputs, lanes));
    return begins;
  }

  Panels(const Problem& p, bool turned, int64_t lanes) : all(begins_of(p, lanes).back()), begins(begins_of(p, lanes)) {
    const int64_t blocks = blocks_of(turned ? p.channels : p.outputs, lanes);
    const int64_t at_once = std::max<int64_t>(1, (kSerialProducts >> 5) * blocks / begins.back());
    for (size_t i = 0; i < p.convolutions.size(); ++i) {
      const Convolution& c = p.convolutions[i];
      float* own = all.data() + begins[i];
      const int64_t of_block = (begins[i + 1] - begins[i]) / blocks;
      torch::stable::parallel_for(0, blocks, at_once, [&](int64_t first, int64_t last) {
        if (p.channels % lanes != 0 || p.outputs % lanes != 0)
          std::fill(own + first * of_block, own + last * of_block, 0.0f);
        dispatch_any(c.weight.type(), [&](auto element) {
          const auto* from = static_cast<const decltype(element)*>(c.weight.data);
          for (int64_t block = first; block < last; ++block)
            each_weight(c, turned, block, lanes, [own, from](int64_t to, int64_t at, int64_t count, int64_t step) {
              for (int64_t n = 0; n < count; ++n) own[to + n] = static_cast<float>(from[at + n * step]);
            });
        });
      });
    }
  }
  const float* of(size_t i) const { return all.data() + begins[i]; }
};

// The rows and columns of a map that results by these taps read.
struct Halo {
  int64_t up = 0, down = 0, left = 0,
          right = 0;  // before the first result, and after the last, where negative and positive

  void add(const Taps& taps) {
    up = std::min(up, taps.row);
    down = std::max(down, taps.last_row());
    left = std::min(left, taps.column);
    right = std::max(right, taps.last_column());
  }
  // Packed rows of a map for results in rows [begin, end) of `width` columns.
  Packed rows(int64_t begin, int64_t end, int64_t width, int64_t height, int64_t channels, float* data) const {
    const int64_t first = std::max<int64_t>(0, begin + up), last = std::min(height, end + down);
    return {data, first, std::max<int64_t>(0, last - first), left, pitch(width), channels};
  }
  int64_t pitch(int64_t width) const { return width + right - left; }
  int64_t numbers(int64_t rows, int64_t width, int64_t channels, int64_t lanes) const {
    return (rows + down - up) * pitch(width) * blocks_of(channels, lanes) * lanes;
  }
};

// Runs of rows of an image.
struct Tasks {
  int64_t images, height, tiles;

  Tasks(int64_t images_, int64_t height_, int64_t row_bytes, int64_t reach) : images(images_), height(height_) {
    const int64_t rows = std::clamp<int64_t>(kFirstCache / row_bytes - reach, 1, height);
    tiles = (height + rows - 1) / rows;
  }
  int64_t count() const { return images * tiles; }
  int64_t rows() const { return (height + tiles - 1) / tiles; }
  int64_t begin(int64_t tile) const { return tile * height / tiles; }
};

template <class T>
void convolve_all(const Problem& p, Tensors& ys) {
  const Passes<T>& pass = kernels<T>();
  const Panels panels(p, false, pass.lanes);
  std::vector<Link> links;
  std::vector<Maps<T>> outs;
  Halo halo;
  for (size_t i = 0; i < p.convolutions.size(); ++i) {
    links.push_back({0, static_cast<int>(i), p.convolutions[i].taps, panels.of(i)});
    halo.add(links[i].taps);
    outs.push_back(maps_of<T, T>(View(ys[i])));
  }
  const Maps<const T> x = maps_of<T>(p.x);
  const Tasks tasks(p.images, p.out_height, halo.pitch(p.out_width) * pass.lanes * int64_t(sizeof(float)),
                    halo.down - halo.up);
  const int64_t packed = halo.numbers(tasks.rows(), p.out_width, p.channels, pass.lanes);
  const int64_t sums = (2 * tasks.rows() * p.out_width + pass.lanes) * pass.lanes;
  const int64_t at_once = std::max<int64_t>(1, kSerialProducts * tasks.count() / std::max<int64_t>(1, p.products()));
  torch::stable::parallel_for(0, tasks.count(), at_once, [&](int64_t first, int64_t last) {
    Buffer<float> scratch(packed + sums);
    for (int64_t task = first; task < last; ++task) {
      const int64_t image = task / tasks.tiles, begin = tasks.begin(task % tasks.tiles),
                    end = tasks.begin(task % tasks.tiles + 1);
      const Packed source = halo.rows(begin, end, p.out_width, p.height, p.channels, scratch.data());
      pass.pack(x, image, source);
      for (size_t i = 0; i < outs.size(); ++i)
        pass.convolve(&source, &links[i], 1, static_cast<int>(i), outs[i], image, begin, end, scratch.data() + packed);
    }
  });
}

// The gradients wanted of what: dx unless null, and of the kernels that are not.
struct Wanted {
  Tensor* dx;
  std::vector<Tensor*> dws;

  bool any_weight() const {
    return std::any_of(dws.begin(), dws.end(), [](const Tensor* dw) { return dw != nullptr; });
  }
};

template <class T>
void differentiate(const Problem& p, const std::vector<std::optional<View>>& grads, const Wanted& wanted) {
  const Passes<T>& pass = kernels<T>();
  const int64_t lanes = pass.lanes;
  std::optional<Panels> panels;
  if (wanted.dx != nullptr) panels.emplace(p, true, lanes);
  std::vector<Link> links;
  Halo of_grad, of_x;
  std::vector<int64_t> sums{0};  // where those of each kernel begin in a chunk's
  for (size_t i = 0; i < p.convolutions.size(); ++i) {
    const Convolution& c = p.convolutions[i];
    if (panels && grads[i]) links.push_back({static_cast<int>(i), 0, c.turned(), panels->of(i)});
    if (panels && grads[i]) of_grad.add(c.turned());
    if (wanted.dws[i] != nullptr) of_x.add(c.taps);
    sums.push_back(sums.back() + (wanted.dws[i] == nullptr ? 0 : panel(c.taps, p.channels, p.outputs, lanes)));
  }
  const int64_t width = std::max(p.width, p.out_width), height = std::max(p.height, p.out_height);
  const int64_t reach = std::max(of_grad.down - of_grad.up, of_x.down - of_x.up);
  const int64_t pitch = std::max(of_grad.pitch(width), of_x.pitch(width));
  const Tasks tasks(p.images, height, pitch * lanes * int64_t(sizeof(float)), reach);
  const int64_t per_grad = of_grad.numbers(tasks.rows(), width, p.outputs, lanes),
                per_x = of_x.numbers(tasks.rows(), width, p.channels, lanes);
  const int64_t per_sum = (2 * tasks.rows() * width + lanes) * lanes, count = static_cast<int64_t>(grads.size());
  const bool adds = wanted.any_weight();
  const int64_t most = std::clamp<int64_t>(kMostSums / std::max<int64_t>(1, sums.back()), kFewChunks, kMostChunks);
  const int64_t chunks = adds ? std::clamp<int64_t>(p.images * p.out_height * p.out_width / kChunkPixels, 1,
                                                    std::min(most, std::max<int64_t>(1, tasks.count())))
                              : tasks.count();
  Buffer<float> products(adds ? chunks * sums.back() : 0);
  const Maps<const T> x = maps_of<T>(p.x);
  std::optional<Maps<T>> dx;
  if (wanted.dx != nullptr) dx = maps_of<T, T>(View(*wanted.dx));
  std::vector<Maps<const T>> dys(grads.size());
  for (size_t i = 0; i < grads.size(); ++i)
    if (grads[i]) dys[i] = maps_of<T>(*grads[i]);
  const int64_t at_once = std::max<int64_t>(1, kSerialProducts * chunks / std::max<int64_t>(1, 2 * p.products()));
  torch::stable::parallel_for(0, chunks, at_once, [&](int64_t first_chunk, int64_t last_chunk) {
    Buffer<float> scratch(count * per_grad + per_x + per_sum);
    std::vector<Packed> sources(grads.size());
    for (int64_t chunk = first_chunk; chunk < last_chunk; ++chunk) {
      float* own = products.data() + chunk * sums.back();
      if (adds) std::fill_n(own, sums.back(), 0.0f);
      for (int64_t task = chunk * tasks.count() / chunks; task < (chunk + 1) * tasks.count() / chunks; ++task) {
        const int64_t image = task / tasks.tiles, begin = tasks.begin(task % tasks.tiles),
                      end = tasks.begin(task % tasks.tiles + 1);
        for (size_t i = 0; i < grads.size(); ++i) {
          if (!grads[i]) continue;
          sources[i] = of_grad.rows(begin, end, width, p.out_height, p.outputs,
                                    scratch.data() + static_cast<int64_t>(i) * per_grad);
          pass.pack(dys[i], image, sources[i]);
        }
        if (dx && begin < p.height)
          pass.convolve(sources.data(), links.data(), static_cast<int>(links.size()), 0, *dx, image, begin,
                        std::min(end, p.height), scratch.data() + count * per_grad + per_x);
        const int64_t last = std::min(end, p.out_height);
        if (!adds || begin >= last) continue;
        const Packed source = of_x.rows(begin, last, width, p.height, p.channels, scratch.data() + count * per_grad);
        pass.pack(x, image, source);
        for (size_t i = 0; i < grads.size(); ++i)
          if (wanted.dws[i] != nullptr)
            pass.correlate(source, sources[i], p.convolutions[i].taps, begin, last, p.out_width, own + sums[i]);
      }
    }
  });
  if (!adds) return;
  const int64_t blocks = blocks_of(p.outputs, lanes);
  torch::stable::parallel_for(0, blocks, std::max<int64_t>(1, blocks * (kSerialProducts >> 5) / (sums.back() * chunks)),
                              [&](int64_t first, int64_t last) {
                                for (size_t i = 0; i < grads.size(); ++i) {
                                  if (wanted.dws[i] == nullptr) continue;
                                  const Convolution& c = p.convolutions[i];
                                  const int64_t of_block = (sums[i + 1] - sums[i]) / blocks;
                                  Buffer<double> total(of_block);
                                  Convolution target{View(*wanted.dws[i]), c.taps};
                                  for (int64_t block = first; block < last; ++block) {
                                    std::fill_n(total.data(), of_block, 0.0);
                                    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
                                      const float* from =
                                          products.data() + chunk * sums.back() + sums[i] + block * of_block;
                                      for (int64_t n = 0; n < of_block; ++n) total[n] += from[n];
                                    }
                                    dispatch_any(target.weight.type(), [&](auto element) {
                                      using E = decltype(element);
                                      E* to = static_cast<E*>(target.weight.data);
                                      const double* from = total.data() - block * of_block;
                                      each_weight(target, false, block, lanes,
                                                  [to, from](int64_t at, int64_t own, int64_t count, int64_t step) {
                                                    for (int64_t n = 0; n < count; ++n)
                                                      to[own + n * step] = static_cast<E>(from[at + n]);
                                                  });
                                    });
                                  }
                                }
                              });
}

}  // namespace

Tensors maps(Tensor x, Tensors weights, std::vector<int64_t> taps, std::vector<int64_t> geometry, bool channels_last) {
  const Problem p("direct_maps", x, weights, taps, geometry);
  Tensors ys;
  for (size_t i = 0; i < p.convolutions.size(); ++i)
    ys.push_back(library::empty_map(p.x.type(), p.images, p.outputs, p.out_height, p.out_width, channels_last));
  dispatch(p.x.type(), [&](auto element) { convolve_all<decltype(element)>(p, ys); });
  return ys;
}

std::tuple<Tensor, Tensors> gradients(Tensors dys, Tensor x, Tensors weights, std::vector<int64_t> taps,
                                      std::vector<int64_t> geometry, bool need_x, std::vector<bool> need_weights,
                                      bool channels_last) {
  const Problem p("direct_gradients", x, weights, taps, geometry);
  const size_t count = p.convolutions.size();
  p.check(need_weights.size() == count, "need_weights must have one entry a convolution, ", count, " here, got ",
          need_weights.size());
  std::vector<std::optional<View>> grads(count);
  size_t used = 0;
  for (size_t i = 0; i < count; ++i) {
    if (!need_x && !need_weights[i]) continue;
    p.check(used < dys.size(), "dys must have one entry for each convolution that something needs, got ", dys.size());
    const Entry name{"dys", used};
    const View grad(dys[used++]);
    p.check.readable(grad, name);
    p.check.shape(grad, name, {p.images, p.outputs, p.out_height, p.out_width});
    p.check.type(grad, name, p.x.type(), "the dtype of x");
    grads[i] = grad;
  }
  p.check(used == dys.size(), "dys must have ", used, " entries, one for each convolution that something needs, got ",
          dys.size());
  Tensor dx = need_x ? library::empty_map(p.x.type(), p.images, p.channels, p.height, p.width, channels_last)
                     : torch::stable::new_empty(x, {0});
  Tensors dws;
  dws.reserve(count);
  Wanted wanted{need_x ? &dx : nullptr, std::vector<Tensor*>(count, nullptr)};
  for (size_t i = 0; i < count; ++i) {
    if (!need_weights[i]) continue;
    dws.push_back(torch::stable::empty_like(weights[i]));
    wanted.dws[i] = &dws.back();
  }
  dispatch(p.x.type(), [&](auto element) { differentiate<decltype(element)>(p, grads, wanted); });
  return {dx, dws};
}

STABLE_TORCH_LIBRARY_FRAGMENT(acnet_kernels, m) {
  m.def("direct_maps(Tensor x, Tensor[] weights, int[] taps, int[] geometry, bool channels_last) -> Tensor[]");
  m.def("direct_gradients(Tensor[] dys, Tensor x, Tensor[] weights, int[] taps, int[] geometry, bool need_x,"
        " bool[] need_weights, bool channels_last) -> (Tensor, Tensor[])");
}

STABLE_TORCH_LIBRARY_IMPL(acnet_kernels, CPU, m) {
  m.impl("direct_maps", TORCH_BOX(&maps));
  m.impl("direct_gradients", TORCH_BOX(&gradients));
}

}  // namespace acnet::direct
