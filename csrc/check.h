// What the operators ask of their arguments. One place, so that all refuse alike: before anything is written, and in
// words about the arguments, where STD_TORCH_CHECK names a file of the machine that built this.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <ostream>
#include <sstream>
#include <stdexcept>
#include <vector>

namespace acnet {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

constexpr int64_t kMostTaps = 255;  // of a kernel's side

struct ElementType {
  int32_t number;  // torch's
  ScalarType type;
  const char* name;
  int64_t size;
};

inline const ElementType& element_type(int32_t number) {
  static ElementType const known[] = {{aoti_torch_dtype_float32(), ScalarType::Float, "float32", 4},
                                {aoti_torch_dtype_bfloat16(), ScalarType::BFloat16, "bfloat16", 2},
                                {aoti_torch_dtype_float16(), ScalarType::Half, "float16", 2},
                                {aoti_torch_dtype_float64(), ScalarType::Double, "float64", 8},
                                {aoti_torch_dtype_int64(), ScalarType::Long, "int64", 8},
                                {aoti_torch_dtype_int32(), ScalarType::Int, "int32", 4},
                                {aoti_torch_dtype_int16(), ScalarType::Short, "int16", 2},
                                {aoti_torch_dtype_int8(), ScalarType::Char, "int8", 1},
                                {aoti_torch_dtype_uint8(), ScalarType::Byte, "uint8", 1}};
  static ElementType const other = {-1, ScalarType::Undefined, "another dtype", 0};
  for (const ElementType& dtype : known)
    if (dtype.number == number) return dtype;
  return other;
}

inline bool is_float(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 || type == ScalarType::Half;
}

// What sums over maps of this type are kept in.
inline ScalarType sums_of(ScalarType type) { return type == ScalarType::Double ? type : ScalarType::Float; }

struct Shape {  // "(4, 3)"
  const int64_t* sizes;
  int64_t dim;
};

inline std::ostream& operator<<(std::ostream& out, const Shape& shape) {
  out << "(";
  if (shape.dim < 0) return out << "nothing)";
  for (int64_t i = 0; i < shape.dim; ++i) out << (i ? ", " : "") << shape.sizes[i];
  return out << (shape.dim == 1 ? ",)" : ")");
}

struct View {  // a tensor's properties, read once
  void* data;
  const int64_t* sizes;
  const int64_t* strides;
  int64_t dim;
  const ElementType* dtype;
  int32_t device_type, device_index;

  explicit View(const Tensor& t) {
    AtenTensorHandle const handle = t.get();
    int64_t *size, *stride;
    int32_t number;
    if (!t.defined()) {  // None, which the dispatcher lets through; it passes no check of shape, dtype or device
      data = nullptr;
      sizes = strides = nullptr;
      dim = device_type = device_index = -1;
      dtype = &element_type(-1);
      return;
    }
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle, &data));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &size));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &stride));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &dim));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &number));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &device_type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle, &device_index));
    sizes = size;
    strides = stride;
    dtype = &element_type(number);
  }

  Shape shape() const { return {sizes, dim}; }
  ScalarType type() const { return dtype->type; }

  int64_t numel() const {
    int64_t n = 1;
    for (int64_t i = 0; i < dim; ++i) n *= sizes[i];
    return n;
  }
  bool empty() const { return numel() == 0; }

  bool has_shape(std::initializer_list<int64_t> wanted) const {
    if (dim != static_cast<int64_t>(wanted.size())) return false;
    const int64_t* size = sizes;
    for (int64_t want : wanted)
      if (*size++ != want) return false;
    return true;
  }

  // Strides of dimensions of size 1 do not matter, nor any where there are no elements.
  bool contiguous() const {
    if (empty()) return true;
    int64_t expected = 1;
    for (int64_t i = dim - 1; i >= 0; --i) {
      if (sizes[i] != 1 && strides[i] != expected) return false;
      expected *= sizes[i];
    }
    return true;
  }

  // Four dimensions dense in the order (0, 1, 2, 3) or, channels_last, (0, 2, 3, 1).
  bool dense(bool channels_last) const {
    if (!channels_last || empty()) return contiguous();
    int64_t expected = 1;
    for (int i : {1, 3, 2, 0}) {
      if (sizes[i] != 1 && strides[i] != expected) return false;
      expected *= sizes[i];
    }
    return true;
  }

  bool aligned() const { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }
};

// The memory between a tensor's first and its last element.
struct Extent {
  uintptr_t begin, end;

  explicit Extent(const View& v) : begin(reinterpret_cast<uintptr_t>(v.data)), end(begin) {
    if (v.empty()) return;
    int64_t last = 0;
    for (int64_t i = 0; i < v.dim; ++i) last += (v.sizes[i] - 1) * v.strides[i];
    end += (last + 1) * v.dtype->size;
  }

  bool overlaps(const Extent& other) const { return begin < other.end && other.begin < end; }
};

// The checks of one operator. A name is anything that can be streamed: it is turned into text only when a check fails.
class Check {
 public:
  explicit constexpr Check(const char* op) : op_(op) {}

  template <class... Parts>
  [[noreturn]] void fail(const Parts&... parts) const {
    std::ostringstream out;
    out << "acnet_kernels::" << op_ << ": ";
    (out << ... << parts);
    throw std::runtime_error(out.str());
  }

  template <class... Parts>
  void operator()(bool condition, const Parts&... parts) const {
    if (!condition) fail(parts...);
  }

  template <class Name>
  void floats(const View& v, const Name& name) const {
    if (!is_float(v.type())) fail(name, " must be float32, float64, float16 or bfloat16, got ", v.dtype->name);
  }

  template <class Name>
  void type(const View& v, const Name& name, ScalarType wanted, const char* why) const {
    if (v.type() != wanted) fail(name, " must have ", why, ", got ", v.dtype->name);
  }

  template <class Name>
  void shape(const View& v, const Name& name, std::initializer_list<int64_t> wanted) const {
    if (!v.has_shape(wanted))
      fail(name, " must have shape ", Shape{wanted.begin(), static_cast<int64_t>(wanted.size())}, ", got ", v.shape());
  }

  template <class Name>
  void contiguous(const View& v, const Name& name) const {
    if (!v.contiguous()) fail(name, " must be contiguous");
  }

  // Memory that this processor reads: the dispatcher brings tensors of another device only past an operator's own.
  template <class Name>
  void readable(const View& v, const Name& name) const {
    if (v.dim < 0) fail(name, " must be a tensor, got None");
    if (v.device_type != aoti_torch_device_type_cpu()) fail(name, " must be on the CPU, as the other tensors");
    if (v.data == nullptr && !v.empty()) fail(name, " has no memory behind its shape ", v.shape());
  }

  // N×C×H×W of a float dtype, of any N.
  template <class Name>
  void map(const View& v, const Name& name) const {
    readable(v, name);
    if (v.dim != 4 || v.sizes[1] < 1 || v.sizes[2] < 1 || v.sizes[3] < 1)
      fail(name, " must be N×C×H×W with C, H, W > 0, got ", v.shape());
    floats(v, name);
  }

  void kernel(int64_t kernel) const {
    if (kernel < 1 || kernel % 2 == 0 || kernel > kMostTaps)
      fail("kernel must be odd, from 1 to ", kMostTaps, ", got ", kernel);
  }

  void groups(int64_t groups, int64_t channels, const char* whose) const {
    if (groups < 1 || channels % groups != 0)
      fail("groups must divide ", whose, " ", channels, " channels, got ", groups);
  }

  // What is written must share no memory with anything else.
  template <class Name, class Other>
  void apart(const View& written, const Name& name, const View& v, const Other& other) const {
    if (Extent(written).overlaps(Extent(v))) fail(name, " must share no memory with ", other, ": it is written");
  }

 private:
  const char* op_;
};

struct Entry {  // "ys[1]"
  const char* list;
  size_t index;
};

inline std::ostream& operator<<(std::ostream& out, const Entry& entry) {
  return out << entry.list << "[" << entry.index << "]";
}

}  // namespace acnet
