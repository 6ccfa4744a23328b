// Probabilities exp(score - lse) of one head, for the last probe_rows queries of each sequence: what an alignment monitor
// watches. A thread does one key; the query lies in shared memory.
#include "kernels/attention/launch.h"
#include "kernels/attention/mask.cuh"
#include "kernels/attention/scores.cuh"
#include "kernels/attention/sequence.cuh"
#include "kernels/common/dependent_launch.h"
#include "kernels/common/ptx.cuh"
#include "kernels/common/vector.cuh"

namespace vivace {
namespace {

constexpr int kThreads = 128;
constexpr int kMaxHeadDim = 256;

struct ProbeArgs {
  AttentionParams params;
  Window window;
  FastDivmod page_size;
};

/// s plus the bias of (query i, key j), whose type is known at run time only.
template <typename T>
__device__ __forceinline__ float add_bias(const ScoreTerms& terms, float s, int i, int j) {
  const int64_t row = terms.bias_offset + i * terms.bias_row_stride;
  if (terms.bias_dtype == DType::kFloat32) return terms.biased<float>(s, row, j);
  if (terms.bias_dtype == DType::kBool) return terms.biased<uint8_t>(s, row, j);
  return terms.biased<T>(s, row, j);
}

template <typename T, int kN>
__global__ void __launch_bounds__(kThreads) probe_kernel(const __grid_constant__ ProbeArgs args) {
  ptx::grid_dependency_launch();
  ptx::grid_dependency_wait();
  const AttentionParams& p = args.params;
  const int head_dim = static_cast<int>(p.head_dim), head = static_cast<int>(p.probe_head);
  const int head_kv = head / static_cast<int>(p.heads / p.heads_kv);
  __shared__ float q[kMaxHeadDim];

  const int probe_rows = static_cast<int>(p.probe_rows);
  const int64_t j = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  for (int64_t row = blockIdx.y; row < p.batch * probe_rows; row += gridDim.y) {  // of probe
    const int b = static_cast<int>(row) / probe_rows;
    const Sequence seq(p, b);
    const int i = seq.queries - probe_rows + static_cast<int>(row) - b * probe_rows;
    float probability = 0.0f;
    if (i >= 0) {  // the same for the whole CTA
      const T* q_row = static_cast<const T*>(p.q) + seq.q_offset + i * p.q_stride[1] + head * p.q_stride[2];
      __syncthreads();  // the query before is done with
      for (int d = threadIdx.x; d < head_dim; d += kThreads) q[d] = to_float(q_row[d]);
      __syncthreads();
      const VisibleKeys visible(seq, args.window, i);
      if (j < seq.key_end && visible.contains(static_cast<int>(j))) {
        const RowSource<T> k_rows{static_cast<const T*>(p.k) + seq.k_offset + head_kv * p.k_stride[2], p.k_stride[1],
                                  seq.pages, p.k_stride[0], args.page_size};
        const T* k_row = k_rows.row(static_cast<int>(j));
        float s = 0.0f;
        for (int d = 0; d < head_dim; d += kN) {
          float k[kN];
          load_vector<kN>(k_row + d, k);
#pragma unroll
          for (int e = 0; e < kN; ++e) s += q[d + e] * k[e];
        }
        const ScoreTerms terms(p, seq.batch, head);
        s = terms(s, i + seq.keys - seq.queries, static_cast<int>(j));
        if (terms.bias != nullptr) s = add_bias<T>(terms, s, i, static_cast<int>(j));
        const float lse = p.lse[seq.lse_offset + head * seq.lse_head_stride + i];
        probability = lse == -INFINITY ? 0.0f : expf(s - lse);
      }
    }
    if (j < p.probe_capacity) p.probe[row * p.probe_capacity + j] = probability;
  }
}

template <typename T, int kN>
cudaError_t launch(const ProbeArgs& args, cudaStream_t stream) {
  const AttentionParams& p = args.params;
  const dim3 grid(grid_x(ceil_div(p.probe_capacity, kThreads)), grid_y(p.batch * p.probe_rows));
  return launch_kernel(probe_kernel<T, kN>, grid, kThreads, 0, stream, p.dependent, args);
}

}  // namespace

cudaError_t attention_probe(const AttentionParams& p, cudaStream_t stream) {
  if (p.probe == nullptr || p.batch * p.probe_rows * p.probe_capacity == 0) return cudaSuccess;
  if (p.head_dim > kMaxHeadDim || p.batch * p.probe_rows > 0x7fffffff) return cudaErrorNotSupported;
  ProbeArgs args{};
  args.params = p;
  args.window = Window(p);
  if (p.page_size > 0) args.page_size = FastDivmod(p.page_size);
  use_rotated_q(args.params);
  const int64_t size = size_of(p.dtype);
  const bool vectors = p.head_dim * size % 16 == 0 && is_aligned_16(p.k) &&
                       are_aligned_16({p.k_stride[0], p.k_stride[1], p.k_stride[2]}, size);
  return for_float_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return vectors ? launch<T, kVector<T>>(args, stream) : launch<T, 1>(args, stream);
  });
}

}  // namespace vivace
