// Drawing a token. Two exchanges over the threads of a request: the largest logit, which min-p is measured by, then the
// first to arrive of an exponential race at rates e^(logit - largest). Between them top-k and top-p have theirs
// (threshold.cuh). kCluster CTAs share a request, so that a single one does not wait for one SM's arithmetic; they exchange
// through distributed shared memory. The token is the same for any number of CTAs.
//
// The race is run twice: roughly by all entries, then exactly by those that may have won. And the kernel is small: what it
// needs of the instruction cache the next step's kernel has to load again.
#pragma once

#include <cstdint>

#include "kernels/common/cluster.cuh"
#include "kernels/common/philox.h"
#include "kernels/common/ptx.cuh"
#include "kernels/common/tma.cuh"
#include "kernels/sampling/logits.cuh"
#include "kernels/sampling/threshold.cuh"

namespace vivace {

/// Extrema over the CTAs of a request, each once. A warp sends what it has to whom it concerns; bytes that have come
/// complete an mbarrier. (The release of a barrier.cluster waits for all stores of the thread to reach memory.)
template <int kThreads, int kCluster>
class RequestReduce {
 public:
  static constexpr int kWarps = kThreads / 32, kAll = kCluster * kWarps, kReads = (kAll + 31) / 32;
  struct Slots {
    uint64_t first[kAll];  // of all warps: key << 32 | index; in the first CTA
    uint32_t largest[kAll];
    uint64_t first_here, largest_here;  // mbarriers
  };

  __device__ __forceinline__ explicit RequestReduce(Slots& slots) : slots_(slots) {
    if constexpr (kCluster > 1) {
      if (threadIdx.x == 0) {
        sm90::barrier_init(&slots_.first_here, 1);
        sm90::barrier_init(&slots_.largest_here, 1);
        sm90::barrier_init_fence();
        sm90::barrier_expect(&slots_.largest_here, kAll * sizeof(uint32_t));
        if (sm90::cluster_rank() == 0) sm90::barrier_expect(&slots_.first_here, kAll * sizeof(uint64_t));
      }
      __syncwarp();
      sm90::cluster_arrive_relaxed();
    }
  }

  /// Every thread gets the largest, from largest().
  __device__ __forceinline__ void send_largest(uint32_t x) {
    x = __reduce_max_sync(~0u, x);
    if constexpr (kCluster > 1) {
      sm90::cluster_wait();  // nobody sends to a CTA that has not started
      if (lane() < kCluster) {
        sm90::store_async(sm90::cluster_address(ptx::shared_address(&slots_.largest[place()]), lane()), x,
                          sm90::cluster_address(ptx::shared_address(&slots_.largest_here), lane()));
      }
      __syncwarp();
    } else {
      if (lane() == 0) slots_.largest[place()] = x;
    }
  }
  __device__ __forceinline__ uint32_t largest() {
    wait(&slots_.largest_here);
    uint32_t x = 0;
#pragma unroll
    for (int i = 0; i < kReads; ++i) x = max(x, slots_.largest[min(lane() + 32 * i, kAll - 1)]);
    return __reduce_max_sync(~0u, x);
  }

  /// Of the smallest key and, among equal ones, the smallest index; by all threads, known to warp 0 of the first CTA.
  __device__ __forceinline__ uint32_t first(uint32_t key, uint32_t index) {
    const uint2 x = warp_first(key, index);
    if (lane() == 0) {
      const uint64_t both = static_cast<uint64_t>(x.x) << 32 | x.y;
      if constexpr (kCluster > 1) {
        sm90::store_async(sm90::cluster_address(ptx::shared_address(&slots_.first[place()]), 0), both,
                          sm90::cluster_address(ptx::shared_address(&slots_.first_here), 0));
      } else {
        slots_.first[place()] = both;
      }
    }
    __syncwarp();
    if constexpr (kCluster > 1) {
      if (sm90::cluster_rank() != 0 || threadIdx.x >= 32) return 0;
    }
    wait(&slots_.first_here);
    uint64_t least = ~uint64_t{0};
#pragma unroll
    for (int i = 0; i < kReads; ++i) least = min(least, slots_.first[min(lane() + 32 * i, kAll - 1)]);
    return warp_first(static_cast<uint32_t>(least >> 32), static_cast<uint32_t>(least)).y;
  }

 private:
  __device__ static int lane() { return static_cast<int>(threadIdx.x) % 32; }
  /// Of this warp, among those of all CTAs.
  __device__ static int place() {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    return kCluster > 1 ? static_cast<int>(sm90::cluster_rank()) * kWarps + warp : warp;
  }
  __device__ static void wait(uint64_t* here) {
    if constexpr (kCluster > 1) {
      sm90::barrier_wait(here, 0);
    } else {
      __syncthreads();
    }
  }
  __device__ static uint2 warp_first(uint32_t key, uint32_t index) {
    const uint32_t smallest = __reduce_min_sync(~0u, key);
    return make_uint2(smallest, __reduce_min_sync(~0u, key == smallest ? index : ~0u));
  }

  Slots& slots_;
};

/// Four neighbouring entries; what those at or past the vocabulary have means nothing.
template <typename T>
struct Quad {
  float cond[4], uncond[4];
  uint32_t seen;  // a bit each

  /// Rows of an even number of fp32, of which all are loaded: no load waits for another one's predicate.
  __device__ __forceinline__ void load_pairs_of_seen(const uint8_t* row, int i0, int vocab) {
    const uint16_t a = *reinterpret_cast<const uint16_t*>(row + at(i0, vocab));
    const uint16_t b = *reinterpret_cast<const uint16_t*>(row + at(i0 + 2, vocab));
    seen = (a & 0xff ? 1u : 0) | (a >> 8 ? 2u : 0) | (b & 0xff ? 4u : 0) | (b >> 8 ? 8u : 0);
  }
  __device__ __forceinline__ void load_pairs(const float* row, const float* other, int i0, int vocab) {
    load_pair(row + at(i0, vocab), cond);
    load_pair(row + at(i0 + 2, vocab), cond + 2);
    load_pair(other + at(i0, vocab), uncond);
    load_pair(other + at(i0 + 2, vocab), uncond + 2);
  }
  /// Any rows.
  __device__ __forceinline__ void load(const Logits<T>& logits, int i0, int vocab) {
    seen = 0;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int i = min(i0 + e, vocab - 1);
      cond[e] = to_float(logits.cond[i]);
      uncond[e] = logits.uncond != nullptr ? to_float(logits.uncond[i]) : 0.0f;
      seen |= logits.seen[i] != 0 ? 1u << e : 0;
    }
  }

 private:
  __device__ static int at(int i, int vocab) { return min(i, vocab - 2); }
  __device__ static void load_pair(const float* from, float* to) {
    const float2 a = *reinterpret_cast<const float2*>(from);
    to[0] = a.x;
    to[1] = a.y;
  }
};

/// What top-k, min-p and top-p drop becomes NaN, which is nothing to all that follows.
template <int kThreads, int kCluster, int kRounds>
__device__ __forceinline__ void filter(const DrawRequest& request, int vocab, float largest, float (&logit)[kRounds][4]) {
  __shared__ typename Threshold<kThreads, kCluster>::Slots slots;
  Threshold<kThreads, kCluster> threshold(slots);
  const float cutoff = request.cutoff();
  if (request.top_k > 0 && request.top_k < vocab) {
    const uint32_t most = find_top_k(threshold, request.top_k, largest, [&](const auto& f) {
#pragma unroll
      for (int n = 0; n < 4 * kRounds; ++n) f(logit[n / 4][n % 4]);
    });
#pragma unroll
    for (int n = 0; n < 4 * kRounds; ++n) {
      if (logit_distance(logit[n / 4][n % 4], largest) > most) logit[n / 4][n % 4] = NAN;
    }
  }
  if (request.top_p < 1.0f) {
    float weight[kRounds][4];
#pragma unroll
    for (int n = 0; n < 4 * kRounds; ++n) {
      const float w = weight_of(logit[n / 4][n % 4], largest);
      weight[n / 4][n % 4] = w < cutoff ? 0.0f : w;
    }
    const uint32_t most = find_top_p(threshold, request.top_p, [&](const auto& f) {
#pragma unroll
      for (int n = 0; n < 4 * kRounds; ++n) f(weight[n / 4][n % 4]);
    });
#pragma unroll
    for (int n = 0; n < 4 * kRounds; ++n) {
      if (weight_distance(weight[n / 4][n % 4]) > most) logit[n / 4][n % 4] = NAN;
    }
  }
}

/// philox4x32_10 a round at a time: where the rounds are a loop, their code is loaded once.
struct PhiloxRounds {
  uint32_t c[4], k[2];

  __device__ __forceinline__ void begin(uint64_t key, uint64_t counter_lo, uint64_t counter_hi) {
    k[0] = static_cast<uint32_t>(key), k[1] = static_cast<uint32_t>(key >> 32);
    c[0] = static_cast<uint32_t>(counter_lo), c[1] = static_cast<uint32_t>(counter_lo >> 32);
    c[2] = static_cast<uint32_t>(counter_hi), c[3] = static_cast<uint32_t>(counter_hi >> 32);
  }
  __device__ __forceinline__ void next() {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c[0];
    const uint64_t p1 = uint64_t{0xCD9E8D57u} * c[2];
    c[0] = static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k[0];
    c[1] = static_cast<uint32_t>(p1);
    c[2] = static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k[1];
    c[3] = static_cast<uint32_t>(p0);
    k[0] += 0x9E3779B9u;
    k[1] += 0xBB67AE85u;
  }
};

/// -log(u) of a draw of Philox, roughly: to 2^-16 of it.
__device__ __forceinline__ float rough_time(uint32_t bits) {
  const float rest = static_cast<float>(0xffffffu - (bits >> 8)) * (1.0f / 16777216.0f);  // 1 - u, exactly
  const float far = -0.693147181f * ptx::log2_approx(philox_uniform(bits));
  return rest < 1.0f / 64 ? rest * (1.0f + rest * (0.5f + rest * (1.0f / 3))) : far;
}

/// The winner of this thread's entries, if it may be one of the warp's: the bits of its time, and which entry it is.
///
/// Times are not negative, so their bits are in their order. A rough time is wrong by less than 2^-14 of it (rough_time;
/// d up to 126 with an error of 2^-17, ex2.approx 2^-22), and roughly the cutoff is met with as much: so who is 2^-9 behind
/// one that surely runs has lost, and only who is nearer is computed exactly.
template <int kRounds>
__device__ __forceinline__ uint2 race(const DrawRequest& request, float largest, const float (&logit)[kRounds][4],
                                      const uint32_t (&draw)[kRounds][4], const float (&rough)[kRounds][4]) {
  constexpr float kSlack = 1.0f / 1024;
  const bool greedy = request.greedy();
  const float cutoff = request.cutoff();
  const float range = -ptx::log2_approx(cutoff);  // of log2 of the largest weight over one that runs
  // A draw of 1 is the time 0 at any weight, but what is further than 126 behind the largest may have none at all.
  const float surely = greedy ? 0.0f : fminf(range - kSlack, 126.0f), maybe = greedy ? 0.0f : range + kSlack;
  float time[kRounds][4];
  uint32_t most = 0x7f800000u;  // infinity
#pragma unroll
  for (int n = 0; n < 4 * kRounds; ++n) {
    const float l = logit[n / 4][n % 4];
    const float d = l == largest ? 0.0f : __fsub_rn(largest, l) * 1.44269504f;  // even if both are infinite
    const float t = greedy ? 0.0f : rough[n / 4][n % 4] * ptx::exp2_approx(fminf(d, 126.0f));
    time[n / 4][n % 4] = d <= maybe ? t : NAN;
    if (d <= surely) most = min(most, __float_as_uint(t));
  }
  const float bound = __uint_as_float(__reduce_min_sync(~0u, most)) * (1.0f + 2 * kSlack);
  uint32_t candidates = 0;
#pragma unroll
  for (int n = 0; n < 4 * kRounds; ++n) candidates |= time[n / 4][n % 4] <= bound ? 1u << n : 0;

  uint2 first = make_uint2(~0u, ~0u);
#pragma unroll 1
  for (; candidates != 0; candidates &= candidates - 1) {
    const int entry = __ffs(static_cast<int>(candidates)) - 1;
    float l = logit[0][0];
    uint32_t bits = draw[0][0];
#pragma unroll
    for (int n = 1; n < 4 * kRounds; ++n) {
      if (n == entry) l = logit[n / 4][n % 4], bits = draw[n / 4][n % 4];
    }
    const float weight = weight_of(l, largest);
    if (!(weight > 0.0f) || weight < cutoff) continue;
    // -log(1) is -0
    const uint32_t exact = greedy ? 0 : __float_as_uint(fabsf(logf(philox_uniform(bits))) / weight);
    if (exact < first.x) first = make_uint2(exact, entry);
  }
  __syncwarp();
  return first;
}

/// A thread's part of a request: quads first, first + kThreads, ... below end.
struct DrawShare {
  int first, end;
  bool last_word;  // the thread is the one that writes what comes out
};

/// From the logits on. kFiltered: the request has top-k or top-p, whose code and registers the others shall not have.
template <bool kFiltered, typename T, int kThreads, int kCluster, int kRounds>
__device__ __forceinline__ void draw_token(const SampleParams& p, int r, const DrawRequest& request, const Logits<T>& logits,
                                           const DrawShare& share, const Quad<T> (&quad)[kRounds],
                                           RequestReduce<kThreads, kCluster>& reduce) {
  const int vocab = static_cast<int>(p.vocab);
  RequestState state;
  if (share.last_word) state.load(p, r, request);

  // Draws, while the logits are on their way: a round waits for the one before in any case.
  PhiloxRounds draws[kRounds];
#pragma unroll
  for (int n = 0; n < kRounds; ++n) {
    draws[n].begin(static_cast<uint64_t>(request.seed), static_cast<uint64_t>(share.first + n * kThreads),
                   static_cast<uint64_t>(request.step));
  }
#pragma unroll 1
  for (int round = 0; round < 10; ++round) {
#pragma unroll
    for (int n = 0; n < kRounds; ++n) draws[n].next();
  }

  float l[kRounds][4];
  uint32_t most = 0;  // NaN counts as nothing
#pragma unroll
  for (int n = 0; n < kRounds; ++n) {
    const int q = share.first + n * kThreads;
    logits.values(quad[n].cond, quad[n].uncond, quad[n].seen, l[n]);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (q >= share.end || 4 * q + e >= vocab) l[n][e] = NAN;
      if (l[n][e] == l[n][e]) most = max(most, ordered_bits(l[n][e]));
    }
  }
  reduce.send_largest(most);
  // While the CTAs hear of each other.
  uint32_t draw[kRounds][4];
  float rough[kRounds][4];
#pragma unroll
  for (int n = 0; n < 4 * kRounds; ++n) {
    draw[n / 4][n % 4] = draws[n / 4].c[n % 4];
    rough[n / 4][n % 4] = rough_time(draw[n / 4][n % 4]);
  }
  if (share.last_word) state.prepare(p, request);
  most = reduce.largest();
  const float largest = most == 0 ? -INFINITY : from_ordered_bits(most);
  if constexpr (kFiltered) filter<kThreads, kCluster, kRounds>(request, vocab, largest, l);
  const uint2 first = race<kRounds>(request, largest, l, draw, rough);
  const uint32_t entry = first.y, quad_of = static_cast<uint32_t>(share.first) + entry / 4 * kThreads;
  const uint32_t winner = reduce.first(first.x, first.y == ~0u ? ~0u : 4 * quad_of + entry % 4);
  if (share.last_word) state.finish(p, r, winner < static_cast<uint32_t>(vocab) ? static_cast<int>(winner) : 0);
}

/// One request of at most kRounds * kThreads * kCluster * 4 entries. pairs: rows of an even number of fp32, of logits and of
/// ids seen, at even addresses.
template <typename T, int kThreads, int kCluster, int kRounds>
__device__ __forceinline__ void draw_request(const SampleParams& p, bool pairs, int r,
                                             RequestReduce<kThreads, kCluster>& reduce) {
  const int vocab = static_cast<int>(p.vocab), thread = static_cast<int>(threadIdx.x);
  const int quads = (vocab + 3) / 4, most = (quads + kCluster - 1) / kCluster;
  const int rank = kCluster > 1 ? static_cast<int>(sm90::cluster_rank()) : 0;
  const DrawShare share{rank * most + thread, min((rank + 1) * most, quads), rank == 0 && thread == 0};

  // Two trips to memory: what the request asks for and what it has seen; its logits and what moves on with it.
  Quad<T> quad[kRounds];
  if (pairs) {
#pragma unroll
    for (int n = 0; n < kRounds; ++n)
      quad[n].load_pairs_of_seen(p.seen + r * p.seen_stride, 4 * (share.first + n * kThreads), vocab);
  }
  const DrawRequest request = DrawRequest::load<true>(p, r);
  if (request.padding(p)) return;
  const Logits<T> logits(p, r, request);
  if (pairs) {
    if constexpr (sizeof(T) == 4) {
      const float* other = logits.uncond != nullptr ? logits.uncond : logits.cond;
#pragma unroll
      for (int n = 0; n < kRounds; ++n) quad[n].load_pairs(logits.cond, other, 4 * (share.first + n * kThreads), vocab);
    }
  } else {
#pragma unroll
    for (int n = 0; n < kRounds; ++n) quad[n].load(logits, 4 * (share.first + n * kThreads), vocab);
  }
  if (request.filtered(p.vocab) && !logits.greedy) {
    draw_token<true>(p, r, request, logits, share, quad, reduce);
  } else {
    draw_token<false>(p, r, request, logits, share, quad, reduce);
  }
}

}  // namespace vivace
