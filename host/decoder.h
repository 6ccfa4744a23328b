// A decoder whose weights are stacked over the layers, as vivace::decode_step takes them.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "host/manifest.h"

namespace torch::jit {
struct Module;
}

namespace vivace {

/// Which kernels run a step (csrc/step.h).
enum class StepFamily : int64_t { kAuto, kPersistent, kChain, kSplit, kMesh };

class Decoder {
 public:
  /// Moves the weights of an exported T3's layers to `device` in `dtype`, stacked, and makes the module's parameters views
  /// of them: there is one copy, and a kind at a time is on both sides. The module's other parameters stay where they are.
  /// Null where the module is not built as ours is; `why` says what was met.
  static std::unique_ptr<Decoder> stack(torch::jit::Module& module, const Manifest& manifest, at::Device device,
                                        at::ScalarType dtype, std::string& why);

  /// Bytes of workspace for up to `rows` rows on this cache; -1 where no kernel of the device takes them.
  int64_t workspace(const at::Tensor& k_cache, int64_t rows, bool probes, StepFamily family) const;

  /// One token of each row: (rows, vocab) fp32. Device work only. probes (alignment heads, at least rows, 1, capacity).
  at::Tensor step(const at::Tensor& tokens, const at::Tensor& positions, const at::Tensor& row_request,
                  const at::Tensor& k_cache, const at::Tensor& v_cache, const at::Tensor& cache_seqlens,
                  const at::Tensor& cache_rows, const at::Tensor& workspace, const std::optional<at::Tensor>& probes,
                  StepFamily family) const;

 private:
  Decoder() = default;

  at::Tensor speech_emb_, speech_pos_emb_;                                 // (tokens, hidden), (positions, hidden)
  at::Tensor input_norm_, qkv_, out_, post_norm_, gate_up_, down_, norm_;  // (layers, ...); norm_ (hidden)
  at::Tensor head_;                                                        // (vocab, hidden)
  at::Tensor rotary_;                                                      // (2, positions, head_dim / 2) fp32
  double eps_ = 0;
  std::vector<int64_t> probe_layers_, probe_heads_;
};

}  // namespace vivace
