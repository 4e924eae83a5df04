// A block's modules: whether they are still what they were when a step was put together, and their tensors now.
// submodules.py says in Python what is looked at here, and why; whatever does not fit goes its way.
#pragma once

#include <torch/csrc/autograd/python_variable.h>

#include <array>
#include <utility>

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
  c10::Device device;
};

inline PyObject* item(PyObject* dict, const py::str& name) {  // borrowed; null where there is none
  return dict == nullptr || !PyDict_Check(dict) ? nullptr : PyDict_GetItemWithError(dict, name.ptr());
}

inline py::str interned(const char* name) { return py::reinterpret_steal<py::str>(PyUnicode_InternFromString(name)); }

inline bool fits(const Tensor& t, at::ScalarType dtype, c10::Device device, const std::vector<int64_t>& sizes) {
  return t.scalar_type() == dtype && t.device() == device && t.layout() == at::kStrided && t.sizes() == sizes &&
         !t.key_set().has(c10::DispatchKey::Python);
}

class Reading {
 public:
  static constexpr size_t KINDS = 6;  // weights, γ, β, running means and variances, counters
  using Objects = std::array<std::vector<PyObject*>, KINDS>;

  Reading(std::vector<Module> modules, std::array<std::vector<Source>, KINDS> sources)
      : modules_(std::move(modules)), sources_(std::move(sources)) {}

  // The tensors of the block that has these modules, borrowed; false where anything is not as it was.
  bool read(PyObject* children, Objects& tensors) const {
    std::vector<PyObject*> found(modules_.size());
    for (size_t i = 0; i < modules_.size(); ++i) {
      found[i] = find(modules_[i], children);
      if (found[i] == nullptr) return false;
    }
    for (size_t kind = 0; kind < KINDS; ++kind) {
      tensors[kind].reserve(sources_[kind].size());
      for (const Source& source : sources_[kind]) {
        PyObject* t = tensor(found[source.module], source.parameter, source.name);
        if (t == nullptr || !THPVariable_Check(t)) return false;
        if (!fits(THPVariable_Unpack(t), source.dtype, source.device, source.sizes)) return false;
        tensors[kind].push_back(t);
      }
    }
    return true;
  }

  // `read`, appended to a list a kind; no list is touched where it is false.
  bool append(const py::dict& children, const std::array<py::list, KINDS>& lists) const {
    Objects tensors;
    if (!read(children.ptr(), tensors)) return false;
    for (size_t kind = 0; kind < KINDS; ++kind)
      for (PyObject* t : tensors[kind])
        if (PyList_Append(lists[kind].ptr(), t) != 0) throw py::error_already_set();
    return true;
  }

 private:
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

  std::vector<Module> modules_;
  std::array<std::vector<Source>, KINDS> sources_;
};

}  // namespace acnet::node
