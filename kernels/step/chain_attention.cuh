// Attention of the chain: one query of each row and head over the row's keys, and the probabilities of single heads.
//
// A CTA of four warps takes one (row, head) at a time and lives for the whole launch. Blocks of 16 keys go to the warps in
// turn; in a warp 8 lanes share a key, 16 bytes each, and 4 keys are read at a time. Each of the 16 groups of 8 lanes has a
// softmax state of its own; they are merged in a fixed order at the end. So what a row computes depends on its own length
// alone. Keys and values pass through shared memory by cp.async, kStages blocks a warp; a thread copies just what it will
// read, so the ring needs no barrier, and runs ahead into the next (row, head) while this one is merged. 48 or 64 KiB a CTA:
// four or three on a multiprocessor of Hopper, 192 KiB in flight (22 to 29 are latency times bandwidth), one on sm_86 and
// sm_89. The ring holds keys of earlier steps only, so it fills before the kernel in front (which writes the newest key) has
// ended. The newest key and value come from memory directly.
#pragma once

#include "kernels/common/ptx.cuh"
#include "kernels/common/vector.cuh"
#include "kernels/step/softmax_state.cuh"

namespace vivace {

/// q is (rows, heads, 64), out the same, the caches hold heads of 64; strides in elements.
struct ChainAttentionArgs {
  int32_t rows = 0;
  int32_t heads = 0;
  int32_t group = 1;  // heads that share a kv head
  int32_t capacity = 0;
  const void* q = nullptr;
  void* out = nullptr;
  const void* k_cache = nullptr;
  const void* v_cache = nullptr;
  int64_t k_stride[3] = {0, 0, 0};  // cache row, position, head
  int64_t v_stride[3] = {0, 0, 0};
  const int32_t* cache_seqlens = nullptr;    // (rows) keys before the step
  const int32_t* cache_batch_idx = nullptr;  // (rows) negative: no keys
  float scale_log2 = 0.0f;                   // of the scores, times log2(e)
  float* lse = nullptr;                      // (rows, heads), base 2; null where nobody asks
};

/// Probabilities of some heads, from the same arguments and the lse.
struct ChainProbeArgs {
  ChainAttentionArgs attention;
  int32_t count = 0;
  int32_t head[8] = {};
  float* to[8] = {};  // (rows, capacity)
  int64_t capacity = 0;
};

inline constexpr int kAttentionThreads = 128;
inline constexpr int kAttentionBlock = 16;                               // keys
inline constexpr int kAttentionStageBytes = kAttentionThreads * 8 * 16;  // a block of keys and of values for each warp
inline constexpr int kAttentionMergeBytes = 2 * 4 * (64 + 2) * 4;        // two sets of four states

/// Keys of row `row` that were there before the step.
__device__ __forceinline__ int old_keys(const ChainAttentionArgs& args, int row) {
  return args.cache_batch_idx[row] < 0 ? 0 : max(0, min(args.cache_seqlens[row], args.capacity));
}

/// Whether the step has added one.
__device__ __forceinline__ bool has_new_key(const ChainAttentionArgs& args, int row) {
  const int n = args.cache_seqlens[row];
  return args.cache_batch_idx[row] >= 0 && n >= 0 && n < args.capacity;
}

template <typename T, int kStages>
__global__ void __launch_bounds__(kAttentionThreads) attention_kernel(const __grid_constant__ ChainAttentionArgs args) {
  extern __shared__ uint4 attention_shared[];
  float* const merged = reinterpret_cast<float*>(attention_shared + kStages * kAttentionStageBytes / 16);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int group = lane / 8, dim = lane % 8 * 8;
  const int units = args.rows * args.heads, step = static_cast<int>(gridDim.x);
  ptx::grid_dependency_launch();

  // Where the copies are: ahead of the arithmetic, possibly in another unit.
  const uint32_t queue = ptx::shared_address(attention_shared) + threadIdx.x * 16;
  const auto slot = [&](int stage, int i) { return queue + (stage * 8 + i) * kAttentionThreads * 16; };
  int load_unit = static_cast<int>(blockIdx.x), load_block = warp, load_keys = 0;
  const T* load_k = nullptr;
  const T* load_v = nullptr;
  const auto open = [&] {  // the next unit that has a block for this warp
    for (; load_unit < units; load_unit += step) {
      const int row = load_unit / args.heads, head = (load_unit - row * args.heads) / args.group;
      load_keys = old_keys(args, row);
      if (load_keys <= warp * kAttentionBlock) continue;
      const int64_t cache_row = args.cache_batch_idx[row];
      load_k = static_cast<const T*>(args.k_cache) + cache_row * args.k_stride[0] + head * args.k_stride[2] + dim;
      load_v = static_cast<const T*>(args.v_cache) + cache_row * args.v_stride[0] + head * args.v_stride[2] + dim;
      load_block = warp;
      return;
    }
  };
  const auto load = [&](int stage) {
    if (load_unit < units) {
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        const int key = load_block * kAttentionBlock + u * 4 + group;
        const bool exists = key < load_keys;
        const int64_t at = exists ? key : 0;
        ptx::cp_async_16(slot(stage, u), load_k + at * args.k_stride[1], exists ? 16 : 0);
        ptx::cp_async_16(slot(stage, 4 + u), load_v + at * args.v_stride[1], exists ? 16 : 0);
      }
      load_block += 4;
      if (load_block * kAttentionBlock >= load_keys) {
        load_unit += step;
        open();
      }
    }
    ptx::cp_async_commit();
  };
  open();
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) load(stage);

  ptx::grid_dependency_wait();
  // The query, the newest key and the newest value of a unit: this lane's 8 dimensions.
  struct Fresh {
    uint4 q, k, v;
  };
  const auto fetch = [&](int unit) {
    Fresh fresh = {};
    if (unit < units) {
      const int row = unit / args.heads, head = unit - row * args.heads, head_kv = head / args.group;
      fresh.q = __ldcg(reinterpret_cast<const uint4*>(static_cast<const T*>(args.q) + int64_t{unit} * 64 + dim));
      if (warp == 0 && has_new_key(args, row)) {
        const int64_t cache_row = args.cache_batch_idx[row], n = args.cache_seqlens[row];
        fresh.k = __ldcg(reinterpret_cast<const uint4*>(static_cast<const T*>(args.k_cache) + cache_row * args.k_stride[0] +
                                                        n * args.k_stride[1] + head_kv * args.k_stride[2] + dim));
        fresh.v = __ldcg(reinterpret_cast<const uint4*>(static_cast<const T*>(args.v_cache) + cache_row * args.v_stride[0] +
                                                        n * args.v_stride[1] + head_kv * args.v_stride[2] + dim));
      }
    }
    return fresh;
  };
  const auto dot = [](const float(&a)[8], const float(&b)[8]) {
    float s = 0.0f;
#pragma unroll
    for (int d = 0; d < 8; ++d) s += a[d] * b[d];
    return s;
  };

  Fresh next = fetch(static_cast<int>(blockIdx.x));
  int stage = 0, turn = 0;
  for (int unit = static_cast<int>(blockIdx.x); unit < units; unit += step, ++turn) {
    const Fresh fresh = next;
    next = fetch(unit + step);
    const int row = unit / args.heads;
    const int keys = old_keys(args, row);
    float q[8];
    unpack_vector<T>(fresh.q, q);
#pragma unroll
    for (int d = 0; d < 8; ++d) q[d] *= args.scale_log2;

    step::SoftmaxState state;
    if (warp == 0 && has_new_key(args, row)) {
      float k[8];
      unpack_vector<T>(fresh.k, k);
      float s = dot(q, k);
#pragma unroll
      for (int distance = 4; distance > 0; distance /= 2) s += __shfl_xor_sync(~0u, s, distance);
      if (group == 0) {
        state.max = s;
        state.sum = 1.0f;
        unpack_vector<T>(fresh.v, state.out);
      }
    }
    for (int block = warp; block * kAttentionBlock < keys; block += 4) {
      ptx::cp_async_wait<kStages - 1>();
      float s[4];
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        float k[8];
        unpack_vector<T>(ptx::ld_shared_v4(slot(stage, u)), k);
        s[u] = dot(q, k);
      }
#pragma unroll
      for (int distance = 4; distance > 0; distance /= 2) {
#pragma unroll
        for (int u = 0; u < 4; ++u) s[u] += __shfl_xor_sync(~0u, s[u], distance);
      }
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        if (block * kAttentionBlock + u * 4 + group >= keys) s[u] = -INFINITY;
      }
      const float offset = state.raise(s);
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        const float p = ptx::exp2_approx(s[u] - offset);
        state.sum += p;
        float v[8];
        unpack_vector<T>(ptx::ld_shared_v4(slot(stage, 4 + u)), v);
#pragma unroll
        for (int d = 0; d < 8; ++d) state.out[d] += p * v[d];
      }
      load(stage);
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }

    state.merge(8);
    state.merge(16);
    float* const states = merged + turn % 2 * 4 * step::SoftmaxState::kFloats;  // (4, kFloats): the set before may be read
    state.store(states, warp, lane, dim);
    __syncthreads();
    if (warp == turn % 4) {
      const step::SoftmaxOutput o(states, lane);
      static_cast<uint32_t*>(args.out)[int64_t{unit} * 32 + lane] = pack2<T>(o.lo, o.hi);
      if (args.lse != nullptr && lane == 0) args.lse[unit] = o.sum == 0.0f ? 0.0f : o.offset + log2f(o.sum);
    }
  }
}

/// A CTA a row and probe: exp2(score - lse) of the keys that the row sees, 0 behind them.
template <typename T>
__global__ void __launch_bounds__(kAttentionThreads) probe_kernel(const __grid_constant__ ChainProbeArgs probes) {
  ptx::grid_dependency_launch();
  ptx::grid_dependency_wait();
  const ChainAttentionArgs& args = probes.attention;
  __shared__ float q[64];
  const int row = static_cast<int>(blockIdx.x), head = probes.head[blockIdx.y];
  if (threadIdx.x < 64) {
    const int64_t at = (int64_t{row} * args.heads + head) * 64 + threadIdx.x;
    q[threadIdx.x] = to_float(static_cast<const T*>(args.q)[at]) * args.scale_log2;
  }
  __syncthreads();
  const int keys = old_keys(args, row) + (has_new_key(args, row) ? 1 : 0);
  const T* cache = static_cast<const T*>(args.k_cache) + max(args.cache_batch_idx[row], 0) * args.k_stride[0] +
                   head / args.group * args.k_stride[2];
  const float lse = args.lse[row * args.heads + head];
  float* const to = probes.to[blockIdx.y] + row * probes.capacity;
  for (int64_t key = threadIdx.x; key < probes.capacity; key += kAttentionThreads) {
    float p = 0.0f;
    if (key < keys) {
      float s = 0.0f;
#pragma unroll
      for (int d = 0; d < 64; d += 8) {
        float k[8];
        load_vector<8>(cache + key * args.k_stride[1] + d, k);
#pragma unroll
        for (int i = 0; i < 8; ++i) s += q[d + i] * k[i];
      }
      p = ptx::exp2_approx(s - lse);
    }
    to[key] = p;
  }
}

}  // namespace vivace
