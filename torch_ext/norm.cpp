// rms_norm and add_rms_norm.
#include "csrc/norm.h"

#include "torch_ext/tensors.h"

namespace vivace {
namespace {

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  const TensorView vx = view(x, "x");
  RmsNormParams p = check_rms_norm(vx, view(weight, "weight"), eps);
  Tensor out = empty_like(vx);
  p.out = data_of(out);
  const DeviceScope scope(vx);
  run_rms_norm(p, vx.device, vx.device_index, scope.stream());
  return out;
}

Tensor add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps) {
  const TensorView vx = view(x, "x");
  RmsNormParams p = check_add_rms_norm(vx, mutable_view(residual, "residual"), view(weight, "weight"), eps);
  Tensor out = empty_like(vx);
  p.out = data_of(out);
  const DeviceScope scope(vx);
  run_rms_norm(p, vx.device, vx.device_index, scope.stream());
  return out;
}

void register_impls(torch::stable::detail::StableLibrary& m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vivace, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps=1e-05) -> Tensor");
  m.def("add_rms_norm(Tensor x, Tensor(a!) residual, Tensor weight, float eps=1e-05) -> Tensor");
}

VIVACE_REGISTER_IMPLS(register_impls)

}  // namespace vivace
