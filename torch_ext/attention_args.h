// What the schemas of all attention operators have, as AttentionArgs.
#pragma once

#include "csrc/attention.h"
#include "torch_ext/tensors.h"

namespace vivace {

/// k and v: the keys, the cache or its pages. Built in braces, the views are made, and complained of, in this order.
struct Qkv {
  TensorView q, k, v;
};

inline AttentionArgs attention_args(const Qkv& tensors, std::optional<double> softmax_scale, bool causal,
                                    int64_t window_left, int64_t window_right, double softcap,
                                    const OptionalTensor& alibi_slopes) {
  AttentionArgs a;
  a.q = tensors.q;
  a.k = tensors.k;
  a.v = tensors.v;
  a.softmax_scale = softmax_scale;
  a.causal = causal;
  a.window_left = window_left;
  a.window_right = window_right;
  a.softcap = softcap;
  a.alibi_slopes = view(alibi_slopes, "alibi_slopes");
  return a;
}

inline void set_dropout(AttentionArgs& a, double dropout_p, const OptionalTensor& rng_state) {
  a.dropout_p = dropout_p;
  a.rng_state = view(rng_state, "rng_state");
}

/// Sequences of different lengths, packed.
inline void set_sequences(AttentionArgs& a, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, int64_t max_seqlen_q,
                          int64_t max_seqlen_k) {
  a.cu_seqlens_q = view(cu_seqlens_q, "cu_seqlens_q");
  a.cu_seqlens_k = view(cu_seqlens_k, "cu_seqlens_k");
  a.max_seqlen_q = max_seqlen_q;
  a.max_seqlen_k = max_seqlen_k;
}

}  // namespace vivace
