#include "csrc/attention.h"

#include <cmath>

#include "csrc/attention_values.h"
#include "csrc/check.h"

namespace vivace {

namespace {

constexpr int64_t kMaxHeadDim = 256;
constexpr int64_t kMaxLength = int64_t{1} << 30;  // kernels count the rows of one sequence in 32 bits

/// Strides of (batch, row, head), or of (row, head) with batch 0.
void set_strides(int64_t (&strides)[3], const TensorView& t) {
  const bool batched = t.dims == 4;
  strides[0] = batched ? t.strides[0] : 0;
  strides[1] = t.strides[batched ? 1 : 0];
  strides[2] = t.strides[batched ? 2 : 1];
}

/// Keys or values against q: dtype, device, heads, head_dim.
void check_heads(const Checker& check, const TensorView& q, const TensorView& k, const char* k_name, const TensorView& v,
                 const char* v_name) {
  check.device(k, k_name);
  check.device(v, v_name);
  check.dtype(k, k_name, q.dtype);
  check.dtype(v, v_name, q.dtype);
  check.last_dim_contiguous(k, k_name);
  check.last_dim_contiguous(v, v_name);
  check(k.size(-1) == q.size(-1), k_name, " has head_dim ", k.size(-1), ", q has ", q.size(-1), " (", k_name, ": ", k,
        ", q: ", q, ")");
  check(k.size(-2) > 0 && q.size(-2) % k.size(-2) == 0, "q has ", q.size(-2), " heads, ", k_name, " has ", k.size(-2),
        "; q's must be a multiple of ", k_name, "'s (q: ", q, ", ", k_name, ": ", k, ")");
  for (int d = 0; d < k.dims - 1; ++d) {
    check(v.size(d) == k.size(d), v_name, " has shape ", v, ", ", k_name, " has ", k,
          "; all but the last dimension must be equal");
  }
}

/// What every layout has: q, scale, mask, softcap, alibi, sinks, dropout.
void fill_common(const Checker& check, const AttentionArgs& a, AttentionParams& p) {
  const TensorView& q = a.q;
  p.dtype = q.dtype;
  p.q = q.data;
  set_strides(p.q_stride, q);
  p.heads = q.size(-2);
  p.head_dim = q.size(-1);
  p.k = a.k.data;
  p.v = a.v.data;
  set_strides(p.k_stride, a.k);
  set_strides(p.v_stride, a.v);
  p.heads_kv = a.k.size(-2);
  p.head_dim_v = a.v.size(-1);
  check(p.head_dim >= 1 && p.head_dim <= kMaxHeadDim, "q has head_dim ", p.head_dim, ", expected 1 to ", kMaxHeadDim,
        " (q: ", q, ")");
  check(p.head_dim_v >= 1 && p.head_dim_v <= kMaxHeadDim, "v has head_dim ", p.head_dim_v, ", expected 1 to ", kMaxHeadDim,
        " (v: ", a.v, ")");
  check(p.seqlen_q <= kMaxLength && p.seqlen_k <= kMaxLength, "sequences of ", p.seqlen_q, " queries and ", p.seqlen_k,
        " keys are longer than ", kMaxLength);

  p.softmax_scale =
      static_cast<float>(a.softmax_scale ? *a.softmax_scale : 1.0 / std::sqrt(static_cast<double>(p.head_dim)));
  check(std::isfinite(p.softmax_scale), "softmax_scale is ", p.softmax_scale, ", expected a finite number");
  check(a.softcap >= 0.0 && std::isfinite(a.softcap), "softcap is ", a.softcap, ", expected 0 (off) or a positive number");
  p.softcap = static_cast<float>(a.softcap);

  // A side that reaches past every key is clamped, so that kernels may count in 32 bits; without rotary embedding, whose
  // positions depend on whether the call is local, it is dropped.
  p.window_left = a.window_left < 0 ? -1 : a.window_left;
  p.window_right = a.causal ? 0 : a.window_right < 0 ? -1 : a.window_right;
  const bool rotary = static_cast<bool>(a.rotary_cos);
  if (p.window_left >= p.seqlen_k) p.window_left = rotary ? p.seqlen_k : -1;
  if (p.window_right > 0 && p.window_right >= p.seqlen_q) p.window_right = rotary ? p.seqlen_q : -1;
  p.causal = p.window_right == 0;

  if (a.alibi_slopes) {
    const TensorView& t = a.alibi_slopes;
    check.device(t, "alibi_slopes");
    check.dtype(t, "alibi_slopes", DType::kFloat32);
    if (t.dims == 1) {
      check.shape(t, "alibi_slopes", {p.heads}, "(heads)");
    } else {
      check.shape(t, "alibi_slopes", {p.batch, p.heads}, "(batch, heads), or (heads)");
      p.alibi_batch_stride = t.strides[0];
    }
    check.last_dim_contiguous(t, "alibi_slopes");
    p.alibi_slopes = static_cast<const float*>(t.data);
  }
  if (a.sinks) {
    check.device(a.sinks, "sinks");
    check.dtype(a.sinks, "sinks", DType::kFloat32);
    check.shape(a.sinks, "sinks", {p.heads}, "(heads)");
    check.contiguous(a.sinks, "sinks");
    p.sinks = static_cast<const float*>(a.sinks.data);
  }
  check(a.dropout_p >= 0.0 && a.dropout_p < 1.0, "dropout_p is ", a.dropout_p, ", expected at least 0 and less than 1");
  p.dropout_p = static_cast<float>(a.dropout_p);
  if (p.dropout_p > 0.0f) {
    check(a.rng_state.defined, "rng_state is missing: with dropout_p ", a.dropout_p,
          " an int64 tensor (seed, offset) is needed");
    check.device(a.rng_state, "rng_state");
    check.dtype(a.rng_state, "rng_state", DType::kInt64);
    check.shape(a.rng_state, "rng_state", {2}, "(seed, offset)");
    check.contiguous(a.rng_state, "rng_state");
    p.rng_state = static_cast<const int64_t*>(a.rng_state.data);
  }
}

void fill_bias(const Checker& check, const TensorView& bias, AttentionParams& p) {
  if (!bias) return;
  check.device(bias, "bias");
  check(bias.dtype == DType::kFloat32 || bias.dtype == p.dtype || bias.dtype == DType::kBool, "bias is ",
        dtype_name(bias.dtype), ", expected float32, q's ", dtype_name(p.dtype), " or bool");
  check.dims(bias, "bias", 4, "broadcastable to (batch, heads, seqlen_q, seqlen_k)");
  const int64_t full[4] = {p.batch, p.heads, p.seqlen_q, p.seqlen_k};
  for (int d = 0; d < 4; ++d) {
    check(bias.sizes[d] == full[d] || bias.sizes[d] == 1, "bias has shape ", bias,
          ", expected one that broadcasts to (batch, heads, seqlen_q, seqlen_k) = (", full[0], ", ", full[1], ", ", full[2],
          ", ", full[3], ")");
    p.bias_stride[d] = bias.sizes[d] == 1 ? 0 : bias.strides[d];
  }
  p.bias = bias.data;
  p.bias_dtype = bias.dtype;
}

void check_q(const Checker& check, const TensorView& q, int dims, const char* layout) {
  check.dims(q, "q", dims, layout);
  check.floating(q, "q");
  check.last_dim_contiguous(q, "q");
  check(q.size(-2) > 0, "q has no heads (q: ", q, ")");
}

const int32_t* int32_data(const TensorView& t) { return t ? static_cast<const int32_t*>(t.data) : nullptr; }

int64_t batch_of(const Checker& check, const TensorView& cu_seqlens, const char* name) {
  check.dims(cu_seqlens, name, 1, "(batch + 1)");
  check(cu_seqlens.size(0) >= 1, name, " is empty, expected batch + 1 entries");
  return cu_seqlens.size(0) - 1;
}

void fill_block_table(const Checker& check, const AttentionArgs& a, AttentionParams& p) {
  const TensorView& t = a.block_table;
  check.device(t, "block_table");
  check.dtype(t, "block_table", DType::kInt32);
  check.dims(t, "block_table", 2, "(batch, max_pages)");
  check(t.size(0) == p.batch, "block_table has ", t.size(0), " rows, the batch has ", p.batch);
  check.last_dim_contiguous(t, "block_table");
  p.block_table = int32_data(t);
  p.block_table_stride = t.strides[0];
  p.page_size = a.k.size(1);
  check(p.page_size > 0, "k has pages of no keys (k: ", a.k, ")");
}

}  // namespace

AttentionParams check_attention(const AttentionArgs& a) {
  const Checker check("attention", a.q, "q");
  check_q(check, a.q, 4, "(batch, seqlen_q, heads, head_dim)");
  check.dims(a.k, "k", 4, "(batch, seqlen_k, heads_kv, head_dim)");
  check.dims(a.v, "v", 4, "(batch, seqlen_k, heads_kv, head_dim_v)");
  check_heads(check, a.q, a.k, "k", a.v, "v");
  check(a.k.size(0) == a.q.size(0), "k has batch ", a.k.size(0), ", q has ", a.q.size(0), " (k: ", a.k, ", q: ", a.q, ")");
  AttentionParams p;
  p.batch = a.q.size(0);
  p.seqlen_q = a.q.size(1);
  p.seqlen_k = a.k.size(1);
  p.total_q = p.batch * p.seqlen_q;
  fill_common(check, a, p);
  fill_bias(check, a.bias, p);
  return p;
}

AttentionParams check_attention_varlen(const AttentionArgs& a) {
  const Checker check("attention_varlen", a.q, "q");
  check_q(check, a.q, 3, "(total_q, heads, head_dim)");
  const bool paged = a.block_table.defined;
  const int kv_dims = paged ? 4 : 3;
  const char* kv_layout =
      paged ? "(num_pages, page_size, heads_kv, head_dim), as block_table is given" : "(total_k, heads_kv, head_dim)";
  check.dims(a.k, "k", kv_dims, kv_layout);
  check.dims(a.v, "v", kv_dims, kv_layout);
  check_heads(check, a.q, a.k, "k", a.v, "v");
  AttentionParams p;
  p.batch = batch_of(check, a.cu_seqlens_q, "cu_seqlens_q");
  check.int32_vector(a.cu_seqlens_q, "cu_seqlens_q", p.batch + 1, "(batch + 1)");
  check.int32_vector(a.cu_seqlens_k, "cu_seqlens_k", p.batch + 1, "(batch + 1)");
  check.int32_vector(a.seqused_q, "seqused_q", p.batch, "(batch)");
  check.int32_vector(a.seqused_k, "seqused_k", p.batch, "(batch)");
  check(a.max_seqlen_q >= 0, "max_seqlen_q is ", a.max_seqlen_q, ", expected the longest query sequence");
  check(a.max_seqlen_k >= 0, "max_seqlen_k is ", a.max_seqlen_k, ", expected the longest key sequence");
  p.seqlen_q = a.max_seqlen_q;
  p.seqlen_k = a.max_seqlen_k;
  p.total_q = a.q.size(0);
  p.total_k = paged ? 0 : a.k.size(0);
  p.cu_seqlens_q = int32_data(a.cu_seqlens_q);
  p.cu_seqlens_k = int32_data(a.cu_seqlens_k);
  p.seqused_q = int32_data(a.seqused_q);
  p.seqused_k = int32_data(a.seqused_k);
  if (paged) fill_block_table(check, a, p);
  check(!a.bias, "bias is not supported with variable lengths (bias: ", a.bias,
        "); pad the batch and call vivace.attention");
  fill_common(check, a, p);
  if (a.q.device == DeviceType::kCpu) check_varlen_values(check, a, p);
  return p;
}

AttentionParams check_attention_with_kvcache(const AttentionArgs& a) {
  const Checker check("attention_with_kvcache", a.q, "q");
  const bool ragged = a.cu_seqlens_q.defined;
  const bool paged = a.block_table.defined;
  check_q(check, a.q, ragged ? 3 : 4,
          ragged ? "(total_q, heads, head_dim), as cu_seqlens_q is given" : "(batch, seqlen_q, heads, head_dim)");
  const char* cache_layout = paged ? "(num_pages, page_size, heads_kv, head_dim), as block_table is given"
                                   : "(cache_rows, capacity, heads_kv, head_dim)";
  check.dims(a.k, "k_cache", 4, cache_layout);
  check.dims(a.v, "v_cache", 4, cache_layout);
  check_heads(check, a.q, a.k, "k_cache", a.v, "v_cache");

  AttentionParams p;
  p.has_cache = true;
  p.cache_rows = a.k.size(0);
  p.batch = ragged ? batch_of(check, a.cu_seqlens_q, "cu_seqlens_q") : a.q.size(0);
  check.int32_vector(a.cu_seqlens_q, "cu_seqlens_q", p.batch + 1, "(batch + 1)");
  check(!ragged || a.max_seqlen_q > 0 || a.q.size(0) == 0, "max_seqlen_q is ", a.max_seqlen_q,
        ", expected the longest query sequence, as cu_seqlens_q is given");
  p.seqlen_q = ragged ? a.max_seqlen_q : a.q.size(1);
  p.total_q = ragged ? a.q.size(0) : p.batch * p.seqlen_q;
  p.cu_seqlens_q = int32_data(a.cu_seqlens_q);
  if (paged) {
    check(!a.cache_batch_idx, "cache_batch_idx does not go with block_table: the table already says where each row lies");
    check(!a.cache_leftpad, "cache_leftpad does not go with block_table");
    fill_block_table(check, a, p);
    p.seqlen_k = a.block_table.size(1) * p.page_size;
  } else {
    p.seqlen_k = a.k.size(1);
    check(a.cache_batch_idx.defined || a.k.size(0) >= p.batch, "k_cache has ", a.k.size(0), " rows, the batch has ", p.batch,
          " (k_cache: ", a.k, ", q: ", a.q, ")");
  }
  check.int32_vector(a.cache_seqlens, "cache_seqlens", p.batch, "(batch)");
  check.int32_vector(a.cache_batch_idx, "cache_batch_idx", p.batch, "(batch)");
  check.int32_vector(a.cache_leftpad, "cache_leftpad", p.batch, "(batch)");
  p.cache_seqlens = int32_data(a.cache_seqlens);
  p.cache_batch_idx = int32_data(a.cache_batch_idx);
  p.cache_leftpad = int32_data(a.cache_leftpad);

  check(a.k_new.defined == a.v_new.defined, a.k_new ? "k was given without v" : "v was given without k",
        "; new keys and values go together");
  if (a.k_new) {
    const char* layout =
        ragged ? "(total_q, heads_kv, head_dim), as cu_seqlens_q is given" : "(batch, seqlen_new, heads_kv, head_dim)";
    check.dims(a.k_new, "k", a.q.dims, layout);
    check.dims(a.v_new, "v", a.q.dims, layout);
    check_heads(check, a.q, a.k_new, "k", a.v_new, "v");
    check(a.k_new.size(0) == a.q.size(0), "k has shape ", a.k_new, ", expected ", layout, " with q's ", a.q.size(0),
          " first (q: ", a.q, ")");
    check(a.k_new.size(-2) == a.k.size(-2), "k has ", a.k_new.size(-2), " heads, k_cache has ", a.k.size(-2));
    check(a.v_new.size(-1) == a.v.size(-1), "v has head_dim ", a.v_new.size(-1), ", v_cache has ", a.v.size(-1));
    check(a.cache_seqlens.defined, "cache_seqlens is missing: with new keys it says where each row continues");
    check.not_expanded(a.k, "k_cache");
    check.not_expanded(a.v, "v_cache");
    p.k_new = a.k_new.data;
    p.v_new = a.v_new.data;
    set_strides(p.k_new_stride, a.k_new);
    set_strides(p.v_new_stride, a.v_new);
    p.seqlen_new = ragged ? p.seqlen_q : a.k_new.size(1);
  }
  check(a.rotary_cos.defined == a.rotary_sin.defined, "rotary_cos and rotary_sin go together; only one was given");
  if (a.rotary_cos) {
    check(a.k_new.defined, "rotary_cos was given without k: rotary embedding applies to q and the new keys together");
    for (const auto* t : {&a.rotary_cos, &a.rotary_sin}) {
      const char* name = t == &a.rotary_cos ? "rotary_cos" : "rotary_sin";
      check.device(*t, name);
      check(t->dtype == DType::kFloat32 || t->dtype == a.q.dtype, name, " is ", dtype_name(t->dtype),
            ", expected float32 or q's ", dtype_name(a.q.dtype));
      check.dims(*t, name, 2, "(max_position, rotary_dim / 2)");
      check.contiguous(*t, name);
    }
    check.dtype(a.rotary_sin, "rotary_sin", a.rotary_cos.dtype);
    check.shape(a.rotary_sin, "rotary_sin", {a.rotary_cos.size(0), a.rotary_cos.size(1)}, "as rotary_cos");
    p.rotary_dim = 2 * a.rotary_cos.size(1);
    p.rotary_positions = a.rotary_cos.size(0);
    check(p.rotary_dim >= 2 && p.rotary_dim <= a.q.size(-1), "rotary_cos has shape ", a.rotary_cos, ", that is rotary_dim ",
          p.rotary_dim, ", expected 2 to head_dim = ", a.q.size(-1));
    p.rotary_cos = a.rotary_cos.data;
    p.rotary_sin = a.rotary_sin.data;
    p.rotary_dtype = a.rotary_cos.dtype;
    p.rotary_interleaved = a.rotary_interleaved;
  }
  fill_common(check, a, p);
  check(a.num_splits >= 0 && a.num_splits <= 256, "num_splits is ", a.num_splits, ", expected 0 (chosen) to 256");
  p.num_splits = a.num_splits;
  if (a.probe) {
    check.device(a.probe, "probe");
    check.dtype(a.probe, "probe", DType::kFloat32);
    check.dims(a.probe, "probe", 3, "(batch, probe_rows, capacity)");
    check.shape(a.probe, "probe", {p.batch, a.probe.size(1), p.seqlen_k}, "(batch, probe_rows, capacity)");
    check.contiguous(a.probe, "probe");
    check(a.probe_head >= 0 && a.probe_head < p.heads, "probe_head is ", a.probe_head, ", expected 0 to ", p.heads - 1);
    p.probe = static_cast<float*>(a.probe.data);
    p.probe_head = a.probe_head;
    p.probe_rows = a.probe.size(1);
    p.probe_capacity = a.probe.size(2);
  }
  if (a.q.device == DeviceType::kCpu) check_cache_values(check, a, p);
  return p;
}

void set_attention_outputs(AttentionParams& p, void* out, float* lse) {
  p.out = out;
  p.lse = lse;
  p.out_stride[2] = p.head_dim_v;
  p.out_stride[1] = p.heads * p.head_dim_v;
  p.out_stride[0] = p.cu_seqlens_q != nullptr ? 0 : p.seqlen_q * p.out_stride[1];
}

}  // namespace vivace
