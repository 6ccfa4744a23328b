// The token step as a chain of kernels: the embedding, five kernels a layer, the head.
//
//   qkv        q, k, v = W x of the normed stream; q and k rotated; k and v into the cache      linear_*.cuh
//   attention  one query over the row's keys                                                    chain_attention.cuh
//   out        residual += W attention; x = residual * gain; sums of squares                    linear_*.cuh
//   gate_up    silu(gate) * up of the normed stream                                             linear_*.cuh
//   down       residual += W gated; x = residual * gain of the next layer; sums of squares      linear_*.cuh
//
// On Hopper each kernel starts while the one before runs (programmatic dependent launch) and loads what does not depend on
// it. Every kernel waits for the one before to end before it reads or writes anything that another kernel of the step
// touches.
#include <cuda_runtime.h>

#include <algorithm>

#include "kernels/step/chain_attention.cuh"
#include "kernels/step/chain_embed.cuh"
#include "kernels/step/chain_workspace.h"
#include "kernels/step/launch.h"
#include "kernels/step/linear_launch.h"

namespace vivace {
namespace {

bool is_16_bit(DType dtype) { return dtype == DType::kBFloat16 || dtype == DType::kFloat16; }

int64_t qkv_features(const StepParams& p) { return (p.heads + 2 * p.heads_kv) * p.head_dim; }

/// Whether Hopper's products run: asked for, built in, and of a shape that they can share out.
bool takes_sm90(const StepParams& p) {
#ifdef VIVACE_WITH_SM90
  return p.arch >= 90 && p.arch < 100 && linear_sm90_supports(Matrix::kQkv, qkv_features(p), p.hidden) &&
         linear_sm90_supports(Matrix::kOut, p.hidden, p.heads * p.head_dim) &&
         linear_sm90_supports(Matrix::kGateUp, 2 * p.intermediate, p.hidden) &&
         linear_sm90_supports(Matrix::kDown, p.hidden, p.intermediate) &&
         linear_sm90_supports(Matrix::kHead, p.vocab, p.hidden);
#else
  return false;
#endif
}

const char* layer_of(const void* stack, int64_t layer, int64_t elements) {
  return static_cast<const char*>(stack) + layer * elements * 2;
}

int64_t multiprocessors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 132;
  return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess ? count : 132;
}

/// kStages blocks of keys a warp, kCtas CTAs on a multiprocessor, or as many as there is work for.
template <typename T, int kStages, int kCtas>
cudaError_t launch_attention_as(const ChainAttentionArgs& args, int64_t multiprocessors, bool dependent,
                                cudaStream_t stream) {
  constexpr int kBytes = kStages * kAttentionStageBytes + kAttentionMergeBytes;
  const int64_t ctas = std::min(int64_t{args.rows} * args.heads, kCtas * multiprocessors);
  return launch_linked(attention_kernel<T, kStages>, dim3(static_cast<unsigned>(ctas)), kAttentionThreads, kBytes, 1,
                       dependent, stream, args);
}

/// 192 KiB in flight on a multiprocessor of Hopper either way: where there is much work, more CTAs hide each other's ends.
template <typename T>
cudaError_t launch_attention(const ChainAttentionArgs& args, int64_t multiprocessors, bool dependent, cudaStream_t stream) {
  return int64_t{args.rows} * args.heads < 8 * multiprocessors
             ? launch_attention_as<T, 4, 3>(args, multiprocessors, dependent, stream)
             : launch_attention_as<T, 3, 4>(args, multiprocessors, dependent, stream);
}

/// The products of one family for one step.
class Products {
 public:
  Products(const StepParams& p, const ChainWorkspace& at, bool sm90, cudaStream_t stream)
      : p_(p), at_(at), sm90_(sm90), dependent_(p.arch >= 90), multiprocessors_(multiprocessors()), stream_(stream) {}

  int square_width() const { return sm90_ ? kSquareWidthSm90 : kSquareWidthSm80; }
  char* part(size_t offset) const { return static_cast<char*>(p_.workspace) + offset; }

  /// Describes the operands to the copy engine; false where it cannot take them.
  bool prepare() {
#ifdef VIVACE_WITH_SM90
    if (!sm90_) return true;
    const auto weight = [&](Matrix matrix, const void* data, int64_t rows, int64_t k) {
      return linear_sm90_map(weight_[static_cast<int>(matrix)], p_.dtype, data, rows, k, linear_sm90_weight_rows(matrix));
    };
    const auto x = [&](CUtensorMap& map, Matrix matrix, size_t offset, int64_t rows, int64_t k) {
      return linear_sm90_map(map, p_.dtype, part(offset), rows, k, linear_sm90_rows(matrix, p_.rows));
    };
    const int64_t heads = p_.heads * p_.head_dim;
    return weight(Matrix::kQkv, p_.qkv, p_.layers * qkv_features(p_), p_.hidden) &&
           weight(Matrix::kOut, p_.out, p_.layers * p_.hidden, heads) &&
           weight(Matrix::kGateUp, p_.gate_up, p_.layers * 2 * p_.intermediate, p_.hidden) &&
           weight(Matrix::kDown, p_.down, p_.layers * p_.hidden, p_.intermediate) &&
           weight(Matrix::kHead, p_.head, p_.vocab, p_.hidden) && x(x_, Matrix::kQkv, at_.x, p_.rows, p_.hidden) &&
           x(attention_, Matrix::kOut, at_.attention, p_.rows, heads) &&
           x(gated_, Matrix::kDown, at_.gated, p_.rows, p_.intermediate);
#else
    return true;
#endif
  }

  cudaError_t qkv(int64_t layer) const {
    LinearArgs a = normed(qkv_features(p_));
    a.out = part(at_.q);
    a.k_cache = static_cast<char*>(p_.k_cache) + layer * p_.k_stride[0] * 2;
    a.v_cache = static_cast<char*>(p_.v_cache) + layer * p_.v_stride[0] * 2;
    std::copy_n(p_.k_stride + 1, 3, a.k_stride);
    std::copy_n(p_.v_stride + 1, 3, a.v_stride);
    a.capacity = p_.capacity;
    a.cache_seqlens = p_.cache_seqlens;
    a.cache_batch_idx = p_.cache_batch_idx;
    a.heads_kv = static_cast<int32_t>(p_.heads_kv);
    a.heads = static_cast<int32_t>(p_.heads);
    a.rotary_cos = p_.rotary_cos;
    a.rotary_sin = p_.rotary_sin;
    a.rotary_fp32 = p_.rotary_dtype == DType::kFloat32;
    a.rotary_positions = p_.rotary_positions;
    return run(Matrix::kQkv, a, p_.qkv, layer);
  }
  cudaError_t attention(int64_t layer) const {
    ChainAttentionArgs a;
    a.rows = static_cast<int32_t>(p_.rows);
    a.heads = static_cast<int32_t>(p_.heads);
    a.group = static_cast<int32_t>(p_.heads / p_.heads_kv);
    a.capacity = static_cast<int32_t>(p_.capacity);
    a.q = part(at_.q);
    a.out = part(at_.attention);
    a.k_cache = layer_of(p_.k_cache, layer, p_.k_stride[0]);
    a.v_cache = layer_of(p_.v_cache, layer, p_.v_stride[0]);
    std::copy_n(p_.k_stride + 1, 3, a.k_stride);
    std::copy_n(p_.v_stride + 1, 3, a.v_stride);
    a.cache_seqlens = p_.cache_seqlens;
    a.cache_batch_idx = p_.cache_batch_idx;
    a.scale_log2 = p_.softmax_scale * 1.4426950408889634f;
    ChainProbeArgs probes;
    for (int64_t i = 0; p_.probes != nullptr && i < p_.probe_count; ++i) {
      if (p_.probe_layer[i] != layer) continue;
      probes.head[probes.count] = p_.probe_head[i];
      probes.to[probes.count++] = p_.probes + i * p_.probe_rows * p_.probe_capacity;
    }
    if (probes.count > 0) a.lse = reinterpret_cast<float*>(part(at_.lse));
    cudaError_t status = p_.dtype == DType::kBFloat16
                             ? launch_attention<__nv_bfloat16>(a, multiprocessors_, dependent_, stream_)
                             : launch_attention<__half>(a, multiprocessors_, dependent_, stream_);
    if (status == cudaSuccess && probes.count > 0) {
      probes.attention = a;
      probes.capacity = p_.probe_capacity;
      auto* kernel = p_.dtype == DType::kBFloat16 ? probe_kernel<__nv_bfloat16> : probe_kernel<__half>;
      const dim3 grid(static_cast<unsigned>(p_.rows), static_cast<unsigned>(probes.count));
      status = launch_linked(kernel, grid, kAttentionThreads, 0, 1, dependent_, stream_, probes);
    }
    return status;
  }
  cudaError_t out(int64_t layer) const {
    LinearArgs a = to_residual(at_.attention, p_.heads * p_.head_dim, layer_of(p_.post_norm, layer, p_.hidden));
    return run(Matrix::kOut, a, p_.out, layer);
  }
  cudaError_t gate_up(int64_t layer) const {
    LinearArgs a = normed(2 * p_.intermediate);
    a.out = part(at_.gated);
    return run(Matrix::kGateUp, a, p_.gate_up, layer);
  }
  cudaError_t down(int64_t layer) const {
    const void* gain = layer + 1 < p_.layers ? layer_of(p_.input_norm, layer + 1, p_.hidden) : p_.norm;
    return run(Matrix::kDown, to_residual(at_.gated, p_.intermediate, gain), p_.down, layer);
  }
  cudaError_t head() const {
    LinearArgs a = normed(p_.vocab);
    a.logits = p_.logits;
    return run(Matrix::kHead, a, p_.head, 0);
  }

 private:
  LinearArgs normed(int64_t features) const {
    LinearArgs a;
    a.rows = static_cast<int32_t>(p_.rows);
    a.features = static_cast<int32_t>(features);
    a.k = static_cast<int32_t>(p_.hidden);
    a.x = part(at_.x);
    a.squares = reinterpret_cast<const float*>(part(at_.squares));
    a.square_parts = static_cast<int32_t>(p_.hidden / square_width());
    a.inverse_hidden = 1.0f / static_cast<float>(p_.hidden);
    a.eps = p_.eps;
    return a;
  }
  LinearArgs to_residual(size_t x, int64_t k, const void* gain) const {
    LinearArgs a;
    a.rows = static_cast<int32_t>(p_.rows);
    a.features = static_cast<int32_t>(p_.hidden);
    a.k = static_cast<int32_t>(k);
    a.x = part(x);
    a.residual = reinterpret_cast<float*>(part(at_.residual));
    a.x_next = part(at_.x);
    a.gain = gain;
    a.squares_next = reinterpret_cast<float*>(part(at_.squares));
    return a;
  }
  cudaError_t run(Matrix matrix, LinearArgs a, const void* stack, int64_t layer) const {
    a.multiprocessors = static_cast<int32_t>(multiprocessors_);
    a.weight = layer_of(stack, layer, int64_t{a.features} * a.k);
    a.weight_row = static_cast<int32_t>(layer * a.features);
#ifdef VIVACE_WITH_SM90
    if (sm90_) {
      const CUtensorMap& x = matrix == Matrix::kOut ? attention_ : matrix == Matrix::kDown ? gated_ : x_;
      return linear_sm90(matrix, p_.dtype, a, weight_[static_cast<int>(matrix)], x, dependent_, stream_);
    }
#endif
    return linear_sm80(matrix, p_.dtype, a, dependent_, stream_);
  }

  const StepParams& p_;
  const ChainWorkspace& at_;
  bool sm90_, dependent_;
  int64_t multiprocessors_;
  cudaStream_t stream_;
#ifdef VIVACE_WITH_SM90
  CUtensorMap weight_[5], x_, attention_, gated_;
#endif
};

cudaError_t embed(const StepParams& p, const ChainWorkspace& at, const Products& products, cudaStream_t stream) {
  const EmbedArgs args{static_cast<int32_t>(p.rows),
                       static_cast<int32_t>(p.hidden),
                       p.requests,
                       p.speech_tokens,
                       p.speech_positions,
                       p.tokens,
                       p.positions,
                       p.row_request,
                       p.speech_emb,
                       p.speech_pos_emb,
                       p.input_norm,
                       reinterpret_cast<float*>(products.part(at.residual)),
                       products.part(at.x),
                       reinterpret_cast<float*>(products.part(at.squares)),
                       products.square_width()};
  // Not dependent: what follows reads the step's inputs before its wait, so they must be there when this one starts.
  auto* kernel = p.dtype == DType::kBFloat16 ? embed_kernel<__nv_bfloat16> : embed_kernel<__half>;
  return launch_linked(kernel, dim3(static_cast<unsigned>(p.rows)), kEmbedThreads, 0, 1, false, stream, args);
}

}  // namespace

bool step_chain_supported(const StepParams& p) {
  const bool sizes = is_16_bit(p.dtype) && p.head_dim == 64 && p.heads > 0 && p.heads_kv > 0 && p.heads % p.heads_kv == 0 &&
                     p.hidden % 64 == 0 && p.intermediate % 32 == 0 && p.vocab > 0 && p.layers > 0 && p.rows <= 65535;
  // Tensor maps and features are counted in 32 bits.
  const int64_t most = std::max(std::max(qkv_features(p), 2 * p.intermediate), p.hidden) * p.layers;
  const bool strides = [&] {
    for (int i = 0; i < 4; ++i) {
      if (p.k_stride[i] % 8 != 0 || p.v_stride[i] % 8 != 0) return false;
    }
    return true;
  }();
  return sizes && most < (int64_t{1} << 31) && strides && p.probe_count <= StepParams::kMaxProbes &&
         p.capacity < (int64_t{1} << 30) && p.arch >= 80;
}

size_t step_chain_workspace(const StepParams& p) { return chain_workspace(p).bytes; }

cudaError_t step_chain(const StepParams& p, cudaStream_t stream) {
  if (!step_chain_supported(p)) return cudaErrorNotSupported;
  if (p.rows == 0) return cudaSuccess;
  const ChainWorkspace at = chain_workspace(p);
  if (p.workspace_bytes < at.bytes) return cudaErrorInvalidValue;
  Products products(p, at, takes_sm90(p), stream);
  if (!products.prepare()) return cudaErrorNotSupported;

  cudaError_t status = embed(p, at, products, stream);
  for (int64_t layer = 0; layer < p.layers && status == cudaSuccess; ++layer) {
    status = products.qkv(layer);
    if (status == cudaSuccess) status = products.attention(layer);
    if (status == cudaSuccess) status = products.out(layer);
    if (status == cudaSuccess) status = products.gate_up(layer);
    if (status == cudaSuccess) status = products.down(layer);
  }
  if (status == cudaSuccess) status = products.head();
  return status;
}

}  // namespace vivace
