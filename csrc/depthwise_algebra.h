// The small algebra of depthwise.h for one instruction set: loops over lanes, in double, for the compiler to turn into
// vectors. Included by each depthwise_<isa>.cpp behind depthwise_kernels.h.

namespace acnet::depthwise::ACNET_ISA {
namespace {

template <int lanes>
using Lanes = double[lanes];  // one number, of all lanes

template <int lanes>
inline const Lanes<lanes>* rows_of(const double* p) {
  return reinterpret_cast<const Lanes<lanes>*>(p);
}
template <int lanes>
inline Lanes<lanes>* rows_of(double* p) {
  return reinterpret_cast<Lanes<lanes>*>(p);
}

template <int lanes>
inline void add(double* to, const double* from) {
  for (int l = 0; l < lanes; ++l) to[l] += from[l];
}
template <int lanes>
inline void add_product(double* to, const double* a, const double* b) {
  for (int l = 0; l < lanes; ++l) to[l] += a[l] * b[l];
}
template <int lanes>
inline void add_scaled(double* to, double factor, const double* a) {
  for (int l = 0; l < lanes; ++l) to[l] += factor * a[l];
}

// The place of a shift in the half plane of them.
inline int shift_place(const Plan& plan, int row, int column) {
  const int reach = plan.columns.taps - 1;
  return row == 0 ? column : reach + 1 + (row - 1) * (2 * reach + 1) + column + reach;
}

// Rows and columns of the taps, in raster order.
struct Places {
  int row[kMostTaps * kMostTaps], column[kMostTaps * kMostTaps];

  explicit Places(const Plan& plan) {
    for (int t = 0; t < plan.taps; ++t) {
      row[t] = t / plan.columns.taps;
      column[t] = t % plan.columns.taps;
    }
  }
};

// Whether tap `from` of an axis reads a position of this fine kind, from which the shift to tap `to` leads inside.
inline bool meets(const Axis& axis, int kind, int from, int to) {
  return axis.fine_reads[kind * axis.taps + from] && axis.inside[kind * (2 * axis.taps - 1) + to - from + axis.taps - 1];
}

template <class A>
void covariance(const Plan& plan, const double* products, const double* sums, const double* pivot, double* scratch,
                double* gram, double* patch_sums) {
  constexpr int lanes = kLanes<A>;
  const Axis &rows = plan.rows, &columns = plan.columns;
  const int taps = plan.taps, wide = columns.taps;
  const Places at(plan);
  const auto* product = rows_of<lanes>(products);
  const auto* sum = rows_of<lanes>(sums);
  auto* g = rows_of<lanes>(gram);
  auto* s = rows_of<lanes>(patch_sums);
  __builtin_memset(gram, 0, int64_t(taps) * taps * lanes * sizeof(double));
  __builtin_memset(patch_sums, 0, int64_t(taps) * lanes * sizeof(double));
  if (plan.by_kind) {
    for (int i = 0; i < rows.coarse_kinds; ++i)
      for (int j = 0; j < columns.coarse_kinds; ++j) {
        const auto* own = product + (int64_t(i) * columns.coarse_kinds + j) * plan.shift_count;
        for (int t = 0; t < taps; ++t) {
          if (!rows.reads[i * rows.taps + at.row[t]] || !columns.reads[j * wide + at.column[t]]) continue;
          for (int u = t; u < taps; ++u)
            add<lanes>(g[t * taps + u], own[shift_place(plan, at.row[u] - at.row[t], at.column[u] - at.column[t])]);
        }
      }
  } else {
    for (int t = 0; t < taps; ++t)
      for (int u = t; u < taps; ++u) add<lanes>(g[t * taps + u], *product++);
  }
  // Σ x̃ over the columns that a tap's column reads and from which another's is inside, by kind of row.
  auto* of_columns = rows_of<lanes>(scratch);
  __builtin_memset(scratch, 0, int64_t(rows.fine_kinds) * wide * wide * lanes * sizeof(double));
  for (int i = 0; i < rows.fine_kinds; ++i)
    for (int from = 0; from < wide; ++from)
      for (int to = 0; to < wide; ++to)
        for (int j = 0; j < columns.fine_kinds; ++j)
          if (meets(columns, j, from, to)) add<lanes>(of_columns[(i * wide + from) * wide + to], sum[i * columns.fine_kinds + j]);
  const auto add_seen = [&](double* to, int t, int u) {
    for (int i = 0; i < rows.fine_kinds; ++i)
      if (meets(rows, i, at.row[t], at.row[u])) add<lanes>(to, of_columns[(i * wide + at.column[t]) * wide + at.column[u]]);
  };
  for (int t = 0; t < taps; ++t) add_seen(s[t], t, t);
  // G − SSᵀ/M of x̃ + pivot, S = S̃ + N·pivot with N the pixels a tap sees; `seen` has X[t][u] = Σ x̃ of tap t where u
  // sees inside, too. Term by term what is constant where nothing is padded cancels exactly.
  const double count = double(plan.images * rows.out * columns.out), share = count > 0 ? 1 / count : 0;
  const auto pixels = [&](int t, int u) {
    return double(plan.images) * rows.pairs[at.row[t] * rows.taps + at.row[u]] * columns.pairs[at.column[t] * wide + at.column[u]];
  };
  for (int t = 0; t < taps; ++t)
    for (int u = t; u < taps; ++u)
      for (int l = 0; l < lanes; ++l) g[t * taps + u][l] -= s[t][l] * s[u][l] * share;
  for (int t = 0; t < taps; ++t)
    for (int u = 0; u < taps; ++u) {
      const int low = t < u ? t : u, high = t < u ? u : t;
      const double both = pixels(t, u), own = pixels(t, t), other = pixels(u, u);
      if (both < own || other < count) {  // else X[t][u] = S̃[t], and all cancels
        double seen[lanes] = {};
        if (both == own) add<lanes>(seen, s[t]);
        else add_seen(seen, t, u);
        for (int l = 0; l < lanes; ++l) seen[l] = (seen[l] - s[t][l] * (other * share)) * pivot[l];
        add<lanes>(g[low * taps + high], seen);
        if (t == u) add<lanes>(g[low * taps + high], seen);
      }
      if (t > u) continue;
      const double left = both - own * other * share;
      for (int l = 0; l < lanes; ++l) g[t * taps + u][l] += left * pivot[l] * pivot[l];
    }
  for (int t = 0; t < taps; ++t) {
    add_scaled<lanes>(s[t], pixels(t, t), pivot);
    for (int u = 0; u < t; ++u) __builtin_memcpy(g[t * taps + u], g[u * taps + t], sizeof(double) * lanes);
  }
  // What belongs to taps that never see the image together counts for nothing: exactly so.
  for (int t = 0; t < taps; ++t)
    for (int u = 0; u < taps; ++u)
      if (pixels(t, t) == 0 || pixels(u, u) == 0) __builtin_memset(g[t * taps + u], 0, sizeof(double) * lanes);
}

template <class A>
void statistics(const Plan& plan, const int* places, int count, const double* weight, const double* gram,
                const double* patch_sums, double* mean, double* variance, double* centred) {
  constexpr int lanes = kLanes<A>;
  const auto* w = rows_of<lanes>(weight);
  const auto* g = rows_of<lanes>(gram);
  const auto* s = rows_of<lanes>(patch_sums);
  auto* c = rows_of<lanes>(centred);
  const double values = double(plan.images * plan.rows.out * plan.columns.out), share = values > 0 ? 1 / values : 0;
  double first[lanes] = {}, second[lanes] = {};
  for (int t = 0; t < count; ++t) {
    double sum[lanes] = {};
    for (int u = 0; u < count; ++u) add_product<lanes>(sum, w[u], g[places[t] * plan.taps + places[u]]);
    add_product<lanes>(first, w[t], s[places[t]]);
    add_product<lanes>(second, w[t], sum);
    __builtin_memcpy(c[t], sum, sizeof sum);
  }
  for (int l = 0; l < lanes; ++l) {
    mean[l] = first[l] * share;
    const double v = second[l] * share;
    variance[l] = v < 0 ? 0 : v;
  }
}

template <class A>
void fold(const Plan& plan, const double* kernel, const double* bias, const double* pivot, A* weights, A* init) {
  constexpr int lanes = kLanes<A>;
  const Axis &rows = plan.rows, &columns = plan.columns;
  const auto* k = rows_of<lanes>(kernel);
  for (int i = 0; i < plan.taps * lanes; ++i) weights[i] = A(kernel[i]);
  for (int i = 0; i < rows.out_kinds; ++i)
    for (int j = 0; j < columns.out_kinds; ++j, init += lanes) {
      double sum[lanes] = {};
      for (int t = 0; t < plan.taps; ++t)
        if (rows.seen[i * rows.taps + t / columns.taps] && columns.seen[j * columns.taps + t % columns.taps])
          add<lanes>(sum, k[t]);
      for (int l = 0; l < lanes; ++l) init[l] = A(bias[l] + pivot[l] * sum[l]);
    }
}

template <class A>
void patch_gradient(const Plan& plan, const double* products, const double* sums, const double* pivot, double* gradient,
                    double* total) {
  constexpr int lanes = kLanes<A>;
  const Axis &rows = plan.rows, &columns = plan.columns;
  const auto* sum = rows_of<lanes>(sums);
  __builtin_memset(total, 0, lanes * sizeof(double));
  for (int i = 0; i < rows.out_kinds * columns.out_kinds; ++i) add<lanes>(total, sum[i]);
  for (int t = 0; t < plan.taps; ++t) {
    double seen[lanes] = {};
    for (int i = 0; i < rows.out_kinds; ++i)
      for (int j = 0; j < columns.out_kinds; ++j)
        if (rows.seen[i * rows.taps + t / columns.taps] && columns.seen[j * columns.taps + t % columns.taps])
          add<lanes>(seen, sum[i * columns.out_kinds + j]);
    for (int l = 0; l < lanes; ++l) gradient[t * lanes + l] = products[t * lanes + l] + pivot[l] * seen[l];
  }
}

template <class Body>
inline void for_each(const Runs& runs, const Body& body) {
  for (int i = 0; i < runs.count; ++i)
    for (int j = 0; j < runs.data[i].count; ++j) body(Shift{runs.data[i].row, runs.data[i].first + j * runs.data[i].step});
}

template <class A>
void correct(const Plan& plan, const double* squares, const double* levels, const double* pivot, double* scratch,
             A* correction, A* init) {
  constexpr int lanes = kLanes<A>;
  const Axis &rows = plan.rows, &columns = plan.columns;
  const int taps = plan.taps, wide = columns.taps, high = rows.taps;
  const auto* q = rows_of<lanes>(squares);
  const auto* level = rows_of<lanes>(levels);
  for (int i = 0; i < rows.coarse_kinds; ++i)
    for (int j = 0; j < columns.coarse_kinds; ++j) {
      const Terms& own = plan.terms[i * columns.coarse_kinds + j];
      A* to = correction + own.first * lanes;
      for_each(own.shifts, [&](const Shift& shift) {
        double sum[lanes] = {};
        for_each(own.taps, [&](const Shift& tap) {
          const int row = tap.row + shift.row, column = tap.column + shift.column;
          if (row < 0 || row >= rows.taps || column < 0 || column >= wide) return;
          add<lanes>(sum, q[(tap.row * wide + tap.column) * taps + row * wide + column]);
        });
        for (int l = 0; l < lanes; ++l) to[l] = A(-sum[l]);
        to += lanes;
      });
    }
  // Σ q over the columns that meet in a kind of column, by pair of rows.
  auto* of_columns = rows_of<lanes>(scratch);
  __builtin_memset(scratch, 0, int64_t(columns.fine_kinds) * high * high * lanes * sizeof(double));
  for (int j = 0; j < columns.fine_kinds; ++j)
    for (int from = 0; from < wide; ++from)
      for (int to = 0; to < wide; ++to) {
        if (!meets(columns, j, from, to)) continue;
        for (int r = 0; r < high; ++r)
          for (int v = 0; v < high; ++v)
            add<lanes>(of_columns[(j * high + r) * high + v], q[(r * wide + from) * taps + v * wide + to]);
      }
  for (int i = 0; i < rows.fine_kinds; ++i)
    for (int j = 0; j < columns.fine_kinds; ++j, init += lanes) {
      double sum[lanes] = {}, constant[lanes] = {};
      for (int r = 0; r < high; ++r) {
        if (!rows.fine_reads[i * high + r]) continue;
        for (int c = 0; c < wide; ++c)
          if (columns.fine_reads[j * wide + c]) add<lanes>(sum, level[r * wide + c]);
        for (int v = 0; v < high; ++v)
          if (meets(rows, i, r, v)) add<lanes>(constant, of_columns[(j * high + r) * high + v]);
      }
      for (int l = 0; l < lanes; ++l) init[l] = A(sum[l] - pivot[l] * constant[l]);
    }
}

}  // namespace

template <class A>
Algebra<A> algebra() {
  return {kLanes<A>, covariance<A>, statistics<A>, fold<A>, patch_gradient<A>, correct<A>};
}

#define ACNET_DEPTHWISE_INSTANTIATE(T, A) template Passes<T, A> passes();
ACNET_DEPTHWISE_INSTANTIATE(float, float)
ACNET_DEPTHWISE_INSTANTIATE(c10::BFloat16, float)
ACNET_DEPTHWISE_INSTANTIATE(c10::Half, float)
ACNET_DEPTHWISE_INSTANTIATE(double, double)
#undef ACNET_DEPTHWISE_INSTANTIATE
template Algebra<float> algebra();
template Algebra<double> algebra();

}  // namespace acnet::depthwise::ACNET_ISA
