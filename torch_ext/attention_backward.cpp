// Schemas and CPU/CUDA entries of the attention gradients.
#include "csrc/attention_backward.h"

#include <tuple>

#include "torch_ext/attention_args.h"

namespace vivace {
namespace {

using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;

ThreeTensors run(const char* op, const AttentionArgs& a, const AttentionParams& forward, const Tensor& dout,
                 const Tensor& out, const Tensor& softmax_lse) {
  AttentionBackwardParams p =
      check_attention_backward(op, forward, a.q, view(dout, "dout"), view(out, "out"), view(softmax_lse, "softmax_lse"));
  Tensor dq = empty_like(a.q), dk = empty_like(a.k), dv = empty_like(a.v);
  set_attention_gradients(p, data_of(dq), data_of(dk), data_of(dv));
  run_attention_backward(op, p, a.q.device, a.q.device_index);
  return {dq, dk, dv};
}

ThreeTensors attention_backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                                const Tensor& softmax_lse, std::optional<double> softmax_scale, bool causal,
                                int64_t window_left, int64_t window_right, double softcap,
                                const OptionalTensor& alibi_slopes, const OptionalTensor& bias, const OptionalTensor& sinks,
                                double dropout_p, const OptionalTensor& rng_state, bool /*deterministic*/) {
  AttentionArgs a = attention_args({view(q, "q"), view(k, "k"), view(v, "v")}, softmax_scale, causal, window_left,
                                   window_right, softcap, alibi_slopes);
  a.bias = view(bias, "bias");
  a.sinks = view(sinks, "sinks");
  set_dropout(a, dropout_p, rng_state);
  return run("attention_backward", a, check_attention(a), dout, out, softmax_lse);
}

ThreeTensors attention_varlen_backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                                       const Tensor& out, const Tensor& softmax_lse, const Tensor& cu_seqlens_q,
                                       const Tensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
                                       std::optional<double> softmax_scale, bool causal, int64_t window_left,
                                       int64_t window_right, double softcap, const OptionalTensor& alibi_slopes,
                                       double dropout_p, const OptionalTensor& rng_state, bool /*deterministic*/) {
  AttentionArgs a = attention_args({view(q, "q"), view(k, "k"), view(v, "v")}, softmax_scale, causal, window_left,
                                   window_right, softcap, alibi_slopes);
  set_sequences(a, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k);
  set_dropout(a, dropout_p, rng_state);
  return run("attention_varlen_backward", a, check_attention_varlen(a), dout, out, softmax_lse);
}

void register_impls(torch::stable::detail::StableLibrary& m) {
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
  m.impl("attention_varlen_backward", TORCH_BOX(&attention_varlen_backward));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vivace, m) {
  m.def(
      "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
      "float? softmax_scale=None, bool causal=False, int window_left=-1, int window_right=-1, float softcap=0.0, "
      "Tensor? alibi_slopes=None, Tensor? bias=None, Tensor? sinks=None, float dropout_p=0.0, Tensor? rng_state=None, "
      "bool deterministic=False) -> (Tensor dq, Tensor dk, Tensor dv)");
  m.def(
      "attention_varlen_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
      "Tensor cu_seqlens_q, Tensor cu_seqlens_k, int max_seqlen_q, int max_seqlen_k, float? softmax_scale=None, "
      "bool causal=False, int window_left=-1, int window_right=-1, float softcap=0.0, Tensor? alibi_slopes=None, "
      "float dropout_p=0.0, Tensor? rng_state=None, bool deterministic=False) -> (Tensor dq, Tensor dk, Tensor dv)");
}

VIVACE_REGISTER_IMPLS(register_impls)

}  // namespace vivace
