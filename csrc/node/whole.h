// A step that is one operator each way as a node of autograd's graph, in C++: dense `moments` and depthwise blocks.
// acnet_kernels/steps/ says what they compute; backends/nodes.py has the same node in Python.
#pragma once

#include <ATen/Context.h>

#include "step.h"

namespace acnet::node {

struct WholeStep : torch::autograd::Function<WholeStep> {
  static constexpr size_t kFirst = 3;  // of what backward returns, x's: as in Step

  // x is of the maps' dtype already: its cast is a node of its own. Only depthwise steps take what follows.
  static Tensor forward(AutogradContext* ctx, int64_t number, const Running& running, int64_t activation, const Tensor& x,
                        TensorList weights, TensorList gammas, TensorList betas, const std::optional<Tensor>& added) {
    const WithoutAutogradAndAutocast guard;
    const Whole& config = std::get<Whole>(config_of(number));
    const auto is_last = [](const Tensor& t) { return t.suggest_memory_format() == at::MemoryFormat::ChannelsLast; };
    const bool channels_last = is_last(x) || is_last(weights[0]);
    const auto layout = channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
    const Tensor residual = added.has_value() ? added->contiguous(layout) : Tensor();
    const auto after = residual.defined() ? std::optional(stable(residual)) : std::nullopt;
    const auto [out, means, variances, rstds, pivot, sums, centred] =
        config.is_depthwise ? functions->depthwise(stable(x), stable(weights), stable(gammas), stable(betas), config.eps,
                                                   config.taps, config.geometry, channels_last, after, activation)
                            : functions->moments(stable(x), stable(weights), stable(gammas), stable(betas), config.eps,
                                                 config.taps, config.geometry, config.convolution_dtype, channels_last);
    const Tensor result = unstable(out);
    functions->update_running(stable(running.means), stable(running.vars), stable(running.counters), means, variances,
                              running.momenta, result.numel() / result.size(1));
    variable_list saved{x};
    saved.insert(saved.end(), weights.begin(), weights.end());
    saved.insert(saved.end(), gammas.begin(), gammas.end());
    for (const auto& t : {means, rstds, pivot, sums, centred}) saved.push_back(unstable(t));
    if (activation != 0) {
      saved.insert(saved.end(), betas.begin(), betas.end());
      saved.push_back(Epilogue{activation, {}}.is_clamp() ? result : residual);
    }
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["config"] = number;
    ctx->saved_data["activation"] = activation;
    ctx->saved_data["residual"] = added.has_value();
    ctx->saved_data["channels_last"] = channels_last;
    ctx->set_materialize_grads(false);
    return result;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const int64_t number = ctx->saved_data.at("config").toInt(), activation = ctx->saved_data.at("activation").toInt();
    const Whole& config = std::get<Whole>(config_of(number));
    const size_t convolved = config.convolutions, inputs = 1 + convolved + config.gammas, tensors = inputs + config.betas;
    variable_list found(kFirst + tensors + 1);
    Tensor grad = grads[0];
    if (!grad.defined()) return found;
    const variable_list saved = ctx->get_saved_variables();
    std::vector<bool> needs(tensors);
    for (size_t i = 0; i < needs.size(); ++i) needs[i] = ctx->needs_input_grad(i);
    const bool needs_residual = ctx->saved_data.at("residual").toBool() && ctx->needs_input_grad(tensors);
    variable_list betas;
    Tensor outer;
    if (activation != 0) {
      outer = saved.back();
      betas.assign(saved.end() - 1 - static_cast<int64_t>(config.betas), saved.end() - 1);
    } else if (needs_residual) {
      found.back() = grad;
    }
    if (wants_definition(grad)) {
      if (activation != 0) needs.push_back(needs_residual);
      by_definition(number, saved, inputs, needs, grad, found, kFirst, activation, betas, outer);
      return found;
    }
    const WithoutAutogradAndAutocast guard;
    const auto first = needs.begin() + 1, last = first + static_cast<int64_t>(convolved);
    const std::vector<bool> need_weights(first, last);
    const bool need_gammas = std::find(last, last + static_cast<int64_t>(config.gammas), true) != last + static_cast<int64_t>(config.gammas);
    const Tensors weights = stable(TensorList(saved.data() + 1, convolved));
    const Tensors gammas = stable(TensorList(saved.data() + 1 + convolved, config.gammas));
    std::array<torch::stable::Tensor, 5> kept;
    for (size_t i = 0; i < kept.size(); ++i) kept[i] = stable(saved[inputs + i]);
    const auto& [means, rstds, pivot, sums, centred] = kept;
    const bool accumulates = config.accumulates && at::globalContext().userEnabledMkldnn();
    torch::stable::Tensor dx, dgammas, dbeta, dresidual;
    Tensors dws;
    if (config.is_depthwise) {
      if (activation != 0)  // the layout of what it is told by
        grad = grad.contiguous(ctx->saved_data.at("channels_last").toBool() ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
      std::tie(dx, dws, dgammas, dbeta, dresidual) = functions->depthwise_backward(
          stable(grad), stable(saved[0]), weights, gammas, stable(betas), means, rstds, pivot, sums, centred, std::nullopt,
          config.taps, config.geometry, needs[0], need_weights, need_gammas,
          outer.defined() ? std::optional(stable(outer)) : std::nullopt, activation, activation != 0 && needs_residual);
      if (activation != 0 && needs_residual) found.back() = unstable(dresidual);
    } else {
      std::tie(dx, dws, dgammas, dbeta) = functions->moments_backward(
          stable(grad), stable(saved[0]), weights, gammas, means, rstds, pivot, sums, centred, config.taps, config.geometry,
          config.convolution_dtype, accumulates, needs[0], need_weights, need_gammas);
    }
    if (needs[0]) found[kFirst] = unstable(dx);
    size_t next = 0;
    for (size_t w = 0; w < convolved; ++w)
      if (need_weights[w]) found[kFirst + 1 + w] = unstable(dws[next++]);
    const Tensor rows = unstable(dgammas), row = unstable(dbeta);
    for (size_t i = 0; i < config.gammas; ++i)
      if (needs[1 + convolved + i]) found[kFirst + 1 + convolved + i] = row_of(rows, row.numel(), i);
    for (size_t i = 0; i < config.betas; ++i)
      if (needs[inputs + i]) found[kFirst + inputs + i] = i < config.cancelled ? at::zeros_like(row) : row_of(row, row.numel(), 0);
    return found;
  }
};

// A step by its number, and what follows it.
inline Tensor run_step(int64_t number, const Running& running, const Tensor& x, TensorList weights, TensorList gammas,
                       TensorList betas, const Epilogue& epilogue) {
  const auto residual = epilogue.residual.defined() ? std::optional(epilogue.residual) : std::nullopt;
  if (const Whole* whole = std::get_if<Whole>(&config_of(number))) {
    const Tensor input = x.to(whole->dtype);
    if (whole->is_depthwise)
      return WholeStep::apply(number, running, epilogue.activation, input, weights, gammas, betas, residual);
    return epilogue.finish(WholeStep::apply(number, running, 0, input, weights, gammas, betas, std::nullopt), false);
  }
  return Step::apply(number, running, epilogue.activation, x, weights, gammas, betas, residual);
}

inline int64_t configure_whole(std::vector<int64_t> taps, std::vector<int64_t> geometry, std::vector<double> eps, size_t gammas,
                               size_t betas, size_t cancelled, size_t convolutions, at::ScalarType convolution_dtype, at::ScalarType dtype,
                               bool is_depthwise, bool accumulates) {
  return add_config(Whole{std::move(taps), std::move(geometry), std::move(eps), gammas, betas, cancelled, convolutions,
                          convolution_dtype, dtype, is_depthwise, accumulates});
}

}  // namespace acnet::node
