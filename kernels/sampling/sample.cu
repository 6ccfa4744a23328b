// One CTA a request. Nothing is sorted: top-k and top-p are thresholds, found by bisection on the bits of the values (for
// floats of one sign the order of the bits is the order of the values), so that equal values stand or fall together. Sums
// and extrema over the CTA are taken in a fixed order that depends on the vocabulary alone. Vocabularies up to kSharedVocab
// lie in shared memory; larger ones are computed anew from the logits in each pass.
#include <cstdint>

#include "kernels/common/philox.h"
#include "kernels/common/vector.cuh"
#include "kernels/sampling/sample_launch.h"

namespace vivace {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int64_t kSharedVocab = 12000;  // fp32, with the reductions' slots below the 48 KiB that need no opt-in

/// A value and its index; ordered by value, then by the lower index.
struct Indexed {
  float value;
  int index;
};

/// Reductions over the CTA; every thread calls and gets the result. Two sets of slots take turns, so one barrier does.
class BlockReduce {
 public:
  template <typename V, typename Combine>
  __device__ __forceinline__ V operator()(V x, Combine combine) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) x = combine(x, shuffle(x, distance));
    V* slot = reinterpret_cast<V*>(slots_[turn_]);
    turn_ ^= 1;
    if (threadIdx.x % 32 == 0) slot[threadIdx.x / 32] = x;
    __syncthreads();
    x = slot[0];
#pragma unroll
    for (int warp = 1; warp < kWarps; ++warp) x = combine(x, slot[warp]);
    return x;
  }
  __device__ __forceinline__ float sum(float x) {
    return (*this)(x, [](float a, float b) { return a + b; });
  }
  __device__ __forceinline__ int count(int x) {
    return (*this)(x, [](int a, int b) { return a + b; });
  }

  __device__ __forceinline__ explicit BlockReduce(Indexed (&slots)[2][kWarps]) : slots_(slots) {}

 private:
  __device__ static float shuffle(float x, int distance) { return __shfl_xor_sync(~0u, x, distance); }
  __device__ static int shuffle(int x, int distance) { return __shfl_xor_sync(~0u, x, distance); }
  __device__ static Indexed shuffle(Indexed x, int distance) {
    return {shuffle(x.value, distance), shuffle(x.index, distance)};
  }

  Indexed (&slots_)[2][kWarps];
  int turn_ = 0;
};

/// Bits that order as the floats do, negative ones too; NaN beyond the infinities.
__device__ __forceinline__ uint32_t ordered_bits(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);  // -0 is 0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/// The smallest t in [low, high] for which holds(t), which once true stays true; high where none below it is.
template <typename Holds>
__device__ __forceinline__ uint32_t bisect(uint32_t low, uint32_t high, Holds holds) {
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2;
    if (holds(middle)) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

/// The request's logits before the softmax: guidance, penalty, temperature. Rounded after each operation, as on the CPU.
template <typename T>
struct Logits {
  const T* cond;
  const T* uncond;  // or null
  const uint8_t* seen;
  float cfg_weight, penalty, temperature;

  __device__ __forceinline__ Logits(const SampleParams& p, int64_t r) {
    const T* logits = static_cast<const T*>(p.logits);
    const int64_t last = p.logit_rows - 1;  // rows outside the logits cannot raise here; they must not be read either
    const int64_t cond_row = p.rows[2 * r], uncond_row = p.rows[2 * r + 1];
    cond = logits + (cond_row < 0 ? 0 : cond_row < last ? cond_row : last) * p.logits_stride;
    uncond = uncond_row < 0 ? nullptr : logits + (uncond_row < last ? uncond_row : last) * p.logits_stride;
    seen = p.seen + r * p.seen_stride;
    cfg_weight = p.cfg_weight[r * p.cfg_weight_stride];
    penalty = p.repetition_penalty[r * p.repetition_penalty_stride];
    temperature = p.temperature[r * p.temperature_stride];
  }

  __device__ __forceinline__ bool greedy() const { return !(temperature > 0.0f); }

  __device__ __forceinline__ float operator()(int i) const {
    float l = to_float(cond[i]);
    if (uncond != nullptr) l = __fadd_rn(l, __fmul_rn(cfg_weight, __fsub_rn(l, to_float(uncond[i]))));
    if (seen[i]) l = l < 0.0f ? __fmul_rn(l, penalty) : __fdiv_rn(l, penalty);
    return greedy() ? l : __fdiv_rn(l, temperature);
  }
};

/// The unnormalised probability of a logit that is at least `least`; 0 for others and for NaN. 1 for the largest, even if
/// that is infinite.
__device__ __forceinline__ float weight_of(float logit, float largest, uint32_t least) {
  if (ordered_bits(logit) < least) return 0.0f;
  return logit == largest ? 1.0f : logit < largest ? expf(logit - largest) : 0.0f;
}

template <typename T, bool kShared>
__device__ __forceinline__ void sample_request(const SampleParams& p, int64_t r, float* kept, BlockReduce& reduce) {
  const int vocab = static_cast<int>(p.vocab), thread = static_cast<int>(threadIdx.x);
  const Logits<T> logits(p, r);
  float* probs = p.probs == nullptr ? nullptr : p.probs + r * p.vocab;

  // The first largest logit. Each thread meets its indices in ascending order.
  Indexed first{-INFINITY, vocab};
  for (int i = thread; i < vocab; i += kThreads) {
    const float l = logits(i);
    if constexpr (kShared) kept[i] = l;
    if (l > first.value || (l == first.value && first.index == vocab)) first = {l, i};
  }
  first = reduce(
      first, [](Indexed a, Indexed b) { return b.value > a.value || (b.value == a.value && b.index < a.index) ? b : a; });
  const float largest = first.value;
  int token = first.index < vocab ? first.index : 0;  // 0: every logit is NaN

  if (logits.greedy()) {
    if (probs != nullptr) {
      for (int i = thread; i < vocab; i += kThreads) probs[i] = i == token ? 1.0f : 0.0f;
    }
  } else {
    // top-k: the largest bits that k logits reach.
    const int top_k = p.top_k[r * p.top_k_stride];
    uint32_t least = 0;
    if (top_k > 0 && top_k < vocab) {
      const uint32_t past = bisect(0, ordered_bits(largest), [&](uint32_t bits) {
        int reach = 0;
        for (int i = thread; i < vocab; i += kThreads) reach += ordered_bits(kShared ? kept[i] : logits(i)) > bits;
        return reduce.count(reach) < top_k;
      });
      least = past;  // fewer than k lie above `past`, so at least k reach it
    }
    if constexpr (kShared) {
      for (int i = thread; i < vocab; i += kThreads) kept[i] = weight_of(kept[i], largest, least);
      __syncthreads();  // from here on threads read the weights of others
    }
    const auto weight = [&](int i) {
      if constexpr (kShared) {
        return kept[i];
      } else {
        return weight_of(logits(i), largest, least);
      }
    };

    // min-p, in units of the largest probability, then top-p; the largest is always kept.
    float cutoff = fminf(fmaxf(p.min_p[r * p.min_p_stride], 0.0f), 1.0f);
    const auto mass = [&](float low, float high) {
      float sum = 0.0f;
      for (int i = thread; i < vocab; i += kThreads) {
        const float w = weight(i);
        if (w >= low && w <= high) sum += w;
      }
      return reduce.sum(sum);
    };
    float total = mass(cutoff, 1.0f);
    const float top_p = p.top_p[r * p.top_p_stride];
    if (top_p < 1.0f) {
      const float dropped = (1.0f - top_p) * total;
      const float low = cutoff;
      const uint32_t bits = bisect(__float_as_uint(cutoff), __float_as_uint(1.0f),
                                   [&](uint32_t high) { return mass(low, __uint_as_float(high)) > dropped; });
      cutoff = __uint_as_float(bits);
      total = mass(cutoff, 1.0f);
    }

    // The race. Four neighbouring entries share a draw of Philox.
    const int64_t seed = p.seed == nullptr ? 0 : p.seed[r * p.seed_stride];
    const int64_t step = p.step == nullptr ? 0 : p.step[r * p.step_stride];
    Indexed winner{INFINITY, vocab};
    for (int i0 = 4 * thread; i0 < vocab; i0 += 4 * kThreads) {
      Philox4 draw{};
      if (p.tokens != nullptr) draw = philox4x32_10(static_cast<uint64_t>(seed), i0 >> 2, static_cast<uint64_t>(step));
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = i0 + e;
        if (i >= vocab) break;
        const float w = weight(i);
        const float probability = w > 0.0f && w >= cutoff ? w / total : 0.0f;
        if (probs != nullptr) probs[i] = probability;
        if (probability > 0.0f && p.tokens != nullptr) {
          const float time = -logf(philox_uniform(draw.x[e])) / probability;  // u = 1 gives 0: first to arrive
          if (time < winner.value) winner = {time, i};
        }
      }
    }
    winner = reduce(
        winner, [](Indexed a, Indexed b) { return b.value < a.value || (b.value == a.value && b.index < a.index) ? b : a; });
    if (winner.index < vocab) token = winner.index;
  }

  if (p.tokens != nullptr && thread == 0) {
    p.tokens[r] = token;
    p.seen[r * p.seen_stride + token] = 1;
  }
}

template <typename T, bool kShared>
__global__ void __launch_bounds__(kThreads) sample_kernel(const __grid_constant__ SampleParams p) {
  extern __shared__ float kept[];  // (vocab): logits, then weights
  __shared__ Indexed slots[2][kWarps];
  BlockReduce reduce(slots);
  for (int64_t r = blockIdx.x; r < p.requests; r += gridDim.x) {
    sample_request<T, kShared>(p, r, kept, reduce);
    __syncthreads();  // before `kept` takes the next request
  }
}

}  // namespace

cudaError_t sample_cuda(const SampleParams& p, cudaStream_t stream) {
  if (p.requests == 0 || p.vocab == 0 || p.logit_rows == 0) return cudaSuccess;
  if (p.vocab > (int64_t{1} << 30)) return cudaErrorNotSupported;
  const unsigned grid = grid_x(p.requests);
  return for_float_dtype(p.logits_dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (p.vocab <= kSharedVocab) {
      sample_kernel<T, true><<<grid, kThreads, static_cast<size_t>(p.vocab) * sizeof(float), stream>>>(p);
    } else {
      sample_kernel<T, false><<<grid, kThreads, 0, stream>>>(p);
    }
    return cudaGetLastError();
  });
}

}  // namespace vivace
