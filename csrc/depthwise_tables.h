// Makes and keeps the plans of depthwise_plan.h.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <tuple>
#include <utility>
#include <vector>

#include "depthwise_plan.h"

namespace acnet::depthwise {

// Of one axis, with what its pointers point to.
class AxisTables {
 public:
  AxisTables(int64_t size, int64_t out, int taps, int64_t stride, int64_t padding, int64_t dilation) {
    const int shifts = 2 * taps - 1;
    axis.size = size;
    axis.out = out;
    axis.stride = stride;
    axis.padding = padding;
    axis.dilation = dilation;
    axis.taps = taps;
    axis.reach = dilation * (taps - 1);
    axis.after = std::max<int64_t>(0, (out - 1) * stride + axis.reach - padding - (size - 1));
    const auto reads = [&](int64_t q, int t) {
      const int64_t far = q + padding - t * dilation;
      return far >= 0 && far % stride == 0 && far / stride < out;
    };
    const auto is_inside = [&](int64_t q) { return q >= 0 && q < size; };
    std::vector<std::vector<uint8_t>> coarse(size), fine(size), seen(out);
    for (int64_t q = 0; q < size; ++q) {
      for (int t = 0; t < taps; ++t) coarse[q].push_back(reads(q, t));
      fine[q] = coarse[q];
      for (int d = 0; d < shifts; ++d) fine[q].push_back(is_inside(q + (d - taps + 1) * dilation));
    }
    for (int64_t p = 0; p < out; ++p)
      for (int t = 0; t < taps; ++t) seen[p].push_back(is_inside(p * stride + t * dilation - padding));
    const auto coarse_kinds = classify(coarse, coarse_of_), fine_kinds = classify(fine, fine_of_),
               out_kinds = classify(seen, out_of_);
    for (const auto& kind : coarse_kinds) reads_.insert(reads_.end(), kind.begin(), kind.end());
    for (const auto& kind : fine_kinds) {
      fine_reads_.insert(fine_reads_.end(), kind.begin(), kind.begin() + taps);
      inside_.insert(inside_.end(), kind.begin() + taps, kind.end());
    }
    for (const auto& kind : out_kinds) seen_.insert(seen_.end(), kind.begin(), kind.end());
    pairs_.assign(taps * taps, 0);
    for (const auto& own : seen)
      for (int t = 0; t < taps; ++t)
        for (int u = 0; u < taps; ++u) pairs_[t * taps + u] += own[t] && own[u];
    segment(coarse_of_, stride, coarse_);
    segment(fine_of_, stride, fine_);
    segment(out_of_, 1, outputs_);
    axis.coarse_kinds = static_cast<int>(coarse_kinds.size());
    axis.fine_kinds = static_cast<int>(fine_kinds.size());
    axis.out_kinds = static_cast<int>(out_kinds.size());
    axis.coarse_of = coarse_of_.data();
    axis.fine_of = fine_of_.data();
    axis.out_of = out_of_.data();
    axis.coarse = {coarse_.data(), static_cast<int>(coarse_.size())};
    axis.fine = {fine_.data(), static_cast<int>(fine_.size())};
    axis.outputs = {outputs_.data(), static_cast<int>(outputs_.size())};
    axis.reads = reads_.data();
    axis.fine_reads = fine_reads_.data();
    axis.inside = inside_.data();
    axis.seen = seen_.data();
    axis.pairs = pairs_.data();
  }
  AxisTables(const AxisTables&) = delete;
  AxisTables& operator=(const AxisTables&) = delete;

  Axis axis{};

 private:
  using Kinds = std::vector<std::vector<uint8_t>>;

  static Kinds classify(const Kinds& positions, std::vector<int>& kind_of) {
    Kinds kinds;
    for (const auto& position : positions) {
      // The last one found first: neighbours are mostly alike.
      const auto found = std::find(kinds.rbegin(), kinds.rend(), position);
      kind_of.push_back(static_cast<int>(found == kinds.rend() ? kinds.size() : kinds.rend() - found - 1));
      if (found == kinds.rend()) kinds.push_back(position);
    }
    return kinds;
  }

  static void segment(const std::vector<int>& kind_of, int64_t step, std::vector<Segment>& segments) {
    const int64_t size = static_cast<int64_t>(kind_of.size());
    for (int64_t first = 0; first < std::min(step, size); ++first)
      for (int64_t q = first; q < size; q += step) {
        const bool goes_on = q > first && kind_of[q] == kind_of[q - step];
        if (goes_on) ++segments.back().count;
        else segments.push_back({q, step, 1, kind_of[q]});
      }
    for (Segment& s : segments)
      if (s.count == 1) s.step = 1;
  }

  std::vector<int> coarse_of_, fine_of_, out_of_;
  std::vector<uint8_t> reads_, fine_reads_, inside_, seen_;
  std::vector<Segment> coarse_, fine_, outputs_;
  std::vector<double> pairs_;
};

class PlanTables {
 public:
  // Images, then of rows and columns (size, out, taps, stride, padding, dilation), then the multiplier.
  using Key = std::array<int64_t, 14>;

  explicit PlanTables(const Key& k)
      : rows_(k[1], k[2], static_cast<int>(k[3]), k[4], k[5], k[6]),
        columns_(k[7], k[8], static_cast<int>(k[9]), k[10], k[11], k[12]) {
    const Axis &rows = rows_.axis, &columns = columns_.axis;
    const int down = rows.taps - 1, right = columns.taps - 1;
    plan.images = k[0];
    plan.rows = rows;
    plan.columns = columns;
    plan.taps = rows.taps * columns.taps;
    plan.multiplier = static_cast<int>(k[13]);
    plan.by_kind = rows.stride == 1 && columns.stride == 1;
    for (int i = 0; i <= down; ++i)
      for (int j = i ? -right : 0; j <= right; ++j) shifts_.push_back({i, j});
    plan.shifts = shifts_.data();
    plan.shift_count = static_cast<int>(shifts_.size());
    const int64_t kinds = int64_t(rows.coarse_kinds) * columns.coarse_kinds;
    plan.products = plan.by_kind ? kinds * plan.shift_count : int64_t(plan.taps) * (plan.taps + 1) / 2;
    plan.sums = int64_t(rows.fine_kinds) * columns.fine_kinds;
    runs_.resize(2 * kinds);
    for (int i = 0; i < rows.coarse_kinds; ++i)
      for (int j = 0; j < columns.coarse_kinds; ++j) {
        std::vector<Shift> taps, shifts;
        for (int t = 0; t < plan.taps; ++t)
          if (rows.reads[i * rows.taps + t / columns.taps] && columns.reads[j * columns.taps + t % columns.taps])
            taps.push_back({t / columns.taps, t % columns.taps});
        for (int a = -down; a <= down; ++a)
          for (int b = -right; b <= right; ++b) {
            const auto leads_to_one = [&](const Shift& t) {
              return t.row + a >= 0 && t.row + a <= down && t.column + b >= 0 && t.column + b <= right;
            };
            if (std::any_of(taps.begin(), taps.end(), leads_to_one)) shifts.push_back({a, b});
          }
        std::vector<Run>&of_taps = runs_[2 * terms_.size()], &of_shifts = runs_[2 * terms_.size() + 1];
        of_taps = runs_of(taps);
        of_shifts = runs_of(shifts);
        terms_.push_back({{of_taps.data(), static_cast<int>(of_taps.size())},
                          {of_shifts.data(), static_cast<int>(of_shifts.size())},
                          plan.correction});
        plan.correction += static_cast<int64_t>(shifts.size());
      }
    plan.terms = terms_.data();
    const auto window = [](int64_t held, int64_t width) {
      int64_t slots = 1;
      while (slots < held) slots *= 2;
      return slots / 2 + 1 + (slots + 1) * width;
    };
    const int64_t padded = columns.padding + columns.size + columns.after, spread = columns.size + 2 * columns.reach;
    const int64_t row = std::max(columns.size, columns.out) + 64;  // unpacked by whole vectors of pixels
    const int64_t sums = plan.products + plan.sums + plan.taps + int64_t(rows.out_kinds) * columns.out_kinds;
    // Terms in vectors of 16 bytes, of a kernel's rows, and of each segment of columns every output channel's taps and
    // all shifts.
    const int64_t of_segment = plan.multiplier * int64_t(plan.taps) + (2 * rows.taps - 1) * (2 * columns.taps - 1);
    const int64_t terms = 3 * (of_segment * std::clamp(columns.coarse.count, 1, kMostSegments) + rows.taps);
    plan.algebra = std::max(int64_t(rows.fine_kinds) * columns.taps * columns.taps, int64_t(columns.fine_kinds) * rows.taps * rows.taps);
    plan.scratch = sums + terms + 3 * row + window(2 * rows.reach + 1, std::max(padded, spread)) + window(1, columns.out + 64) +
                   plan.multiplier * window(rows.reach / rows.stride + 2, columns.out) + 8;
  }
  PlanTables(const PlanTables&) = delete;
  PlanTables& operator=(const PlanTables&) = delete;

  Plan plan{};

 private:
  // Of a list in raster order: one of each row, as what reads a position, and what that leads to, are evenly spaced.
  static std::vector<Run> runs_of(const std::vector<Shift>& list) {
    std::vector<Run> runs;
    for (const Shift& next : list) {
      Run* last = runs.empty() || runs.back().row != next.row ? nullptr : &runs.back();
      if (last != nullptr && last->count == 1) last->step = next.column - last->first;
      if (last != nullptr && next.column == last->first + last->count * last->step) ++last->count;
      else runs.push_back({next.row, next.column, 1, 1});
    }
    return runs;
  }

  AxisTables rows_, columns_;
  std::vector<Shift> shifts_;
  std::vector<std::vector<Run>> runs_;
  std::vector<Terms> terms_;
};

// The plan of this key: the last few dozen are kept.
inline std::shared_ptr<const PlanTables> plan_of(const PlanTables::Key& key) {
  static std::mutex lock;
  static std::map<PlanTables::Key, std::shared_ptr<const PlanTables>> kept;
  const std::lock_guard<std::mutex> guard(lock);
  std::shared_ptr<const PlanTables>& found = kept[key];
  if (found != nullptr) return found;
  found = std::make_shared<const PlanTables>(key);
  const auto own = found;
  constexpr size_t kMost = 64;
  if (kept.size() > kMost) {
    kept.clear();
    kept[key] = own;
  }
  return own;
}

}  // namespace acnet::depthwise
