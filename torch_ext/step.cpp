// decode_step: one token of every row through the whole decoder.
#include "csrc/step.h"

#include <string>
#include <vector>

#include "csrc/error.h"
#include "torch_ext/tensors.h"

namespace vivace {
namespace {

StepFamily family_of(const char* op, int64_t family) {
  check(family >= 0 && family <= 4, op, "family is ", family,
        ", expected 0 (automatic), 1 (persistent), 2 (chain), 3 (split) or 4 (mesh)");
  return static_cast<StepFamily>(family);
}

Tensor decode_step(const Tensor& tokens, const Tensor& positions, const Tensor& row_request, const Tensor& speech_emb,
                   const Tensor& speech_pos_emb, const Tensor& input_norm, const Tensor& qkv, const Tensor& out,
                   const Tensor& post_norm, const Tensor& gate_up, const Tensor& down, const Tensor& norm,
                   const Tensor& head, const Tensor& rotary_cos, const Tensor& rotary_sin, const Tensor& k_cache,
                   const Tensor& v_cache, const Tensor& cache_seqlens, const Tensor& cache_batch_idx,
                   const Tensor& workspace, double eps, const OptionalTensor& probes, std::vector<int64_t> probe_layers,
                   std::vector<int64_t> probe_heads, int64_t family) {
  const StepFamily chosen = family_of("decode_step", family);
  StepArgs a;
  a.tokens = view(tokens, "tokens");
  a.positions = view(positions, "positions");
  a.row_request = view(row_request, "row_request");
  a.speech_emb = view(speech_emb, "speech_emb");
  a.speech_pos_emb = view(speech_pos_emb, "speech_pos_emb");
  a.input_norm = view(input_norm, "input_norm");
  a.qkv = view(qkv, "qkv");
  a.out = view(out, "out");
  a.post_norm = view(post_norm, "post_norm");
  a.gate_up = view(gate_up, "gate_up");
  a.down = view(down, "down");
  a.norm = view(norm, "norm");
  a.head = view(head, "head");
  a.rotary_cos = view(rotary_cos, "rotary_cos");
  a.rotary_sin = view(rotary_sin, "rotary_sin");
  a.k_cache = mutable_view(k_cache, "k_cache");
  a.v_cache = mutable_view(v_cache, "v_cache");
  a.cache_seqlens = view(cache_seqlens, "cache_seqlens");
  a.cache_batch_idx = view(cache_batch_idx, "cache_batch_idx");
  a.workspace = mutable_view(workspace, "workspace");
  a.eps = eps;
  a.probes = mutable_view(probes, "probes");
  a.probe_layers = std::move(probe_layers);
  a.probe_heads = std::move(probe_heads);
  StepParams p = check_step(a);
  Tensor logits = empty({p.rows, p.vocab}, DType::kFloat32, a.tokens);
  p.logits = static_cast<float*>(data_of(logits));
  const DeviceScope scope(a.tokens);
  run_step(p, chosen, a.tokens.device, a.tokens.device_index, scope.stream());
  return logits;
}

int64_t decode_step_workspace(const Tensor& qkv, const Tensor& down, const Tensor& head, const Tensor& k_cache, int64_t rows,
                              bool probes, int64_t family) {
  const StepFamily chosen = family_of("decode_step_workspace", family);
  const TensorView weights = view(qkv, "qkv");
  const DeviceScope scope(weights);
  return step_workspace(weights, view(down, "down"), view(head, "head"), view(k_cache, "k_cache"), rows, probes, chosen);
}

std::string decode_step_kernel() { return last_step_kernel(); }

void register_impls(torch::stable::detail::StableLibrary& m) {
  m.impl("decode_step", TORCH_BOX(&decode_step));
  m.impl("decode_step_workspace", TORCH_BOX(&decode_step_workspace));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vivace, m) {
  m.def(
      "decode_step(Tensor tokens, Tensor positions, Tensor row_request, Tensor speech_emb, Tensor speech_pos_emb, "
      "Tensor input_norm, Tensor qkv, Tensor out, Tensor post_norm, Tensor gate_up, Tensor down, Tensor norm, Tensor head, "
      "Tensor rotary_cos, Tensor rotary_sin, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_seqlens, "
      "Tensor cache_batch_idx, Tensor(c!) workspace, float eps=1e-05, Tensor(d!)? probes=None, int[] probe_layers=[], "
      "int[] probe_heads=[], int family=0) -> Tensor");
  m.def(
      "decode_step_workspace(Tensor qkv, Tensor down, Tensor head, Tensor k_cache, int rows, bool probes=False, "
      "int family=0) -> int");
  m.def("decode_step_kernel() -> str");
}

VIVACE_REGISTER_IMPLS(register_impls)
STABLE_TORCH_LIBRARY_IMPL(vivace, CompositeExplicitAutograd, m) {
  m.impl("decode_step_kernel", TORCH_BOX(&decode_step_kernel));
}

}  // namespace vivace
