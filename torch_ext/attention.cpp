// Schemas and CPU/CUDA entries of the attention operators: tensors to AttentionArgs, outputs, nothing else.
#include "csrc/attention.h"

#include <tuple>

#include "torch_ext/attention_args.h"

namespace vivace {
namespace {

using TwoTensors = std::tuple<Tensor, Tensor>;

/// Allocates out, lse and the workspace, and runs the checked call.
TwoTensors run(AttentionParams& p, const TensorView& q) {
  const bool varlen = p.cu_seqlens_q != nullptr;
  Tensor out = varlen ? empty({p.total_q, p.heads, p.head_dim_v}, p.dtype, q)
                      : empty({p.batch, p.seqlen_q, p.heads, p.head_dim_v}, p.dtype, q);
  Tensor lse =
      varlen ? empty({p.heads, p.total_q}, DType::kFloat32, q) : empty({p.batch, p.heads, p.seqlen_q}, DType::kFloat32, q);
  set_attention_outputs(p, data_of(out), static_cast<float*>(data_of(lse)));
  const int64_t workspace_bytes = plan_attention(p, q.device, q.device_index);
  const DeviceScope scope(q);
  OptionalTensor workspace;  // freed in stream order when the call is queued
  if (workspace_bytes > 0) {
    workspace = empty({workspace_bytes}, DType::kUInt8, q);
    p.workspace = data_of(*workspace);
  }
  run_attention(p, q.device, q.device_index, scope.stream());
  return {out, lse};
}

TwoTensors attention(const Tensor& q, const Tensor& k, const Tensor& v, std::optional<double> softmax_scale, bool causal,
                     int64_t window_left, int64_t window_right, double softcap, const OptionalTensor& alibi_slopes,
                     const OptionalTensor& bias, const OptionalTensor& sinks, double dropout_p,
                     const OptionalTensor& rng_state) {
  AttentionArgs a = attention_args({view(q, "q"), view(k, "k"), view(v, "v")}, softmax_scale, causal, window_left,
                                   window_right, softcap, alibi_slopes);
  a.bias = view(bias, "bias");
  a.sinks = view(sinks, "sinks");
  set_dropout(a, dropout_p, rng_state);
  AttentionParams p = check_attention(a);
  return run(p, a.q);
}

TwoTensors attention_varlen(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
                            const Tensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
                            const OptionalTensor& seqused_q, const OptionalTensor& seqused_k,
                            const OptionalTensor& block_table, std::optional<double> softmax_scale, bool causal,
                            int64_t window_left, int64_t window_right, double softcap, const OptionalTensor& alibi_slopes,
                            const OptionalTensor& bias, const OptionalTensor& sinks, double dropout_p,
                            const OptionalTensor& rng_state) {
  AttentionArgs a = attention_args({view(q, "q"), view(k, "k"), view(v, "v")}, softmax_scale, causal, window_left,
                                   window_right, softcap, alibi_slopes);
  set_sequences(a, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k);
  a.seqused_q = view(seqused_q, "seqused_q");
  a.seqused_k = view(seqused_k, "seqused_k");
  a.block_table = view(block_table, "block_table");
  a.bias = view(bias, "bias");
  a.sinks = view(sinks, "sinks");
  set_dropout(a, dropout_p, rng_state);
  AttentionParams p = check_attention_varlen(a);
  return run(p, a.q);
}

TwoTensors attention_with_kvcache(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const OptionalTensor& k,
                                  const OptionalTensor& v, const OptionalTensor& cache_seqlens,
                                  const OptionalTensor& rotary_cos, const OptionalTensor& rotary_sin,
                                  const OptionalTensor& cache_batch_idx, const OptionalTensor& cache_leftpad,
                                  const OptionalTensor& block_table, const OptionalTensor& cu_seqlens_q,
                                  int64_t max_seqlen_q, std::optional<double> softmax_scale, bool causal,
                                  int64_t window_left, int64_t window_right, double softcap,
                                  const OptionalTensor& alibi_slopes, const OptionalTensor& sinks, bool rotary_interleaved,
                                  int64_t num_splits, const OptionalTensor& probe, int64_t probe_head) {
  AttentionArgs a = attention_args({view(q, "q"), mutable_view(k_cache, "k_cache"), mutable_view(v_cache, "v_cache")},
                                   softmax_scale, causal, window_left, window_right, softcap, alibi_slopes);
  a.k_new = view(k, "k");
  a.v_new = view(v, "v");
  a.cache_seqlens = view(cache_seqlens, "cache_seqlens");
  a.rotary_cos = view(rotary_cos, "rotary_cos");
  a.rotary_sin = view(rotary_sin, "rotary_sin");
  a.cache_batch_idx = view(cache_batch_idx, "cache_batch_idx");
  a.cache_leftpad = view(cache_leftpad, "cache_leftpad");
  a.block_table = view(block_table, "block_table");
  a.cu_seqlens_q = view(cu_seqlens_q, "cu_seqlens_q");
  a.max_seqlen_q = max_seqlen_q;
  a.sinks = view(sinks, "sinks");
  a.rotary_interleaved = rotary_interleaved;
  a.num_splits = num_splits;
  a.probe = mutable_view(probe, "probe");
  a.probe_head = probe_head;
  AttentionParams p = check_attention_with_kvcache(a);
  return run(p, a.q);
}

void register_impls(torch::stable::detail::StableLibrary& m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_varlen", TORCH_BOX(&attention_varlen));
  m.impl("attention_with_kvcache", TORCH_BOX(&attention_with_kvcache));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vivace, m) {
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, float? softmax_scale=None, bool causal=False, int window_left=-1, "
      "int window_right=-1, float softcap=0.0, Tensor? alibi_slopes=None, Tensor? bias=None, Tensor? sinks=None, "
      "float dropout_p=0.0, Tensor? rng_state=None) -> (Tensor out, Tensor softmax_lse)");
  m.def(
      "attention_varlen(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int max_seqlen_q, "
      "int max_seqlen_k, Tensor? seqused_q=None, Tensor? seqused_k=None, Tensor? block_table=None, "
      "float? softmax_scale=None, bool causal=False, int window_left=-1, int window_right=-1, float softcap=0.0, "
      "Tensor? alibi_slopes=None, Tensor? bias=None, Tensor? sinks=None, float dropout_p=0.0, Tensor? rng_state=None) "
      "-> (Tensor out, Tensor softmax_lse)");
  m.def(
      "attention_with_kvcache(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? k=None, Tensor? v=None, "
      "Tensor? cache_seqlens=None, Tensor? rotary_cos=None, Tensor? rotary_sin=None, Tensor? cache_batch_idx=None, "
      "Tensor? cache_leftpad=None, Tensor? block_table=None, Tensor? cu_seqlens_q=None, int max_seqlen_q=0, "
      "float? softmax_scale=None, bool causal=False, int window_left=-1, int window_right=-1, float softcap=0.0, "
      "Tensor? alibi_slopes=None, Tensor? sinks=None, bool rotary_interleaved=True, int num_splits=0, "
      "Tensor(c!)? probe=None, int probe_head=-1) -> (Tensor out, Tensor softmax_lse)");
}

VIVACE_REGISTER_IMPLS(register_impls)

}  // namespace vivace
