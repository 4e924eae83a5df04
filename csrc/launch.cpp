// The operators `replay` and `remember`: a routine's kernels, launched by the CUDA driver in one call.
// Their meaning is documented once, in acnet_kernels/ops/launch.py. The driver is found when it is first needed, so that
// this builds and loads without one.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "functions.h"

namespace acnet::launch {
namespace {

constexpr Check check_replay("replay"), check_remember("remember");

constexpr size_t kMostPrograms = 4096;  // a program is a few kilobytes
constexpr int64_t kMostThreads = 1024, kMostBlocks = 0x7fffffff, kMostBlocksAcross = 65535, kMostShared = 1 << 20;

struct Driver {  // CUresult is an int, every handle a pointer
  int (*launch_kernel)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                       unsigned block_z, unsigned shared, void* stream, void** parameters, void** extra);
  int (*get_context)(void** context);
  int (*push_context)(void* context);
  int (*pop_context)(void** context);
  int (*error_string)(int error, const char** text);

  Driver() {
    void* const library = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
    if (library == nullptr) check_remember.fail("there is no CUDA driver: ", dlerror());
    find(library, "cuLaunchKernel", launch_kernel);
    find(library, "cuCtxGetCurrent", get_context);
    find(library, "cuCtxPushCurrent_v2", push_context);
    find(library, "cuCtxPopCurrent_v2", pop_context);
    find(library, "cuGetErrorString", error_string);
  }

  void check(const Check& caller, int error, const char* what) const {
    if (error == 0) return;
    const char* text = nullptr;
    error_string(error, &text);
    caller.fail("CUDA error ", error, " in ", what, ": ", text == nullptr ? "of no name" : text);
  }

 private:
  template <class Function>
  static void find(void* library, const char* name, Function*& function) {
    function = reinterpret_cast<Function*>(dlsym(library, name));
    if (function == nullptr) check_remember.fail("the CUDA driver has no ", name);
  }
};

const Driver& driver() {
  static Driver const found;  // looked for again after a failure
  return found;
}

struct Parameter {
  int64_t place;  // of a memory: a tensor, then a buffer, then the workspace; kConstant for none
  int64_t value;  // bytes into that memory, or the constant's bits
};
constexpr int64_t kConstant = -1;

struct Kernel {
  void* function;
  std::array<unsigned, 3> grid;
  unsigned threads, shared;
  std::vector<Parameter> parameters;
};

struct Buffer {
  std::vector<int64_t> sizes, strides;
  int32_t dtype;

  Tensor empty(int32_t device_type, int32_t device_index) const {
    AtenTensorHandle made;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), dtype,
                                                    device_type, device_index, &made));
    return Tensor(made);
  }
};

struct Program {
  void* context;  // which the kernels were loaded into
  int32_t device_type, device_index;
  std::vector<Buffer> results;
  Buffer workspace;
  std::vector<Kernel> kernels;
  size_t most_parameters = 0;

  Tensors run(void* stream, const std::vector<View>& tensors) const {
    std::vector<int64_t> memories;
    memories.reserve(tensors.size() + results.size() + 1);
    for (const View& v : tensors) memories.push_back(reinterpret_cast<int64_t>(v.data));
    Tensors made;
    made.reserve(results.size());
    for (const Buffer& buffer : results) {
      made.push_back(buffer.empty(device_type, device_index));
      memories.push_back(reinterpret_cast<int64_t>(made.back().data_ptr()));
    }
    Tensor scratch;
    if (workspace.sizes[0] > 0) {
      scratch = workspace.empty(device_type, device_index);
      memories.push_back(reinterpret_cast<int64_t>(scratch.data_ptr()));
    }
    const Driver& cuda = driver();
    // A thread that has not used the device has no context, and one that uses several may have another's.
    void* current = nullptr;
    cuda.check(check_replay, cuda.get_context(&current), "cuCtxGetCurrent");
    if (current != context) cuda.check(check_replay, cuda.push_context(context), "cuCtxPushCurrent");
    int const error = launch(cuda, stream, memories);
    if (current != context) cuda.pop_context(&current);
    cuda.check(check_replay, error, "cuLaunchKernel");
    return made;
  }

 private:
  int launch(const Driver& cuda, void* stream, const std::vector<int64_t>& memories) const {
    std::vector<int64_t> values(most_parameters);
    std::vector<void*> pointers(most_parameters);
    for (size_t i = 0; i < most_parameters; ++i) pointers[i] = &values[i];
    for (const Kernel& kernel : kernels) {
      for (size_t i = 0; i < kernel.parameters.size(); ++i) {
        const Parameter& p = kernel.parameters[i];
        values[i] = p.value + (p.place == kConstant ? 0 : memories[static_cast<size_t>(p.place)]);
      }
      const auto& [x, y, z] = kernel.grid;
      int const error = cuda.launch_kernel(kernel.function, x, y, z, kernel.threads, 1, 1, kernel.shared, stream,
                                           pointers.data(), nullptr);
      if (error != 0) return error;
    }
    return 0;
  }
};

// All that a routine's launches can depend on but for its constants, which its number stands for: of every tensor the
// dtype, device, shape, strides, whether it is aligned, and the first one at the same address.
using Key = std::vector<int64_t>;

Key key_of(int64_t routine, const std::vector<View>& tensors) {
  Key key;
  key.reserve(1 + 12 * tensors.size());
  key.push_back(routine);
  for (size_t i = 0; i < tensors.size(); ++i) {
    const View& v = tensors[i];
    size_t first = 0;
    while (tensors[first].data != v.data) ++first;
    key.push_back(v.dim);
    key.push_back(v.dtype->number);
    key.push_back(int64_t{v.device_type} << 32 | uint32_t(v.device_index));
    key.push_back(static_cast<int64_t>(first << 1 | size_t{v.aligned()}));
    for (int64_t d = 0; d < v.dim; ++d) key.push_back(v.sizes[d]);
    for (int64_t d = 0; d < v.dim; ++d) key.push_back(v.strides[d]);
  }
  return key;
}

struct Hash {
  size_t operator()(const Key& key) const {
    uint64_t hash = 0x9e3779b97f4a7c15;
    for (int64_t n : key) hash = (hash ^ static_cast<uint64_t>(n)) * 0xff51afd7ed558ccd, hash ^= hash >> 32;
    return hash;
  }
};

class Programs {
 public:
  std::shared_ptr<const Program> find(const Key& key) const {
    std::shared_lock const lock(mutex_);
    auto const found = programs_.find(key);
    return found == programs_.end() ? nullptr : found->second;
  }

  void add(Key key, Program program) {
    std::unique_lock const lock(mutex_);
    if (programs_.size() >= kMostPrograms) programs_.clear();
    programs_.insert_or_assign(std::move(key), std::make_shared<const Program>(std::move(program)));
  }

 private:
  mutable std::shared_mutex mutex_;
  std::unordered_map<Key, std::shared_ptr<const Program>, Hash> programs_;
};

Programs& programs() {
  static Programs* const all = new Programs;  // never destroyed: a thread may be at work when the process ends
  return *all;
}

std::vector<View> views_of(const Check& check, const Tensors& tensors, const char* name) {
  std::vector<View> views(tensors.begin(), tensors.end());
  for (size_t i = 0; i < views.size(); ++i) {
    check(views[i].dim >= 0, Entry{name, i}, " must be a tensor, got None");
    check(views[i].data != nullptr || views[i].empty(), Entry{name, i}, " has no memory behind its shape ", views[i].shape());
  }
  return views;
}

}  // namespace

Tensors replay(int64_t routine, int64_t stream, Tensors tensors) {
  std::vector<View> const views = views_of(check_replay, tensors, "tensors");
  std::shared_ptr<const Program> const program = programs().find(key_of(routine, views));
  return program == nullptr ? Tensors{} : program->run(reinterpret_cast<void*>(stream), views);
}

namespace {

// Takes a program's numbers one after another.
class Reader {
 public:
  explicit Reader(const std::vector<int64_t>& numbers) : numbers_(numbers) {}

  bool done() const { return at_ == numbers_.size(); }

  int64_t next() {
    check_remember(at_ < numbers_.size(), "kernels must hold all of a kernel's numbers, got ", numbers_.size(), " in all");
    return numbers_[at_++];
  }

  int64_t next(const char* what, int64_t least, int64_t most) {
    int64_t const n = next();
    check_remember(least <= n && n <= most, what, " must be from ", least, " to ", most, ", got ", n);
    return n;
  }

 private:
  const std::vector<int64_t>& numbers_;
  size_t at_ = 0;
};

Kernel read_kernel(Reader& reader, int64_t memories) {
  Kernel kernel;
  kernel.function = reinterpret_cast<void*>(reader.next());
  check_remember(kernel.function != nullptr, "a kernel must have a function, got 0");
  for (size_t axis = 0; axis < 3; ++axis)
    kernel.grid[axis] = static_cast<unsigned>(reader.next("a grid's size", 1, axis == 0 ? kMostBlocks : kMostBlocksAcross));
  kernel.threads = static_cast<unsigned>(reader.next("a kernel's threads", 1, kMostThreads));
  kernel.shared = static_cast<unsigned>(reader.next("a kernel's shared memory", 0, kMostShared));
  for (int64_t i = reader.next("a kernel's parameters", 0, 4096); i > 0; --i) {
    int64_t const place = reader.next("a parameter's memory", kConstant, memories - 1);
    kernel.parameters.push_back({place, reader.next()});
  }
  return kernel;
}

void remember(int64_t routine, Tensors tensors, Tensors results, int64_t workspace, std::vector<int64_t> kernels) {
  std::vector<View> const views = views_of(check_remember, tensors, "tensors");
  check_remember(!views.empty(), "tensors must not be empty");
  check_remember(!results.empty(), "results must not be empty: replay returns none where it knows no routine");
  check_remember(workspace >= 0, "workspace must not be negative, got ", workspace);
  const View& first = views[0];
  Program program{nullptr, first.device_type, first.device_index, {}, {{workspace}, {1}, aoti_torch_dtype_uint8()}, {}};
  for (const View& v : views)
    check_remember(v.device_type == first.device_type && v.device_index == first.device_index,
                   "all tensors must be on one device");
  for (const View& v : views_of(check_remember, results, "results")) {
    program.results.push_back({{v.sizes, v.sizes + v.dim}, {v.strides, v.strides + v.dim}, v.dtype->number});
  }
  Reader reader(kernels);
  int64_t const memories = static_cast<int64_t>(views.size() + program.results.size()) + (workspace > 0);
  while (!reader.done()) {
    program.kernels.push_back(read_kernel(reader, memories));
    program.most_parameters = std::max(program.most_parameters, program.kernels.back().parameters.size());
  }
  driver().check(check_remember, driver().get_context(&program.context), "cuCtxGetCurrent");
  check_remember(program.context != nullptr, "this thread has no CUDA context, as one that has launched the kernels has");
  programs().add(key_of(routine, views), std::move(program));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(acnet_kernels, m) {
  m.def("replay(int routine, int stream, Tensor(a!)[] tensors) -> Tensor[]");
  m.def("remember(int routine, Tensor[] tensors, Tensor[] results, int workspace, int[] kernels) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(acnet_kernels, CompositeExplicitAutograd, m) {
  m.impl("replay", TORCH_BOX(&replay));
  m.impl("remember", TORCH_BOX(&remember));
}

}  // namespace acnet::launch
