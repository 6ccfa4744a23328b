#include <cmath>

#include "csrc/cpu/kernels.h"
#include "csrc/cpu/ops.h"
#include "csrc/parallel.h"

namespace vivace::cpu {

void silu_gate(const SiluGateParams& p) {
  const int64_t size = size_of(p.dtype);
  const auto row_kernel = kernels().of(p.dtype).silu_gate;
  parallel_for(0, p.rows, 8192 / (p.width + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const char* x = static_cast<const char*>(p.x) + r * p.x_stride * size;
      char* out = static_cast<char*>(p.out) + r * p.width * size;
      if (p.dtype == DType::kFloat64) {
        const double* gate = reinterpret_cast<const double*>(x);
        for (int64_t i = 0; i < p.width; ++i) {
          reinterpret_cast<double*>(out)[i] = gate[i] / (1.0 + std::exp(-gate[i])) * gate[p.width + i];
        }
      } else {
        row_kernel(x, out, p.width);
      }
    }
  });
}

}  // namespace vivace::cpu
