#include "csrc/tensor_view.h"

#include <ostream>

namespace vivace {

std::string shape_string(const TensorView& t) {
  std::string text = "[";
  for (int d = 0; d < t.dims; ++d) {
    if (d > 0) text += ", ";
    text += std::to_string(t.sizes[d]);
  }
  return text + "]";
}

std::ostream& operator<<(std::ostream& out, const TensorView& t) { return out << shape_string(t); }

const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return "float32";
    case DType::kFloat16: return "float16";
    case DType::kBFloat16: return "bfloat16";
    case DType::kInt32: return "int32";
    case DType::kInt64: return "int64";
    case DType::kUInt8: return "uint8";
    case DType::kBool: return "bool";
    case DType::kFloat64: return "float64";
  }
  return "unknown";
}

}  // namespace vivace
