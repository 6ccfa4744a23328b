// The only place with heuristics: which kernels run an attention call, and over how many splits of the keys.
#include "csrc/arch.h"
#include "csrc/attention.h"
#include "csrc/cpu/ops.h"
#include "csrc/error.h"

#ifdef VIVACE_WITH_CUDA
#include "kernels/attention/launch.h"
#include "kernels/attention/splits.h"
#include "kernels/attention/workspace.h"
#endif

namespace vivace {

namespace {

thread_local const char* last_kernel = "";

const char* op_name(const AttentionParams& p) {
  if (p.has_cache) return "attention_with_kvcache";
  return p.cu_seqlens_q != nullptr ? "attention_varlen" : "attention";
}

#ifdef VIVACE_WITH_CUDA

/// Up to this many query rows share a kv head's keys (queries * heads / heads_kv) reading the keys is all the work, and the
/// decode kernel does that; above it the larger tiles of the forward kernels win, if there are enough of them.
constexpr int64_t kMaxDecodeRows = 32;
constexpr int64_t kMaxDecodeRowsFp32 = 16;
constexpr int64_t kMaxDecodeRowsOfFew = 256;

int64_t decode_rows_of(const AttentionParams& p) { return p.seqlen_q * (p.heads / p.heads_kv); }

bool use_decode(const AttentionParams& p, int64_t multiprocessors) {
  if (!p.has_cache || forced_arch() < 0 || p.dropout_p > 0.0f) return false;
  const int64_t rows = decode_rows_of(p);
  if (p.num_splits > 1) return true;
  if (p.dtype == DType::kFloat32) return rows <= kMaxDecodeRowsFp32;
  // The forward kernels do not split keys: a CTA for each 128 queries of a head.
  const int64_t forward_ctas = p.batch * p.heads * ((p.seqlen_q + 127) / 128);
  return rows <= kMaxDecodeRows || (rows <= kMaxDecodeRowsOfFew && 2 * forward_ctas <= multiprocessors);
}

struct ForwardFamily {
  const char* name;
  cudaError_t (*run)(const AttentionParams&, cudaStream_t);
  int capability;  // it is tried on this one and newer; exactly this one, if `only`
  bool only;
};

/// The fastest first; each answers cudaErrorNotSupported to what it does not cover, the last covers everything.
constexpr ForwardFamily kForwardFamilies[] = {
#ifdef VIVACE_WITH_SM90
    {"attention_forward_sm90", attention_forward_sm90, 90, true},
#endif
    {"attention_forward_sm80", attention_forward_sm80, 80, false},
};

void run_forward(const AttentionParams& p, int capability, cudaStream_t stream) {
  const int64_t arch = forced_arch();
  for (const ForwardFamily& family : kForwardFamilies) {
    if (arch < 0 || (arch > 0 && arch < family.capability)) continue;
    if (capability < family.capability || (family.only && capability != family.capability)) continue;
    const cudaError_t status = family.run(p, stream);
    if (status == cudaErrorNotSupported) continue;
    last_kernel = family.name;
    return check_cuda(op_name(p), family.name, status);
  }
  last_kernel = "attention_forward_generic";
  check_cuda(op_name(p), last_kernel, attention_forward_generic(p, stream));
}

void run_cuda(const AttentionParams& p, int device_index, cudaStream_t stream) {
  const char* op = op_name(p);
  if (p.batch == 0) return;
  const bool decode = use_decode(p, p.multiprocessors);
  if ((p.k_new != nullptr || p.rotary_cos != nullptr) && !(decode && attention_decode_appends(p))) {
    check_cuda(op, "attention_append", attention_append(p, stream));
  }
  if (p.total_q == 0) return;
  cudaError_t status = cudaErrorNotSupported;
  if (decode) {
    const bool fp32 = p.dtype == DType::kFloat32;
    status = fp32 ? attention_decode_fp32(p, stream) : attention_decode(p, stream);
    if (status != cudaErrorNotSupported) {
      last_kernel = "attention_decode";
      check_cuda(op, last_kernel, status);
      if (!fp32) return;  // the probe is written
      if (p.num_splits > 1) check_cuda(op, "attention_combine", attention_combine(p, stream));
    }
  }
  if (status == cudaErrorNotSupported) run_forward(p, cuda_device(device_index).capability, stream);
  if (p.probe != nullptr) check_cuda(op, "attention_probe", attention_probe(p, stream));
}

#endif

}  // namespace

int64_t plan_attention(AttentionParams& p, DeviceType device, [[maybe_unused]] int device_index) {
  check_device(op_name(p), device, device_index);
  if (device == DeviceType::kCpu) {
    p.num_splits = 1;
    return 0;
  }
#ifdef VIVACE_WITH_CUDA
  const CudaDevice cuda = cuda_device(device_index);
  p.multiprocessors = cuda.multiprocessors;
  p.arch = cuda.capability == 90 && forced_arch() != 80 ? 90 : 80;
  p.dependent = cuda.capability >= 90;  // where it pays; the launchers know
  if (!use_decode(p, p.multiprocessors)) {
    p.num_splits = 1;
  } else if (p.num_splits == 0 && p.dtype == DType::kFloat32) {
    const int64_t rows = decode_rows_of(p), tile = fp32_decode_rows(rows);
    p.num_splits = choose_num_splits(p.batch * p.heads_kv * ((rows + tile - 1) / tile), p.seqlen_k, p.multiprocessors,
                                     fp32_decode_block(p.head_dim));
  }
  return attention_workspace(p).bytes;
#else
  return 0;
#endif
}

void run_attention(const AttentionParams& p, DeviceType device, int device_index, [[maybe_unused]] void* stream) {
  if (device == DeviceType::kCpu) {
    last_kernel = "cpu";
    return cpu::attention_forward(p);
  }
#ifdef VIVACE_WITH_CUDA
  run_cuda(p, device_index, static_cast<cudaStream_t>(stream));
#else
  check_device(op_name(p), device, device_index);
#endif
}

const char* last_attention_kernel() { return last_kernel; }

}  // namespace vivace
