// The Python module acnet_kernels._node_TORCH; acnet_kernels/backends/node.py is its one user.
#include <dlfcn.h>

#include <stdexcept>
#include <string>

#include "lane.h"

namespace acnet::node {
namespace {

void attach(const std::string& library, py::object gradients) {
  void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_NOLOAD);
  void* symbol = handle == nullptr ? nullptr : dlsym(handle, "acnet_functions");
  if (symbol == nullptr) throw std::runtime_error(library + " is not loaded, or of another version");
  functions = reinterpret_cast<const Functions* (*)()>(symbol)();
  definition = gradients.release().ptr();
}

Tensor run(int64_t number, const Tensor& x, const variable_list& weights, const variable_list& gammas,
           const variable_list& betas, const variable_list& running_means, const variable_list& running_vars,
           const variable_list& counters, const std::vector<double>& momenta, int64_t activation,
           const std::optional<Tensor>& residual) {
  const Running running{running_means, running_vars, counters, momenta};
  return run_step(number, running, x, weights, gammas, betas, {activation, residual.value_or(Tensor())});
}

using Names = std::vector<std::pair<bool, py::str>>;

std::vector<Module> modules_of(const py::list& given) {
  std::vector<Module> modules;
  for (const py::handle entry : given) {
    const auto fields = py::cast<py::tuple>(entry);
    Module module{py::cast<std::vector<py::str>>(fields[0]), fields[1], py::cast<py::ssize_t>(fields[2]), {},
                  py::cast<Names>(fields[4]), py::cast<std::vector<py::str>>(fields[5])};
    for (const auto& [name, value] : py::cast<py::dict>(fields[3]))
      module.settings.emplace_back(py::cast<py::str>(name), py::reinterpret_borrow<py::object>(value));
    modules.push_back(std::move(module));
  }
  return modules;
}

std::array<std::vector<Source>, Reading::KINDS> sources_of(const std::vector<std::vector<py::tuple>>& given) {
  std::array<std::vector<Source>, Reading::KINDS> sources;
  for (size_t kind = 0; kind < sources.size(); ++kind)
    for (const py::tuple& entry : given.at(kind)) {
      const auto t = py::cast<Tensor>(entry[3]);
      sources[kind].push_back(
          {py::cast<size_t>(entry[0]), py::cast<bool>(entry[1]), py::cast<py::str>(entry[2]), t.sizes().vec(), t.scalar_type(), t.device()});
    }
  return sources;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("attach", &attach);
  py::class_<Config>(m, "Config").def(py::init(&make_config));
  m.def("add", [](const Config& config) { return add_config(config); });
  m.def("add_on_device", [](const Config& config, bool by_triton, py::object launches) {
    return add_config(DeviceConfig{config, by_triton, launches.release().ptr()});
  });
  m.def("configure_whole", &configure_whole);
  m.def("run", &run, py::call_guard<py::gil_scoped_release>());
  py::class_<Fold>(m, "Fold")
      .def(py::init<Pair, Pair, Pair, int64_t, std::vector<int64_t>, std::vector<int64_t>, std::vector<double>, bool>());
  py::class_<OnDevice>(m, "OnDevice").def(py::init<py::object, std::optional<int64_t>, bool>());
  py::class_<Reading>(m, "Reading")
      .def(py::init([](const py::list& modules, const std::vector<std::vector<py::tuple>>& sources) {
        return Reading(modules_of(modules), sources_of(sources));
      }))
      .def("append", &Reading::append);
  py::class_<Lane>(m, "Lane")
      .def(py::init<std::variant<int64_t, Fold, OnDevice>, const Tensor&, std::vector<int64_t>, at::ScalarType, Reading, std::vector<double>>())
      .def("__call__", &Lane::operator());
}

}  // namespace acnet::node
