// attention_decode_direct: instantiates and launches decode_direct.cuh's
// kernel.
#include "kernels/attention/decode_direct.cuh"

#include "kernels/attention/decode_launch_number.h"
#include "kernels/attention/launch.h"
#include "kernels/attention/sequence.cuh"
#include "kernels/attention/workspace.h"
#include "kernels/common/dependent_launch.h"
#include "kernels/common/device.h"
#include "kernels/common/vector.cuh"

namespace vivace {
namespace {

constexpr int64_t kMostOfGrid = 65535;  // in y and z

bool fit(const void* data, const int64_t (&stride)[3], int64_t alignment) {
  if (reinterpret_cast<uintptr_t>(data) % alignment != 0) return false;
  for (const int64_t s : stride) {
    if (s < 0 || s * 2 % alignment != 0 || s * 2 > int64_t{0xffffffff}) return false;
  }
  return true;
}

/// Whether chunks of 16 bytes lie at multiples of 16 and strides fit into 32
/// bits, out's pairs at multiples of 4; whether the grid is possible.
bool fits(const AttentionParams& p) {
  if (!fit(p.q, p.q_stride, 16) || !fit(p.k, p.k_stride, 16) || !fit(p.v, p.v_stride, 16)) return false;
  if (!fit(p.out, p.out_stride, 4)) return false;
  if (p.batch > kMostOfGrid || p.heads_kv > 0x7fffffff) return false;
  if (p.block_table == nullptr) return true;
  return p.page_size >= direct_keys(p.head_dim) && (p.page_size & (p.page_size - 1)) == 0;
}

template <typename T, int kDim, int kWarps, int kBlocks, DirectForm kForm, bool kPaged, bool kStream>
cudaError_t launch(const DirectArgs& args, dim3 grid, bool dependent, cudaStream_t stream) {
  auto* const kernel = decode_direct_kernel<T, kDim, kWarps, kBlocks, kForm, kPaged, kStream>;
  constexpr int64_t kMostRows = kForm == DirectForm::kWide ? kDirectRows : kDirectNarrowRows;
  static_assert(DirectMerge<T, kDim, kWarps>::shared_bytes(static_cast<int>(kMostRows)) <= 48 * 1024);
  return launch_kernel(kernel, grid, 32 * kWarps, DirectMerge<T, kDim, kWarps>::shared_bytes(args.rows), stream, dependent,
                       args);
}

template <typename T, int kDim, int kWarps, int kBlocks, bool kStream>
cudaError_t launch(const DirectArgs& args, dim3 grid, bool dependent, cudaStream_t stream) {
  constexpr DirectForm kFewRows = kDim == 64 ? DirectForm::kFew : DirectForm::kNarrow;
  constexpr int64_t kMostFew = kDim == 64 ? kDirectFewRows : kDirectNarrowRows;
  const bool paged = args.pages != nullptr;
  if (args.rows <= kMostFew) {
    return paged ? launch<T, kDim, kWarps, kBlocks, kFewRows, true, kStream>(args, grid, dependent, stream)
                 : launch<T, kDim, kWarps, kBlocks, kFewRows, false, kStream>(args, grid, dependent, stream);
  }
  return paged ? launch<T, kDim, kWarps, kBlocks, DirectForm::kWide, true, kStream>(args, grid, dependent, stream)
               : launch<T, kDim, kWarps, kBlocks, DirectForm::kWide, false, kStream>(args, grid, dependent, stream);
}

template <typename T>
cudaError_t launch(const DirectArgs& args, int64_t head_dim, const DirectShape& shape, bool streams, dim3 grid,
                   bool dependent, cudaStream_t stream) {
  if (head_dim == 64) {
    if (shape.warps == 4) return launch<T, 64, 4, 4, DirectForm::kFew, true, true>(args, grid, dependent, stream);
    return streams ? launch<T, 64, 8, 2, true>(args, grid, dependent, stream)
                   : launch<T, 64, 8, 2, false>(args, grid, dependent, stream);
  }
  if (shape.warps == 4) return launch<T, 128, 4, 3, true>(args, grid, dependent, stream);
  if (shape.warps == 6) return launch<T, 128, 6, 2, true>(args, grid, dependent, stream);
  return streams ? launch<T, 128, 8, 1, true>(args, grid, dependent, stream)
                 : launch<T, 128, 8, 1, false>(args, grid, dependent, stream);
}

}  // namespace

bool attention_decode_appends(const AttentionParams& p) {
  if (p.k_new == nullptr || p.rotary_cos != nullptr || p.seqlen_new > kDirectAppended || p.total_q == 0) return false;
  return direct_shape(p).covered && fits(p) && fit(p.k_new, p.k_new_stride, 16) && fit(p.v_new, p.v_new_stride, 16) &&
         (p.probe == nullptr || p.lse != nullptr) && direct_shape(p).parts <= kMostOfGrid;
}

cudaError_t attention_decode_direct(const AttentionParams& params, cudaStream_t stream) {
  AttentionParams p = params;
  use_rotated_q(p);
  const DirectShape shape = direct_shape(p);
  if (!shape.covered || !fits(p) || (p.probe != nullptr && p.lse == nullptr)) return cudaErrorNotSupported;
  if (p.batch == 0 || p.total_q == 0 || p.heads == 0) return cudaSuccess;
  if (shape.parts > kMostOfGrid) return cudaErrorNotSupported;

  const auto bytes = [](int64_t elements) { return static_cast<uint32_t>(2 * elements); };
  DirectArgs args{};
  args.lengths = p.cache_seqlens;
  args.rows_of = p.cache_batch_idx;
  args.k = static_cast<const char*>(p.k);
  args.v = static_cast<const char*>(p.v);
  args.k_row = bytes(p.k_stride[0]);
  args.k_key = bytes(p.k_stride[1]);
  args.k_head = bytes(p.k_stride[2]);
  args.v_row = bytes(p.v_stride[0]);
  args.v_key = bytes(p.v_stride[1]);
  args.v_head = bytes(p.v_stride[2]);
  args.capacity = static_cast<int>(p.seqlen_k);
  args.appended = p.k_new == nullptr ? 0 : static_cast<int>(p.seqlen_new);
  const bool pieces = shape.piece > 0;
  args.first = static_cast<int>(pieces ? shape.piece : shape.tile);
  args.step = static_cast<int>(pieces ? shape.tile : shape.tile * shape.parts);
  args.span = static_cast<int>(pieces ? shape.piece : p.seqlen_k);
  args.rows = static_cast<int>(p.seqlen_q * (p.heads / p.heads_kv));
  args.pages = p.block_table;
  args.pages_stride = p.block_table_stride;
  if (p.block_table != nullptr) {
    while ((int64_t{1} << args.page_shift) < p.page_size) ++args.page_shift;
    args.last_page = static_cast<int>((p.seqlen_k - 1) >> args.page_shift);
  }
  args.q = static_cast<const char*>(p.q);
  args.q_batch = bytes(p.q_stride[0]);
  args.q_row = bytes(p.q_stride[1]);
  args.q_head = bytes(p.q_stride[2]);
  args.scale = p.softmax_scale * kLog2E;
  args.by_group = FastDivmod(p.heads / p.heads_kv);
  args.out = static_cast<char*>(p.out);
  args.out_batch = bytes(p.out_stride[0]);
  args.out_row = bytes(p.out_stride[1]);
  args.out_head = bytes(p.out_stride[2]);
  args.heads = static_cast<int>(p.heads);
  args.seqlen_q = static_cast<int>(p.seqlen_q);
  args.lse = p.lse;
  args.packets = static_cast<char*>(p.workspace) + attention_workspace(params).packets;
  args.launch = decode_launch_number();
  if (attention_decode_appends(params)) {
    args.k_new = static_cast<const char*>(p.k_new);
    args.v_new = static_cast<const char*>(p.v_new);
    args.k_new_batch = bytes(p.k_new_stride[0]);
    args.k_new_row = bytes(p.k_new_stride[1]);
    args.k_new_head = bytes(p.k_new_stride[2]);
    args.v_new_batch = bytes(p.v_new_stride[0]);
    args.v_new_row = bytes(p.v_new_stride[1]);
    args.v_new_head = bytes(p.v_new_stride[2]);
  }

  int device = 0;
  DeviceFacts facts;
  cudaError_t status = device_facts(device, facts);
  if (status != cudaSuccess) return status;
  // Whether the cache may stay in L2 until the next call.
  const int64_t cache_bytes = p.batch * p.seqlen_k * p.heads_kv * (p.head_dim + p.head_dim_v) * 2;
  const bool streams = cache_bytes > int64_t{facts.l2_bytes} / 4 * 3;
  const dim3 grid(static_cast<unsigned>(p.heads_kv), static_cast<unsigned>(shape.parts), static_cast<unsigned>(p.batch));
  // A CTA that starts early takes a place. Where the kernel before leaves
  // places free, those are taken unevenly: some multiprocessors get twice as
  // much to do as others.
  const int64_t of_entry = p.heads_kv * shape.parts, ctas = of_entry * p.batch, places = shape.blocks * p.multiprocessors;
  const bool dependent = p.dependent && (10 * ctas >= 9 * places || 2 * ctas <= p.multiprocessors);
  args.last_row = static_cast<int>(p.cache_rows - 1);
  args.early = dependent && streams && p.cache_rows > 0 ? static_cast<int>(places / of_entry) + 1 : 0;
  args.next_head = static_cast<int>(places % p.heads_kv);
  args.next_part = static_cast<int>(places % of_entry / p.heads_kv);
  args.next_batch = static_cast<int>(places / of_entry);
  args.prefetch_next = shape.prefetch_next && streams && p.cache_rows > 0;
  status = p.dtype == DType::kFloat16 ? launch<__half>(args, p.head_dim, shape, streams, grid, dependent, stream)
                                      : launch<__nv_bfloat16>(args, p.head_dim, shape, streams, grid, dependent, stream);
  return status == cudaSuccess ? attention_probe(params, stream) : status;
}

}  // namespace vivace
