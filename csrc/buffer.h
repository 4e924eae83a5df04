// Scratch memory of the C++ operators.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdint>
#include <memory>
#include <new>

namespace acnet {

// Uninitialised memory, aligned to a cache line. Much of it comes from torch, so that whoever watches its memory sees it.
template <class E>
class Buffer {
 public:
  explicit Buffer(int64_t numbers) {
    const int64_t bytes = numbers * static_cast<int64_t>(sizeof(E));
    if (bytes >= kMuch) {
      const int64_t stride = 1;
      void* data;
      AtenTensorHandle tensor = nullptr;
      if (aoti_torch_empty_strided(1, &bytes, &stride, aoti_torch_dtype_uint8(), aoti_torch_device_type_cpu(), 0, &tensor) !=
          AOTI_TORCH_SUCCESS)
        throw std::bad_alloc();
      tensor_.reset(tensor);
      aoti_torch_get_data_ptr(tensor, &data);
      data_ = static_cast<E*>(data);
      return;
    }
    memory_.reset(new (std::nothrow) char[bytes + 64]);
    if (memory_ == nullptr) throw std::bad_alloc();  // as `new` would, but for sanitizers, which end the process there
    auto at = reinterpret_cast<uintptr_t>(memory_.get());
    data_ = reinterpret_cast<E*>((at + 63) / 64 * 64);
  }
  E* data() { return data_; }
  const E* data() const { return data_; }
  E& operator[](int64_t i) { return data_[i]; }
  const E& operator[](int64_t i) const { return data_[i]; }

 private:
  static constexpr int64_t kMuch = 1 << 16;
  struct Delete {
    void operator()(AtenTensorOpaque* tensor) const { aoti_torch_delete_tensor_object(tensor); }
  };
  std::unique_ptr<char[]> memory_;
  std::unique_ptr<AtenTensorOpaque, Delete> tensor_;
  E* data_;
};

}  // namespace acnet
