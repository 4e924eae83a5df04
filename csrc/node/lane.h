// A block's step without Python in between: whether its modules are still what they were when the step was put together,
// and their tensors now. submodules.py, spec.py and backends/planner.py say in Python what is looked at here, and why;
// whatever does not fit goes their way.
#pragma once

#include <ATen/Parallel.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include <utility>
#include <variant>

#include "whole.h"

namespace acnet::node {

// A module by its names on the way from the block, and what it must be.
struct Module {
  std::vector<py::str> path;
  py::object type;
  py::ssize_t attributes;  // in its __dict__: one more may shadow what its class's forward reads
  std::vector<std::pair<py::str, py::object>> settings;
  std::vector<std::pair<bool, py::str>> missing;  // parameters (true) and buffers that must be None
  std::vector<py::str> children;                  // all of its own, in order; none are looked at where there are none
};

// One of its tensors.
struct Source {
  size_t module;
  bool parameter;
  py::str name;
  std::vector<int64_t> sizes;
  at::ScalarType dtype;
};

inline PyObject* item(PyObject* dict, const py::str& name) {  // borrowed; null where there is none
  return dict == nullptr || !PyDict_Check(dict) ? nullptr : PyDict_GetItemWithError(dict, name.ptr());
}

inline py::str interned(const char* name) { return py::reinterpret_steal<py::str>(PyUnicode_InternFromString(name)); }

// Autocast, threads and whatever else a choice of backend hangs on besides the modules and x.
struct Surroundings {
  bool grad, inference, autocast;
  at::ScalarType autocast_dtype;
  int threads;

  static Surroundings now() {
    return {at::GradMode::is_enabled(), c10::InferenceMode::is_enabled(), at::autocast::is_autocast_enabled(at::kCPU),
            at::autocast::get_autocast_dtype(at::kCPU), at::get_num_threads()};
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
  // What it runs, by its number or as a fold; what it ran on, and from which tensors of which modules.
  Lane(std::variant<int64_t, Fold> step, const Tensor& x, std::vector<Module> modules,
       std::array<std::vector<Source>, 6> sources, std::vector<double> momenta)
      : step_(std::move(step)),
        sizes_(x.sizes().vec()),
        strides_(x.strides().vec()),
        dtype_(x.scalar_type()),
        requires_grad_(x.requires_grad()),
        surroundings_(Surroundings::now()),
        modules_(std::move(modules)),
        sources_(std::move(sources)),
        momenta_(std::move(momenta)) {}

  // The step on x by the block that has these modules; None where anything is not as it was.
  py::object operator()(py::handle x, py::dict children) const {
    if (!THPVariable_CheckExact(x.ptr()) || Surroundings::are_special() || !(Surroundings::now() == surroundings_))
      return py::none();
    const Tensor& input = THPVariable_Unpack(x.ptr());
    if (!fits(input, dtype_, sizes_) || input.strides() != strides_ || input.requires_grad() != requires_grad_)
      return py::none();
    std::vector<PyObject*> found(modules_.size());
    for (size_t i = 0; i < modules_.size(); ++i) {
      found[i] = find(modules_[i], children.ptr());
      if (found[i] == nullptr) return py::none();
    }
    std::array<variable_list, 6> tensors;
    for (size_t kind = 0; kind < tensors.size(); ++kind) {
      tensors[kind].reserve(sources_[kind].size());
      for (const Source& source : sources_[kind]) {
        PyObject* t = tensor(found[source.module], source.parameter, source.name);
        if (t == nullptr || !THPVariable_Check(t)) return py::none();
        const Tensor& value = THPVariable_Unpack(t);
        if (!fits(value, source.dtype, source.sizes)) return py::none();
        tensors[kind].push_back(value);
      }
    }
    const auto& [weights, gammas, betas, means, vars, counters] = tensors;
    Tensor out;
    {
      const py::gil_scoped_release release;
      if (const Fold* fold = std::get_if<Fold>(&step_)) {
        out = fold->run(input, weights, gammas, betas, means, vars);
      } else {
        const Running running{means, vars, counters, momenta_};
        out = run_step(std::get<int64_t>(step_), running, input, weights, gammas, betas);
      }
    }
    return py::cast(out);
  }

 private:
  static bool fits(const Tensor& t, at::ScalarType dtype, const std::vector<int64_t>& sizes) {
    return t.scalar_type() == dtype && t.is_cpu() && t.layout() == at::kStrided && t.sizes() == sizes &&
           !t.key_set().has(c10::DispatchKey::Python);
  }

  // The module's __dict__, borrowed, if it is what it must be.
  static PyObject* find(const Module& wanted, PyObject* children) {
    static const py::str modules = interned("_modules"), parameters = interned("_parameters"), buffers = interned("_buffers");
    static const std::array<py::str, 4> hooks{interned("_forward_hooks"), interned("_forward_pre_hooks"),
                                              interned("_backward_hooks"), interned("_backward_pre_hooks")};
    PyObject* own = nullptr;
    PyObject* module = nullptr;
    for (const py::str& name : wanted.path) {
      module = item(own == nullptr ? children : item(own, modules), name);
      if (module == nullptr || module == Py_None) return nullptr;
      PyObject* dict = PyObject_GenericGetDict(module, nullptr);
      if (dict == nullptr) {
        PyErr_Clear();
        return nullptr;
      }
      Py_DECREF(dict);  // the module has it
      own = dict;
    }
    if (reinterpret_cast<PyObject*>(Py_TYPE(module)) != wanted.type.ptr() || PyDict_Size(own) != wanted.attributes) return nullptr;
    for (const py::str& name : hooks) {
      PyObject* registered = item(own, name);
      if (registered == nullptr || !PyDict_Check(registered) || PyDict_Size(registered) != 0) return nullptr;
    }
    for (const auto& [name, value] : wanted.settings) {
      PyObject* is = item(own, name);
      if (is == nullptr || (is != value.ptr() && PyObject_RichCompareBool(is, value.ptr(), Py_EQ) != 1)) {
        PyErr_Clear();
        return nullptr;
      }
    }
    if (!wanted.children.empty()) {
      PyObject *own_modules = item(own, modules), *name = nullptr, *child = nullptr;
      if (own_modules == nullptr || PyDict_Size(own_modules) != static_cast<py::ssize_t>(wanted.children.size())) return nullptr;
      py::ssize_t at = 0;
      for (const py::str& expected : wanted.children)
        if (!PyDict_Next(own_modules, &at, &name, &child) || PyUnicode_Compare(name, expected.ptr()) != 0) return nullptr;
    }
    for (const auto& [parameter, name] : wanted.missing)
      if (item(item(own, parameter ? parameters : buffers), name) != Py_None) return nullptr;
    return own;
  }

  static PyObject* tensor(PyObject* own, bool parameter, const py::str& name) {
    static const py::str parameters = interned("_parameters"), buffers = interned("_buffers");
    return item(item(own, parameter ? parameters : buffers), name);
  }

  std::variant<int64_t, Fold> step_;
  std::vector<int64_t> sizes_, strides_;
  at::ScalarType dtype_;
  bool requires_grad_;
  Surroundings surroundings_;
  std::vector<Module> modules_;
  std::array<std::vector<Source>, 6> sources_;
  std::vector<double> momenta_;
};

}  // namespace acnet::node
