#include "csrc/norm.h"

#include <cmath>

#include "csrc/arch.h"
#include "csrc/check.h"
#include "csrc/cpu/ops.h"

#ifdef VIVACE_WITH_CUDA
#include "kernels/norm/rms_norm_launch.h"
#endif

namespace vivace {

namespace {
RmsNormParams check_norm(const char* op, const TensorView& x, const TensorView& weight, double eps) {
  const Checker check(op, x, "x");
  check(x.dims >= 1, "x has no dimensions, expected (..., width)");
  check.floating(x, "x");
  check.last_dim_contiguous(x, "x");
  check.device(weight, "weight");
  check.dtype(weight, "weight", x.dtype);
  check.shape(weight, "weight", {x.size(-1)}, "(width), x's last dimension");
  check.contiguous(weight, "weight");
  check(eps >= 0.0 && std::isfinite(eps), "eps is ", eps, ", expected a finite number of at least 0");
  const Rows rows = rows_of(x);
  check(rows.even, "the rows of x are not evenly spaced (x: ", x, "); call x.contiguous()");
  RmsNormParams p;
  p.dtype = x.dtype;
  p.x = x.data;
  p.weight = weight.data;
  p.rows = rows.count;
  p.width = x.size(-1);
  p.x_stride = rows.stride;
  p.eps = static_cast<float>(eps);
  return p;
}
}  // namespace

RmsNormParams check_rms_norm(const TensorView& x, const TensorView& weight, double eps) {
  return check_norm("rms_norm", x, weight, eps);
}

RmsNormParams check_add_rms_norm(const TensorView& x, const TensorView& residual, const TensorView& weight, double eps) {
  RmsNormParams p = check_norm("add_rms_norm", x, weight, eps);
  const Checker check("add_rms_norm", x, "x");
  check.device(residual, "residual");
  check.dtype(residual, "residual", x.dtype);
  bool same = residual.dims == x.dims;
  for (int d = 0; same && d < x.dims; ++d) same = residual.sizes[d] == x.sizes[d];
  check(same, "residual has shape ", residual, ", x has ", x);
  check.last_dim_contiguous(residual, "residual");
  check.not_expanded(residual, "residual");
  check(residual.data != x.data || x.numel() == 0, "residual and x are the same memory; residual is written in place");
  const Rows rows = rows_of(residual);
  check(rows.even, "the rows of residual are not evenly spaced (residual: ", residual,
        "); it is written in place, so it must be");
  p.residual = residual.data;
  p.residual_stride = rows.stride;
  return p;
}

void run_rms_norm(const RmsNormParams& p, DeviceType device, int device_index, [[maybe_unused]] void* stream) {
  const char* op = p.residual != nullptr ? "add_rms_norm" : "rms_norm";
  check_device(op, device, device_index);
  if (p.rows == 0 || p.width == 0) return;
  if (device == DeviceType::kCpu) return cpu::rms_norm(p);
#ifdef VIVACE_WITH_CUDA
  check_cuda(op, "rms_norm_cuda", rms_norm_cuda(p, static_cast<cudaStream_t>(stream)));
#endif
}

}  // namespace vivace
