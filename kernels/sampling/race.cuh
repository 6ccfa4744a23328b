// Drawing a token. Two exchanges over the threads of a request: the largest logit, which min-p is measured by, then the
// first to arrive of an exponential race at rates e^(logit - largest). Between them top-k and top-p have theirs
// (threshold.cuh). kCluster CTAs share a request, so that a single one does not wait for one SM's arithmetic (Philox and
// logarithms of 8 K entries take one SM 2.7 us); they exchange through distributed shared memory. The token is the same for
// any number of CTAs.
#pragma once

#include <cstdint>

#include "kernels/common/cluster.cuh"
#include "kernels/common/philox.h"
#include "kernels/common/ptx.cuh"
#include "kernels/sampling/logits.cuh"
#include "kernels/sampling/threshold.cuh"

namespace vivace {

/// Minima and maxima over the CTAs of a request.
template <int kThreads, int kCluster>
class RequestReduce {
 public:
  static constexpr int kWarps = kThreads / 32;
  struct Slots {
    uint32_t warp[kWarps], cta[kCluster];
    uint2 warp_pair[kWarps], cta_pair[kCluster];
  };

  __device__ __forceinline__ explicit RequestReduce(Slots& slots) : slots_(slots) {
    if constexpr (kCluster > 1) sm90::cluster_arrive();  // nobody writes to a CTA that has not started
  }

  /// Every thread gets the largest.
  __device__ __forceinline__ uint32_t largest(uint32_t x) {
    x = __reduce_max_sync(~0u, x);
    if (lane() == 0) slots_.warp[warp()] = x;
    __syncthreads();
    x = __reduce_max_sync(~0u, lane() < kWarps ? slots_.warp[lane()] : 0);
    if constexpr (kCluster > 1) {
      sm90::cluster_wait();
      if (threadIdx.x < kCluster) store(&slots_.cta[sm90::cluster_rank()], x, threadIdx.x);
      sm90::cluster_arrive();
      sm90::cluster_wait();
      x = __reduce_max_sync(~0u, lane() < kCluster ? slots_.cta[lane()] : 0);
    }
    return x;
  }

  /// The smallest key and, among equal ones, the smallest index: in warp 0 of the first CTA.
  __device__ __forceinline__ uint2 first(uint32_t key, uint32_t index) {
    uint2 x = warp_first(key, index);
    if (lane() == 0) slots_.warp_pair[warp()] = x;
    __syncthreads();
    x = lane() < kWarps ? slots_.warp_pair[lane()] : make_uint2(~0u, ~0u);
    x = warp_first(x.x, x.y);
    if constexpr (kCluster > 1) {
      if (threadIdx.x == 0) {
        store(&slots_.cta_pair[sm90::cluster_rank()].x, x.x, 0);
        store(&slots_.cta_pair[sm90::cluster_rank()].y, x.y, 0);
      }
      sm90::cluster_arrive();
      sm90::cluster_wait();
      x = lane() < kCluster ? slots_.cta_pair[lane()] : make_uint2(~0u, ~0u);
      x = warp_first(x.x, x.y);
    }
    return x;
  }

 private:
  __device__ static int lane() { return static_cast<int>(threadIdx.x) % 32; }
  __device__ static int warp() { return static_cast<int>(threadIdx.x) / 32; }
  __device__ static uint2 warp_first(uint32_t key, uint32_t index) {
    const uint32_t smallest = __reduce_min_sync(~0u, key);
    return make_uint2(smallest, __reduce_min_sync(~0u, key == smallest ? index : ~0u));
  }
  /// st.shared::cluster.u32: to the same place in block `rank` of the cluster.
  __device__ static void store(const uint32_t* to, uint32_t x, uint32_t rank) {
    const uint32_t address = sm90::cluster_address(ptx::shared_address(to), rank);
    asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
  }

  Slots& slots_;
};

/// Four neighbouring entries; those at or past the vocabulary are 0, and not seen.
template <typename T>
struct Quad {
  float cond[4], uncond[4];
  uint32_t seen;  // a byte each

  __device__ __forceinline__ void load(const Logits<T>& logits, int i0, int vocab, bool pairs) {
    seen = 0;
    if (pairs && i0 + 4 <= vocab) {  // rows of an even number of fp32: 8-byte loads
      if constexpr (sizeof(T) == 4) {
        load_pairs(logits.cond + i0, cond);
        if (logits.uncond != nullptr) load_pairs(logits.uncond + i0, uncond);
        const auto* bytes = reinterpret_cast<const uint16_t*>(logits.seen + i0);
        seen = bytes[0] | static_cast<uint32_t>(bytes[1]) << 16;
      }
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const bool inside = i0 + e < vocab;
        cond[e] = inside ? to_float(logits.cond[i0 + e]) : 0.0f;
        uncond[e] = inside && logits.uncond != nullptr ? to_float(logits.uncond[i0 + e]) : 0.0f;
        if (inside && logits.seen[i0 + e] != 0) seen |= 1u << (8 * e);
      }
    }
  }

 private:
  __device__ static void load_pairs(const float* from, float (&to)[4]) {
    const float2 a = reinterpret_cast<const float2*>(from)[0], b = reinterpret_cast<const float2*>(from)[1];
    to[0] = a.x;
    to[1] = a.y;
    to[2] = b.x;
    to[3] = b.y;
  }
};

/// Zeroes the weights of what top-k and top-p drop.
template <int kThreads, int kCluster, int kRounds>
__device__ __forceinline__ void filter(const DrawRequest& request, int vocab, float largest,
                                       const float (&logit)[kRounds][4], float (&weight)[kRounds][4],
                                       Threshold<kThreads, kCluster>& threshold) {
  if (request.top_k > 0 && request.top_k < vocab) {
    const uint32_t most = find_top_k(threshold, request.top_k, largest, [&](const auto& f) {
#pragma unroll
      for (int n = 0; n < 4 * kRounds; ++n) f(logit[n / 4][n % 4]);
    });
#pragma unroll
    for (int n = 0; n < 4 * kRounds; ++n) {
      if (logit_distance(logit[n / 4][n % 4], largest) > most) weight[n / 4][n % 4] = 0.0f;
    }
  }
  if (request.top_p < 1.0f) {
    const uint32_t most = find_top_p(threshold, request.top_p, [&](const auto& f) {
#pragma unroll
      for (int n = 0; n < 4 * kRounds; ++n) f(weight[n / 4][n % 4]);
    });
#pragma unroll
    for (int n = 0; n < 4 * kRounds; ++n) {
      if (weight_distance(weight[n / 4][n % 4]) > most) weight[n / 4][n % 4] = 0.0f;
    }
  }
}

/// One request of at most kRounds * kThreads * kCluster * 4 entries.
template <typename T, int kThreads, int kCluster, int kRounds>
__device__ __forceinline__ void draw_request(const SampleParams& p, int64_t r, const DrawRequest& request,
                                             typename Threshold<kThreads, kCluster>::Slots& slots,
                                             RequestReduce<kThreads, kCluster>& reduce) {
  const int vocab = static_cast<int>(p.vocab);
  const int quads = (vocab + 3) / 4, share = (quads + kCluster - 1) / kCluster;
  const int rank = kCluster > 1 ? static_cast<int>(sm90::cluster_rank()) : 0;
  const int begin = rank * share, end = begin + share < quads ? begin + share : quads;  // this CTA's quads
  const Logits<T> logits(p, r, request);
  const bool last_word = rank == 0 && threadIdx.x == 0;  // of this thread
  const bool pairs = sizeof(T) == 4 && p.logits_stride % 2 == 0 && p.seen_stride % 2 == 0 &&
                     reinterpret_cast<uintptr_t>(p.logits) % 8 == 0 && reinterpret_cast<uintptr_t>(p.seen) % 2 == 0;

  Quad<T> quad[kRounds];
#pragma unroll
  for (int n = 0; n < kRounds; ++n) {
    const int q = begin + n * kThreads + static_cast<int>(threadIdx.x);
    if (q < end) quad[n].load(logits, 4 * q, vocab, pairs);
  }
  // One thread alone would wait for these loads at the end; here they come with the logits.
  RequestState state;
  if (last_word) state.load(p, r, request);

  float l[kRounds][4];
  uint32_t most = 0;  // NaN counts as nothing
#pragma unroll
  for (int n = 0; n < kRounds; ++n) {
    const int q = begin + n * kThreads + static_cast<int>(threadIdx.x);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      l[n][e] = NAN;
      if (q >= end || 4 * q + e >= vocab) continue;
      l[n][e] = logits.value(quad[n].cond[e], quad[n].uncond[e], (quad[n].seen >> (8 * e) & 0xffu) != 0);
      if (l[n][e] == l[n][e]) most = max(most, ordered_bits(l[n][e]));
    }
  }
  most = reduce.largest(most);
  const float largest = most == 0 ? -INFINITY : from_ordered_bits(most);
  const float cutoff = fminf(fmaxf(request.min_p, 0.0f), 1.0f);

  float weight[kRounds][4];
#pragma unroll
  for (int n = 0; n < kRounds; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float w = weight_of(l[n][e], largest);
      weight[n][e] = w < cutoff || (logits.greedy && l[n][e] != largest) ? 0.0f : w;
    }
  }
  if (request.filtered(p.vocab) && !logits.greedy) {
    Threshold<kThreads, kCluster> threshold(slots);
    filter(request, vocab, largest, l, weight, threshold);
  }

  uint32_t key = ~0u, index = ~0u;
#pragma unroll
  for (int n = 0; n < kRounds; ++n) {
    const int q = begin + n * kThreads + static_cast<int>(threadIdx.x);
    bool any = false;
#pragma unroll
    for (int e = 0; e < 4; ++e) any = any || weight[n][e] > 0.0f;
    if (!any) continue;
    Philox4 draw{};
    if (!logits.greedy) {
      draw =
          philox4x32_10(static_cast<uint64_t>(request.seed), static_cast<uint64_t>(q), static_cast<uint64_t>(request.step));
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (!(weight[n][e] > 0.0f)) continue;
      // Times are not negative, so their bits are in their order; -log(1) is -0. Greedily all are the same.
      const float time = logits.greedy ? 0.0f : fabsf(logf(philox_uniform(draw.x[e]))) / weight[n][e];
      const uint32_t bits = __float_as_uint(time);
      if (bits < key) {
        key = bits;
        index = static_cast<uint32_t>(4 * q + e);
      }
    }
  }
  const uint2 winner = reduce.first(key, index);
  if (last_word) state.finish(p, r, winner.y < static_cast<uint32_t>(vocab) ? static_cast<int>(winner.y) : 0);
}

}  // namespace vivace
