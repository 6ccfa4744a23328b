// The token step on the CPU: the operators that the exported module calls, one after another, over the rows that are not
// padding, with the same roundings to the model's dtype in between.
#include <algorithm>
#include <cstring>
#include <vector>

#include "csrc/cpu/kernels.h"
#include "csrc/cpu/ops.h"
#include "csrc/error.h"
#include "csrc/parallel.h"

namespace vivace::cpu {

namespace {

constexpr const char* kOp = "decode_step";

/// The rows that take part, in their order.
struct Active {
  std::vector<int64_t> rows;
  std::vector<int32_t> seqlens, cache_rows;
  int64_t count() const { return static_cast<int64_t>(rows.size()); }
};

Active active_rows(const StepParams& p) {
  Active active;
  for (int64_t r = 0; r < p.rows; ++r) {
    const int32_t row = p.cache_batch_idx[r], length = p.cache_seqlens[r];
    if (row < 0) continue;
    check(row < p.cache_rows, kOp, "cache_batch_idx[", r, "] is ", row, ", the cache has ", p.cache_rows, " rows");
    check(length >= 0, kOp, "cache_seqlens[", r, "] is ", length, ", expected at least 0");
    if (length >= p.capacity) continue;
    const int64_t request = p.row_request[r];
    check(request >= 0 && request < p.requests, kOp, "row_request[", r, "] is ", request, ", there are ", p.requests,
          " requests");
    const int64_t token = p.tokens[request], position = p.positions[request];
    check(token >= 0 && token < p.speech_tokens, kOp, "tokens[", request, "] is ", token, ", speech_emb has ",
          p.speech_tokens, " rows");
    check(position >= 0 && position < p.speech_positions, kOp, "positions[", request, "] is ", position,
          ", speech_pos_emb has ", p.speech_positions, " rows");
    active.rows.push_back(r);
    active.seqlens.push_back(length);
    active.cache_rows.push_back(row);
  }
  return active;
}

template <typename T>
void embed_row(const void* token, const void* position, void* out, int64_t hidden) {
  for (int64_t i = 0; i < hidden; ++i) {
    static_cast<T*>(out)[i] =
        from_float<T>(to_float(static_cast<const T*>(token)[i]) + to_float(static_cast<const T*>(position)[i]));
  }
}

class Step {
 public:
  Step(const StepParams& params, const Active& active)
      : p_(params),
        active_(active),
        size_(size_of(params.dtype)),
        x_(buffer(p_.hidden)),
        residual_(buffer(p_.hidden)),
        normed_(buffer(p_.hidden)),
        qkv_(buffer(qkv_width())),
        attended_(buffer(p_.heads * p_.head_dim)),
        gate_up_(buffer(2 * p_.intermediate)),
        gated_(buffer(p_.intermediate)),
        lse_(static_cast<size_t>(n() * p_.heads)) {}

  /// logits (active rows, vocab); probes as in params, of the active rows.
  void run(float* logits, float* probes, int64_t probe_rows) {
    embed();
    for (int64_t layer = 0; layer < p_.layers; ++layer) {
      add_norm(at(p_.input_norm, layer * p_.hidden));
      linear(normed_, p_.hidden, at(p_.qkv, layer * qkv_width() * p_.hidden), qkv_, qkv_width());
      attend(layer, probes, probe_rows);
      const int64_t width = p_.heads * p_.head_dim;
      linear(attended_, width, at(p_.out, layer * p_.hidden * width), x_, p_.hidden);
      add_norm(at(p_.post_norm, layer * p_.hidden));
      linear(normed_, p_.hidden, at(p_.gate_up, layer * 2 * p_.intermediate * p_.hidden), gate_up_, 2 * p_.intermediate);
      silu_gate({p_.dtype, gate_up_.data(), gated_.data(), n(), p_.intermediate, 2 * p_.intermediate});
      linear(gated_, p_.intermediate, at(p_.down, layer * p_.hidden * p_.intermediate), x_, p_.hidden);
    }
    add_norm(p_.norm);
    parallel_for(0, p_.vocab, grain(p_.hidden), [&](int64_t begin, int64_t end) {
      kernels().of(p_.dtype).linear_float(normed_.data(), p_.hidden, at(p_.head, begin * p_.hidden), logits + begin,
                                          p_.vocab, n(), end - begin, p_.hidden);
    });
  }

 private:
  int64_t n() const { return active_.count(); }
  int64_t qkv_width() const { return (p_.heads + 2 * p_.heads_kv) * p_.head_dim; }
  const char* at(const void* tensor, int64_t offset) const { return static_cast<const char*>(tensor) + offset * size_; }
  std::vector<char> buffer(int64_t width) const { return std::vector<char>(static_cast<size_t>(n() * width * size_)); }
  /// Outputs of a linear layer worth a thread: some 64 K products.
  int64_t grain(int64_t depth) const { return std::max<int64_t>(65536 / (depth * n()), 16); }

  /// x into the embeddings; the residual stream starts as zeros and the first norm adds x to it.
  void embed() {
    const auto row = p_.dtype == DType::kBFloat16  ? embed_row<BFloat16>
                     : p_.dtype == DType::kFloat16 ? embed_row<Float16>
                                                   : embed_row<float>;
    for (int64_t i = 0; i < n(); ++i) {
      const int64_t request = p_.row_request[active_.rows[static_cast<size_t>(i)]];
      row(at(p_.speech_emb, p_.tokens[request] * p_.hidden), at(p_.speech_pos_emb, p_.positions[request] * p_.hidden),
          x_.data() + i * p_.hidden * size_, p_.hidden);
    }
  }

  /// residual += x; normed = norm of it.
  void add_norm(const void* weight) {
    RmsNormParams norm;
    norm.dtype = p_.dtype;
    norm.x = x_.data();
    norm.residual = residual_.data();
    norm.weight = weight;
    norm.out = normed_.data();
    norm.rows = n();
    norm.width = norm.x_stride = norm.residual_stride = p_.hidden;
    norm.eps = p_.eps;
    rms_norm(norm);
  }

  void linear(const std::vector<char>& x, int64_t depth, const char* weight, std::vector<char>& out, int64_t outputs) {
    parallel_for(0, outputs, grain(depth), [&](int64_t begin, int64_t end) {
      kernels().of(p_.dtype).linear(x.data(), depth, weight + begin * depth * size_, out.data() + begin * size_, outputs,
                                    n(), end - begin, depth);
    });
  }

  void attend(int64_t layer, float* probes, int64_t probe_rows) {
    AttentionParams a;
    const int64_t width = qkv_width(), q_width = p_.heads * p_.head_dim, kv_width = p_.heads_kv * p_.head_dim;
    a.dtype = p_.dtype;
    a.q = qkv_.data();
    a.k_new = qkv_.data() + q_width * size_;
    a.v_new = qkv_.data() + (q_width + kv_width) * size_;
    a.k = static_cast<char*>(p_.k_cache) + layer * p_.k_stride[0] * size_;
    a.v = static_cast<char*>(p_.v_cache) + layer * p_.v_stride[0] * size_;
    a.out = attended_.data();
    a.lse = lse_.data();
    for (int d = 0; d < 3; ++d) {
      a.q_stride[d] = a.k_new_stride[d] = a.v_new_stride[d] = d == 2 ? p_.head_dim : width;
      a.out_stride[d] = d == 2 ? p_.head_dim : q_width;
      a.k_stride[d] = p_.k_stride[d + 1];
      a.v_stride[d] = p_.v_stride[d + 1];
    }
    a.batch = a.total_q = n();
    a.heads = p_.heads;
    a.heads_kv = p_.heads_kv;
    a.head_dim = a.head_dim_v = p_.head_dim;
    a.seqlen_q = a.seqlen_new = 1;
    a.seqlen_k = p_.capacity;
    a.has_cache = true;
    a.cache_seqlens = active_.seqlens.data();
    a.cache_batch_idx = active_.cache_rows.data();
    a.rotary_cos = p_.rotary_cos;
    a.rotary_sin = p_.rotary_sin;
    a.rotary_dtype = p_.rotary_dtype;
    a.rotary_dim = p_.head_dim;
    a.rotary_positions = p_.rotary_positions;
    a.softmax_scale = p_.softmax_scale;
    a.causal = true;
    a.window_right = 0;
    a.probe_rows = 1;
    a.probe_capacity = p_.probe_capacity;
    bool done = false;
    for (int64_t i = 0; probes != nullptr && i < p_.probe_count; ++i) {
      if (p_.probe_layer[i] != layer) continue;
      a.probe = probes + i * probe_rows * p_.probe_capacity;
      a.probe_head = p_.probe_head[i];
      attention_forward(a);  // a second probe of a layer runs it again, to the same result
      done = true;
    }
    if (!done) attention_forward(a);
  }

  const StepParams& p_;
  const Active& active_;
  const int64_t size_;
  std::vector<char> x_, residual_, normed_, qkv_, attended_, gate_up_, gated_;  // (active rows, width) of dtype
  std::vector<float> lse_;
};

}  // namespace

void decode_step(const StepParams& p) {
  const Active active = active_rows(p);
  const int64_t n = active.count();
  if (n == p.rows) {
    if (n > 0) Step(p, active).run(p.logits, p.probes, p.probe_rows);
    return;
  }
  // Rows that take no part get zeros; the others are computed side by side.
  std::vector<float> logits(static_cast<size_t>(n * p.vocab));
  std::vector<float> probes(p.probes == nullptr ? 0 : static_cast<size_t>(p.probe_count * n * p.probe_capacity));
  if (n > 0) Step(p, active).run(logits.data(), p.probes == nullptr ? nullptr : probes.data(), n);
  std::fill_n(p.logits, p.rows * p.vocab, 0.0f);
  for (int64_t i = 0; p.probes != nullptr && i < p.probe_count; ++i) {
    std::fill_n(p.probes + i * p.probe_rows * p.probe_capacity, p.rows * p.probe_capacity, 0.0f);
  }
  for (int64_t a = 0; a < n; ++a) {
    const int64_t r = active.rows[static_cast<size_t>(a)];
    std::copy_n(logits.data() + a * p.vocab, p.vocab, p.logits + r * p.vocab);
    for (int64_t i = 0; p.probes != nullptr && i < p.probe_count; ++i) {
      std::copy_n(probes.data() + (i * n + a) * p.probe_capacity, p.probe_capacity,
                  p.probes + (i * p.probe_rows + r) * p.probe_capacity);
    }
  }
}

}  // namespace vivace::cpu
