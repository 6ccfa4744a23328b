// Requests without top-k and top-p go through a race alone (race.cuh). The others take one CTA each, and nothing is sorted:
// top-k and top-p are thresholds, found by bisection on the bits of the values (for floats of one sign the order of the bits
// is the order of the values), so that equal values stand or fall together. Sums and extrema over the CTA are taken in a
// fixed order that depends on the vocabulary alone. Vocabularies up to kSharedVocab lie in shared memory; larger ones are
// computed anew from the logits in each pass.
#include <cstdint>

#include "kernels/common/philox.h"
#include "kernels/common/vector.cuh"
#include "kernels/sampling/logits.cuh"
#include "kernels/sampling/race.cuh"
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

/// The unnormalised probability of a logit that is at least `least`; 0 for others and for NaN. 1 for the largest, even if
/// that is infinite.
__device__ __forceinline__ float weight_of(float logit, float largest, uint32_t least) {
  if (ordered_bits(logit) < least) return 0.0f;
  return logit == largest ? 1.0f : logit < largest ? expf(logit - largest) : 0.0f;
}

template <typename T, bool kShared>
__device__ __forceinline__ void filter_request(const SampleParams& p, int64_t r, const DrawRequest& request, float* kept,
                                               BlockReduce& reduce) {
  const int vocab = static_cast<int>(p.vocab), thread = static_cast<int>(threadIdx.x);
  const Logits<T> logits(p, r, request);
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

  if (logits.greedy) {
    if (probs != nullptr) {
      for (int i = thread; i < vocab; i += kThreads) probs[i] = i == token ? 1.0f : 0.0f;
    }
  } else {
    // top-k: the largest bits that k logits reach.
    const int top_k = request.top_k;
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
    float cutoff = fminf(fmaxf(request.min_p, 0.0f), 1.0f);
    const auto mass = [&](float low, float high) {
      float sum = 0.0f;
      for (int i = thread; i < vocab; i += kThreads) {
        const float w = weight(i);
        if (w >= low && w <= high) sum += w;
      }
      return reduce.sum(sum);
    };
    float total = mass(cutoff, 1.0f);
    const float top_p = request.top_p;
    if (top_p < 1.0f) {
      const float dropped = (1.0f - top_p) * total;
      const float low = cutoff;
      const uint32_t bits = bisect(__float_as_uint(cutoff), __float_as_uint(1.0f),
                                   [&](uint32_t high) { return mass(low, __uint_as_float(high)) > dropped; });
      cutoff = __uint_as_float(bits);
      total = mass(cutoff, 1.0f);
    }

    // The race. Four neighbouring entries share a draw of Philox.
    const int64_t seed = request.seed, step = request.step;
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
    RequestState state;
    state.load(p, r, request);
    state.finish(p, r, token);
  }
}

/// Any vocabulary, any options: a CTA a request.
template <typename T, bool kShared>
__global__ void __launch_bounds__(kThreads) sample_kernel(const __grid_constant__ SampleParams p) {
  extern __shared__ float kept[];  // (vocab): logits, then weights
  __shared__ Indexed slots[2][kWarps];
  ptx::dependency_wait();
  BlockReduce reduce(slots);
  for (int64_t r = blockIdx.x; r < p.requests; r += gridDim.x) {
    const DrawRequest request(p, r);
    if (request.padding(p)) continue;
    filter_request<T, kShared>(p, r, request, kept, reduce);
    __syncthreads();  // before `kept` takes the next request
  }
}

/// Vocabularies up to kSharedVocab, drawing tokens: kCluster CTAs a request, of which the first does alone what is more than
/// a race.
template <typename T, int kCluster>
__global__ void __launch_bounds__(kThreads) draw_kernel(const __grid_constant__ SampleParams p) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  if constexpr (kCluster > 1)
    return;  // there are no clusters
  else
#endif
  {
    constexpr int kRounds = static_cast<int>((kSharedVocab + 4 * kThreads * kCluster - 1) / (4 * kThreads * kCluster));
    using Reduce = RequestReduce<kThreads, kCluster>;
    extern __shared__ float kept[];  // (vocab)
    __shared__ Indexed slots[2][kWarps];
    __shared__ typename Reduce::Slots race_slots;
    Reduce reduce(race_slots);
    ptx::dependency_wait();
    const int64_t r = blockIdx.x / kCluster;
    const DrawRequest request(p, r);
    if (request.padding(p)) return;
    if (!request.filtered(p.vocab)) {
      race_request<T, kThreads, kCluster, kRounds>(p, r, request, reduce);
    } else if (blockIdx.x % kCluster == 0) {
      BlockReduce block_reduce(slots);
      filter_request<T, true>(p, r, request, kept, block_reduce);
    }
  }
}

/// CTAs a request: what the machine has idle, up to 8.
int cluster_of(int64_t requests, int multiprocessors) {
  int cluster = 8;
  while (cluster > 1 && requests * cluster > multiprocessors) cluster /= 2;
  return cluster;
}

struct Device {
  int capability = 0, multiprocessors = 0;
};
Device current_device() {
  int device = 0, major = 0;
  Device d;
  if (cudaGetDevice(&device) != cudaSuccess) return d;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&d.multiprocessors, cudaDevAttrMultiProcessorCount, device);
  d.capability = 10 * major;
  return d;
}

template <typename Kernel>
cudaError_t launch(Kernel kernel, unsigned grid, size_t shared, int cluster, bool dependent, const SampleParams& p,
                   cudaStream_t stream) {
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = attributes;
  if (dependent) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, p);
}

template <typename T>
cudaError_t launch_draw(const SampleParams& p, int cluster, bool dependent, cudaStream_t stream) {
  const unsigned requests = static_cast<unsigned>(p.requests);
  const size_t shared = static_cast<size_t>(p.vocab) * sizeof(float);
  if constexpr (sizeof(T) < sizeof(float)) cluster = 1;  // what decode_step gives is fp32
  switch (cluster) {
    case 1: return launch(draw_kernel<T, 1>, requests, shared, 1, dependent, p, stream);
    case 2: return launch(draw_kernel<float, 2>, 2 * requests, shared, 2, dependent, p, stream);
    case 4: return launch(draw_kernel<float, 4>, 4 * requests, shared, 4, dependent, p, stream);
    case 8: return launch(draw_kernel<float, 8>, 8 * requests, shared, 8, dependent, p, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t sample_cuda(const SampleParams& p, cudaStream_t stream, int cluster) {
  if (p.requests == 0 || p.vocab == 0 || p.logit_rows == 0) return cudaSuccess;
  if (p.vocab > (int64_t{1} << 30)) return cudaErrorNotSupported;
  const Device device = current_device();
  const bool hopper = device.capability >= 90;  // clusters and programmatic dependent launch
  return for_float_dtype(p.logits_dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (p.vocab <= kSharedVocab && p.tokens != nullptr && p.requests <= 65535) {
      if (cluster == 0) cluster = hopper ? cluster_of(p.requests, device.multiprocessors) : 1;
      return launch_draw<T>(p, cluster, hopper, stream);
    }
    const unsigned grid = grid_x(p.requests);
    if (p.vocab <= kSharedVocab) {
      return launch(sample_kernel<T, true>, grid, static_cast<size_t>(p.vocab) * sizeof(float), 1, hopper, p, stream);
    }
    return launch(sample_kernel<T, false>, grid, 0, 1, hopper, p, stream);
  });
}

}  // namespace vivace
