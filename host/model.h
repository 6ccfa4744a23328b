// An exported T3: the TorchScript archive and its methods.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "host/decoder.h"
#include "host/manifest.h"
#include "host/voice.h"

namespace vivace {

struct ModelOptions {
  std::string path;
  std::string operators;  // empty: find_operators()
  std::string device = "auto";
  std::string dtype = "auto";  // "auto": as exported
  bool verify = true;          // recompute the archive's digest first
  bool stacked = false;        // stack the layers' weights for decode_step, where the module is built as ours is
};

/// Methods may be called from one thread at a time, in inference mode. Row and shape names are those of the module
/// (python/vivace/t3): `rows` are rows of the KV cache in a call, `requests` what they belong to.
class Model {
 public:
  /// Reads the manifest and checks the digest before torch sees the file: TorchScript is a program.
  explicit Model(const ModelOptions& options);
  ~Model();
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  const Manifest& manifest() const { return manifest_; }
  at::Device device() const { return device_; }
  at::ScalarType dtype() const { return dtype_; }
  int64_t weight_bytes() const { return weight_bytes_; }

  /// Bytes of the keys and values of one position of one row.
  int64_t cache_bytes_per_position() const;
  /// Positions from one head's keys to the next one's: a distance of a power of two of KiB makes a token step of many rows
  /// 0.6 % slower, since all multiprocessors then read from the same part of the memory at a time.
  int64_t cache_pitch(int64_t capacity) const;

  /// (length, hidden) from a voice: speaker, perceiver, emotion.
  at::Tensor encode_voice(const Voice& voice, float emotion);
  /// (length + text + 2, hidden); drop_text: the row without a text, its positions only.
  at::Tensor embed_prompt(const at::Tensor& cond, const std::vector<int64_t>& text_tokens, bool drop_text);
  /// The stacked decoder; null where it was not asked for, and where the module is built otherwise (`not_stacked` says how).
  const Decoder* decoder() const { return decoder_.get(); }
  const std::string& not_stacked() const { return not_stacked_; }

  /// Keys and values, each (layers, rows, capacity, heads_kv, head_dim), zero. With a stacked decoder a head's keys lie side
  /// by side.
  std::pair<at::Tensor, at::Tensor> new_cache(int64_t rows, int64_t capacity);
  /// Appends x (tokens, hidden) to the cache; (tokens, hidden) after the final norm.
  at::Tensor forward(const at::Tensor& x, const at::Tensor& k_cache, const at::Tensor& v_cache,
                     const at::Tensor& cache_seqlens, const at::Tensor& cache_rows, const at::Tensor& cu_seqlens,
                     int64_t max_seqlen, const std::optional<at::Tensor>& probes);
  /// (rows, vocab) fp32 from (rows, hidden).
  at::Tensor logits(const at::Tensor& hidden);
  /// One token for every row: (rows, vocab) fp32. Device work only.
  at::Tensor decode(const at::Tensor& tokens, const at::Tensor& positions, const at::Tensor& row_request,
                    const at::Tensor& k_cache, const at::Tensor& v_cache, const at::Tensor& cache_seqlens,
                    const at::Tensor& cache_rows, const std::optional<at::Tensor>& probes);

 private:
  struct Script;
  Manifest manifest_;
  at::Device device_;
  at::ScalarType dtype_ = at::kFloat;
  int64_t weight_bytes_ = 0;
  std::unique_ptr<Script> script_;
  std::unique_ptr<Decoder> decoder_;
  std::string not_stacked_;
};

/// The line of an exception that a user should see: operator errors without TorchScript's or C++'s tracebacks.
std::string brief(const std::exception& error);

}  // namespace vivace
