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
  record(tokens.device());
}

Readback::Readback(const at::Tensor& history, std::vector<int64_t> slots, at::Device device)
    : host_(history), slots_(std::move(slots)) {
  if (!device.is_cpu()) record(device);
}

void Readback::record(at::Device device) {
  const c10::impl::VirtualGuardImpl guard(device.type());
  arrived_.emplace(device.type());
  arrived_->record(guard.getStream(device));
}

std::vector<int64_t> Readback::read() {
  if (arrived_) arrived_->synchronize();
  if (!slots_.empty()) {
    std::vector<int64_t> tokens(slots_.size());
    const int64_t* const first = host_.const_data_ptr<int64_t>();
    for (size_t r = 0; r < tokens.size(); ++r) tokens[r] = first[slots_[r] * host_.stride(0) + static_cast<int64_t>(r)];
    return tokens;
  }
  const int64_t* data = host_.const_data_ptr<int64_t>();
  return {data, data + host_.numel()};
}

}  // namespace vivace
