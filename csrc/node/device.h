// A step of `branches` on CUDA as one node of autograd's graph, in C++: Triton's launches of a direction by one call into
// the operators' library (csrc/launch.cpp), and where the convolutions are the library's, these by ATen.
//
// Python's nodes (backends/triton_node.py and branches.py) compute the same. They record the launches, and take whatever
// is not recorded for tensors of a kind, so that nothing is checked here; and what only the definition differentiates.
#pragma once

#include "step.h"

namespace acnet::node {

using Routine = std::pair<int64_t, int64_t>;  // its number, and the raw stream it is launched on

inline Tensor last(const Tensor& t) { return t.contiguous(at::MemoryFormat::ChannelsLast); }

// The weights as Triton's kernels take them: of the convolutions' dtype, in one memory format.
inline variable_list as_kernels_take(const Config& config, TensorList weights) {
  variable_list cast;
  for (const Tensor& weight : weights) cast.push_back(weight.to(config.convolution_dtype));
  for (const auto layout : {at::MemoryFormat::ChannelsLast, at::MemoryFormat::Contiguous})
    if (std::all_of(cast.begin(), cast.end(), [layout](const Tensor& t) { return t.is_contiguous(layout); })) return cast;
  for (Tensor& weight : cast) weight = last(weight);
  return cast;
}

// What a routine is given, tensor by tensor, and what it returns: nothing where it is not recorded for such tensors.
class Launch {
 public:
  Launch& operator<<(const Tensor& t) {
    if (t.defined()) given_.push_back(stable(t));
    return *this;
  }
  Launch& operator<<(TensorList list) {
    for (const Tensor& t : list) given_.push_back(stable(t));
    return *this;
  }
  variable_list run(const Routine& routine) {
    variable_list made;
    for (const auto& t : functions->replay(routine.first, routine.second, std::move(given_))) made.push_back(unstable(t));
    return made;
  }

 private:
  Tensors given_;
};

struct Launched {
  Tensor out, means, rstds;
  variable_list ys;  // of all branches
};

// The forward, running statistics included; nothing, and nothing has happened, where its launches are not recorded.
inline std::optional<Launched> launch_forward(const DeviceConfig& config, const Routine& routine, const Running& running,
                                              const Tensor& x, TensorList weights, TensorList gammas, TensorList betas,
                                              const Tensor& residual) {
  const WithoutAutogradAndAutocast guard;
  const Tensor seen = x.to(config.step.convolution_dtype);
  variable_list ys;
  Launch launch;
  if (config.by_triton) {
    launch << last(seen) << as_kernels_take(config.step, weights);
  } else {
    ys = maps_of(config.step, seen, weights);
    launch << ys;
  }
  launch << gammas << betas << running.means << running.vars << running.counters;
  if (residual.defined()) launch << last(residual);
  variable_list made = launch.run(routine);
  if (made.empty()) return std::nullopt;
  if (config.by_triton) ys.assign(made.begin() + 4, made.end());
  return Launched{made[0], made[1], made[3], std::move(ys)};
}

struct DeviceStep : torch::autograd::Function<DeviceStep> {
  static constexpr size_t kFirst = 3;  // of what backward returns, x's: as in Step

  static Tensor forward(AutogradContext* ctx, int64_t number, const Launched& launched, int64_t activation, const Tensor& x,
                        TensorList weights, TensorList gammas, TensorList betas, const std::optional<Tensor>& added) {
    const Config& config = std::get<DeviceConfig>(config_of(number)).step;
    variable_list saved{x};
    saved.insert(saved.end(), weights.begin(), weights.end());
    saved.insert(saved.end(), gammas.begin(), gammas.end());
    saved.push_back(launched.means);
    saved.push_back(launched.rstds);
    if (activation != 0) {
      saved.insert(saved.end(), betas.begin(), betas.end());
      saved.push_back(Epilogue{activation, {}}.is_clamp() ? launched.out : added.value_or(Tensor()));
    }
    for (size_t b = 0; b < launched.ys.size(); ++b)
      if (config.places[b].convolved) saved.push_back(launched.ys[b]);
    keep(ctx, number, activation, added.has_value(), std::move(saved));
    return launched.out;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const int64_t number = ctx->saved_data.at("config").toInt(), activation = ctx->saved_data.at("activation").toInt();
    const DeviceConfig& config = std::get<DeviceConfig>(config_of(number));
    const size_t tensors = 1 + config.step.convolutions + config.step.gammas + config.step.betas;
    variable_list found(kFirst + tensors + 1);
    const Tensor& grad = grads[0];
    if (!grad.defined()) return found;
    const variable_list saved = ctx->get_saved_variables();
    std::vector<bool> needs(tensors);
    for (size_t i = 0; i < tensors; ++i) needs[i] = ctx->needs_input_grad(i);
    const bool needs_residual = ctx->saved_data.at("residual").toBool() && ctx->needs_input_grad(tensors);
    const bool owns = ctx->saved_data.at("owns").toBool();
    const Gradients wanted{config, activation, needs, needs_residual, owns && !torch::autograd::get_current_graph_task_keep_graph()};
    if (wants_definition(grad) || !wanted.launch(saved, grad, found)) wanted.by_python(saved, grad, owns, found);
    return found;
  }

 private:
  struct Gradients {
    const DeviceConfig& config;
    int64_t activation;
    const std::vector<bool>& needs;  // of x, the weights, the γs and the βs
    bool needs_residual, overwrite;

    // Into `found`; false where the launches are not recorded.
    bool launch(const variable_list& saved, const Tensor& grad, variable_list& found) const {
      const Config& step = config.step;
      const size_t inputs = 1 + step.convolutions + step.gammas;
      const TensorList weights(saved.data() + 1, step.convolutions), gammas(weights.end(), step.gammas);
      const TensorList after(saved.data() + inputs + 2, activation == 0 ? 0 : step.betas + 1);
      const TensorList kept(after.end(), step.convolutions), betas = activation == 0 ? after : after.slice(0, step.betas);
      const bool is_told = activation != 0 && after.back().defined();
      const auto routine = routine_of(is_told, grad.get_device());
      if (!routine) return false;
      const WithoutAutogradAndAutocast guard;
      const Tensor x = saved[0].to(step.convolution_dtype);
      const variable_list ys = config.by_triton ? kept.vec() : from_kept(step, x, weights, kept);
      const Tensor upstream = like(grad, first_map(step, ys)), told = is_told ? last(after.back()) : Tensor();
      const std::vector<bool> needs_dy = needs_dy_of(step, needs);
      const bool writes_residual = activation != 0 && needs_residual;
      Tensor dresidual;
      variable_list dys;
      Launch launch;
      launch << upstream;
      if (config.by_triton) {
        launch << last(x) << saved[inputs] << saved[inputs + 1] << as_kernels_take(step, weights) << ys;
      } else {
        if (overwrite || activation != 0) dys = targets_of(step, ys, needs_dy, overwrite);
        if (writes_residual) dresidual = at::empty_like(upstream);
        launch << saved[inputs] << saved[inputs + 1] << ys << dys;
      }
      launch << gammas << betas << told << dresidual;
      const variable_list made = launch.run(*routine);
      if (made.empty()) return false;
      auto next = made.begin() + 2;
      if (config.by_triton) {
        if (writes_residual) dresidual = *next++;
        for (size_t i = 0; i <= step.convolutions; ++i)
          if (needs[i]) found[kFirst + i] = *next++;
      } else {
        dys.insert(dys.end(), next, made.end());
        convolution_gradients(step, dys, needs_dy, x, weights, needs, &found[kFirst]);
      }
      for (size_t i = 0, at = 1 + step.convolutions; i < step.gammas; ++i, ++at)
        if (needs[at]) found[kFirst + at] = made[0].select(0, static_cast<int64_t>(i));
      for (size_t at = inputs; at < needs.size(); ++at)
        if (needs[at]) found[kFirst + at] = made[1];
      if (needs_residual) found.back() = activation == 0 ? grad : dresidual;
      return true;
    }

    std::optional<Routine> routine_of(bool is_told, int64_t device) const {
      const py::gil_scoped_acquire gil;
      const py::object given = py::handle(config.launches).attr("backward")(activation, device, needs, needs_residual, overwrite, is_told);
      return given.cast<std::optional<Routine>>();
    }

    void by_python(const variable_list& saved, const Tensor& grad, bool owns, variable_list& found) const {
      const py::gil_scoped_acquire gil;
      const py::object gradients = py::handle(config.launches).attr("gradients")(activation, saved, needs, needs_residual, owns, grad);
      const auto results = gradients.cast<std::vector<std::optional<Tensor>>>();
      for (size_t i = 0; i < results.size(); ++i)
        if (results[i]) found[kFirst + i] = *results[i];
    }
  };
};

// A step that a lane has on a device: by the node where its launches are recorded, else by Python.
struct OnDevice {
  py::object again;               // Python's function of x, a list of each kind of tensors, and what follows
  std::optional<int64_t> number;  // the node's, of what it takes
  bool untimed;                   // cudnn.benchmark, once it is on, has the planner time it first

  // Undefined where Python is to do it, and nothing has happened.
  Tensor run(const Running& running, const Tensor& x, TensorList weights, TensorList gammas, TensorList betas,
             const Epilogue& epilogue) const {
    if (!number) return {};
    const DeviceConfig& config = std::get<DeviceConfig>(config_of(*number));
    const py::object given = py::handle(config.launches).attr("forward")(epilogue.activation, x.get_device());
    const auto routine = given.cast<std::optional<Routine>>();
    if (!routine) return {};
    const py::gil_scoped_release release;
    const auto launched = launch_forward(config, *routine, running, x, weights, gammas, betas, epilogue.residual);
    if (!launched) return {};
    const auto residual = epilogue.residual.defined() ? std::optional(epilogue.residual) : std::nullopt;
    return DeviceStep::apply(*number, *launched, epilogue.activation, x, weights, gammas, betas, residual);
  }
};

}  // namespace acnet::node
