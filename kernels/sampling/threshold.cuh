// Top-k and top-p as thresholds, found by the CTAs of a request without sorting. An entry has a distance from the largest,
// which orders it, and a mass: 1 for top-k, the probability in fixed point for top-p. It is kept where the masses of all
// nearer entries together stay below a goal, so that entries of one distance stand or fall together. Masses are integers:
// their sums are the same in any order, and by any number of CTAs.
//
// A histogram over the first 8 bits of the distance finds the bin in which the goal is reached; another looks at the next 8
// bits of what lies there; the few entries that are left then are compared with each other. Each CTA makes the histogram of
// its own entries, hands it to all others, and draws the same conclusions as they do.
#pragma once

#include <cstdint>

#include "kernels/common/cluster.cuh"
#include "kernels/common/ptx.cuh"
#include "kernels/sampling/logits.cuh"

namespace vivace {

/// What a selection asks of one entry.
struct ThresholdEntry {
  uint32_t distance = 0;
  uint32_t mass = 0;  // 0: not counted
};

/// The threads of kCluster CTAs share the entries. They are handed in as `each`, which calls a function with every entry of
/// a thread, and may be called often.
template <int kThreads, int kCluster>
class Threshold {
 public:
  static constexpr int kBins = 256, kWarps = kThreads / 32;
  static constexpr int kFew = 64 / kCluster;  // entries of a CTA that are compared with all others
  static constexpr uint32_t kAll = ~0u;       // no threshold
  struct Slots {
    uint32_t low[kBins], high[kBins];   // a bin's mass, its two halves summed apart; zero between uses
    uint64_t mass[2][kCluster][kBins];  // of all CTAs; the two take turns
    uint64_t few[kCluster][kFew];       // of all CTAs: distance << 32 | mass
    int members[kCluster];              // how many there were
    uint64_t own_few[kFew];
    int own_members;
    uint64_t warp_mass[kWarps];
    uint64_t above;     // mass of what is nearer than the bin
    uint64_t bin_mass;  // of the bin
    int bin;            // in which the goal is reached; -1: in none
    uint32_t result;
  };

  __device__ __forceinline__ explicit Threshold(Slots& slots) : s_(slots) {
    for (int b = static_cast<int>(threadIdx.x); b < kBins; b += kThreads) s_.low[b] = s_.high[b] = 0;
    if (threadIdx.x == 0) s_.own_members = 0;
    __syncthreads();
  }

  /// The largest distance that is kept, for the goal that `goal_of(mass of all)` names; kAll where it is not reached.
  /// count_of(bin, its mass): about how many entries a bin of the first 8 bits has. All threads of the cluster call and get
  /// the result.
  template <typename Each, typename Goal, typename Count>
  __device__ __forceinline__ uint32_t find(const Each& each, const Goal& goal_of, const Count& count_of) {
    uint32_t prefix = 0;  // the first bits of the distances that are left
    uint64_t above = 0, goal = 0;
#pragma unroll 1
    for (int shift = 24;; shift -= 8) {
      const auto left = [&](uint32_t distance) { return shift == 24 || distance >> (shift + 8) == prefix; };
      each([&](const ThresholdEntry& e) {
        if (e.mass == 0 || !left(e.distance)) return;
        const uint32_t bin = e.distance >> shift & 0xff;
        if (const uint32_t low = e.mass & 0xffff; low != 0) atomicAdd(&s_.low[bin], low);
        if (const uint32_t high = e.mass >> 16; high != 0) atomicAdd(&s_.high[bin], high);
      });
      __syncthreads();
      uint64_t all = 0;
      const uint64_t mass = exchange();
      uint64_t before = above + sum_before(mass, all);
      if (shift == 24) goal = goal_of(all);
      if (threadIdx.x == 0 && above + all < goal) s_.bin = -1;
      if (before < goal && goal <= before + mass) {
        s_.bin = static_cast<int>(threadIdx.x);
        s_.above = before;
        s_.bin_mass = mass;
      }
      __syncthreads();
      if (s_.bin < 0) return kAll;
      prefix = prefix << 8 | static_cast<uint32_t>(s_.bin);
      above = s_.above;
      if (shift == 0) return prefix;
      if (shift == 24 && count_of(s_.bin, s_.bin_mass) > 24) continue;
      each([&](const ThresholdEntry& e) {
        if (e.mass == 0 || e.distance >> shift != prefix) return;
        const int at = atomicAdd(&s_.own_members, 1);
        if (at < kFew) s_.own_few[at] = static_cast<uint64_t>(e.distance) << 32 | e.mass;
      });
      __syncthreads();
      if (gather()) return compare(above, goal);
    }
  }

 private:
  static_assert(kThreads >= 256 && kBins == 256);

  /// The mass of this thread's bin over all CTAs; 0 for threads without one.
  __device__ __forceinline__ uint64_t exchange() {
    const int bin = static_cast<int>(threadIdx.x);
    uint64_t mass = 0;
    if (bin < kBins) {
      mass = s_.low[bin] + (static_cast<uint64_t>(s_.high[bin]) << 16);
      s_.low[bin] = s_.high[bin] = 0;
    }
    if constexpr (kCluster > 1) {
      turn_ ^= 1;
      if (bin < kBins) {
#pragma unroll
        for (int cta = 0; cta < kCluster; ++cta) store(&s_.mass[turn_][sm90::cluster_rank()][bin], mass, cta);
      }
      sync();
      mass = 0;
#pragma unroll
      for (int cta = 0; cta < kCluster; ++cta) {
        if (bin < kBins) mass += s_.mass[turn_][cta][bin];
      }
    }
    return mass;
  }

  /// Hands the few entries that are left to all CTAs. False where one has too many.
  __device__ __forceinline__ bool gather() {
    const int members = s_.own_members;
    for (int i = static_cast<int>(threadIdx.x); i < kFew * kCluster; i += kThreads) {
      const int at = i % kFew, cta = i / kFew;
      store(&s_.few[rank()][at], at < members ? s_.own_few[at] : 0, cta);
      if (at == 0) store(&s_.members[rank()], members, cta);
    }
    sync();
    if (threadIdx.x == 0) {
      s_.own_members = 0;
      s_.result = 0;
    }
    bool fit = true;
#pragma unroll
    for (int cta = 0; cta < kCluster; ++cta) fit = fit && s_.members[cta] <= kFew;
    __syncthreads();
    return fit;
  }

  /// The largest of the distances in `few` that is kept; a warp an entry.
  __device__ __forceinline__ uint32_t compare(uint64_t above, uint64_t goal) {
    const uint64_t* few = &s_.few[0][0];
    const uint64_t mine[2] = {few[lane()], few[lane() + 32]};
    uint32_t kept = 0;
    for (int at = warp(); at < kFew * kCluster; at += kWarps) {
      const uint64_t entry = few[at];
      if (entry == 0) continue;
      const auto distance = static_cast<uint32_t>(entry >> 32);
      uint32_t low = 0, high = 0;
#pragma unroll
      for (const uint64_t other : mine) {
        const uint32_t mass = other >> 32 < distance ? static_cast<uint32_t>(other) : 0;
        low += mass & 0xffff;
        high += mass >> 16;
      }
      low = __reduce_add_sync(~0u, low);
      high = __reduce_add_sync(~0u, high);
      if (above + low + (static_cast<uint64_t>(high) << 16) < goal) kept = max(kept, distance);
    }
    if (kept != 0 && lane() == 0) atomicMax(&s_.result, kept);
    __syncthreads();
    return s_.result;
  }

  /// The sum of x over the threads before this one, of those that have a bin; `all`: over all.
  __device__ __forceinline__ uint64_t sum_before(uint64_t x, uint64_t& all) {
    uint64_t sum = x;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const uint64_t other = __shfl_up_sync(~0u, sum, distance);
      if (lane() >= distance) sum += other;
    }
    if (lane() == 31) s_.warp_mass[warp()] = sum;
    __syncthreads();
    uint64_t before = sum - x;
    all = 0;
#pragma unroll
    for (int w = 0; w < kBins / 32; ++w) {
      const uint64_t mass = s_.warp_mass[w];
      if (w < warp()) before += mass;
      all += mass;
    }
    return before;
  }

  __device__ static int lane() { return static_cast<int>(threadIdx.x) % 32; }
  __device__ static int warp() { return static_cast<int>(threadIdx.x) / 32; }
  __device__ static int rank() { return kCluster > 1 ? static_cast<int>(sm90::cluster_rank()) : 0; }
  __device__ static void sync() {
    if constexpr (kCluster > 1) {
      sm90::cluster_arrive();
      sm90::cluster_wait();
    } else {
      __syncthreads();
    }
  }
  /// To the same place in block `cta` of the cluster.
  template <typename V>
  __device__ static void store(V* to, V x, int cta) {
    if constexpr (kCluster > 1) {
      const uint32_t address = sm90::cluster_address(ptx::shared_address(to), static_cast<uint32_t>(cta));
      if constexpr (sizeof(V) == 8) {
        asm volatile("st.shared::cluster.u64 [%0], %1;" ::"r"(address), "l"(x) : "memory");
      } else {
        asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
      }
    } else {
      *to = x;
    }
  }

  Slots& s_;
  int turn_ = 0;
};

/// Of a logit from the largest: 2^25 a unit, up to 128, where nothing is left of e^-distance in fp32.
__device__ __forceinline__ uint32_t logit_distance(float logit, float largest) {
  return logit == largest ? 0u : __float2uint_rd(fminf(__fsub_rn(largest, logit) * 33554432.0f, 4294967040.0f));
}

/// Of a weight from 1, the largest: 2^27 an octave, up to 32 octaves.
__device__ __forceinline__ uint32_t weight_distance(float weight) {
  return min(__float_as_uint(1.0f) - __float_as_uint(weight), 0x0fffffffu) << 4;
}

/// The largest logit_distance that top-k keeps. each: calls a function with this thread's logits; NaN counts as none.
template <int kThreads, int kCluster, typename Each>
__device__ __forceinline__ uint32_t find_top_k(Threshold<kThreads, kCluster>& threshold, int top_k, float largest,
                                               const Each& each) {
  return threshold.find(
      [&](const auto& f) {
        each([&](float logit) { f(ThresholdEntry{logit_distance(logit, largest), logit <= largest ? 1u : 0u}); });
      },
      [&](uint64_t) { return static_cast<uint64_t>(top_k); }, [](int, uint64_t mass) { return mass; });
}

/// The largest weight_distance that top-p keeps. each: calls a function with this thread's weights. They have 31 bits of
/// fraction: what is below 2^-32 has no mass.
template <int kThreads, int kCluster, typename Each>
__device__ __forceinline__ uint32_t find_top_p(Threshold<kThreads, kCluster>& threshold, float top_p, const Each& each) {
  return threshold.find(
      [&](const auto& f) {
        each([&](float weight) { f(ThresholdEntry{weight_distance(weight), __float2uint_rn(weight * 2147483648.0f)}); });
      },
      [&](uint64_t total) {
        const auto dropped =
            static_cast<uint64_t>(static_cast<double>(fmaxf(1.0f - top_p, 0.0f)) * static_cast<double>(total));
        return dropped < total ? total - dropped : uint64_t{1};
      },
      [](int bin, uint64_t mass) { return mass >> max(30 - bin / 8, 0); });  // 8 bins an octave
}

}  // namespace vivace
