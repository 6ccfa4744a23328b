#include "torch_ext/tensors.h"

#include <cstring>
#include <string>
#include <utility>

#include "csrc/error.h"

#ifdef VIVACE_WITH_CUDA
// In libtorch_cuda.so: where torch has no CUDA the library still loads, and the symbol is null.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream) __attribute__((weak));
#endif

namespace vivace {

namespace {

/// torch's numbers of the dtypes, asked once: their values are not part of the stable ABI.
struct DTypes {
  const int32_t float32 = aoti_torch_dtype_float32(), float16 = aoti_torch_dtype_float16(),
                bfloat16 = aoti_torch_dtype_bfloat16(), int32 = aoti_torch_dtype_int32(), int64 = aoti_torch_dtype_int64(),
                uint8 = aoti_torch_dtype_uint8(), boolean = aoti_torch_dtype_bool(), float64 = aoti_torch_dtype_float64();
  const int32_t cpu = aoti_torch_device_type_cpu(), cuda = aoti_torch_device_type_cuda();
};
const DTypes& dtypes() {
  static const DTypes numbers;
  return numbers;
}

/// torch's name of a dtype that no operator takes.
const char* other_dtype(int32_t dtype) {
  const std::pair<int32_t, const char*> names[] = {
      {aoti_torch_dtype_int8(), "int8"},
      {aoti_torch_dtype_int16(), "int16"},
      {aoti_torch_dtype_uint16(), "uint16"},
      {aoti_torch_dtype_uint32(), "uint32"},
      {aoti_torch_dtype_uint64(), "uint64"},
      {aoti_torch_dtype_float8_e4m3fn(), "float8_e4m3fn"},
      {aoti_torch_dtype_float8_e5m2(), "float8_e5m2"},
      {aoti_torch_dtype_float8_e4m3fnuz(), "float8_e4m3fnuz"},
      {aoti_torch_dtype_float8_e5m2fnuz(), "float8_e5m2fnuz"},
      {aoti_torch_dtype_complex32(), "complex32"},
      {aoti_torch_dtype_complex64(), "complex64"},
      {aoti_torch_dtype_complex128(), "complex128"},
  };
  for (const auto& [number, name] : names) {
    if (number == dtype) return name;
  }
  return "of another dtype";
}

DType to_dtype(int32_t dtype, const char* name) {
  const DTypes& d = dtypes();
  if (dtype == d.float32) return DType::kFloat32;
  if (dtype == d.bfloat16) return DType::kBFloat16;
  if (dtype == d.float16) return DType::kFloat16;
  if (dtype == d.int32) return DType::kInt32;
  if (dtype == d.int64) return DType::kInt64;
  if (dtype == d.uint8) return DType::kUInt8;
  if (dtype == d.boolean) return DType::kBool;
  if (dtype == d.float64) return DType::kFloat64;
  throw Error(
      std::string("vivace: ") + name + " is " + other_dtype(dtype) +
      ", which no operator takes; they take float32, float16, bfloat16, float64 (CPU), and int32, int64, uint8, bool "
      "where documented");
}

int32_t from_dtype(DType dtype) {
  const DTypes& d = dtypes();
  switch (dtype) {
    case DType::kFloat32: return d.float32;
    case DType::kFloat16: return d.float16;
    case DType::kBFloat16: return d.bfloat16;
    case DType::kInt32: return d.int32;
    case DType::kInt64: return d.int64;
    case DType::kUInt8: return d.uint8;
    case DType::kBool: return d.boolean;
    case DType::kFloat64: return d.float64;
  }
  return d.float32;
}

TensorView shape_view(const Tensor& t, const char* name) {
  const AtenTensorHandle handle = t.get();
  TensorView v;
  v.defined = true;
  int64_t dims = 0;
  int64_t *sizes = nullptr, *strides = nullptr;
  int32_t dtype = 0, device = 0, index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &dims));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &sizes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &strides));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle, &index));
  if (dims > TensorView::kMaxDims) {
    throw Error(std::string("vivace: ") + name + " has " + std::to_string(dims) + " dimensions, expected at most " +
                std::to_string(TensorView::kMaxDims));
  }
  v.dims = static_cast<int>(dims);
  std::memcpy(v.sizes.data(), sizes, dims * sizeof(int64_t));
  std::memcpy(v.strides.data(), strides, dims * sizeof(int64_t));
  v.dtype = to_dtype(dtype, name);
  if (device == dtypes().cuda) {
    v.device = DeviceType::kCuda;
  } else if (device != dtypes().cpu) {
    throw Error(std::string("vivace: ") + name + " is neither on the CPU nor on CUDA");
  }
  v.device_index = index;
  return v;
}

}  // namespace

TensorView view(const Tensor& t, const char* name) {
  TensorView v = shape_view(t, name);
  const void* data = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(t.get(), &data));
  v.data = const_cast<void*>(data);
  return v;
}

TensorView mutable_view(const Tensor& t, const char* name) {
  TensorView v = shape_view(t, name);
  TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(t.get(), &v.data));
  return v;
}

TensorView view(const OptionalTensor& t, const char* name) { return t ? view(*t, name) : TensorView{}; }

TensorView mutable_view(const OptionalTensor& t, const char* name) { return t ? mutable_view(*t, name) : TensorView{}; }

namespace {
Tensor empty(const int64_t* sizes, int dims, DType dtype, const TensorView& like) {
  int64_t strides[TensorView::kMaxDims];
  int64_t stride = 1;
  for (int d = dims - 1; d >= 0; --d) {
    strides[d] = stride;
    stride *= sizes[d] > 1 ? sizes[d] : 1;
  }
  AtenTensorHandle handle = nullptr;
  const int32_t device = like.device == DeviceType::kCuda ? dtypes().cuda : dtypes().cpu;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides, from_dtype(dtype), device, like.device_index, &handle));
  return Tensor(handle);
}
}  // namespace

Tensor empty(std::initializer_list<int64_t> sizes, DType dtype, const TensorView& like) {
  return empty(sizes.begin(), static_cast<int>(sizes.size()), dtype, like);
}

Tensor empty_like(const TensorView& like) { return empty(like.sizes.data(), like.dims, like.dtype, like); }

void* data_of(const Tensor& t) {
  void* data = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(t.get(), &data));
  return data;
}

DeviceScope::DeviceScope(const TensorView& like) {
  if (like.device == DeviceType::kCpu) return;
#ifdef VIVACE_WITH_CUDA
  if (aoti_torch_get_current_cuda_stream == nullptr) {
    throw Error("vivace: a tensor is on CUDA, but the torch in this process was built without CUDA");
  }
  int32_t current = -1;
  const bool known = aoti_torch_get_current_device_index(&current) == AOTI_TORCH_SUCCESS;
  if (!known || current != like.device_index) {  // a guard lies on the heap: 0.4 us
    TORCH_ERROR_CODE_CHECK(aoti_torch_create_device_guard(like.device_index, &guard_));
  }
  const AOTITorchError failed = aoti_torch_get_current_cuda_stream(like.device_index, &stream_);
  if (failed) {
    if (guard_ != nullptr) aoti_torch_delete_device_guard(guard_);
    throw Error("vivace: torch gives no current stream of cuda:" + std::to_string(like.device_index));
  }
#endif
}

DeviceScope::~DeviceScope() {
  if (guard_ != nullptr) aoti_torch_delete_device_guard(guard_);
}

}  // namespace vivace
