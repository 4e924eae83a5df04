// The operator cross_correlation on the CPU: checks, blocks, threads and merging. Its meaning is documented in
// acnet_kernels/ops/autocorrelation.py. Which pixels are summed together depends on the shapes alone, never on the
// number of threads, and partial sums are merged in order: results are deterministic.
#include "autocorrelation.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <memory>
#include <tuple>
#include <vector>

#include "check.h"

namespace acnet::autocorrelation {
namespace {

constexpr int64_t kBlockElements = 32 << 10;  // of x and y each, packed: both stay in the second-level cache
constexpr int64_t kMostTasks = 32;
constexpr int64_t kLeastBlocks = 8;  // where there are as many images: small maps too occupy all threads
constexpr int64_t kPartialBytes = 64 << 20;  // of all tasks' partial sums

// How the pixels are cut into blocks: bands of rows of one image, or several whole images.
struct Cut {
  int64_t images, rows, image_blocks, bands;
  Cut(int64_t n, int64_t height, int64_t width, int64_t channels) {
    const int64_t row = width * channels;
    rows = std::min(height, std::max<int64_t>(8, kBlockElements / row));
    const int64_t most = std::max<int64_t>(n / kLeastBlocks, 1);
    images = rows < height ? 1 : std::clamp<int64_t>(kBlockElements / (row * height), 1, most);
    image_blocks = (n + images - 1) / images;
    bands = (height + rows - 1) / rows;
  }
  int64_t blocks() const { return image_blocks * bands; }
};

// A shift beyond the image sees nothing, as one of the image's size: however far, nothing is packed for it.
std::vector<int64_t> within(std::vector<int64_t> shifts, int64_t size) {
  for (int64_t& shift : shifts) shift = std::clamp(shift, -size, size);
  return shifts;
}

}  // namespace

template <class T, class A>
void correlate(const T* x, const A* x_pivot, const T* y, const A* y_pivot, const Maps& maps,
               std::vector<int64_t> rows, std::vector<int64_t> columns, A* products) {
  rows = within(std::move(rows), maps.height);
  columns = within(std::move(columns), maps.width);
  const int64_t shifts = static_cast<int64_t>(rows.size()), groups = maps.groups;
  const int64_t n = maps.images, height = maps.height, width = maps.width;
  const int64_t c = maps.x_channels / groups, k = maps.y_channels / groups;
  const int64_t cs = round_up(c, kRowTile), ks = round_up(k, kLanes<A>), size = shifts * cs * ks;
  const Cut cut(n, height, width, std::max(cs, ks));
  // A task is a tile of x channels in a share of the blocks: many channels need few shares, whose sums are large.
  const int64_t tiles = (cs + kMostRows - 1) / kMostRows;
  const int64_t most = std::clamp<int64_t>(kPartialBytes / (8 * groups * size), 1, std::max<int64_t>(kMostTasks / tiles, 1));
  const int64_t shares = std::min(cut.blocks(), most);
  const std::unique_ptr<double[]> partials(new double[shares * groups * size]);  // share, group, tile, shift, x, y
  const auto partial = [&](int64_t share, int64_t group, int64_t tile) {
    return partials.get() + (share * groups + group) * size + shifts * tile * kMostRows * ks;
  };
  const auto rows_of = [&](int64_t tile) { return std::min(cs - tile * kMostRows, kMostRows); };
  Block<T, A> block{};
  block.height = height, block.width = width;
  block.x_pixel = maps.x_channels, block.y_pixel = maps.y_channels;
  block.x_channels = c, block.y_channels = k;
  block.shift_rows = rows.data(), block.shift_columns = columns.data(), block.shifts = shifts;
  for (int64_t i = 0; i < shifts; ++i) {
    block.reach_rows = std::max({block.reach_rows, rows[i], -rows[i]});
    block.reach_columns = std::max({block.reach_columns, columns[i], -columns[i]});
  }
  torch::stable::parallel_for(0, shares * tiles, 1, [&](int64_t begin, int64_t end) {
    Block<T, A> b = block;
    b.images = cut.images, b.rows = cut.rows;
    const std::unique_ptr<A[]> x_packed(new A[x_scratch(b)]), y_packed(new A[y_scratch(b)]);
    const std::unique_ptr<A[]> block_sums(new A[shifts * std::min(cs, kMostRows) * ks]);
    b.x_packed = x_packed.get(), b.y_packed = y_packed.get(), b.block_sums = block_sums.get();
    for (int64_t task = begin; task < end; ++task) {
      const int64_t share = task / tiles, tile = task % tiles;
      b.x_first = tile * kMostRows, b.x_last = b.x_first + rows_of(tile);
      for (int64_t g = 0; g < groups; ++g) std::fill_n(partial(share, g, tile), shifts * rows_of(tile) * ks, 0.0);
      for (int64_t i = share * cut.blocks() / shares; i < (share + 1) * cut.blocks() / shares; ++i) {
        const int64_t image = i / cut.bands * cut.images;
        b.images = std::min(cut.images, n - image);
        b.first_row = i % cut.bands * cut.rows;
        b.rows = std::min(cut.rows, height - b.first_row);
        for (int64_t g = 0; g < groups; ++g) {
          b.x = x + image * height * width * b.x_pixel + g * c;
          b.y = y + image * height * width * b.y_pixel + g * k;
          b.x_pivot = x_pivot + g * c;
          b.y_pivot = y_pivot + g * k;
          b.sums = partial(share, g, tile);
          passes<T, A>().correlate(b);
        }
      }
    }
  });
  torch::stable::parallel_for(0, shifts * groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      std::vector<double> sum(cs * ks);
      for (int64_t share = 0; share < shares; ++share)
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const int64_t count = rows_of(tile) * ks;
          const double* from = partial(share, i % groups, tile) + i / groups * count;
          double* to = sum.data() + tile * kMostRows * ks;
          for (int64_t j = 0; j < count; ++j) to[j] += from[j];
        }
      for (int64_t a = 0; a < k; ++a)
        for (int64_t b = 0; b < c; ++b) products[(i * k + a) * c + b] = static_cast<A>(sum[b * ks + a]);
    }
  });
}

template <class T, class A>
void sum_images(const T* y, const A* pivot, const Maps& maps, A* total) {
  const int64_t n = maps.images, k = maps.y_channels, height = maps.height, row = maps.width * k;
  // Parts of the image in parallel: long runs of memory each.
  const int64_t grain = std::max<int64_t>(1, 4096 / std::max<int64_t>(row, 1));
  torch::stable::parallel_for(0, height, grain, [&](int64_t begin, int64_t end) {
    passes<T, A>().sum_images(y + begin * row, n, height * row, pivot, k, (end - begin) * row, total + begin * row);
  });
}

#define ACNET_INSTANTIATE(T, A)                                                                                  \
  template void correlate(const T*, const A*, const T*, const A*, const Maps&, std::vector<int64_t>,       \
                          std::vector<int64_t>, A*);                                                       \
  template void sum_images(const T*, const A*, const Maps&, A*);
ACNET_INSTANTIATE(float, float)
ACNET_INSTANTIATE(double, double)
ACNET_INSTANTIATE(c10::BFloat16, float)
ACNET_INSTANTIATE(c10::Half, float)
#undef ACNET_INSTANTIATE

namespace {

constexpr Check check("cross_correlation");

void check_map(const View& map, const View& pivot, const char* name, const char* pivot_name, const View& x) {
  check.map(map, name);
  check(map.dense(true), name, " must be in channels_last layout");
  check.type(map, name, x.type(), "x's dtype");
  check.readable(pivot, pivot_name);
  check.shape(pivot, pivot_name, {map.sizes[1]});
  check.type(pivot, pivot_name, sums_of(x.type()), "the dtype sums are kept in");
  check.contiguous(pivot, pivot_name);
}

std::tuple<Tensor, Tensor> cross_correlation(Tensor x, Tensor x_pivot, Tensor y, Tensor y_pivot,
                                             std::vector<int64_t> rows, std::vector<int64_t> columns, int64_t groups) {
  const View first(x), second(y);
  check_map(first, View(x_pivot), "x", "x_pivot", first);
  check_map(second, View(y_pivot), "y", "y_pivot", first);
  for (const int d : {0, 2, 3})
    check(first.sizes[d] == second.sizes[d], "x and y must have the same images and pixels, got ", first.shape(), " and ",
          second.shape());
  check.groups(groups, first.sizes[1], "x's");
  check.groups(groups, second.sizes[1], "y's");
  check(!rows.empty() && rows.size() == columns.size(), "rows and columns must be as long as each other, got ", rows.size(),
        " and ", columns.size());
  const ScalarType type = first.type();
  Tensor products = torch::stable::new_empty(
      y_pivot, {static_cast<int64_t>(rows.size()), groups, y.size(1) / groups, x.size(1) / groups});
  Tensor total = torch::stable::new_empty(y_pivot, {y.size(2), y.size(3), y.size(1)});
  const auto run = [&](auto t, auto a) {
    using T = decltype(t);
    using A = decltype(a);
    const Maps maps{first.sizes[0], first.sizes[2], first.sizes[3], first.sizes[1], second.sizes[1], groups};
    const auto numbers = [](const Tensor& t) { return static_cast<const A*>(t.const_data_ptr()); };
    const T *from_x = static_cast<const T*>(x.const_data_ptr()), *from_y = static_cast<const T*>(y.const_data_ptr());
    correlate(from_x, numbers(x_pivot), from_y, numbers(y_pivot), maps, rows, columns,
              static_cast<A*>(products.mutable_data_ptr()));
    sum_images(from_y, numbers(y_pivot), maps, static_cast<A*>(total.mutable_data_ptr()));
  };
  if (type == ScalarType::Float) run(float{}, float{});
  else if (type == ScalarType::Double) run(double{}, double{});
  else if (type == ScalarType::BFloat16) run(c10::BFloat16{}, float{});
  else run(c10::Half{}, float{});
  return {products, torch::stable::transpose(torch::stable::transpose(total, 1, 2), 0, 1)};
}

}  // namespace
}  // namespace acnet::autocorrelation

STABLE_TORCH_LIBRARY_FRAGMENT(acnet_kernels, m) {
  m.def(
      "cross_correlation(Tensor x, Tensor x_pivot, Tensor y, Tensor y_pivot, int[] rows, int[] columns, int groups)"
      " -> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(acnet_kernels, CPU, m) {
  m.impl("cross_correlation", TORCH_BOX(&acnet::autocorrelation::cross_correlation));
}
