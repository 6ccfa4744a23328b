#include "csrc/check.h"

namespace vivace {

namespace {
std::string shape_string(std::initializer_list<int64_t> sizes) {
  TensorView t;
  for (const int64_t size : sizes) t.sizes[t.dims++] = size;
  return vivace::shape_string(t);
}

std::string stride_string(const TensorView& t) {
  TensorView s;
  s.dims = t.dims;
  s.sizes = t.strides;
  return vivace::shape_string(s);
}
}  // namespace

std::string device_string(const TensorView& t) {
  return t.device == DeviceType::kCpu ? "cpu" : "cuda:" + std::to_string(t.device_index);
}

Checker::Checker(const char* op, const TensorView& first, const char* first_name)
    : op_(op), first_(first), first_name_(first_name) {}

void Checker::device(const TensorView& t, const char* name) const {
  if (t.device == first_.device && (t.device == DeviceType::kCpu || t.device_index == first_.device_index)) [[likely]]
    return;
  check(false, op_, name, " is on ", device_string(t), ", ", first_name_, " is on ", device_string(first_),
        "; all tensors must be on one device");
}

void Checker::floating(const TensorView& t, const char* name) const {
  if (t.dtype == DType::kFloat32 || t.dtype == DType::kFloat16 || t.dtype == DType::kBFloat16) [[likely]]
    return;
  if (t.dtype == DType::kFloat64 && t.device == DeviceType::kCpu) return;
  check(false, op_, name, " is ", dtype_name(t.dtype), ", expected float32, float16 or bfloat16");
}

void Checker::dtype(const TensorView& t, const char* name, DType expected) const {
  if (t.dtype == expected) [[likely]]
    return;
  check(false, op_, name, " is ", dtype_name(t.dtype), ", expected ", dtype_name(expected));
}

void Checker::dims(const TensorView& t, const char* name, int expected, const char* layout) const {
  if (t.dims == expected) [[likely]]
    return;
  check(false, op_, name, " has ", t.dims, " dimensions ", vivace::shape_string(t), ", expected ", expected, ": ", layout);
}

void Checker::shape(const TensorView& t, const char* name, std::initializer_list<int64_t> expected,
                    const char* layout) const {
  bool same = t.dims == static_cast<int>(expected.size());
  int d = 0;
  for (const int64_t size : expected) same = same && t.sizes[d++] == size;
  if (same) [[likely]]
    return;
  check(false, op_, name, " has shape ", vivace::shape_string(t), ", expected ", shape_string(expected), " ", layout);
}

void Checker::last_dim_contiguous(const TensorView& t, const char* name) const {
  if (t.stride(-1) == 1 || t.size(-1) == 1 || t.numel() == 0) [[likely]]
    return;
  check(false, op_, name, " has stride ", t.stride(-1), " in its last dimension, expected 1 (shape ",
        vivace::shape_string(t), ", strides ", stride_string(t), "); call ", name, ".contiguous()");
}

void Checker::contiguous(const TensorView& t, const char* name) const {
  int64_t expected = 1;
  bool same = true;
  for (int d = t.dims - 1; d >= 0; --d) {
    same = same && (t.sizes[d] == 1 || t.strides[d] == expected);
    expected *= t.sizes[d];
  }
  if (same || expected == 0) [[likely]]
    return;
  check(false, op_, name, " must be contiguous; it has shape ", vivace::shape_string(t), " and strides ", stride_string(t));
}

void Checker::not_expanded(const TensorView& t, const char* name) const {
  bool expanded = false;
  for (int d = 0; d < t.dims; ++d) expanded = expanded || (t.sizes[d] > 1 && t.strides[d] == 0);
  if (!expanded) [[likely]]
    return;
  check(false, op_, name, " is written in place, but it is expanded: several of its elements share memory (shape ",
        vivace::shape_string(t), ", strides ", stride_string(t), ")");
}

void Checker::int32_vector(const TensorView& t, const char* name, int64_t size, const char* layout) const {
  if (!t) return;
  device(t, name);
  dtype(t, name, DType::kInt32);
  shape(t, name, {size}, layout);
  contiguous(t, name);
}

int64_t* Checker::int64_vector(const TensorView& t, const char* name, int64_t size, const char* layout) const {
  device(t, name);
  dtype(t, name, DType::kInt64);
  shape(t, name, {size}, layout);
  contiguous(t, name);
  return static_cast<int64_t*>(t.data);
}

Rows rows_of(const TensorView& t, int trailing_dims) {
  Rows rows;
  int64_t expected = -1;  // stride that continues the dimensions to the right
  for (int d = t.dims - 1 - trailing_dims; d >= 0; --d) {
    if (t.sizes[d] == 1) continue;
    if (expected < 0) {
      rows.stride = t.strides[d];
    } else if (t.strides[d] != expected) {
      rows.even = false;
    }
    rows.count *= t.sizes[d];
    expected = t.strides[d] * t.sizes[d];
  }
  if (rows.count == 0) rows.even = true;
  return rows;
}

}  // namespace vivace
