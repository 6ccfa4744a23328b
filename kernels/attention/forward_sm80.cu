// Chooses the sm80 kernel of a call; the kernels are in forward_sm80.cuh, _pipelined.cuh and _split.cuh.
#include "kernels/attention/forward_sm80.cuh"

#include <initializer_list>

#include "kernels/attention/launch.h"
#include "kernels/common/device.h"

namespace vivace {
namespace {

bool multiple_of_16_bytes(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

/// Whether rows of 16-bit elements can be moved 16 bytes at a time.
bool rows_aligned(const AttentionParams& p) {
  for (const void* pointer : {p.q, p.k, p.v, static_cast<const void*>(p.out)}) {
    if (!multiple_of_16_bytes(pointer)) return false;
  }
  for (int i = 0; i < 3; ++i) {
    if ((p.q_stride[i] | p.k_stride[i] | p.v_stride[i] | p.out_stride[i]) % 8 != 0) return false;
  }
  return p.head_dim % 8 == 0 && p.head_dim_v % 8 == 0;
}

/// Whether the call needs more than the plain variant does.
bool is_rich(const AttentionParams& p) {
  return p.softcap > 0.0f || p.alibi_slopes != nullptr || p.bias != nullptr || p.sinks != nullptr || p.dropout_p > 0.0f ||
         !(p.softmax_scale > 0.0f);  // the plain one takes the maximum before it scales
}

}  // namespace

cudaError_t attention_forward_sm80(const AttentionParams& params, cudaStream_t stream) {
  if (params.dtype != DType::kFloat16 && params.dtype != DType::kBFloat16) return cudaErrorNotSupported;
  const int64_t dim = params.head_dim > params.head_dim_v ? params.head_dim : params.head_dim_v;
  if (dim > 256) return cudaErrorNotSupported;
  if (params.batch == 0 || params.heads == 0 || params.seqlen_q == 0) return cudaSuccess;

  int device = 0;
  DeviceFacts facts;
  const cudaError_t error = device_facts(device, facts);
  if (error != cudaSuccess) return error;
  if (facts.capability < 80) return cudaErrorNotSupported;
  // As kSm: binaries run within their major version.
  const bool small = (facts.capability > 80 && facts.capability < 90) || facts.capability >= 120;
  const sm80::Sm sm = small ? sm80::Sm::kSmall : facts.capability == 80 ? sm80::Sm::kMedium : sm80::Sm::kLarge;
  const int64_t l2_bytes = facts.l2_bytes;

  sm80::ForwardArgs args{};
  args.params = params;
  use_rotated_q(args.params);
  args.window = Window(params);
  args.by_head_group = FastDivmod(params.heads / params.heads_kv);
  if (params.block_table != nullptr) args.page_size = FastDivmod(params.page_size);
  args.aligned = rows_aligned(args.params);
  const bool rich = is_rich(params) || !args.aligned;

  if (dim <= 64) return sm80::launch_forward<64>(args, rich, l2_bytes, sm, stream);
  if (dim <= 96) return sm80::launch_forward<96>(args, rich, l2_bytes, sm, stream);
  if (dim <= 128) return sm80::launch_forward<128>(args, rich, l2_bytes, sm, stream);
  if (dim <= 192) return sm80::launch_forward<192>(args, rich, l2_bytes, sm, stream);
  return sm80::launch_forward<256>(args, rich, l2_bytes, sm, stream);
}

}  // namespace vivace
