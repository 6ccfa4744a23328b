#include <cmath>

#include "csrc/cpu/kernels.h"
#include "csrc/cpu/ops.h"
#include "csrc/parallel.h"

namespace vivace::cpu {

namespace {
void rms_norm_double(const double* x, double* residual, const double* weight, double* out, int64_t width, double eps) {
  if (residual != nullptr) {
    for (int64_t i = 0; i < width; ++i) residual[i] += x[i];
    x = residual;
  }
  double squares = 0.0;
  for (int64_t i = 0; i < width; ++i) squares += x[i] * x[i];
  const double scale = 1.0 / std::sqrt(squares / static_cast<double>(width) + eps);
  for (int64_t i = 0; i < width; ++i) out[i] = x[i] * scale * weight[i];
}
}  // namespace

void rms_norm(const RmsNormParams& p) {
  const int64_t size = size_of(p.dtype);
  const auto row_kernel = kernels().of(p.dtype).rms_norm;
  parallel_for(0, p.rows, 16384 / (p.width + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const char* x = static_cast<const char*>(p.x) + r * p.x_stride * size;
      char* residual = p.residual != nullptr ? static_cast<char*>(p.residual) + r * p.residual_stride * size : nullptr;
      char* out = static_cast<char*>(p.out) + r * p.width * size;
      if (p.dtype == DType::kFloat64) {
        rms_norm_double(reinterpret_cast<const double*>(x), reinterpret_cast<double*>(residual),
                        static_cast<const double*>(p.weight), reinterpret_cast<double*>(out), p.width, double{p.eps});
      } else {
        row_kernel(x, residual, p.weight, out, p.width, p.eps);
      }
    }
  });
}

}  // namespace vivace::cpu
