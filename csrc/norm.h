#pragma once

#include "csrc/tensor_view.h"
#include "kernels/norm/rms_norm.h"

namespace vivace {

/// x (..., width), weight (width) of x's dtype. The rows of x must be evenly spaced; out is set by the caller.
RmsNormParams check_rms_norm(const TensorView& x, const TensorView& weight, double eps);
/// With residual, x's shape and dtype, which x is added to in place.
RmsNormParams check_add_rms_norm(const TensorView& x, const TensorView& residual, const TensorView& weight, double eps);
void run_rms_norm(const RmsNormParams& params, DeviceType device, int device_index, void* stream);

}  // namespace vivace
