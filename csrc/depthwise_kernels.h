// The passes of depthwise.h for one instruction set: included once by each depthwise_<isa>.cpp. A pass packs the rows it
// needs (packed_rows.h) into a window that moves down the image, zeros beyond its borders.

#include "packed_rows.h"

namespace acnet::depthwise::ACNET_ISA {
namespace {

using namespace rows::ACNET_ISA;

// The rows of a map around the one at hand, packed.
template <class T, class A>
struct Window {
  const Map<const T>* map;
  Vec<A> pivot;
  Told<T, A> told;
  int64_t rows, columns, left, pitch, count;
  int64_t* held;
  A *slots, *zero;

  void open(const Map<const T>& own, Vec<A> level, int64_t height, int64_t width, int64_t before, int64_t after,
            int64_t rows_held, Memory<A>& memory) {
    map = &own;
    pivot = level;
    rows = height;
    columns = width;
    left = before;
    pitch = (before + width + after) * kLanes<A>;
    for (count = 1; count < rows_held;) count *= 2;  // so that a row's slot takes no division
    held = memory.template take<int64_t>(count);
    slots = memory.take(count * pitch);
    zero = memory.take(pitch);
    for (int64_t i = 0; i < count; ++i) {
      held[i] = -1;
      __builtin_memset(slots + i * pitch, 0, left * kLanes<A> * sizeof(A));
      __builtin_memset(slots + i * pitch + (left + columns) * kLanes<A>, 0, after * kLanes<A> * sizeof(A));
    }
    __builtin_memset(zero, 0, pitch * sizeof(A));
  }

  // A row's vectors lie far apart: where the processor would go on are other channels, or it is as many streams as
  // there are planes.
  void prefetch(int64_t n, int64_t q) const {
    if (q >= rows) return;
    const T* from = map->data + n * map->image + q * map->row;
    fetch_row<T>(*map, from, columns);
    if (told.out != nullptr) fetch_row<T>(*map, from + (told.out - map->data), columns);
  }

  // Row q of image n from its first column on.
  const A* row(int64_t n, int64_t q) {
    if (q < 0 || q >= rows) return zero + left * kLanes<A>;
    const int64_t slot = q & (count - 1);
    A* to = slots + slot * pitch + left * kLanes<A>;
    if (held[slot] != n * rows + q) {
      held[slot] = n * rows + q;
      prefetch(n, q + 1);
      pack_row<T, A>(*map, map->data + n * map->image + q * map->row, columns, pivot, told, to);
    }
    return to;
  }
};

// Rows from one on, through all images: a division for each would take as long as a few pixels.
struct Line {
  int64_t n, q, lines;

  Line(int64_t at, int64_t of) : n(of > 0 ? at / of : 0), q(of > 0 ? at % of : 0), lines(of) {}
  void next() {
    if (++q < lines) return;
    q = 0;
    ++n;
  }
};

// ---- sums of products: Σ_c fixed[c]·moved_r[c + b], rows r < Rows and pixels b < Runs ----

template <int Rows, int Run, class A>
void multiply_rows(const A* fixed, int64_t fixed_step, const A* const* moved, int64_t moved_step, int64_t n, A* sums) {
  constexpr int lanes = kLanes<A>;
  Vec<A> acc[Rows][Run] = {};
  const A* from[Rows];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) from[r] = moved[r];
  for (int64_t c = 0; c < n; ++c, fixed += fixed_step) {
    const Vec<A> own = load<A>(fixed);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 13
      for (int b = 0; b < Run; ++b) acc[r][b] = multiply_add(own, load<A>(from[r] + b * lanes), acc[r][b]);
      from[r] += moved_step;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 13
    for (int b = 0; b < Run; ++b) {
      A* sum = sums + (r * Run + b) * lanes;
      store(sum, load<A>(sum) + acc[r][b]);
    }
}

// Rows of `run` neighbours each, whose sums follow each other.
template <class A>
void multiply_runs(const A* fixed, int64_t fixed_step, const A* const* moved, int rows, int run, int64_t moved_step,
                   int64_t n, A* sums) {
  using Multiply = void (*)(const A*, int64_t, const A* const*, int64_t, int64_t, A*);
  static constexpr Multiply kOne[] = {multiply_rows<1, 1, A>,  multiply_rows<1, 2, A>,  multiply_rows<1, 3, A>,
                                      multiply_rows<1, 4, A>,  multiply_rows<1, 5, A>,  multiply_rows<1, 6, A>,
                                      multiply_rows<1, 7, A>,  multiply_rows<1, 8, A>,  multiply_rows<1, 9, A>,
                                      multiply_rows<1, 10, A>, multiply_rows<1, 11, A>, multiply_rows<1, 12, A>,
                                      multiply_rows<1, 13, A>};
  static constexpr Multiply kTwo[] = {multiply_rows<2, 1, A>, multiply_rows<2, 2, A>, multiply_rows<2, 3, A>,
                                      multiply_rows<2, 4, A>, multiply_rows<2, 5, A>, multiply_rows<2, 6, A>};
  static constexpr Multiply kThree[] = {multiply_rows<3, 1, A>, multiply_rows<3, 2, A>, multiply_rows<3, 3, A>,
                                        multiply_rows<3, 4, A>};
  for (int r = 0; r < rows;) {
    int taken = 1;
    if (run <= 4 && rows - r >= 3) taken = 3;
    else if (run <= 6 && rows - r >= 2) taken = 2;
    const Multiply* multiply = taken == 3 ? kThree : taken == 2 ? kTwo : kOne;
    multiply[run - 1](fixed, fixed_step, moved + r, moved_step, n, sums + int64_t(r) * run * kLanes<A>);
    r += taken;
  }
}

template <class A>
void add_up(const A* from, int64_t step, int64_t n, A* sum) {
  Vec<A> acc[4] = {};
  int64_t c = 0;
  for (; c + 4 <= n; c += 4, from += 4 * step)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) acc[i] += load<A>(from + i * step);
  for (; c < n; ++c, from += step) acc[0] += load<A>(from);
  store(sum, load<A>(sum) + ((acc[0] + acc[1]) + (acc[2] + acc[3])));
}

// Sums over pieces of so many pixels or rows, then over the pieces in double.
constexpr int64_t kPiecePixels = 4096, kPieceRows = 128;

template <class A>
struct Piece {
  A* sums;
  double* total;
  int64_t numbers, pixels, rows;

  Piece(int64_t vectors, double* total, Memory<A>& memory)
      : sums(memory.take(vectors * kLanes<A>)), total(total), numbers(vectors * kLanes<A>), pixels(0), rows(0) {
    __builtin_memset(sums, 0, numbers * sizeof(A));
  }
  void end_row(int64_t columns) {
    pixels += columns;
    if (++rows >= kPieceRows || pixels >= kPiecePixels) end();
  }
  void end() {
    for (int64_t i = 0; i < numbers; ++i) total[i] += double(sums[i]);
    __builtin_memset(sums, 0, numbers * sizeof(A));
    pixels = rows = 0;
  }
};

// The rows of a half plane of shifts, or of all taps behind one: where they begin, and how many neighbours each has.
template <class A>
void multiply_half_plane(const A* fixed, int64_t step, const A* const* rows, int present, int64_t first, int64_t before,
                         int64_t after, int64_t spread, int64_t n, A* sums) {
  // Of row 0 neighbours 0 to `after`, of the others −before to after; `spread` is their distance.
  constexpr int lanes = kLanes<A>;
  const int own = int(after) + 1, all = int(before + after) + 1;
  const A* moved[2 * kMostTaps];
  if (spread == 1) {
    moved[0] = rows[0] + first * lanes;
    multiply_runs<A>(fixed, step, moved, 1, own, step, n, sums);
    for (int r = 1; r < present; ++r) moved[r - 1] = rows[r] + (first - before) * lanes;
    if (present > 1) multiply_runs<A>(fixed, step, moved, present - 1, all, step, n, sums + own * lanes);
    return;
  }
  for (int r = 0; r < present; ++r) {
    const int64_t from = r == 0 ? 0 : -before;
    for (int64_t b = from; b <= after; ++b) moved[b - from] = rows[r] + (first + b * spread) * lanes;
    multiply_runs<A>(fixed, step, moved, int(after - from) + 1, 1, step, n, sums);
    sums += (after - from + 1) * lanes;
  }
}

template <class T, class A>
void moments(const Plan& plan, const Map<const T>& x, const A* pivot, int64_t begin, int64_t end, A* scratch,
             double* products, double* sums) {
  constexpr int lanes = kLanes<A>;
  const Axis &rows = plan.rows, &columns = plan.columns;
  Memory<A> memory{scratch};
  Piece<A> product(plan.products, products, memory), sum(plan.sums, sums, memory);
  const int64_t left = plan.by_kind ? columns.reach : columns.padding, right = plan.by_kind ? columns.reach : columns.after;
  Window<T, A> window;
  window.open(x, load<A>(pivot), rows.size, columns.size, left, right, rows.reach + 1, memory);
  const auto add_row = [&](int64_t n, int64_t q) {
    const A* own = window.row(n, q);
    for (int s = 0; s < columns.fine.count; ++s) {
      const Segment& seg = columns.fine.data[s];
      add_up<A>(own + seg.first * lanes, seg.step * lanes, seg.count,
                sum.sums + (int64_t(rows.fine_of[q]) * columns.fine_kinds + seg.kind) * lanes);
    }
    sum.end_row(columns.size);
  };
  const A* from[kMostTaps];
  if (plan.by_kind) {
    Line line(begin, rows.size);
    for (int64_t i = begin; i < end; ++i, line.next()) {
      const int64_t n = line.n, q = line.q;
      int present = 0;
      for (; present < rows.taps && q + present * rows.dilation < rows.size; ++present)
        from[present] = window.row(n, q + present * rows.dilation);
      for (int s = 0; s < columns.coarse.count; ++s) {
        const Segment& seg = columns.coarse.data[s];
        A* to = product.sums + (int64_t(rows.coarse_of[q]) * columns.coarse_kinds + seg.kind) * plan.shift_count * lanes;
        multiply_half_plane<A>(from[0] + seg.first * lanes, seg.step * lanes, from, present, seg.first, columns.taps - 1,
                               columns.taps - 1, columns.dilation, seg.count, to);
      }
      product.end_row(columns.size);
      add_row(n, q);
    }
  } else {
    const int taps = columns.taps;
    Line line(begin, rows.out);
    for (int64_t i = begin; i < end; ++i, line.next()) {
      const int64_t n = line.n, p = line.q, top = p * rows.stride - rows.padding;
      for (int r = 0; r < rows.taps; ++r) from[r] = window.row(n, top + r * rows.dilation);
      A* to = product.sums;
      for (int t = 0; t < plan.taps; ++t) {
        const int r = t / taps, b = t % taps, left_taps = b, right_taps = taps - 1 - b;
        const int64_t first = b * columns.dilation - columns.padding;
        multiply_half_plane<A>(from[r] + first * lanes, columns.stride * lanes, from + r, rows.taps - r, first, left_taps,
                               right_taps, columns.dilation, columns.out, to);
        to += (plan.taps - t) * lanes;
      }
      product.end_row(columns.out);
      // The input rows from this window's top to the next one's, and all before the first and after the last.
      const int64_t own_first = p == 0 ? 0 : top > 0 ? top : 0;
      const int64_t own_end = p == rows.out - 1 || top + rows.stride > rows.size ? rows.size : top + rows.stride;
      for (int64_t q = own_first; q < own_end; ++q) add_row(n, q);
    }
  }
  product.end();
  sum.end();
}

// ---- sums of terms: out[c] = init[kind[c]] + Σ_i weight_i·from_i[c] ----

// A run of terms of one row: each has its pixels and its weight so far behind the one before.
template <class A>
struct Term {
  int row, count;
  int64_t first;  // from where the row begins
  const A* weight;
  int64_t from_step, weight_step;
};

// Terms whose pixels follow each other, then terms whose pixels are Step apart.
template <class A>
struct TermList {
  const Term<A>* data;
  int near, all;
};

template <int Pixels, int Step, class A>
inline __attribute__((always_inline)) void add_run(const Term<A>& run, const A* const* rows, int64_t first, Vec<A> (&acc)[Pixels]) {
  constexpr int lanes = kLanes<A>;
  const A *from = rows[run.row] + run.first + first * Step * lanes, *weights = run.weight;
  for (int i = 0; i < run.count; ++i, from += run.from_step, weights += run.weight_step) {
    const Vec<A> weight = load<A>(weights);
#pragma GCC unroll 16
    for (int u = 0; u < Pixels; ++u) acc[u] = multiply_add(weight, load<A>(from + u * Step * lanes), acc[u]);
  }
}

template <int Pixels, int Step, class A>
void add_terms(const TermList<A>& terms, const A* const* rows, const A* init, const int* kinds, int64_t kind_step,
               int64_t first, int64_t blocks, A* to, int64_t to_step) {
  constexpr int lanes = kLanes<A>;
  for (int64_t c = first; blocks > 0; --blocks, c += Pixels) {
    Vec<A> acc[Pixels];
#pragma GCC unroll 16
    for (int u = 0; u < Pixels; ++u) acc[u] = load<A>(init + kinds[(c + u) * kind_step] * int64_t(lanes));
    for (int i = 0; i < terms.near; ++i) add_run<Pixels, 1, A>(terms.data[i], rows, c, acc);
    for (int i = terms.near; i < terms.all; ++i) add_run<Pixels, Step, A>(terms.data[i], rows, c, acc);
    A* target = to + c * to_step;
#pragma GCC unroll 16
    for (int u = 0; u < Pixels; ++u) store(target + u * to_step, acc[u]);
  }
}

// One pixel, of runs of one: in four sums, as each would wait for the one before.
template <class A>
Vec<A> add_single(const TermList<A>& terms, const A* const* rows, Vec<A> init) {
  Vec<A> acc[4] = {init};
  const auto add = [&](const Term<A>& term, Vec<A>& sum) {
    sum = multiply_add(load<A>(term.weight), load<A>(rows[term.row] + term.first), sum);
  };
  int i = 0;
  for (; i + 4 <= terms.all; i += 4)
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) add(terms.data[i + u], acc[u]);
  for (; i < terms.all; ++i) add(terms.data[i], acc[0]);
  return (acc[0] + acc[1]) + (acc[2] + acc[3]);
}

template <class A>
using AddTerms = void (*)(const TermList<A>&, const A* const*, const A*, const int*, int64_t, int64_t, int64_t, A*, int64_t);

template <int Step, class A>
inline AddTerms<A> adder_of(int64_t pixels) {
  static constexpr AddTerms<A> kAll[] = {
      add_terms<1, Step, A>, add_terms<2, Step, A>,  add_terms<3, Step, A>,  add_terms<4, Step, A>,
      add_terms<5, Step, A>, add_terms<6, Step, A>,  add_terms<7, Step, A>,  add_terms<8, Step, A>,
      add_terms<9, Step, A>, add_terms<10, Step, A>, add_terms<11, Step, A>, add_terms<12, Step, A>,
  };
  return kAll[pixels - 1];
}

// n pixels: as few blocks of at most ACNET_ROW as there can be, of about one size.
template <class A>
void add_all_terms(const TermList<A>& terms, const A* const* rows, int64_t step, const A* init, const int* kinds,
                   int64_t kind_step, int64_t n, A* to, int64_t to_step) {
  if (step > 2 && terms.all > terms.near) {
    Term<A> moved[(kMostMultiplier + 2) * kMostTaps];
    for (int64_t c = 0; c < n; ++c) {
      for (int i = 0; i < terms.all; ++i) {
        moved[i] = terms.data[i];
        moved[i].first += (i < terms.near ? c : c * step) * kLanes<A>;
      }
      const TermList<A> one = {moved, terms.near, terms.all};
      add_terms<1, 1, A>(one, rows, init, kinds + c * kind_step, kind_step, 0, 1, to + c * to_step, to_step);
    }
    return;
  }
  // Of 32 bits, as rows are: a wider division takes as long as a few pixels.
  const uint32_t all = uint32_t(n), blocks = (all + ACNET_ROW - 1) / ACNET_ROW, size = all / blocks, larger = all - size * blocks;
  const auto add = [&](int64_t pixels, int64_t first, int64_t count) {
    if (count == 0) return;
    const AddTerms<A> adder = step == 2 ? adder_of<2, A>(pixels) : adder_of<1, A>(pixels);
    adder(terms, rows, init, kinds, kind_step, first, count, to, to_step);
  };
  add(size + 1, 0, larger);
  add(size, larger * (size + 1), blocks - larger);
}

// Whether rows can be written where they belong, vector by vector.
template <class T, class A>
bool writes_in_place(const Map<T>& out) {
  return sizeof(T) == sizeof(A) && out.channel == 1 && out.lanes == kLanes<A>;
}

// An output row of `convolve`, but for what follows.
template <class T, class A>
void convolve_row(const Plan& plan, Window<T, A>& window, int64_t n, int64_t p, const A* weights, const A* init,
                  Term<A>* terms, A* to, int64_t to_step) {
  constexpr int lanes = kLanes<A>;
  const Axis &rows = plan.rows, &columns = plan.columns;
  int count = 0;
  const A* from[kMostTaps];
  for (int r = 0; r < rows.taps; ++r) {
    const int64_t q = p * rows.stride - rows.padding + r * rows.dilation;
    if (q < 0 || q >= rows.size) continue;
    from[r] = window.row(n, q);
    terms[count++] = {r, columns.taps, -columns.padding * lanes, weights + int64_t(r) * columns.taps * lanes,
                      columns.dilation * lanes, lanes};
  }
  const TermList<A> list = {terms, 0, count};
  add_all_terms<A>(list, from, columns.stride, init + int64_t(rows.out_of[p]) * columns.out_kinds * lanes, columns.out_of, 1,
                   columns.out, to, to_step);
}

template <class T, class A>
void convolve(const Plan& plan, const Map<const T>& x, const A* pivot, const A* weights, const A* init,
              const After<T>& after, const Map<T>& out, int64_t begin, int64_t end, A* scratch) {
  constexpr int lanes = kLanes<A>;
  const Axis &rows = plan.rows, &columns = plan.columns;
  Memory<A> memory{scratch};
  Window<T, A> window;
  window.open(x, load<A>(pivot), rows.size, columns.size, columns.padding, columns.after, rows.reach + 1, memory);
  Term<A>* terms = memory.template take<Term<A>>(rows.taps);
  A* packed = memory.take((columns.out + lanes) * lanes);
  const bool follows = after.activation != Activation::none || after.residual.data != nullptr;
  const bool in_place = !follows && writes_in_place<T, A>(out);
  Line line(begin, rows.out);
  for (int64_t i = begin; i < end; ++i, line.next()) {
    const int64_t n = line.n, p = line.q;
    const int64_t last = (n + 1) * rows.out < end ? rows.out : end - n * rows.out;
    T* to = out.data + n * out.image + p * out.row;
    const T* limit = out.data + n * out.image + last * out.row;
    if (in_place) fetch_next<T>(out, to, limit, columns.out);
    convolve_row<T, A>(plan, window, n, p, weights, init, terms, in_place ? reinterpret_cast<A*>(to) : packed,
                       in_place ? out.column : lanes);
    if (!in_place) unpack_row<T, A>(packed, columns.out, out, after, to, limit);
  }
}

template <class T, class A>
void correlate(const Plan& plan, const Map<const T>& x, const A* pivot, const Map<const T>& grad, const Slope<T, A>& slope,
               const Map<T>& sloped, int64_t begin, int64_t end, A* scratch, double* products, double* sums) {
  constexpr int lanes = kLanes<A>;
  const Axis &rows = plan.rows, &columns = plan.columns;
  Memory<A> memory{scratch};
  Piece<A> product(plan.taps, products, memory), sum(int64_t(rows.out_kinds) * columns.out_kinds, sums, memory);
  Window<T, A> window;
  window.open(x, load<A>(pivot), rows.size, columns.size, columns.padding, columns.after, rows.reach + 1, memory);
  Window<T, A> gradient;
  gradient.open(grad, Vec<A>{}, rows.out, columns.out, 0, lanes, 1, memory);
  const bool again = slope.activation != Activation::none && !is_clamp(slope.activation);
  if (is_clamp(slope.activation)) gradient.told = {slope.kept, flat_from<A>(slope.activation)};
  Term<A>* terms = memory.template take<Term<A>>(rows.taps);
  A *z = memory.take((columns.out + lanes) * lanes), *added = memory.take(columns.out * lanes);
  Line line(begin, rows.out);
  for (int64_t i = begin; i < end; ++i, line.next()) {
    const int64_t n = line.n, p = line.q, top = p * rows.stride - rows.padding;
    const A* g = gradient.row(n, p);
    if (again) {
      convolve_row<T, A>(plan, window, n, p, slope.weights, slope.init, terms, z, lanes);
      const int64_t at = n * grad.image + p * grad.row;
      if (slope.kept != nullptr) {
        Map<const T> residual = grad;
        residual.limit += slope.kept - grad.data;
        residual.data = slope.kept;
        pack_row<T, A>(residual, slope.kept + at, columns.out, Vec<A>{}, {}, added);
      }
      for (int64_t j = 0; j < columns.out * lanes; j += lanes) {
        Vec<A> value = load<A>(z + j);
        if (slope.kept != nullptr) value += load<A>(added + j);
        store(z + j, load<A>(g + j) * smooth_slope<A>(value, slope.activation));
      }
      g = z;
    }
    if (sloped.data != nullptr) {
      const int64_t last = (n + 1) * rows.out < end ? rows.out : end - n * rows.out;
      unpack_row<T, A>(g, columns.out, sloped, {}, sloped.data + n * sloped.image + p * sloped.row,
                       sloped.data + n * sloped.image + last * sloped.row);
    }
    const A* moved[kMostTaps];
    for (int r = 0; r < rows.taps; ++r) moved[r] = window.row(n, top + r * rows.dilation) - columns.padding * lanes;
    if (columns.dilation == 1) {
      multiply_runs<A>(g, lanes, moved, rows.taps, columns.taps, columns.stride * lanes, columns.out, product.sums);
    } else {
      for (int r = 0; r < rows.taps; ++r) {
        const A* spread[kMostTaps];
        for (int b = 0; b < columns.taps; ++b) spread[b] = moved[r] + b * columns.dilation * lanes;
        multiply_runs<A>(g, lanes, spread, columns.taps, 1, columns.stride * lanes, columns.out,
                         product.sums + int64_t(r) * columns.taps * lanes);
      }
    }
    for (int s = 0; s < columns.outputs.count; ++s) {
      const Segment& seg = columns.outputs.data[s];
      add_up<A>(g + seg.first * lanes, seg.step * lanes, seg.count,
                sum.sums + (int64_t(rows.out_of[p]) * columns.out_kinds + seg.kind) * lanes);
    }
    product.end_row(columns.out);
    sum.end_row(columns.out);
  }
  product.end();
  sum.end();
}

template <class T, class A>
void gradient(const Plan& plan, const Map<const T>& x, const A* pivot, const Map<const T>* grads, Activation clamp,
              const T* const* kept, const A* weights, const A* correction, const A* init, const Map<T>& dx, int64_t begin,
              int64_t end, A* scratch) {
  constexpr int lanes = kLanes<A>;
  const Axis &rows = plan.rows, &columns = plan.columns;
  Memory<A> memory{scratch};
  Window<T, A> window, gradients[kMostMultiplier];
  window.open(x, load<A>(pivot), rows.size, columns.size, columns.reach, columns.reach, 2 * rows.reach + 1, memory);
  for (int j = 0; j < plan.multiplier; ++j) {
    gradients[j].open(grads[j], Vec<A>{}, rows.out, columns.out, 0, 0, rows.reach / rows.stride + 2, memory);
    if (is_clamp(clamp)) gradients[j].told = {kept[j], flat_from<A>(clamp)};
  }
  // Of each segment of columns, of the last kind of rows where they are few enough to keep, else of one segment.
  const int kept_segments = columns.coarse.count <= kMostSegments ? columns.coarse.count : 1;
  const int most = plan.multiplier * plan.taps + (2 * rows.taps - 1) * (2 * columns.taps - 1);
  Term<A>* terms = memory.template take<Term<A>>(int64_t(kept_segments) * most);
  TermList<A> lists[kMostSegments];
  A* packed = memory.take((columns.size + lanes) * lanes);
  const bool in_place = writes_in_place<T, A>(dx);
  // Rows of g, of each output channel by tap, then rows of x by shift.
  const A* from[(kMostMultiplier + 2) * kMostTaps];
  const int shifted = plan.multiplier * rows.taps + rows.taps - 1;
  const auto list = [&](const Segment& seg, int kind, Term<A>* to) {
    const Terms& own = plan.terms[kind * columns.coarse_kinds + seg.kind];
    int count = 0;
    const auto add = [&](Term<A> term) {
      const int alone = seg.count == 1 ? term.count : 1;
      if (alone > 1) term.count = 1;
      for (int i = 0; i < alone; ++i, term.first += term.from_step, term.weight += term.weight_step) to[count++] = term;
    };
    for (int j = 0; j < plan.multiplier; ++j)
      for (int t = 0; t < own.taps.count; ++t) {
        const Run& run = own.taps.data[t];
        const int64_t far = seg.first + columns.padding - run.first * columns.dilation, back = run.step * columns.dilation;
        const int64_t p = columns.stride == 1 ? far : far / columns.stride;
        add({j * rows.taps + run.row, run.count, p * lanes,
             weights + (int64_t(j) * plan.taps + run.row * columns.taps + run.first) * lanes,
             -(columns.stride == 1 ? back : back / columns.stride) * lanes, int64_t(run.step) * lanes});
      }
    const int near_count = count;
    const A* factors = correction + own.first * lanes;
    for (int t = 0; t < own.shifts.count; ++t) {
      const Run& run = own.shifts.data[t];
      add({shifted + run.row, run.count, (seg.first + run.first * columns.dilation) * lanes, factors,
           run.step * columns.dilation * lanes, lanes});
      factors += run.count * lanes;
    }
    return TermList<A>{to, near_count, count};
  };
  int listed = -1;
  Line line(begin, rows.size);
  for (int64_t i = begin; i < end; ++i, line.next()) {
    const int64_t n = line.n, q = line.q;
    const int kind = rows.coarse_of[q];
    for (int r = 0; r < rows.taps; ++r) {
      if (!rows.reads[kind * rows.taps + r]) continue;
      const int64_t far = q + rows.padding - r * rows.dilation, p = rows.stride == 1 ? far : far / rows.stride;
      for (int j = 0; j < plan.multiplier; ++j) from[j * rows.taps + r] = gradients[j].row(n, p);
    }
    for (int r = 1 - rows.taps; r < rows.taps; ++r) from[shifted + r] = window.row(n, q + r * rows.dilation);
    const int64_t last = (n + 1) * rows.size < end ? rows.size : end - n * rows.size;
    T* to = dx.data + n * dx.image + q * dx.row;
    const T* limit = dx.data + n * dx.image + last * dx.row;
    if (in_place) fetch_next<T>(dx, to, limit, columns.size);
    A* target = in_place ? reinterpret_cast<A*>(to) : packed;
    const int64_t to_step = in_place ? dx.column : lanes;
    for (int s = 0; s < columns.coarse.count; ++s) {
      const Segment& seg = columns.coarse.data[s];
      const int at = kept_segments == columns.coarse.count ? s : 0;
      if (at < s || kind != listed) lists[at] = list(seg, kind, terms + int64_t(at) * most);
      const A* level = init + int64_t(rows.fine_of[q]) * columns.fine_kinds * lanes;
      const int* kinds = columns.fine_of + seg.first;
      A* first = target + seg.first * to_step;
      if (seg.count == 1) store(first, add_single<A>(lists[at], from, load<A>(level + kinds[0] * int64_t(lanes))));
      else add_all_terms<A>(lists[at], from, seg.step, level, kinds, seg.step, seg.count, first, seg.step * to_step);
    }
    listed = kept_segments == columns.coarse.count ? kind : -1;
    if (!in_place) unpack_row<T, A>(packed, columns.size, dx, {}, to, limit);
  }
}

}  // namespace

template <class T, class A>
Passes<T, A> passes() {
  return {kLanes<A>, moments<T, A>, convolve<T, A>, correlate<T, A>, gradient<T, A>};
}

}  // namespace acnet::depthwise::ACNET_ISA
