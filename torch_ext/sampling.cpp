// sample, sampling_probs and sample_advance.
#include "csrc/sampling.h"

#include "torch_ext/tensors.h"

namespace vivace {
namespace {

SampleArgs arguments(const Tensor& logits, const Tensor& rows, const Tensor& cfg_weight, const Tensor& temperature,
                     const Tensor& repetition_penalty, const Tensor& min_p, const Tensor& top_p, const Tensor& top_k) {
  SampleArgs a;
  a.logits = view(logits, "logits");
  a.rows = view(rows, "rows");
  a.cfg_weight = view(cfg_weight, "cfg_weight");
  a.temperature = view(temperature, "temperature");
  a.repetition_penalty = view(repetition_penalty, "repetition_penalty");
  a.min_p = view(min_p, "min_p");
  a.top_p = view(top_p, "top_p");
  a.top_k = view(top_k, "top_k");
  return a;
}

Tensor sample(const Tensor& logits, const Tensor& rows, const Tensor& seen, const Tensor& cfg_weight,
              const Tensor& temperature, const Tensor& repetition_penalty, const Tensor& min_p, const Tensor& top_p,
              const Tensor& top_k, const Tensor& seed, const Tensor& step) {
  SampleArgs a = arguments(logits, rows, cfg_weight, temperature, repetition_penalty, min_p, top_p, top_k);
  a.seen = mutable_view(seen, "seen");
  a.seed = view(seed, "seed");
  a.step = view(step, "step");
  SampleParams p = check_sample("sample", a);
  Tensor tokens = empty({p.requests}, DType::kInt64, a.logits);
  p.tokens = static_cast<int64_t*>(data_of(tokens));
  const DeviceScope scope(a.logits);
  run_sample("sample", p, a.logits.device, a.logits.device_index, scope.stream());
  return tokens;
}

void sample_advance(const Tensor& logits, const Tensor& rows, const Tensor& seen, const Tensor& cfg_weight,
                    const Tensor& temperature, const Tensor& repetition_penalty, const Tensor& min_p, const Tensor& top_p,
                    const Tensor& top_k, const Tensor& seed, const Tensor& step, const Tensor& tokens,
                    const Tensor& positions, const Tensor& cache_seqlens, const Tensor& advance, int64_t last_position,
                    const OptionalTensor& history, const OptionalTensor& turn) {
  const char* op = "sample_advance";
  SampleArgs a = arguments(logits, rows, cfg_weight, temperature, repetition_penalty, min_p, top_p, top_k);
  a.seen = mutable_view(seen, "seen");
  a.seed = view(seed, "seed");
  a.step = mutable_view(step, "step");
  a.tokens = mutable_view(tokens, "tokens");
  a.positions = mutable_view(positions, "positions");
  a.cache_seqlens = mutable_view(cache_seqlens, "cache_seqlens");
  a.advance = view(advance, "advance");
  a.last_position = last_position;
  a.history = mutable_view(history, "history");
  a.turn = mutable_view(turn, "turn");
  const SampleParams p = check_sample(op, a);
  const DeviceScope scope(a.logits);
  run_sample(op, p, a.logits.device, a.logits.device_index, scope.stream());
}

Tensor sampling_probs(const Tensor& logits, const Tensor& rows, const Tensor& seen, const Tensor& cfg_weight,
                      const Tensor& temperature, const Tensor& repetition_penalty, const Tensor& min_p, const Tensor& top_p,
                      const Tensor& top_k) {
  SampleArgs a = arguments(logits, rows, cfg_weight, temperature, repetition_penalty, min_p, top_p, top_k);
  a.seen = view(seen, "seen");
  SampleParams p = check_sample("sampling_probs", a);
  Tensor probs = empty({p.requests, p.vocab}, DType::kFloat32, a.logits);
  p.probs = static_cast<float*>(data_of(probs));
  const DeviceScope scope(a.logits);
  run_sample("sampling_probs", p, a.logits.device, a.logits.device_index, scope.stream());
  return probs;
}

void register_impls(torch::stable::detail::StableLibrary& m) {
  m.impl("sample", TORCH_BOX(&sample));
  m.impl("sampling_probs", TORCH_BOX(&sampling_probs));
  m.impl("sample_advance", TORCH_BOX(&sample_advance));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vivace, m) {
  m.def(
      "sample(Tensor logits, Tensor rows, Tensor(a!) seen, Tensor cfg_weight, Tensor temperature, "
      "Tensor repetition_penalty, Tensor min_p, Tensor top_p, Tensor top_k, Tensor seed, Tensor step) -> Tensor");
  m.def(
      "sampling_probs(Tensor logits, Tensor rows, Tensor seen, Tensor cfg_weight, Tensor temperature, "
      "Tensor repetition_penalty, Tensor min_p, Tensor top_p, Tensor top_k) -> Tensor");
  m.def(
      "sample_advance(Tensor logits, Tensor rows, Tensor(a!) seen, Tensor cfg_weight, Tensor temperature, "
      "Tensor repetition_penalty, Tensor min_p, Tensor top_p, Tensor top_k, Tensor seed, Tensor(b!) step, "
      "Tensor(c!) tokens, Tensor(d!) positions, Tensor(e!) cache_seqlens, Tensor advance, int last_position, "
      "Tensor(f!)? history=None, Tensor(g!)? turn=None) -> ()");
}

VIVACE_REGISTER_IMPLS(register_impls)

}  // namespace vivace
