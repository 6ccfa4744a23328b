#include "csrc/sampling.h"

#include "csrc/arch.h"
#include "csrc/check.h"
#include "csrc/cpu/ops.h"

#ifdef VIVACE_WITH_CUDA
#include "kernels/sampling/sample_launch.h"
#endif

namespace vivace {

namespace {

/// One value a request, at any stride.
template <typename T>
const T* per_request(const Checker& check, const TensorView& t, const char* name, DType dtype, int64_t requests,
                     int64_t& stride) {
  check.device(t, name);
  check.dtype(t, name, dtype);
  check.shape(t, name, {requests}, "(requests)");
  stride = t.strides[0];
  return static_cast<const T*>(t.data);
}

void check_values(const Checker& check, const SampleParams& p) {
  for (int64_t r = 0; r < p.requests; ++r) {
    const int32_t cond = p.rows[2 * r], uncond = p.rows[2 * r + 1];
    if (p.next_step != nullptr && cond < 0) continue;  // padding
    check(cond >= 0 && cond < p.logit_rows && uncond < p.logit_rows, "rows[", r, "] is (", cond, ", ", uncond,
          "), logits has ", p.logit_rows, " rows");
    const float temperature = p.temperature[r * p.temperature_stride];
    check(temperature >= 0.0f, "temperature[", r, "] is ", temperature, ", expected at least 0 (0: greedy)");
    const float penalty = p.repetition_penalty[r * p.repetition_penalty_stride];
    check(penalty > 0.0f, "repetition_penalty[", r, "] is ", penalty, ", expected more than 0 (1: off)");
  }
}

void check_advance(const Checker& check, const SampleArgs& a, SampleParams& p) {
  p.tokens = check.int64_vector(a.tokens, "tokens", p.requests, "(requests)");
  check.not_expanded(a.step, "step");
  p.next_step = static_cast<int64_t*>(a.step.data);
  p.positions = check.int64_vector(a.positions, "positions", p.requests, "(requests)");
  p.advance = check.int64_vector(a.advance, "advance", p.requests, "(requests)");
  check.int32_vector(a.cache_seqlens, "cache_seqlens", p.logit_rows, "(rows of logits)");
  p.cache_seqlens = static_cast<int32_t*>(a.cache_seqlens.data);
  check(a.last_position >= 0, "last_position is ", a.last_position, ", expected at least 0");
  p.last_position = a.last_position;
  check(static_cast<bool>(a.history) == static_cast<bool>(a.turn), "history and turn are given together or not at all");
  if (!a.history) return;
  p.turn = check.int64_vector(a.turn, "turn", p.requests, "(requests)");
  check.dtype(a.history, "history", DType::kInt64);
  check.dims(a.history, "history", 2, "(slots, requests)");
  check.shape(a.history, "history", {a.history.size(0), p.requests}, "(slots, requests)");
  check.last_dim_contiguous(a.history, "history");
  check.not_expanded(a.history, "history");
  check(a.history.size(0) > 0, "history has no slots");
  p.history = static_cast<int64_t*>(a.history.data);
  p.history_slots = a.history.size(0);
  p.history_stride = a.history.strides[0];
  if (a.history.device == a.logits.device) return check.device(a.history, "history");
  check(a.logits.device == DeviceType::kCuda, "history is on ", device_string(a.history), ", logits is on the CPU");
#ifdef VIVACE_WITH_CUDA
  cudaPointerAttributes memory{};
  const cudaError_t status = cudaPointerGetAttributes(&memory, p.history);
  check(status == cudaSuccess && memory.type == cudaMemoryTypeHost && memory.devicePointer != nullptr,
        "history is on the CPU and not pinned; the kernel could not write to it");
  p.history = static_cast<int64_t*>(memory.devicePointer);
#endif
}

}  // namespace

SampleParams check_sample(const char* op, const SampleArgs& a) {
  const Checker check(op, a.logits, "logits");
  check.dims(a.logits, "logits", 2, "(rows, vocab)");
  check(a.logits.dtype == DType::kFloat32 || a.logits.dtype == DType::kFloat16 || a.logits.dtype == DType::kBFloat16,
        "logits is ", dtype_name(a.logits.dtype), ", expected float32, float16 or bfloat16");
  check.last_dim_contiguous(a.logits, "logits");
  check(a.logits.size(1) > 0, "logits has an empty vocabulary ", a.logits);
  check.device(a.rows, "rows");
  check.dtype(a.rows, "rows", DType::kInt32);
  check.dims(a.rows, "rows", 2, "(requests, 2)");
  check.shape(a.rows, "rows", {a.rows.size(0), 2}, "(requests, 2)");
  check.contiguous(a.rows, "rows");

  SampleParams p;
  p.logits = a.logits.data;
  p.logits_dtype = a.logits.dtype;
  p.logits_stride = a.logits.strides[0];
  p.logit_rows = a.logits.size(0);
  p.vocab = a.logits.size(1);
  p.requests = a.rows.size(0);
  p.rows = static_cast<const int32_t*>(a.rows.data);
  check.device(a.seen, "seen");
  check(a.seen.dtype == DType::kUInt8 || a.seen.dtype == DType::kBool, "seen is ", dtype_name(a.seen.dtype),
        ", expected uint8 or bool");
  check.shape(a.seen, "seen", {p.requests, p.vocab}, "(requests, vocab)");
  check.last_dim_contiguous(a.seen, "seen");
  p.seen = static_cast<uint8_t*>(a.seen.data);
  p.seen_stride = a.seen.strides[0];

  const int64_t n = p.requests;
  p.cfg_weight = per_request<float>(check, a.cfg_weight, "cfg_weight", DType::kFloat32, n, p.cfg_weight_stride);
  p.temperature = per_request<float>(check, a.temperature, "temperature", DType::kFloat32, n, p.temperature_stride);
  p.repetition_penalty =
      per_request<float>(check, a.repetition_penalty, "repetition_penalty", DType::kFloat32, n, p.repetition_penalty_stride);
  p.min_p = per_request<float>(check, a.min_p, "min_p", DType::kFloat32, n, p.min_p_stride);
  p.top_p = per_request<float>(check, a.top_p, "top_p", DType::kFloat32, n, p.top_p_stride);
  p.top_k = per_request<int32_t>(check, a.top_k, "top_k", DType::kInt32, n, p.top_k_stride);
  if (a.seed) {
    check.not_expanded(a.seen, "seen");
    p.seed = per_request<int64_t>(check, a.seed, "seed", DType::kInt64, n, p.seed_stride);
    p.step = per_request<int64_t>(check, a.step, "step", DType::kInt64, n, p.step_stride);
  }
  if (a.tokens) check_advance(check, a, p);
  if (a.logits.device == DeviceType::kCpu) check_values(check, p);
  return p;
}

void run_sample(const char* op, const SampleParams& p, DeviceType device, int device_index, [[maybe_unused]] void* stream) {
  check_device(op, device, device_index);
  if (p.requests == 0) return;
  if (device == DeviceType::kCpu) return cpu::sample(p);
#ifdef VIVACE_WITH_CUDA
  check_cuda(op, "sample_cuda", sample_cuda(p, static_cast<cudaStream_t>(stream)));
#endif
}

}  // namespace vivace
