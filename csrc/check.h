// Checks that every operator makes of its tensors. The happy path is a few compares; text is built only when one fails.
#pragma once

#include <initializer_list>

#include "csrc/error.h"
#include "csrc/tensor_view.h"

namespace vivace {

/// Raises the errors of one operator, all of whose tensors lie on one device.
class Checker {
 public:
  Checker(const char* op, const TensorView& first, const char* first_name);

  template <typename... Parts>
  void operator()(bool ok, const Parts&... parts) const {
    if (!ok) [[unlikely]]
      check(false, op_, parts...);
  }

  /// On the first tensor's device.
  void device(const TensorView& t, const char* name) const;
  /// fp32, fp16 or bf16; on the CPU fp64 too, for gradient checks.
  void floating(const TensorView& t, const char* name) const;
  void dtype(const TensorView& t, const char* name, DType expected) const;
  void dims(const TensorView& t, const char* name, int expected, const char* layout) const;
  /// `layout` names the dimensions: "(batch, heads)".
  void shape(const TensorView& t, const char* name, std::initializer_list<int64_t> expected, const char* layout) const;
  void last_dim_contiguous(const TensorView& t, const char* name) const;
  void contiguous(const TensorView& t, const char* name) const;
  /// No two elements share memory: what is written in place must not be expanded.
  void not_expanded(const TensorView& t, const char* name) const;
  /// int32, on the device, contiguous, one dimension of `size` entries; nothing is checked where the argument was not given.
  void int32_vector(const TensorView& t, const char* name, int64_t size, const char* layout) const;
  /// int64, on the device, contiguous, one dimension of `size` entries; where they begin.
  int64_t* int64_vector(const TensorView& t, const char* name, int64_t size, const char* layout) const;

  const char* op() const { return op_; }

 private:
  const char* op_;
  const TensorView& first_;
  const char* first_name_;
};

/// "cuda:1"
std::string device_string(const TensorView& t);

/// Rows of the last dimension as (rows, stride between rows), where the leading dimensions are evenly spaced.
struct Rows {
  int64_t count = 1;
  int64_t stride = 0;
  bool even = true;
};
Rows rows_of(const TensorView& t, int trailing_dims = 1);

}  // namespace vivace
