// Tokens of vocabularies up to kDrawVocab are drawn by race.cuh. Larger ones, and probabilities, take one CTA a request,
// whose sums and extrema are taken in a fixed order that depends on the vocabulary alone: up to kSharedVocab its entries lie
// in shared memory, larger ones are computed anew from the logits in each pass. Nothing is sorted: top-k and top-p are
// thresholds (threshold.cuh).
#include <cstdint>

#include "kernels/common/philox.h"
#include "kernels/common/ptx.cuh"
#include "kernels/common/vector.cuh"
#include "kernels/sampling/logits.cuh"
#include "kernels/sampling/race.cuh"
#include "kernels/sampling/sample_launch.h"
#include "kernels/sampling/threshold.cuh"

namespace vivace {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int64_t kSharedVocab = 9984;  // fp32, with the other slots below the 48 KiB that need no opt-in

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

template <typename T, bool kShared>
__device__ __forceinline__ void filter_request(const SampleParams& p, int64_t r, const DrawRequest& request, float* kept,
                                               Threshold<kThreads, 1>::Slots& slots, BlockReduce& reduce) {
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
  if constexpr (kShared) __syncthreads();  // from here on threads read what others stored
  const auto logit = [&](int i) { return kShared ? kept[i] : logits(i); };
  int token = first.index < vocab ? first.index : 0;  // 0: every logit is NaN

  if (logits.greedy) {
    if (probs != nullptr) {
      for (int i = thread; i < vocab; i += kThreads) probs[i] = i == token ? 1.0f : 0.0f;
    }
  } else {
    // min-p in units of the largest probability, which is always kept.
    const float cutoff = request.cutoff();
    Threshold<kThreads, 1> threshold(slots);
    uint32_t most_k = threshold.kAll, most_p = threshold.kAll;
    if (request.top_k > 0 && request.top_k < vocab) {
      most_k = find_top_k(threshold, request.top_k, largest, [&](const auto& f) {
        for (int i = thread; i < vocab; i += kThreads) f(logit(i));
      });
    }
    const auto unfiltered = [&](int i) {
      const float l = logit(i), w = weight_of(l, largest);
      return w < cutoff || logit_distance(l, largest) > most_k ? 0.0f : w;
    };
    if (request.top_p < 1.0f) {
      most_p = find_top_p(threshold, request.top_p, [&](const auto& f) {
        for (int i = thread; i < vocab; i += kThreads) f(unfiltered(i));
      });
    }
    const auto weight = [&](int i) {
      const float w = unfiltered(i);
      return weight_distance(w) > most_p ? 0.0f : w;
    };
    float total = 0.0f;
    for (int i = thread; i < vocab; i += kThreads) {
      total += weight(i);
    }
    total = reduce.sum(total);

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
        const float probability = w > 0.0f ? w / total : 0.0f;
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
    state.prepare(p, request);
    state.finish(p, r, token);
  }
}

/// Any vocabulary, any options: a CTA a request.
template <typename T, bool kShared>
__global__ void __launch_bounds__(kThreads, 1) sample_kernel(const __grid_constant__ SampleParams p) {
  extern __shared__ float kept[];  // (vocab): logits
  __shared__ Indexed slots[2][kWarps];
  __shared__ Threshold<kThreads, 1>::Slots threshold_slots;
  ptx::grid_dependency_wait();
  BlockReduce reduce(slots);
  for (int64_t r = blockIdx.x; r < p.requests; r += gridDim.x) {
    const DrawRequest request = DrawRequest::load(p, r);
    if (request.padding(p)) continue;
    filter_request<T, kShared>(p, r, request, kept, threshold_slots, reduce);
    __syncthreads();  // before `kept` takes the next request
  }
}

/// The threads of a CTA, and how many times four entries each has, where kCluster CTAs share up to kDrawVocab: T3's 8,194
/// entries are a few more than a power of two.
constexpr int64_t kDrawVocab = 8704;
template <int kCluster>
inline constexpr int kDrawThreads = kCluster == 8 ? 288 : 544;
template <int kCluster>
inline constexpr int kDrawRounds = static_cast<int>((kDrawVocab + 4 * kDrawThreads<kCluster> * kCluster - 1) /
                                                    (4 * kDrawThreads<kCluster> * kCluster));

/// Vocabularies up to kDrawVocab, drawing tokens: kCluster CTAs a request.
template <typename T, int kCluster>
__global__ void __launch_bounds__(kDrawThreads<kCluster>, 1)
    draw_kernel(const __grid_constant__ SampleParams p, bool pairs) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  if constexpr (kCluster > 1)
    return;  // there are no clusters
  else
#endif
  {
    constexpr int kThreads = kDrawThreads<kCluster>;
    using Reduce = RequestReduce<kThreads, kCluster>;
    __shared__ typename Reduce::Slots race_slots;
    Reduce reduce(race_slots);
    ptx::grid_dependency_wait();
    draw_request<T, kThreads, kCluster, kDrawRounds<kCluster>>(p, pairs, static_cast<int>(blockIdx.x) / kCluster, reduce);
  }
}

/// Whether no stride leaves 32 bits.
bool has_short_strides(const SampleParams& p) {
  for (const int64_t stride : {p.cfg_weight_stride, p.temperature_stride, p.repetition_penalty_stride, p.min_p_stride,
                               p.top_p_stride, p.top_k_stride, p.seed_stride, p.step_stride}) {
    if (stride != static_cast<int32_t>(stride)) return false;
  }
  return true;
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

template <typename Kernel, typename... Args>
cudaError_t launch(Kernel kernel, unsigned grid, int threads, size_t shared, int cluster, bool dependent,
                   cudaStream_t stream, const Args&... args) {
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(static_cast<unsigned>(threads));
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
  return cudaLaunchKernelEx(&config, kernel, args...);
}

template <typename T, int kCluster>
cudaError_t launch_draw(const SampleParams& p, bool dependent, cudaStream_t stream) {
  const unsigned grid = static_cast<unsigned>(p.requests) * kCluster;
  const bool pairs = p.logits_dtype == DType::kFloat32 && p.vocab % 2 == 0 && p.logits_stride % 2 == 0 &&
                     p.seen_stride % 2 == 0 && reinterpret_cast<uintptr_t>(p.logits) % 8 == 0 &&
                     reinterpret_cast<uintptr_t>(p.seen) % 2 == 0;
  return launch(draw_kernel<T, kCluster>, grid, kDrawThreads<kCluster>, 0, kCluster, dependent, stream, p, pairs);
}

template <typename T>
cudaError_t launch_draw(const SampleParams& p, int cluster, bool dependent, cudaStream_t stream) {
  if constexpr (sizeof(T) < sizeof(float)) cluster = 1;  // what decode_step gives is fp32
  switch (cluster) {
    case 1: return launch_draw<T, 1>(p, dependent, stream);
    case 2: return launch_draw<float, 2>(p, dependent, stream);
    case 4: return launch_draw<float, 4>(p, dependent, stream);
    case 8: return launch_draw<float, 8>(p, dependent, stream);
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
    if (p.vocab <= kDrawVocab && p.tokens != nullptr && p.requests <= 65535 && has_short_strides(p)) {
      if (cluster == 0) cluster = hopper ? cluster_of(p.requests, device.multiprocessors) : 1;
      return launch_draw<T>(p, cluster, hopper, stream);
    }
    const unsigned grid = grid_x(p.requests);
    if (p.vocab <= kSharedVocab) {
      return launch(sample_kernel<T, true>, grid, kThreads, static_cast<size_t>(p.vocab) * sizeof(float), 1, hopper, stream,
                    p);
    }
    return launch(sample_kernel<T, false>, grid, kThreads, 0, 1, hopper, stream, p);
  });
}

}  // namespace vivace
