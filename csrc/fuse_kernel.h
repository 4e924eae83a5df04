// The CUDA kernel's body: which elements a (tile, thread) folds, in what order, through what accesses. Plain C++, so
// that tests run every thread of a launch on the host. A launch is one grid for all blocks: tile t belongs to the
// last block whose first_tile is ≤ t, and covers a contiguous piece of that block's output. The kernel runs
// fold_scales() on all threads of the CTA, a barrier, then fold_tile() on all threads.
#pragma once

#include "fuse_math.h"

namespace acnet {

constexpr int kThreads = 256;
constexpr int kTileElements = 4096;
constexpr int kTileScales = 1536;  // at most as many scales, one a channel and branch, belong to one tile
constexpr int kVectorBytes = 16;
static_assert(kTileScales / kMostBranches - 2 >= kVectorBytes, "a tile of every block is a vector at least");

#if defined(CUDART_VERSION) && CUDART_VERSION < 12010
constexpr int kParameterBytes = 4096;
#else
constexpr int kParameterBytes = 32764;  // sm_70 and later, since CUDA 12.1
#endif
constexpr int kMaxBlocks = (kParameterBytes - 16) / int(sizeof(Block) + 3 * sizeof(Branch));
constexpr int kMaxBranches = 3 * kMaxBlocks;  // the norms of sums among them

// The launch's parameters: descriptors travel with the launch, so that nothing is copied to the device, nothing is
// kept alive, and a captured CUDA graph holds them by value.
struct Launch {
  Block blocks[kMaxBlocks];
  Branch branches[kMaxBranches];
  int32_t count;
};

struct Scales {  // the CTA's shared memory: of the channels its tile meets
  alignas(16) unsigned char bytes[kTileScales * sizeof(double)];
};

// Output elements of a tile: a whole number of vectors, small enough that the scales of the channels it meets fit.
ACNET_HD int64_t tile_elements(const Block& block) {
  int64_t const most = (kTileScales / block.branches - 2) * block.row() / kVectorBytes * kVectorBytes;
  return most < kTileElements ? most : kTileElements;
}

ACNET_HD int64_t tile_count(const Block& block) {
  int64_t const tile = tile_elements(block);
  return (block.numel() + tile - 1) / tile;
}

ACNET_HD const Block& block_of(const Launch& launch, int tile) {
  int low = 0, high = launch.count;  // the block is in [low, high)
  while (high - low > 1) {
    int const middle = (low + high) / 2;
    if (launch.blocks[middle].first_tile <= tile) low = middle;
    else high = middle;
  }
  return launch.blocks[low];
}

struct Piece {  // a tile's elements [begin, end) of its block's output in memory order, and its first channel
  int64_t begin, end, channel;
};

ACNET_HD Piece piece_of(const Block& block, int tile) {
  int64_t const size = tile_elements(block), numel = block.numel(), begin = (tile - block.first_tile) * size;
  return {begin, begin + size < numel ? begin + size : numel, begin / block.row()};
}

// Puts the scales of the tile's channels into shared memory, and writes the biases of those that begin in it.
template <class T>
ACNET_HD void fold_scales(const Block& block, const Branch* branches, const Piece& piece, int thread, Scales& shared) {
  using A = typename Accumulate<T>::type;
  A* scales = reinterpret_cast<A*>(shared.bytes);
  for (int64_t o = piece.channel + thread; o * block.row() < piece.end; o += kThreads) {
    A const bias = fold_channel<A>(block, branches, o, scales + (o - piece.channel) * block.branches);
    if (o * block.row() >= piece.begin) static_cast<T*>(block.bias)[o] = T(bias);
  }
}

template <class T>
struct alignas(kVectorBytes) Vector {
  T lanes[kVectorBytes / sizeof(T)];
};

struct Index {  // of one output element
  int64_t o;
  int c, r, s;
};

// From the start of the tile's first channel on, an element's offset fits 32 bits: a row has fewer than 2^31 elements.
ACNET_HD Index index_of(const Block& block, const Piece& piece, int64_t element) {
  uint32_t const row = uint32_t(block.row()), offset = uint32_t(element - piece.channel * row);
  int64_t const o = piece.channel + offset / row;
  int const rest = int(offset % row), columns = block.columns, taps = block.taps();
  if (block.channels_last) {
    int const tap = rest / block.inputs;
    return {o, rest - tap * block.inputs, tap / columns, tap % columns};
  }
  int const c = rest / taps, tap = rest - c * taps;
  return {o, c, tap / columns, tap % columns};
}

// To the next element in memory order.
ACNET_HD void advance(const Block& block, Index& at) {
  if (block.channels_last) {
    if (++at.c < block.inputs) return;
    at.c = 0;
  }
  if (++at.s < block.columns) return;
  at.s = 0;
  if (++at.r < block.rows) return;
  at.r = 0;
  if (!block.channels_last && ++at.c < block.inputs) return;
  if (!block.channels_last) at.c = 0;
  ++at.o;
}

// Folds this thread's elements: vector i of the tile for i = thread, thread + kThreads, …; 16-byte accesses to
// weight and to a first branch that covers all taps where both are aligned and the vector is whole.
template <class T>
ACNET_HD void fold_tile(const Block& block, const Branch* branches, const Piece& piece, int thread, const Scales& shared) {
  using A = typename Accumulate<T>::type;
  constexpr int lanes = kVectorBytes / sizeof(T);
  const A* scales = reinterpret_cast<const A*>(shared.bytes);
  T* weight = static_cast<T*>(block.weight);
  const T* first = static_cast<const T*>(branches[0].kernel);
  for (int64_t e = piece.begin + int64_t(thread) * lanes; e < piece.end; e += int64_t(kThreads) * lanes) {
    bool const whole = block.aligned && e + lanes <= piece.end;
    int const count = piece.end - e < lanes ? int(piece.end - e) : lanes;
    Vector<T> values;
    if (whole) values = *reinterpret_cast<const Vector<T>*>(first + e);
    Index at = index_of(block, piece, e);
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
    for (int lane = 0; lane < lanes; ++lane) {
      if (lane >= count) break;
      const A* scale = scales + (at.o - piece.channel) * block.branches;
      A const x = whole ? scale[0] * A(values.lanes[lane]) : A(0);
      T const folded = T(fold_element<T, A>(block, branches, scale, whole, x, at.o, at.c, at.r, at.s));
      if (whole) values.lanes[lane] = folded;
      else weight[e + lane] = folded;
      advance(block, at);
    }
    if (whole) *reinterpret_cast<Vector<T>*>(weight + e) = values;
  }
}

}  // namespace acnet
