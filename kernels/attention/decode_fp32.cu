// attention_decode for fp32, on CUDA cores: bound by memory, so all effort goes into keeping bytes in flight (arXiv
// 2311.01282 splits the keys likewise).
//
// A CTA takes one (batch entry, kv head, split of the keys) and kRows of its query rows: the queries of the group of heads
// that share the kv head. Its 128 threads make groups of head_dim / kVector lanes; a group reads one key (or value) at a
// time, 16 bytes a lane, and keeps a softmax state of its own (maximum, sum, its lanes' part of the output). Nothing is
// shared until the states are merged at the end.
// Keys and values pass through shared memory, a ring of 3 stages of 16 KiB, by cp.async. A thread copies just the 16 bytes
// that it will read itself, so the ring needs no barrier: it is a private queue that holds up to 384 bytes a thread in
// flight without registers. 48 KiB a CTA: 4 CTAs a multiprocessor on sm_90 (192 KiB in flight; 22 to 29 are latency times
// bandwidth), 2 on sm_86 and sm_89.
// Registers: q and the output take 2 * kRows * kVector.
#include "kernels/attention/launch.h"
#include "kernels/attention/mask.cuh"
#include "kernels/attention/scores.cuh"
#include "kernels/attention/sequence.cuh"
#include "kernels/attention/splits.h"
#include "kernels/attention/workspace.h"
#include "kernels/common/ptx.cuh"
#include "kernels/common/vector.cuh"

namespace vivace {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kUnroll = 4;  // keys of a stage that one group takes
constexpr int kStages = 3;
constexpr int kStageBytes = 2 * kUnroll * kThreads * 16;  // keys, then values

struct DecodeArgs {
  AttentionParams params;
  Window window;
  FastDivmod page_size;
  int group;           // query heads of a kv head
  int row_tiles;       // of the longest sequence
  float* out_partial;  // null: one split, straight to out and lse
  float* lse_partial;
};

template <typename T, int kHeadDim>
struct DecodeTile {
  static constexpr int kLanes = kHeadDim / kVector<T>;  // of a group
  static constexpr int kGroups = 32 / kLanes;           // of a warp
  static constexpr int kBlock = kWarps * kGroups * kUnroll;
  static_assert(kLanes <= 32 && kBlock == fp32_decode_block(kHeadDim));
};

/// Softmax state of kRows rows, in powers of two, with this lane's kN dimensions of the unnormalised output.
template <int kRows, int kN>
struct DecodeState {
  float max[kRows], sum[kRows], out[kRows][kN];

  __device__ __forceinline__ DecodeState() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      max[r] = -INFINITY;
      sum[r] = 0.0f;
#pragma unroll
      for (int d = 0; d < kN; ++d) out[r][d] = 0.0f;
    }
  }

  /// Takes in row r's scores, -inf where hidden; they become unnormalised probabilities.
  __device__ __forceinline__ void update(int r, float (&s)[kUnroll]) {
    float largest = max[r];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) largest = fmaxf(largest, s[u]);
    const float offset = largest == -INFINITY ? 0.0f : largest;  // nothing seen yet: not -inf - -inf
    const float rescale = ptx::exp2_approx(max[r] - offset);
    max[r] = largest;
    sum[r] *= rescale;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      s[u] = ptx::exp2_approx(s[u] - offset);
      sum[r] += s[u];
    }
#pragma unroll
    for (int d = 0; d < kN; ++d) out[r][d] *= rescale;
  }

  /// Merges row r with that of the lane `distance` away.
  __device__ __forceinline__ void merge(int r, int distance) {
    const float other = __shfl_xor_sync(~0u, max[r], distance);
    const float largest = fmaxf(max[r], other);
    const float offset = largest == -INFINITY ? 0.0f : largest;
    const float mine = ptx::exp2_approx(max[r] - offset), its = ptx::exp2_approx(other - offset);
    max[r] = largest;
    sum[r] = sum[r] * mine + __shfl_xor_sync(~0u, sum[r], distance) * its;
#pragma unroll
    for (int d = 0; d < kN; ++d) out[r][d] = out[r][d] * mine + __shfl_xor_sync(~0u, out[r][d], distance) * its;
  }
};

template <typename T, int kHeadDim, int kRows>
__global__ void __launch_bounds__(kThreads, 4) fp32_kernel(const __grid_constant__ DecodeArgs args) {
  using Tile = DecodeTile<T, kHeadDim>;
  constexpr int kN = kVector<T>;
  const AttentionParams& p = args.params;
  extern __shared__ uint4 shared[];  // the ring; at the end the warps' states

  // The tiles of a kv head run beside each other, then the kv heads: they read the same, or neighbouring, memory.
  uint32_t unit = blockIdx.x;
  const int row_tile = static_cast<int>(unit % static_cast<uint32_t>(args.row_tiles));
  unit /= static_cast<uint32_t>(args.row_tiles);
  const int head_kv = static_cast<int>(unit % static_cast<uint32_t>(p.heads_kv));
  unit /= static_cast<uint32_t>(p.heads_kv);
  const int num_splits = static_cast<int>(p.num_splits);
  const int split = static_cast<int>(unit % static_cast<uint32_t>(num_splits));
  const Sequence seq(p, static_cast<int>(unit / static_cast<uint32_t>(num_splits)));

  const int row0 = row_tile * kRows;  // row r is query (row0 + r) / group of head (row0 + r) % group
  const int rows = min(kRows, seq.q_rows * args.group - row0);
  if (rows <= 0) return;

  // The blocks of keys that some row of the tile sees, cut into num_splits runs: by the row's real length, so that a
  // captured graph may run again with other lengths.
  const int query0 = row0 / args.group;
  const KeyBlocks<Tile::kBlock> keys(seq, args.window, query0, (row0 + rows - 1) / args.group + 1 - query0);
  const int run = (keys.end - keys.begin + num_splits - 1) / num_splits;
  const int begin = keys.begin + split * run;
  const int end = min(begin + run, keys.end);

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = warp * Tile::kGroups + lane / Tile::kLanes;  // of the CTA
  const int dim = lane % Tile::kLanes * kN;                      // first of this lane's dimensions
  DecodeState<kRows, kN> state;

  if (begin < end) {
    const RowSource<T> k_rows{static_cast<const T*>(p.k) + seq.k_offset + head_kv * p.k_stride[2], p.k_stride[1], seq.pages,
                              p.k_stride[0], args.page_size};
    const RowSource<T> v_rows{static_cast<const T*>(p.v) + seq.v_offset + head_kv * p.v_stride[2], p.v_stride[1], seq.pages,
                              p.v_stride[0], args.page_size};
    const bool in_k = dim < p.head_dim, in_v = dim < p.head_dim_v;
    const uint32_t queue = ptx::shared_address(shared) + threadIdx.x * 16;
    const auto slot = [&](int stage, int u, bool is_v) {
      return queue + stage * kStageBytes + ((is_v ? kUnroll : 0) + u) * kThreads * 16;
    };
    const auto key_of = [&](int block, int u) { return block * Tile::kBlock + u * (kWarps * Tile::kGroups) + group; };
    const auto load = [&](int block, int stage) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int j = key_of(block, u);
        const bool exists = j < seq.key_end;  // past it there may be no memory, and no page: zeros
        const T* k = exists && in_k ? k_rows.row(j) + dim : static_cast<const T*>(p.k);
        const T* v = exists && in_v ? v_rows.row(j) + dim : static_cast<const T*>(p.v);
        ptx::cp_async_16(slot(stage, u, false), k, exists && in_k ? 16 : 0);
        ptx::cp_async_16(slot(stage, u, true), v, exists && in_v ? 16 : 0);
      }
    };
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) {
      if (begin + stage < end) load(begin + stage, stage);
      ptx::cp_async_commit();
    }

    // Head of row r; unused rows take that of row 0, so that what they read exists.
    const auto head_of = [&](int r) { return head_kv * args.group + (r < rows ? (row0 + r) % args.group : 0); };
    // While those are under way: the queries, with the scale (and the power of two, unless softcap comes between) in them.
    const float q_scale = p.softcap > 0.0f ? p.softmax_scale : p.softmax_scale * kLog2E;
    float q[kRows][kN];
    int query[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const bool used = r < rows;
      query[r] = used ? (row0 + r) / args.group : seq.queries;  // one past the last sees nothing
      const T* from =
          static_cast<const T*>(p.q) + seq.q_offset + query[r] * p.q_stride[1] + head_of(r) * p.q_stride[2] + dim;
#pragma unroll
      for (int d = 0; d < kN; ++d) q[r][d] = used && in_k ? to_float(from[d]) * q_scale : 0.0f;
    }

    int stage = 0;
    for (int block = begin; block < end; ++block) {
      ptx::cp_async_wait<kStages - 1>();
      float s[kRows][kUnroll];
      uint32_t seen = 0;  // bit r * kUnroll + u
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        float k[kN];
        unpack_vector<T>(ptx::ld_shared_v4(slot(stage, u, false)), k);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          s[r][u] = 0.0f;
#pragma unroll
          for (int d = 0; d < kN; ++d) s[r][u] += q[r][d] * k[d];
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
          for (int distance = Tile::kLanes / 2; distance > 0; distance /= 2) {
            s[r][u] += __shfl_xor_sync(~0u, s[r][u], distance);
          }
        }
        if (p.softcap > 0.0f) {
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) s[r][u] = softcapped(s[r][u], p.softcap) * kLog2E;
        }
        if (p.alibi_slopes != nullptr) {
          const float slope = p.alibi_slopes[seq.batch * p.alibi_batch_stride + head_of(r)] * kLog2E;
          const int diagonal = query[r] + seq.keys - seq.queries;
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) s[r][u] -= slope * fabsf(static_cast<float>(diagonal - key_of(block, u)));
        }
        const VisibleKeys visible(seq, args.window, query[r]);
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          if (visible.contains(key_of(block, u))) {
            seen |= 1u << (r * kUnroll + u);
          } else {
            s[r][u] = -INFINITY;
          }
        }
        state.update(r, s[r]);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        float v[kN];
        unpack_vector<T>(ptx::ld_shared_v4(slot(stage, u, true)), v);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if ((seen >> (r * kUnroll + u) & 1u) == 0) continue;  // 0 * NaN behind the mask must not count
#pragma unroll
          for (int d = 0; d < kN; ++d) state.out[r][d] += s[r][u] * v[d];
        }
      }
      if (block + kStages < end) load(block + kStages, stage);
      ptx::cp_async_commit();
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    ptx::cp_async_wait<0>();
  }

  // The groups of a warp, then the warps through shared memory, always in the same order.
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int distance = Tile::kLanes; distance < 32; distance *= 2) state.merge(r, distance);
  }
  float* outs = reinterpret_cast<float*>(shared);    // (kWarps, kRows, kHeadDim)
  float* maxima = outs + kWarps * kRows * kHeadDim;  // (kWarps, kRows)
  float* sums = maxima + kWarps * kRows;             // (kWarps, kRows)
  static_assert(kWarps * kRows * (kHeadDim + 2) * 4 <= kStages * kStageBytes);
  __syncthreads();  // nobody reads the ring any more
  if (lane < Tile::kLanes) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int d = 0; d < kN; ++d) outs[(warp * kRows + r) * kHeadDim + dim + d] = state.out[r][d];
      if (lane == 0) {
        maxima[warp * kRows + r] = state.max[r];
        sums[warp * kRows + r] = state.sum[r];
      }
    }
  }
  __syncthreads();
  const bool direct = args.out_partial == nullptr;
  for (int at = threadIdx.x; at < rows * kHeadDim; at += kThreads) {
    const int r = at / kHeadDim, d = at % kHeadDim;
    const int i = (row0 + r) / args.group;
    const int64_t head = int64_t{head_kv} * args.group + (row0 + r) - i * args.group;
    float largest = -INFINITY;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) largest = fmaxf(largest, maxima[w * kRows + r]);
    float offset = largest == -INFINITY ? 0.0f : largest;
    float sum = 0.0f, out = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float weight = ptx::exp2_approx(maxima[w * kRows + r] - offset);
      sum += weight * sums[w * kRows + r];
      out += weight * outs[(w * kRows + r) * kHeadDim + d];
    }
    const bool empty = sum == 0.0f;
    // The sink, one more logit without a value: here if the keys are not split, else in attention_combine. It changes
    // nothing for a row that sees no key.
    if (direct && p.sinks != nullptr) {
      const float sink = p.sinks[head] * kLog2E, top = fmaxf(offset, sink);
      const float rescale = ptx::exp2_approx(offset - top);
      sum = sum * rescale + ptx::exp2_approx(sink - top);
      out *= rescale;
      offset = top;
    }
    out = empty ? 0.0f : out / sum;
    const float lse = empty ? -INFINITY : (offset + log2f(sum)) * kLn2;
    if (direct) {
      T* to = static_cast<T*>(p.out) + seq.out_offset + i * p.out_stride[1] + head * p.out_stride[2];
      if (d < p.head_dim_v) to[d] = from_float<T>(out);
      if (d == 0 && p.lse != nullptr) p.lse[seq.lse_offset + head * seq.lse_head_stride + i] = lse;
    } else {
      const int64_t q_row = (p.cu_seqlens_q != nullptr ? p.cu_seqlens_q[seq.batch] : seq.batch * p.seqlen_q) + i;
      const int64_t row = (int64_t{split} * p.heads + head) * p.total_q + q_row;
      if (d < p.head_dim_v && lse != -INFINITY) args.out_partial[row * p.head_dim_v + d] = out;
      if (d == 0) args.lse_partial[row] = lse;
    }
  }
}

template <typename T, int kHeadDim, int kRows>
cudaError_t launch(DecodeArgs& args, cudaStream_t stream) {
  const AttentionParams& p = args.params;
  const int64_t row_tiles = ceil_div(p.seqlen_q * args.group, kRows);
  const int64_t units = p.batch * p.num_splits * p.heads_kv * row_tiles;
  if (units > 0x7fffffff) return cudaErrorNotSupported;
  args.row_tiles = static_cast<int>(row_tiles);
  fp32_kernel<T, kHeadDim, kRows><<<static_cast<unsigned>(units), kThreads, kStages * kStageBytes, stream>>>(args);
  return cudaGetLastError();
}

template <int kHeadDim>
cudaError_t launch_rows(DecodeArgs& args, cudaStream_t stream) {
  return args.params.seqlen_q * args.group == 1 ? launch<float, kHeadDim, 1>(args, stream)
                                                : launch<float, kHeadDim, 4>(args, stream);
}

/// Heads of whole 16-byte vectors that start at multiples of 16 bytes, and no dropout and no bias.
bool covers(const AttentionParams& p) {
  constexpr int64_t size = 4, vector = 4;
  return p.dtype == DType::kFloat32 && p.dropout_p == 0.0f && p.bias == nullptr && p.num_splits >= 1 &&
         p.head_dim % vector == 0 && p.head_dim_v % vector == 0 && p.head_dim <= 128 && p.head_dim_v <= 128 &&
         is_aligned_16(p.k) && is_aligned_16(p.v) &&
         are_aligned_16({p.k_stride[0], p.k_stride[1], p.k_stride[2], p.v_stride[0], p.v_stride[1], p.v_stride[2]}, size);
}

}  // namespace

cudaError_t attention_decode_fp32(const AttentionParams& p, cudaStream_t stream) {
  if (!covers(p)) return cudaErrorNotSupported;
  if (p.batch == 0 || p.seqlen_q == 0 || p.heads == 0 || p.total_q == 0) return cudaSuccess;
  DecodeArgs args{};
  args.params = p;
  args.window = Window(p);
  if (p.page_size > 0) args.page_size = FastDivmod(p.page_size);
  args.group = static_cast<int>(p.heads / p.heads_kv);
  if (p.num_splits > 1) {
    const AttentionWorkspace at = attention_workspace(p);
    char* workspace = static_cast<char*>(p.workspace);
    args.out_partial = reinterpret_cast<float*>(workspace + at.out_partial);
    args.lse_partial = reinterpret_cast<float*>(workspace + at.lse_partial);
  }
  use_rotated_q(args.params);
  return p.head_dim <= 64 && p.head_dim_v <= 64 ? launch_rows<64>(args, stream) : launch_rows<128>(args, stream);
}

}  // namespace vivace
