// A block's step without Python in between, where its modules and what else a choice of backend hangs on are still what
// they were when the step was put together. spec.py and backends/planner.py say in Python what is looked at here, and
// why; whatever does not fit goes their way.
#pragma once

#include <ATen/Parallel.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include <utility>
#include <variant>

#include "device.h"
#include "reading.h"

namespace acnet::node {

// Autocast, threads and whatever else a choice of backend hangs on besides the modules and x.
struct Surroundings {
  bool grad, inference, autocast;
  at::ScalarType autocast_dtype;
  int threads;

  static Surroundings now(c10::DeviceType device) {
    return {at::GradMode::is_enabled(), c10::InferenceMode::is_enabled(), at::autocast::is_autocast_enabled(device),
            at::autocast::get_autocast_dtype(device), at::get_num_threads()};
  }
  bool operator==(const Surroundings& other) const {
    return grad == other.grad && inference == other.inference && autocast == other.autocast && (!autocast || autocast_dtype == other.autocast_dtype) &&
           threads == other.threads;
  }
  // Modes, transforms and tracers, which know PyTorch's operators or have rules of their own.
  static bool are_special() {
    return c10::impl::TorchDispatchModeTLS::any_modes_set() ||
           c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
           torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr || torch::jit::tracer::isTracing();
  }
};

// What a block is in eval: one convolution, folded each time.
struct Fold {
  Pair stride, padding, dilation;
  int64_t groups;
  std::vector<int64_t> blocks, branches;
  std::vector<double> eps;
  bool channels_last;

  Tensor run(const Tensor& x, TensorList weights, TensorList gammas, TensorList betas, TensorList means, TensorList vars) const {
    const auto [weight, bias] = functions->fuse(stable(weights), stable(gammas), stable(betas), stable(means), stable(vars),
                                                {}, blocks, branches, eps);
    Tensor kernel = unstable(weight[0]);
    // Of one channel it is dense in both layouts, and folded in the other.
    if (channels_last && kernel.size(1) == 1) kernel = kernel.to(kernel.options(), false, false, at::MemoryFormat::ChannelsLast);
    return at::conv2d(x, kernel, unstable(bias[0]), stride, padding, dilation, groups);
  }
};

class Lane {
 public:
  // What it runs, by its number on the CPU; what it ran on and gave, and from which tensors of which modules.
  Lane(std::variant<int64_t, Fold, OnDevice> step, const Tensor& x, std::vector<int64_t> out_sizes, at::ScalarType out_dtype,
       Reading reading, std::vector<double> momenta)
      : step_(std::move(step)),
        out_sizes_(std::move(out_sizes)),
        out_dtype_(out_dtype),
        sizes_(x.sizes().vec()),
        strides_(x.strides().vec()),
        dtype_(x.scalar_type()),
        requires_grad_(x.requires_grad()),
        device_(x.device()),
        surroundings_(Surroundings::now(x.device().type())),
        reading_(std::move(reading)),
        momenta_(std::move(momenta)) {}

  // The step on x by the block that has these modules, and what follows it; None where anything is not as it was, or the
  // residual, None for none, is no map like the sum.
  py::object operator()(py::handle x, py::dict children, int64_t activation, py::handle residual) const {
    if (!THPVariable_CheckExact(x.ptr()) || Surroundings::are_special() || !(Surroundings::now(device_.type()) == surroundings_))
      return py::none();
    const Tensor& input = THPVariable_Unpack(x.ptr());
    if (!fits(input, dtype_, device_, sizes_) || input.strides() != strides_ || input.requires_grad() != requires_grad_)
      return py::none();
    Reading::Objects objects;
    if (!reading_.read(children.ptr(), objects)) return py::none();
    if (!residual.is_none() && !THPVariable_CheckExact(residual.ptr())) return py::none();
    if (!residual.is_none() && !fits(THPVariable_Unpack(residual.ptr()), out_dtype_, device_, out_sizes_)) return py::none();
    const OnDevice* on_device = std::get_if<OnDevice>(&step_);
    if (on_device != nullptr && on_device->untimed && at::globalContext().benchmarkCuDNN()) return py::none();
    std::array<variable_list, Reading::KINDS> tensors;
    for (size_t kind = 0; kind < tensors.size(); ++kind)
      for (PyObject* t : objects[kind]) tensors[kind].push_back(THPVariable_Unpack(t));
    const auto& [weights, gammas, betas, means, vars, counters] = tensors;
    const Running running{means, vars, counters, momenta_};
    Epilogue epilogue{activation, {}};
    if (!residual.is_none()) epilogue.residual = THPVariable_Unpack(residual.ptr());
    if (on_device != nullptr) {
      const Tensor out = on_device->run(running, input, weights, gammas, betas, epilogue);
      return out.defined() ? py::cast(out) : on_device->again(x, weights, gammas, betas, means, vars, counters, activation, residual);
    }
    Tensor out;
    {
      const py::gil_scoped_release release;
      if (const Fold* fold = std::get_if<Fold>(&step_)) {
        out = epilogue.finish(fold->run(input, weights, gammas, betas, means, vars), true);
      } else {
        out = run_step(std::get<int64_t>(step_), running, input, weights, gammas, betas, epilogue);
      }
    }
    return py::cast(out);
  }

 private:
  std::variant<int64_t, Fold, OnDevice> step_;
  std::vector<int64_t> out_sizes_;
  at::ScalarType out_dtype_;
  std::vector<int64_t> sizes_, strides_;
  at::ScalarType dtype_;
  bool requires_grad_;
  c10::Device device_;
  Surroundings surroundings_;
  Reading reading_;
  std::vector<double> momenta_;
};

}  // namespace acnet::node
