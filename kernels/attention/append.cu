// What a call over a KV cache does before attention: rotates k_new and copies it and v_new into the cache, and rotates q
// into the workspace. (A few keys without rotary embedding decode_direct.cuh appends itself.) A CTA takes 128 items (16
// bytes, or a pair of them under rotary) of one token: the heads of k, of v, of q. Rotary positions count from the first row
// of the cache, left padding included: cache_seqlens[b] + t for key t, and for query i cache_seqlens[b] + i under causal or
// windowed attention, cache_seqlens[b] otherwise.
#include "kernels/attention/launch.h"
#include "kernels/attention/sequence.cuh"
#include "kernels/attention/workspace.h"
#include "kernels/common/dependent_launch.h"
#include "kernels/common/ptx.cuh"
#include "kernels/rotary/rotate.cuh"

namespace vivace {
namespace {

constexpr int kThreads = 128;

/// Items of a head and of a token, of each part.
struct AppendItems {
  int k_head = 0, v_head = 0, q_head = 0;
  int k = 0, v = 0, q = 0;
};

template <typename T, int kN>
__global__ void __launch_bounds__(kThreads)
    append_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ RotaryTables tables,
                  const __grid_constant__ AppendItems items, const __grid_constant__ FastDivmod page_size, T* q_rotated,
                  int parts) {
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  const bool rotary = tables.cos != nullptr;
  const int t = static_cast<int>(blockIdx.x) / parts;
  const int first_item = (static_cast<int>(blockIdx.x) - t * parts) * kThreads + static_cast<int>(threadIdx.x);
  for (int b = static_cast<int>(blockIdx.y); b < p.batch; b += static_cast<int>(gridDim.y)) {
    int item = first_item;

    const Sequence seq(p, b);
    const bool ragged = p.cu_seqlens_q != nullptr;
    const int appended = p.k_new == nullptr ? 0 : ragged ? seq.q_rows : static_cast<int>(p.seqlen_new);
    const int length = seq.keys - appended;                // keys before this call
    const int64_t first = ragged ? p.cu_seqlens_q[b] : 0;  // row of the new tokens

    if (item < items.k + items.v) {
      const int64_t key = int64_t{length} + t;
      if (t >= appended || key < 0 || key >= p.seqlen_k) continue;  // past the capacity: not written
      const bool is_v = item >= items.k;
      if (is_v) item -= items.k;
      const int head_items = is_v ? items.v_head : items.k_head;
      const int head = item / head_items;
      const int part = item - head * head_items;
      const int64_t(&stride)[3] = is_v ? p.v_stride : p.k_stride;
      const int64_t(&stride_new)[3] = is_v ? p.v_new_stride : p.k_new_stride;
      const T* from = static_cast<const T*>(is_v ? p.v_new : p.k_new) + (ragged ? 0 : b * stride_new[0]) +
                      (first + t) * stride_new[1] + head * stride_new[2];
      T* cache = static_cast<T*>(const_cast<void*>(is_v ? p.v : p.k)) + (is_v ? seq.v_offset : seq.k_offset);
      const RowSource<T> rows{cache + head * stride[2], stride[1], seq.pages, stride[0], page_size};
      T* to = const_cast<T*>(rows.row(static_cast<int>(key)));
      if (is_v || !rotary) {
        copy_vector<kN>(to + part * kN, from + part * kN);
      } else {
        rotate_item<T, kN>(tables, from, to, part, key);
      }
      continue;
    }
    item -= items.k + items.v;
    if (item >= items.q || t >= seq.q_rows) continue;
    const int head = item / items.q_head;
    const bool moves = p.causal || p.window_left >= 0 || p.window_right >= 0;
    const int64_t q_row = ragged ? first + t : b * p.seqlen_q + t;
    const T* from = static_cast<const T*>(p.q) + seq.q_offset + t * p.q_stride[1] + head * p.q_stride[2];
    T* to = q_rotated + (q_row * p.heads + head) * p.head_dim;
    rotate_item<T, kN>(tables, from, to, item - head * items.q_head, int64_t{length} + (moves ? t : 0));
  }
}

template <typename T, int kN>
cudaError_t launch(const AttentionParams& p, cudaStream_t stream) {
  const bool rotary = p.rotary_cos != nullptr;
  const RotaryTables tables{p.rotary_cos,
                            p.rotary_sin,
                            p.rotary_dtype == DType::kFloat32,
                            p.rotary_interleaved,
                            static_cast<int>(p.rotary_dim / 2),
                            p.rotary_positions};
  AppendItems items;
  int64_t tokens = 0;
  if (p.k_new != nullptr) {
    items.k_head = rotary_items<kN>(static_cast<int>(p.head_dim), rotary ? tables.half : 0);
    items.v_head = static_cast<int>(p.head_dim_v / kN);
    items.k = static_cast<int>(p.heads_kv) * items.k_head;
    items.v = static_cast<int>(p.heads_kv) * items.v_head;
    tokens = p.cu_seqlens_q != nullptr ? p.seqlen_q : p.seqlen_new;
  }
  if (rotary) {
    items.q_head = rotary_items<kN>(static_cast<int>(p.head_dim), tables.half);
    items.q = static_cast<int>(p.heads) * items.q_head;
    tokens = tokens > p.seqlen_q ? tokens : p.seqlen_q;
  }
  const int parts = static_cast<int>(ceil_div(int64_t{items.k} + items.v + items.q, kThreads));
  if (p.batch * tokens * parts == 0) return cudaSuccess;
  T* q_rotated = rotary ? reinterpret_cast<T*>(static_cast<char*>(p.workspace) + attention_workspace(p).q_rotated) : nullptr;
  if (tokens * parts > 0x7fffffff) return cudaErrorNotSupported;
  const dim3 grid(static_cast<unsigned>(tokens * parts), grid_y(p.batch));
  return launch_kernel(append_kernel<T, kN>, grid, kThreads, 0, stream, p.dependent, p, tables, items,
                       FastDivmod(p.page_size > 0 ? p.page_size : 1), q_rotated, parts);
}

/// Whether every head of every tensor that is touched starts at a multiple of 16 bytes, and holds whole vectors.
bool takes_vectors(const AttentionParams& p) {
  const int64_t size = size_of(p.dtype);
  const int vector = static_cast<int>(16 / size);
  const auto aligned = [&](const void* base, const int64_t(&stride)[3]) {
    return is_aligned_16(base) && are_aligned_16({stride[0], stride[1], stride[2]}, size);
  };
  const bool rotary = p.rotary_cos != nullptr;
  if (p.k_new != nullptr && !(aligned(p.k_new, p.k_new_stride) && aligned(p.v_new, p.v_new_stride) &&
                              aligned(p.k, p.k_stride) && aligned(p.v, p.v_stride) && p.head_dim_v % vector == 0)) {
    return false;
  }
  if (rotary && !(aligned(p.q, p.q_stride) && is_aligned_16(p.rotary_cos) && is_aligned_16(p.rotary_sin))) return false;
  return rotary_takes_vectors(p.head_dim, rotary ? p.rotary_dim : 0, vector);
}

}  // namespace

cudaError_t attention_append(const AttentionParams& p, cudaStream_t stream) {
  return for_float_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return takes_vectors(p) ? launch<T, kVector<T>>(p, stream) : launch<T, 1>(p, stream);
  });
}

}  // namespace vivace
