// A step of `branches` as one node of autograd's graph, in C++: the library's convolutions, the batch-norm sums and the
// running statistics, forward and backward, without a call from Python between them. backends/branches.py says what is
// computed and is the same in Python; this is for steps so small that their time is that of the calls.
//
// Unlike the operators this is built against one torch, whose C++ interface it needs: autograd nodes have no other.
// Where it is missing, Python's node serves.
#pragma once

#include <ATen/ATen.h>
#include <ATen/SavedTensorHooks.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <deque>
#include <mutex>
#include <optional>
#include <utility>
#include <variant>
#include <vector>

#include "../functions.h"

namespace py = pybind11;

namespace acnet::node {

using at::Tensor;
using at::TensorList;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Pair = std::array<int64_t, 2>;

constexpr int64_t kNumbers = 6;  // of a branch's taps (branch_list.h)
inline const Functions* functions = nullptr;  // of the operators' library
inline PyObject* definition = nullptr;  // Python's gradients by the definition, where this node's will not do

inline torch::stable::Tensor stable(const Tensor& t) { return torch::stable::Tensor(torch::aot_inductor::new_tensor_handle(Tensor(t))); }

inline Tensors stable(TensorList list) {
  Tensors all;
  all.reserve(list.size());
  for (const Tensor& t : list) all.push_back(stable(t));
  return all;
}

inline Tensor unstable(const torch::stable::Tensor& t) { return *torch::aot_inductor::tensor_handle_to_tensor_pointer(t.get()); }

struct Place {
  bool convolved;
  Pair padding, dilation;
  std::array<int64_t, 4> edges;  // left, right, top, bottom of the input: padding, or cropping where negative

  // The branch's view of x: padded, then cropped.
  Tensor apply(const Tensor& x) const { return cropped(padded(x, 1), 1); }
  // The gradient of x where `seen` is that of apply(x): the other way round.
  Tensor adjoint(const Tensor& seen) const { return cropped(padded(seen, -1), -1); }

  // t with zeros at the edges that are positive, times sign.
  Tensor padded(const Tensor& t, int64_t sign) const {
    std::array<int64_t, 4> more{};
    for (size_t i = 0; i < more.size(); ++i) more[i] = std::max<int64_t>(sign * edges[i], 0);
    return more == std::array<int64_t, 4>{} ? t : at::constant_pad_nd(t, more, 0);
  }

  // t without its lines at the edges that are negative, times sign.
  Tensor cropped(const Tensor& t, int64_t sign) const {
    Tensor view = t;
    for (int64_t axis : {3, 2}) {
      const auto first = static_cast<size_t>(2 * (3 - axis));
      const int64_t before = std::max<int64_t>(-sign * edges[first], 0), after = std::max<int64_t>(-sign * edges[first + 1], 0);
      if (before + after > 0) view = view.narrow(axis, before, view.size(axis) - before - after);
    }
    return view;
  }
};

// Everything about a step but its tensors.
struct Config {
  Pair stride;
  int64_t groups;
  std::vector<Place> places;
  std::vector<double> eps;
  size_t gammas, betas, convolutions;
  at::ScalarType convolution_dtype, dtype;
  bool keeps_maps;  // for backward; where not, it computes them anew
  // For convolutions of our own, all at once; else these are empty, and the library's are called.
  std::vector<int64_t> taps, geometry;
  bool channels_last;  // what those return
  // A branch whose map they compute again for backward, cheaper than it is to keep; −1: none.
  int64_t again = -1;

  bool is_direct() const { return !taps.empty(); }
  bool keeps(size_t branch) const { return keeps_maps && places[branch].convolved && static_cast<int64_t>(branch) != again; }
  // Of these maps' branch alone.
  std::vector<int64_t> taps_of(size_t branch) const {
    const auto first = taps.begin() + static_cast<int64_t>(branch) * kNumbers;
    return {first, first + kNumbers};
  }
  Tensor convolve(const Tensor& x, const Tensor& weight, const Place& place) const {
    return at::convolution(x, weight, {}, stride, place.padding, place.dilation, false, {0, 0}, groups);
  }
};

// A step of dense `moments`, or of depthwise blocks: one call each way into the operators' library.
struct Whole {
  std::vector<int64_t> taps, geometry;
  std::vector<double> eps;
  size_t gammas, betas;
  size_t cancelled;  // of the βs, the first: a batch norm after the sum takes them away again
  size_t convolutions;
  at::ScalarType convolution_dtype, dtype;
  bool is_depthwise;
  bool accumulates;  // the library's convolutions can add to what is there
};

// A step of `branches` on CUDA (device.h).
struct DeviceConfig {
  Config step;
  bool by_triton;      // the convolutions are Triton's; else the library's
  PyObject* launches;  // backends/device_node.py's, which knows the routines
};

// Configurations are kept for good, as Python keeps their like: a graph may outlive whoever made it.
using AnyConfig = std::variant<Config, Whole, DeviceConfig>;
inline std::deque<AnyConfig> configs;
inline std::mutex configs_lock;

inline const AnyConfig& config_of(int64_t number) {
  const std::lock_guard<std::mutex> guard(configs_lock);
  return configs.at(static_cast<size_t>(number));
}

inline int64_t add_config(AnyConfig config) {
  const std::lock_guard<std::mutex> guard(configs_lock);
  configs.push_back(std::move(config));
  return static_cast<int64_t>(configs.size()) - 1;
}

struct Running {
  TensorList means, vars, counters;
  const std::vector<double>& momenta;
};

// What follows the sum: an activation by its number (ops/epilogue.py), and a residual, undefined for none.
struct Epilogue {
  int64_t activation;
  Tensor residual;

  bool is_there() const { return activation != 0 || residual.defined(); }
  bool is_clamp() const { return activation == 1 || activation == 2; }

  // By PyTorch, of any sum; differentiable. `owns`: in the sum's memory.
  Tensor finish(Tensor out, bool owns) const {
    if (residual.defined()) out = owns ? out.add_(residual) : out.add(residual);
    switch (activation) {
      case 1: return owns ? out.relu_() : out.relu();
      case 2: return owns ? at::hardtanh_(out, 0, 6) : at::relu6(out);
      case 3: return owns ? at::hardswish_(out) : at::hardswish(out);
      case 4: return owns ? at::silu_(out) : at::silu(out);
      default: return out;
    }
  }
};

inline bool is_channels_last(const Tensor& t) { return !t.is_contiguous() && t.is_contiguous(at::MemoryFormat::ChannelsLast); }

// t in y's memory layout; t itself where it has that already.
inline Tensor like(const Tensor& t, const Tensor& y) {
  return t.contiguous(is_channels_last(y) ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
}

// What the batch norms normalise, of the branches in order: the convolutions' maps, and x for the identity.
inline variable_list maps_of(const Config& config, const Tensor& x, TensorList weights) {
  variable_list ys(config.places.size());
  const Tensor* first = nullptr;
  size_t w = 0;
  Tensors direct;
  if (config.is_direct()) direct = functions->direct_maps(stable(x), stable(weights), config.taps, config.geometry, config.channels_last);
  for (size_t b = 0; b < ys.size(); ++b) {
    const Place& place = config.places[b];
    if (!place.convolved) continue;
    if (config.is_direct()) ys[b] = unstable(direct[w++]);
    else ys[b] = config.convolve(place.apply(x), weights[w++].to(config.convolution_dtype), place);
    if (first == nullptr) first = &ys[b];
    else ys[b] = like(ys[b], *first);
  }
  for (size_t b = 0; b < ys.size(); ++b)
    if (!config.places[b].convolved) ys[b] = like(config.places[b].apply(x), *first);
  return ys;
}

// The same of the convolutions' maps, kept in the output's dtype.
inline variable_list from_kept(const Config& config, const Tensor& x, TensorList weights, TensorList kept) {
  variable_list ys;
  size_t k = 0, w = 0;
  for (size_t b = 0; b < config.places.size(); ++b) {
    const Place& place = config.places[b];
    if (config.keeps(b)) ys.push_back(kept[k++].to(config.convolution_dtype));
    else if (place.convolved)
      ys.push_back(unstable(functions->direct_maps(stable(x), {stable(weights[w])}, config.taps_of(b), config.geometry, config.channels_last)[0]));
    else ys.push_back(like(place.apply(x), kept[0]));
    w += place.convolved;
  }
  return ys;
}

// The map whose layout is the others'.
inline const Tensor& first_map(const Config& config, const variable_list& ys) {
  const auto at = std::find_if(config.places.begin(), config.places.end(), [](const Place& p) { return p.convolved; });
  return ys[static_cast<size_t>(at - config.places.begin())];
}

// Which of the maps have a gradient that something needs: x, or the branch's own weight.
inline std::vector<bool> needs_dy_of(const Config& config, const std::vector<bool>& needs) {
  std::vector<bool> needs_dy;
  size_t w = 0;
  for (const Place& place : config.places) {
    needs_dy.push_back(needs[0] || (place.convolved && needs[1 + w]));
    w += place.convolved;
  }
  return needs_dy;
}

// Where each of these goes: over its map where that is ours. The identity's map is x, never overwritten.
inline variable_list targets_of(const Config& config, const variable_list& ys, const std::vector<bool>& needs_dy, bool owns) {
  variable_list targets;
  for (size_t b = 0; b < ys.size(); ++b)
    if (needs_dy[b]) targets.push_back(owns && config.places[b].convolved ? ys[b] : at::empty_like(ys[b]));
  return targets;
}

// dx and the weights' gradients, as far as they are needed, of the maps' that are: into found[0], and from found[1] on.
inline void convolution_gradients(const Config& config, const variable_list& dys, const std::vector<bool>& needs_dy, const Tensor& x,
                                  TensorList weights, const std::vector<bool>& needs, Tensor* found) {
  Tensor dx;
  const auto add = [&](const Tensor& more) { dx.defined() ? void(dx.add_(more)) : void(dx = more); };
  for (size_t b = 0, t = 0; b < needs_dy.size(); t += needs_dy[b++])  // the identity's is the first summand
    if (needs_dy[b] && !config.places[b].convolved) add(config.places[b].adjoint(dys[t]));
  size_t w = 0;
  if (config.is_direct()) {
    Tensors direct;
    for (size_t b = 0, t = 0; b < needs_dy.size(); t += needs_dy[b++])
      if (needs_dy[b] && config.places[b].convolved) direct.push_back(stable(dys[t]));
    const std::vector<bool> needs_weights(needs.begin() + 1, needs.begin() + 1 + static_cast<int64_t>(config.convolutions));
    const auto [seen, dws] =
        functions->direct_gradients(direct, stable(x), stable(weights), config.taps, config.geometry, needs[0], needs_weights,
                                    config.channels_last);
    if (needs[0]) add(unstable(seen));
    for (size_t i = 0, at = 0; i < needs_weights.size(); ++i)
      if (needs_weights[i]) found[1 + i] = unstable(dws[at++]);
    found[0] = dx;
    return;
  }
  for (size_t b = 0, t = 0; b < needs_dy.size(); t += needs_dy[b++]) {
    const Place& place = config.places[b];
    if (!place.convolved) continue;
    if (needs_dy[b]) {
      auto [seen, dw, _] = at::convolution_backward(dys[t], place.apply(x), weights[w].to(config.convolution_dtype), {},
                                                    config.stride, place.padding, place.dilation, false, {0, 0},
                                                    config.groups, {needs[0], needs[1 + w], false});
      if (seen.defined()) add(place.adjoint(seen));
      found[1 + w] = dw;
    }
    ++w;
  }
  found[0] = dx;
}

// A map that may be undefined, in y's memory layout, for the operators.
inline std::optional<torch::stable::Tensor> laid_out(const Tensor& t, const Tensor& y) {
  return t.defined() ? std::optional(stable(like(t, y))) : std::nullopt;
}

struct WithoutAutogradAndAutocast {  // casts are made by hand, and nothing within is differentiated
  at::AutoDispatchBelowADInplaceOrView below;
  c10::impl::ExcludeDispatchKeyGuard autocast{c10::autocast_dispatch_keyset};
};

// Whether only the definition's gradients will do: differentiable ones, or of a batch of gradients, or with a tangent.
inline bool wants_definition(const Tensor& grad) {
  const c10::DispatchKeySet wrapped({c10::DispatchKey::Batched, c10::DispatchKey::FuncTorchBatched,
                                     c10::DispatchKey::FuncTorchGradWrapper, c10::DispatchKey::Python});
  return at::GradMode::is_enabled() || grad.key_set().has_any(wrapped) || grad._fw_grad(0).defined();
}

// The gradients by the definition, of inputs that are saved first: x, weights and γs; before an activation of the βs too,
// and of what it keeps.
inline void by_definition(int64_t number, const variable_list& saved, size_t inputs, const std::vector<bool>& needs,
                          const Tensor& grad, variable_list& found, size_t first, int64_t activation = 0,
                          const variable_list& betas = {}, const Tensor& kept = {}) {
  const py::gil_scoped_acquire gil;
  const py::object gradients = py::reinterpret_borrow<py::object>(definition);
  const variable_list given(saved.begin(), saved.begin() + static_cast<int64_t>(inputs));
  const auto none = kept.defined() ? std::optional<Tensor>(kept) : std::nullopt;
  const auto results =
      gradients(number, given, needs, grad, activation, betas, none).cast<std::vector<std::optional<Tensor>>>();
  for (size_t i = 0; i < results.size(); ++i)
    if (results[i]) found[first + i] = *results[i];
}

// Row i as a tensor of its own: of a view, or of one given twice, autograd makes a copy.
inline Tensor row_of(const Tensor& rows, int64_t channels, size_t i) {
  Tensor to = at::empty({channels}, rows.options());
  std::memcpy(to.data_ptr(), static_cast<const char*>(rows.data_ptr()) + i * to.nbytes(), to.nbytes());
  return to;
}

// What a step's backward needs, into its node.
inline void keep(AutogradContext* ctx, int64_t number, int64_t activation, bool has_residual, variable_list saved) {
  ctx->save_for_backward(std::move(saved));
  ctx->saved_data["config"] = number;
  ctx->saved_data["activation"] = activation;
  ctx->saved_data["residual"] = has_residual;
  // A hook on saved tensors may keep what it was given.
  ctx->saved_data["owns"] = !at::SavedTensorDefaultHooks::get_hooks(true).has_value();
  ctx->set_materialize_grads(false);
}

struct Step : torch::autograd::Function<Step> {
  static constexpr size_t kFirst = 3;  // of what backward returns, x's: the configuration's, the statistics' and the activation's come before

  static Tensor forward(AutogradContext* ctx, int64_t number, const Running& running, int64_t activation, const Tensor& x,
                        TensorList weights, TensorList gammas, TensorList betas, const std::optional<Tensor>& added) {
    const WithoutAutogradAndAutocast guard;
    const Config& config = std::get<Config>(config_of(number));
    const Tensor residual = added.value_or(Tensor());
    const Epilogue epilogue{activation, residual};
    const variable_list ys = maps_of(config, x.to(config.convolution_dtype), weights);
    const auto [sum, means, variances, rstds] =
        epilogue.is_there()
            ? functions->epilogue_forward(stable(ys), stable(gammas), stable(betas), config.eps, config.dtype,
                                          laid_out(residual, first_map(config, ys)), activation)
            : functions->forward(stable(ys), stable(gammas), stable(betas), config.eps, config.dtype);
    functions->update_running(stable(running.means), stable(running.vars), stable(running.counters), means, variances,
                              running.momenta, ys[0].numel() / ys[0].size(1));
    const Tensor out = unstable(sum);
    variable_list saved{x};
    saved.insert(saved.end(), weights.begin(), weights.end());
    saved.insert(saved.end(), gammas.begin(), gammas.end());
    saved.push_back(unstable(means));
    saved.push_back(unstable(rstds));
    for (size_t b = 0; b < ys.size(); ++b)
      if (config.keeps(b)) saved.push_back(ys[b].to(config.dtype));
    if (activation != 0) {
      saved.insert(saved.end(), betas.begin(), betas.end());
      saved.push_back(epilogue.is_clamp() ? out : residual);
    }
    keep(ctx, number, activation, added.has_value(), std::move(saved));
    return out;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const int64_t number = ctx->saved_data.at("config").toInt(), activation = ctx->saved_data.at("activation").toInt();
    const Config& config = std::get<Config>(config_of(number));
    const size_t convolved = config.convolutions, inputs = 1 + convolved + config.gammas, tensors = inputs + config.betas;
    variable_list found(kFirst + tensors + 1);
    Tensor grad = grads[0];
    if (!grad.defined()) return found;
    const variable_list saved = ctx->get_saved_variables();
    std::vector<bool> needs(tensors);
    for (size_t i = 0; i < tensors; ++i) needs[i] = ctx->needs_input_grad(i);
    const bool needs_residual = ctx->saved_data.at("residual").toBool() && ctx->needs_input_grad(tensors);
    variable_list betas;
    Tensor kept;
    if (activation != 0) {
      kept = saved.back();
      betas.assign(saved.end() - 1 - static_cast<int64_t>(config.betas), saved.end() - 1);
    } else if (needs_residual) {
      found.back() = grad;
    }
    if (wants_definition(grad)) {
      if (activation != 0) needs.push_back(needs_residual);
      by_definition(number, saved, inputs, needs, grad, found, kFirst, activation, betas, kept);
      return found;
    }
    const bool owns = !config.keeps_maps || config.convolution_dtype != config.dtype || (ctx->saved_data.at("owns").toBool() &&
                                             !torch::autograd::get_current_graph_task_keep_graph());
    const WithoutAutogradAndAutocast guard;
    const Tensor x = saved[0].to(config.convolution_dtype);
    const TensorList weights(saved.data() + 1, convolved);
    const size_t kept_maps = convolved - (config.again >= 0);
    const variable_list ys = config.keeps_maps ? from_kept(config, x, weights, TensorList(saved.data() + inputs + 2, kept_maps))
                                               : maps_of(config, x, weights);
    const Tensor& first = first_map(config, ys);
    const std::vector<bool> needs_dy = needs_dy_of(config, needs);
    variable_list targets;
    if (owns || activation != 0) targets = targets_of(config, ys, needs_dy, owns);
    torch::stable::Tensor dgammas, dbeta;
    const Tensors scales = stable(TensorList(saved.data() + 1 + convolved, config.gammas));
    grad = like(grad, first);
    const auto means = stable(saved[inputs]), rstds = stable(saved[inputs + 1]), upstream = stable(grad);
    if (activation != 0) {
      std::optional<torch::stable::Tensor> dresidual;
      if (needs_residual) dresidual = stable(found.back() = at::empty_like(grad));
      std::tie(dgammas, dbeta) =
          functions->epilogue_backward(upstream, stable(ys), means, rstds, scales, stable(betas), needs_dy,
                                       laid_out(kept, first), activation, stable(targets), dresidual);
    } else if (owns) {
      std::tie(dgammas, dbeta) =
          functions->backward_into(upstream, stable(ys), means, rstds, scales, needs_dy, stable(targets));
    } else {
      Tensors dys;
      std::tie(dys, dgammas, dbeta) = functions->backward(upstream, stable(ys), means, rstds, scales, needs_dy);
      for (const auto& dy : dys) targets.push_back(unstable(dy));
    }
    convolution_gradients(config, targets, needs_dy, x, weights, needs, &found[kFirst]);
    const Tensor rows = unstable(dgammas), row = unstable(dbeta);
    for (size_t i = 0; i < config.gammas; ++i)
      if (needs[1 + convolved + i]) found[kFirst + 1 + convolved + i] = row_of(rows, row.numel(), i);
    for (size_t i = 0; i < config.betas; ++i)
      if (needs[inputs + i]) found[kFirst + inputs + i] = row_of(row, row.numel(), 0);
    return found;
  }
};

inline Config make_config(Pair stride, int64_t groups, const std::vector<std::array<int64_t, 9>>& places,
                          const std::vector<double>& eps, size_t gammas, size_t betas, at::ScalarType convolution_dtype,
                          at::ScalarType dtype, bool keeps_maps, std::vector<int64_t> taps, std::vector<int64_t> geometry,
                          bool channels_last) {
  Config config{stride, groups, {}, eps, gammas, betas, 0, convolution_dtype, dtype, keeps_maps, std::move(taps), std::move(geometry), channels_last};
  for (const auto& n : places) {
    config.places.push_back({n[0] != 0, {n[1], n[2]}, {n[3], n[4]}, {n[5], n[6], n[7], n[8]}});
    config.convolutions += n[0] != 0;
  }
  if (config.is_direct() && keeps_maps && config.convolutions > 1) {
    int64_t least = 0;
    for (size_t b = 0; b < config.places.size(); ++b) {
      const int64_t* own = &config.taps[b * kNumbers];
      if (config.places[b].convolved && (config.again < 0 || own[2] * own[3] < least)) {
        least = own[2] * own[3];
        config.again = static_cast<int64_t>(b);
      }
    }
  }
  return config;
}

}  // namespace acnet::node
