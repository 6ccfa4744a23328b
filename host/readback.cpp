#include "host/readback.h"

#include <ATen/ATen.h>
#include <c10/core/impl/VirtualGuardImpl.h>

namespace vivace {

Readback::Readback(const at::Tensor& tokens) {
  if (tokens.is_cpu()) {
    host_ = tokens.clone();
    return;
  }
  host_ = at::empty(tokens.sizes(), at::TensorOptions().dtype(at::kLong).pinned_memory(true));
  host_.copy_(tokens, /*non_blocking=*/true);
  const c10::impl::VirtualGuardImpl guard(tokens.device().type());
  arrived_.emplace(tokens.device().type());
  arrived_->record(guard.getStream(tokens.device()));
}

std::vector<int64_t> Readback::read() {
  if (arrived_) arrived_->synchronize();
  const int64_t* data = host_.const_data_ptr<int64_t>();
  return {data, data + host_.numel()};
}

}  // namespace vivace
