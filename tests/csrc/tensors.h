// Random tensors and attention calls over them.
#pragma once

#include <random>
#include <vector>

#include "kernels/attention/params.h"

namespace vivace {

inline std::vector<float> random_tensor(int64_t count, uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(count));
  for (float& x : values) x = normal(generator);
  return values;
}

/// A contiguous (batch, rows, heads, head_dim) tensor's strides.
inline void set_strides(int64_t (&stride)[3], int64_t rows, int64_t heads, int64_t head_dim) {
  stride[0] = rows * heads * head_dim;
  stride[1] = heads * head_dim;
  stride[2] = head_dim;
}

/// A dense fp32 call, or one over a cache of `keys` rows, with memory of its own.
struct Call {
  AttentionParams params;
  std::vector<float> q, k, v, out, lse, k_new, v_new;
  std::vector<int32_t> lengths;

  Call(int64_t batch, int64_t queries, int64_t keys, int64_t heads, int64_t heads_kv, int64_t head_dim, uint32_t seed = 1) {
    AttentionParams& p = params;
    q = random_tensor(batch * queries * heads * head_dim, seed);
    k = random_tensor(batch * keys * heads_kv * head_dim, seed + 1);
    v = random_tensor(batch * keys * heads_kv * head_dim, seed + 2);
    out.resize(q.size());
    lse.resize(static_cast<size_t>(batch * heads * queries));
    p.q = q.data();
    p.k = k.data();
    p.v = v.data();
    p.out = out.data();
    p.lse = lse.data();
    set_strides(p.q_stride, queries, heads, head_dim);
    set_strides(p.out_stride, queries, heads, head_dim);
    set_strides(p.k_stride, keys, heads_kv, head_dim);
    set_strides(p.v_stride, keys, heads_kv, head_dim);
    p.batch = batch;
    p.heads = heads;
    p.heads_kv = heads_kv;
    p.head_dim = p.head_dim_v = head_dim;
    p.seqlen_q = queries;
    p.seqlen_k = keys;
    p.total_q = batch * queries;
    p.softmax_scale = 0.125f;
  }

  /// k and v become a cache with these lengths, and `appended` new keys a row are to be added.
  void use_cache(std::vector<int32_t> cache_seqlens, int64_t appended) {
    AttentionParams& p = params;
    lengths = std::move(cache_seqlens);
    k_new = random_tensor(p.batch * appended * p.heads_kv * p.head_dim, 77);
    v_new = random_tensor(p.batch * appended * p.heads_kv * p.head_dim, 78);
    p.has_cache = true;
    p.cache_seqlens = lengths.data();
    p.k_new = k_new.data();
    p.v_new = v_new.data();
    p.seqlen_new = appended;
    set_strides(p.k_new_stride, appended, p.heads_kv, p.head_dim);
    set_strides(p.v_new_stride, appended, p.heads_kv, p.head_dim);
  }
};

}  // namespace vivace
