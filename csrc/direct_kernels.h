// The passes of direct.h for one instruction set: included once by each direct_<isa>.cpp.

#include "packed_rows.h"

namespace acnet::direct::ACNET_ISA {
namespace {

using namespace rows::ACNET_ISA;

constexpr int64_t kL = kLanes<float>;
// Pixels whose sums, of two vectors each, fill the registers but for the kernel's two and one more; of one, twice as
// many.
constexpr int kPixels = ACNET_BYTES == 64 ? 14 : 6;

// A row of a kernel's taps, for one block of a source: a pixel and kL·kL weights after another.
struct Run {
  const float *pixels, *weights;
};

// Pixels of Vectors blocks of a target: to, or 0, plus the runs, of `taps` taps, `step` numbers apart.
template <int Vectors, int Pixels>
void add_runs(const Run* runs, int count, int64_t taps, int64_t step, int64_t channels, int64_t block, bool begun,
              float* to, int64_t to_block) {
  Vec<float> sums[Vectors][Pixels];
#pragma GCC unroll 2
  for (int k = 0; k < Vectors; ++k)
#pragma GCC unroll 32
    for (int u = 0; u < Pixels; ++u) sums[k][u] = begun ? load<float>(to + k * to_block + u * kL) : Vec<float>{};
  for (int i = 0; i < count; ++i) {
    const float *pixels = runs[i].pixels, *weights = runs[i].weights;
    for (int64_t t = 0; t < taps; ++t, pixels += step, weights += kL * kL) {
      const float* at = weights;
      for (int64_t c = 0; c < channels; ++c, at += kL) {
        Vec<float> w[Vectors];
#pragma GCC unroll 2
        for (int k = 0; k < Vectors; ++k) w[k] = load<float>(at + k * block);
#pragma GCC unroll 32
        for (int u = 0; u < Pixels; ++u) {
          const Vec<float> x = spread(pixels[c + u * kL]);
#pragma GCC unroll 2
          for (int k = 0; k < Vectors; ++k) sums[k][u] = multiply_add(w[k], x, sums[k][u]);
        }
      }
    }
  }
#pragma GCC unroll 2
  for (int k = 0; k < Vectors; ++k)
#pragma GCC unroll 32
    for (int u = 0; u < Pixels; ++u) store(to + k * to_block + u * kL, sums[k][u]);
}

using AddRuns = void (*)(const Run*, int, int64_t, int64_t, int64_t, int64_t, bool, float*, int64_t);

template <int Vectors, int... Pixels>
AddRuns pick(int64_t pixels, std::integer_sequence<int, Pixels...>) {
  static constexpr AddRuns all[] = {add_runs<Vectors, Pixels + 1>...};
  return all[pixels - 1];
}

template <int Vectors>
AddRuns adder_of(int64_t pixels) {
  return pick<Vectors>(pixels, std::make_integer_sequence<int, 2 * kPixels / Vectors>());
}

// A row of a target, all of its columns, in as few parts of about one size as there can be.
template <int Vectors>
void add_row(Run* runs, int count, const Taps& taps, int64_t channels, int64_t block, bool begun, int64_t columns,
             float* to, int64_t to_block) {
  constexpr int64_t most = 2 * kPixels / Vectors;
  const int64_t parts = (columns + most - 1) / most, size = columns / parts, larger = columns - size * parts;
  for (int64_t part = 0, at = 0; part < parts; ++part) {
    const int64_t pixels = part < larger ? size + 1 : size;
    adder_of<Vectors>(pixels)(runs, count, taps.columns, taps.column_step * kL, channels, block, begun, to + at * kL,
                              to_block);
    for (int i = 0; i < count; ++i) runs[i].pixels += pixels * kL;
    at += pixels;
  }
}

inline int64_t blocks_of(int64_t channels) { return (channels + kL - 1) / kL; }

// The same where channels are adjacent and fill all blocks: memory is read in its order.
template <class T>
void pack_pixels(const Maps<const T>& from, int64_t image, const Packed& to, int64_t first, int64_t end) {
  const int64_t of_row = to.pitch * kL, of_block = to.rows * of_row, blocks = from.channels / kL;
  for (int64_t r = 0; r < to.rows; ++r) {
    float* row = to.data + r * of_row;
    for (int64_t b = 0; b < blocks; ++b) {
      __builtin_memset(row + b * of_block, 0, first * kL * sizeof(float));
      __builtin_memset(row + b * of_block + end * kL, 0, (to.pitch - end) * kL * sizeof(float));
    }
    const T* p = from.data + image * from.image + (to.first + r) * from.row + to.left * from.column;
    for (int64_t j = first; j < end; ++j)
      for (int64_t b = 0; b < blocks; ++b)
        store(row + b * of_block + j * kL, load<float>(p + j * from.column + b * kL));
  }
}

template <class T>
void pack(const Maps<const T>& from, int64_t image, const Packed& to) {
  const int64_t first = to.left < 0 ? -to.left : 0,
                end = from.width - to.left < to.pitch ? from.width - to.left : to.pitch;
  if (from.channel == 1 && from.channels % kL == 0 && end > first) return pack_pixels<T>(from, image, to, first, end);
  float* row = to.data;
  for (int64_t c = 0; c < from.channels; c += kL) {
    const int64_t lanes = from.channels - c < kL ? from.channels - c : kL;
    const Map<const T> map{from.data + c * from.channel, from.limit, from.image, from.channel, from.row, from.column,
                           static_cast<int>(lanes)};
    for (int64_t q = to.first; q < to.first + to.rows; ++q, row += to.pitch * kL) {
      __builtin_memset(row, 0, first * kL * sizeof(float));
      const T* p = map.data + image * map.image + q * map.row + (to.left + first) * map.column;
      if (end > first) pack_row<T, float>(map, p, end - first, Vec<float>{}, {}, row + first * kL);
      const int64_t done = end > first ? end : first;
      __builtin_memset(row + done * kL, 0, (to.pitch - done) * kL * sizeof(float));
    }
  }
}

template <int Vectors>
void convolve_blocks(const Packed* sources, const Link* links, int count, int target, int64_t block, int64_t begin,
                     int64_t end, int64_t columns, float* sums, int64_t to_block) {
  bool begun = false;
  for (int l = 0; l < count; ++l) {
    const Link& link = links[l];
    if (link.target != target) continue;
    const Packed& source = sources[link.source];
    const Taps& taps = link.taps;
    const int64_t blocks = blocks_of(source.channels), of_row = taps.columns * kL * kL, of_block = taps.rows * of_row;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t channels = source.channels - b * kL < kL ? source.channels - b * kL : kL;
      const float *pixels = source.data + (b * source.rows * source.pitch + taps.column - source.left) * kL,
                  *weights = link.weights + (block * blocks + b) * of_block;
      for (int64_t h = begin; h < end; ++h) {
        Run runs[kMostRows];
        int used = 0;
        for (int64_t r = 0; r < taps.rows; ++r) {
          const int64_t q = h + taps.row + r * taps.row_step - source.first;
          if (q >= 0 && q < source.rows) runs[used++] = {pixels + q * source.pitch * kL, weights + r * of_row};
        }
        add_row<Vectors>(runs, used, taps, channels, blocks * of_block, begun, columns,
                         sums + (h - begin) * columns * kL, to_block);
      }
      begun = true;
    }
  }
}

template <class T>
void convolve(const Packed* sources, const Link* links, int count, int target, const Maps<T>& out, int64_t image,
              int64_t begin, int64_t end, float* scratch) {
  const int64_t blocks = blocks_of(out.channels), size = (end - begin) * out.width * kL;
  for (int64_t block = 0; block < blocks; block += 2) {
    const int64_t vectors = block + 1 < blocks ? 2 : 1;
    if (vectors == 2)
      convolve_blocks<2>(sources, links, count, target, block, begin, end, out.width, scratch, size);
    else
      convolve_blocks<1>(sources, links, count, target, block, begin, end, out.width, scratch, size);
    for (int64_t k = 0; k < vectors; ++k) {
      const int64_t c = (block + k) * kL, lanes = out.channels - c < kL ? out.channels - c : kL;
      const Map<T> map{out.data + c * out.channel, nullptr, out.image, out.channel, out.row, out.column,
                       static_cast<int>(lanes)};
      T* first = map.data + image * map.image;
      for (int64_t h = begin; h < end; ++h)
        unpack_row<T, float>(scratch + k * size + (h - begin) * out.width * kL, out.width, map, {}, first + h * map.row,
                             first + end * map.row);
    }
  }
}

// Rows × columns pixels: for Taps taps, a pixel apart, and Channels lanes of a source.
template <int Taps_, int Channels>
void add_products(const float* pixels, int64_t pitch, const float* grad, int64_t grad_pitch, int64_t rows,
                  int64_t columns, float* to) {
  Vec<float> sums[Taps_][Channels];
#pragma GCC unroll 4
  for (int t = 0; t < Taps_; ++t)
#pragma GCC unroll 16
    for (int c = 0; c < Channels; ++c) sums[t][c] = load<float>(to + (t * kL + c) * kL);
  for (int64_t r = 0; r < rows; ++r) {
    const float *x = pixels + r * pitch, *g = grad + r * grad_pitch;
    for (int64_t j = 0; j < columns; ++j, x += kL, g += kL) {
      __asm__ volatile("" : : : "memory");  // or GCC keeps what the next pixel reads too, and the sums on the stack
      const Vec<float> own = load<float>(g);
#pragma GCC unroll 4
      for (int t = 0; t < Taps_; ++t)
#pragma GCC unroll 16
        for (int c = 0; c < Channels; ++c) sums[t][c] = multiply_add(own, spread(x[t * kL + c]), sums[t][c]);
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < Taps_; ++t)
#pragma GCC unroll 16
    for (int c = 0; c < Channels; ++c) store(to + (t * kL + c) * kL, sums[t][c]);
}

template <int Taps_>
void add_all_products(const float* pixels, int64_t pitch, const float* grad, int64_t grad_pitch, int64_t rows,
                      int64_t columns, int64_t channels, float* to) {
  constexpr int at_once = Taps_ == 1 ? int(kL) : int(kL) / 2;
  for (int64_t c = 0; c < channels; c += at_once)
    add_products<Taps_, at_once>(pixels + c, pitch, grad, grad_pitch, rows, columns, to + c * kL);
}

template <class T>
void correlate(const Packed& source, const Packed& grad, const Taps& taps, int64_t begin, int64_t end, int64_t columns,
               float* weights) {
  const int64_t blocks = blocks_of(source.channels), out_blocks = blocks_of(grad.channels);
  for (int64_t k = 0; k < out_blocks; ++k)
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t channels = source.channels - b * kL < kL ? source.channels - b * kL : kL;
      for (int64_t r = 0; r < taps.rows; ++r) {
        float* to = weights + (((k * blocks + b) * taps.rows + r) * taps.columns) * kL * kL;
        // The rows whose tap is in the image.
        const int64_t away = taps.row + r * taps.row_step - source.first;
        const int64_t first = begin + away < 0 ? -away : begin,
                      last = end + away > source.rows ? source.rows - away : end;
        if (first >= last) continue;
        const float* g = grad.data + ((k * grad.rows + first - grad.first) * grad.pitch - grad.left) * kL;
        const float* x =
            source.data + ((b * source.rows + first + away) * source.pitch + taps.column - source.left) * kL;
        const int64_t pitch = source.pitch * kL, grad_pitch = grad.pitch * kL, together = taps.column_step == 1 ? 3 : 1;
        for (int64_t t = 0; t < taps.columns;) {
          const int64_t left = taps.columns - t, taken = left < together              ? left
                                                         : together == 3 && left == 4 ? 2
                                                                                      : together;
          const auto add = taken == 3 ? add_all_products<3> : taken == 2 ? add_all_products<2> : add_all_products<1>;
          add(x + t * taps.column_step * kL, pitch, g, grad_pitch, last - first, columns, channels, to + t * kL * kL);
          t += taken;
        }
      }
    }
}

}  // namespace

template <class T>
Passes<T> passes() {
  return {int(kL), pack<T>, convolve<T>, correlate<T>};
}

template Passes<float> passes();
template Passes<c10::BFloat16> passes();
template Passes<c10::Half> passes();

}  // namespace acnet::direct::ACNET_ISA
