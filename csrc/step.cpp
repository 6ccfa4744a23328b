#include "csrc/step.h"

#include <algorithm>
#include <cmath>

#include "csrc/arch.h"
#include "csrc/check.h"
#include "csrc/cpu/ops.h"

#ifdef VIVACE_WITH_CUDA
#include "kernels/step/launch.h"
#endif

namespace vivace {

namespace {

constexpr const char* kOp = "decode_step";

thread_local const char* last_kernel = "";

/// The sizes that the weights and the cache have between them.
StepParams shape_of(const Checker& check, const TensorView& qkv, const TensorView& down, const TensorView& head,
                    const TensorView& k_cache) {
  check.dims(qkv, "qkv", 3, "(layers, (heads + 2 * heads_kv) * head_dim, hidden)");
  check.dims(down, "down", 3, "(layers, hidden, intermediate)");
  check.dims(head, "head", 2, "(vocab, hidden)");
  check.dims(k_cache, "k_cache", 5, "(layers, cache_rows, capacity, heads_kv, head_dim)");
  check(qkv.dtype == DType::kFloat32 || qkv.dtype == DType::kFloat16 || qkv.dtype == DType::kBFloat16, "qkv is ",
        dtype_name(qkv.dtype), ", expected float32, float16 or bfloat16");
  StepParams p;
  p.dtype = qkv.dtype;
  p.layers = qkv.size(0);
  p.hidden = qkv.size(2);
  p.intermediate = down.size(2);
  p.vocab = head.size(0);
  p.cache_rows = k_cache.size(1);
  p.capacity = k_cache.size(2);
  p.heads_kv = k_cache.size(3);
  p.head_dim = k_cache.size(4);
  check(p.layers > 0 && p.hidden > 0 && p.intermediate > 0 && p.vocab > 0, "a weight is empty (qkv: ", qkv, ", down: ", down,
        ", head: ", head, ")");
  check(p.heads_kv > 0 && p.head_dim > 0 && p.head_dim % 2 == 0 && p.head_dim <= 256, "k_cache has ", p.heads_kv,
        " heads of ", p.head_dim, ", expected at least one, of an even head_dim up to 256");
  const int64_t q_width = qkv.size(1) - 2 * p.heads_kv * p.head_dim;
  p.heads = q_width / p.head_dim;
  check(q_width > 0 && q_width % p.head_dim == 0 && p.heads % p.heads_kv == 0, "qkv has shape ", qkv,
        ", which is no (heads + ", 2 * p.heads_kv, ") * ", p.head_dim, " outputs with heads a multiple of ", p.heads_kv,
        ", as k_cache (", k_cache, ") has them");
  p.softmax_scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(p.head_dim)));
  return p;
}

/// A weight of the model: contiguous, of its dtype, and aligned for the kernels' vector loads.
const void* weight(const Checker& check, const StepParams& p, const TensorView& t, const char* name,
                   std::initializer_list<int64_t> shape, const char* layout) {
  check.device(t, name);
  check.dtype(t, name, p.dtype);
  check.shape(t, name, shape, layout);
  check.contiguous(t, name);
  check(t.device == DeviceType::kCpu || reinterpret_cast<uintptr_t>(t.data) % 16 == 0, name,
        " does not start at a multiple of 16 bytes");
  return t.data;
}

void check_cache(const Checker& check, const StepArgs& a, StepParams& p) {
  const auto one = [&](const TensorView& t, const char* name, int64_t(&stride)[4]) {
    check.device(t, name);
    check.dtype(t, name, p.dtype);
    check.shape(t, name, {p.layers, p.cache_rows, p.capacity, p.heads_kv, p.head_dim},
                "(layers, cache_rows, capacity, heads_kv, head_dim)");
    check.last_dim_contiguous(t, name);
    check.not_expanded(t, name);
    std::copy_n(t.strides.begin(), 4, stride);
    return t.data;
  };
  p.k_cache = one(a.k_cache, "k_cache", p.k_stride);
  p.v_cache = one(a.v_cache, "v_cache", p.v_stride);
  check.int32_vector(a.cache_seqlens, "cache_seqlens", p.rows, "(rows)");
  check.int32_vector(a.cache_batch_idx, "cache_batch_idx", p.rows, "(rows)");
  p.cache_seqlens = static_cast<const int32_t*>(a.cache_seqlens.data);
  p.cache_batch_idx = static_cast<const int32_t*>(a.cache_batch_idx.data);
}

void check_rotary(const Checker& check, const StepArgs& a, StepParams& p) {
  const TensorView &cos = a.rotary_cos, &sin = a.rotary_sin;
  check.device(cos, "rotary_cos");
  check.device(sin, "rotary_sin");
  check(cos.dtype == DType::kFloat32 || cos.dtype == p.dtype, "rotary_cos is ", dtype_name(cos.dtype),
        ", expected float32 or ", dtype_name(p.dtype));
  check.dims(cos, "rotary_cos", 2, "(positions, head_dim / 2)");
  check.shape(cos, "rotary_cos", {cos.size(0), p.head_dim / 2}, "(positions, head_dim / 2)");
  check.contiguous(cos, "rotary_cos");
  check.dtype(sin, "rotary_sin", cos.dtype);
  check.shape(sin, "rotary_sin", {cos.size(0), p.head_dim / 2}, "(positions, head_dim / 2), as rotary_cos");
  check.contiguous(sin, "rotary_sin");
  check(cos.size(0) >= p.capacity, "rotary_cos has ", cos.size(0), " positions, the cache a capacity of ", p.capacity);
  p.rotary_cos = cos.data;
  p.rotary_sin = sin.data;
  p.rotary_dtype = cos.dtype;
  p.rotary_positions = cos.size(0);
}

void check_probes(const Checker& check, const StepArgs& a, StepParams& p) {
  if (!a.probes) return;
  const TensorView& t = a.probes;
  check.device(t, "probes");
  check.dtype(t, "probes", DType::kFloat32);
  check.dims(t, "probes", 4, "(probes, rows, 1, capacity)");
  check.contiguous(t, "probes");
  check(t.size(1) >= p.rows && t.size(2) == 1, "probes has shape ", t, ", expected (probes, at least ", p.rows,
        " rows, 1, capacity)");
  check(t.size(0) <= StepParams::kMaxProbes, "probes has ", t.size(0), " heads, expected at most ", StepParams::kMaxProbes);
  const auto count = static_cast<size_t>(t.size(0));
  check(a.probe_layers.size() == count && a.probe_heads.size() == count, "probes has ", count, " heads, probe_layers names ",
        a.probe_layers.size(), ", probe_heads ", a.probe_heads.size());
  for (size_t i = 0; i < count; ++i) {
    check(a.probe_layers[i] >= 0 && a.probe_layers[i] < p.layers, "probe_layers[", i, "] is ", a.probe_layers[i],
          ", there are ", p.layers, " layers");
    check(a.probe_heads[i] >= 0 && a.probe_heads[i] < p.heads, "probe_heads[", i, "] is ", a.probe_heads[i], ", there are ",
          p.heads, " heads");
    p.probe_layer[i] = static_cast<int32_t>(a.probe_layers[i]);
    p.probe_head[i] = static_cast<int32_t>(a.probe_heads[i]);
  }
  if (count == 0) return;
  p.probes = static_cast<float*>(t.data);
  p.probe_count = t.size(0);
  p.probe_rows = t.size(1);
  p.probe_capacity = t.size(3);
}

#ifdef VIVACE_WITH_CUDA

/// Up to this many rows the persistent kernel is the faster one where both take the step (docs/performance.md).
[[maybe_unused]] constexpr int64_t kPersistentRows = 4;

/// From this many rows on the split kernel is faster than the chain (docs/performance.md).
[[maybe_unused]] constexpr int64_t kSplitRows = 65;

/// From and to this many rows the mesh kernel is faster than the chain, whatever the lengths (docs/performance.md).
[[maybe_unused]] constexpr int64_t kMeshRowsLeast = 5, kMeshRowsMost = 64;

/// The families' parts of the workspace lie behind each other: the persistent kernel's, the split kernel's, the mesh
/// kernel's, the chain's. All but the last, rounded up so that the next is aligned, are the same for any number of rows.
[[maybe_unused]] constexpr size_t region(size_t bytes) { return (bytes + 1023) / 1024 * 1024; }

bool persistent_supported([[maybe_unused]] const StepParams& p) {
#ifdef VIVACE_STEP_PERSISTENT
  return step_persistent_supported(p);
#else
  return false;
#endif
}

bool split_supported([[maybe_unused]] const StepParams& p) {
#ifdef VIVACE_STEP_SPLIT
  return step_split_supported(p);
#else
  return false;
#endif
}

bool mesh_supported([[maybe_unused]] const StepParams& p) {
#ifdef VIVACE_STEP_MESH
  return step_mesh_supported(p);
#else
  return false;
#endif
}

bool chain_supported([[maybe_unused]] const StepParams& p) {
#ifdef VIVACE_STEP_CHAIN
  return step_chain_supported(p);
#else
  return false;
#endif
}

/// One row and no probes: whether a step itself runs on a family does not move the parts behind that family's.
[[maybe_unused]] StepParams one_row(const StepParams& p) {
  StepParams one = p;
  one.rows = one.requests = 1;
  one.probes = nullptr;
  return one;
}

size_t persistent_bytes([[maybe_unused]] const StepParams& p) {
#ifdef VIVACE_STEP_PERSISTENT
  const StepParams one = one_row(p);
  return step_persistent_supported(one) ? region(step_persistent_workspace(one)) : 0;
#else
  return 0;
#endif
}

size_t split_bytes([[maybe_unused]] const StepParams& p) {
#ifdef VIVACE_STEP_SPLIT
  return step_split_supported(p) ? region(step_split_workspace(p)) : 0;
#else
  return 0;
#endif
}

size_t mesh_bytes([[maybe_unused]] const StepParams& p) {
#ifdef VIVACE_STEP_MESH
  const StepParams one = one_row(p);
  return step_mesh_supported(one) ? region(step_mesh_workspace(one)) : 0;
#else
  return 0;
#endif
}

size_t chain_bytes([[maybe_unused]] const StepParams& p) {
#ifdef VIVACE_STEP_CHAIN
  return step_chain_supported(p) ? step_chain_workspace(p) : 0;
#else
  return 0;
#endif
}

/// kAuto: none takes the step.
StepFamily choose(const StepParams& p, StepFamily wanted) {
  const auto takes = [&](StepFamily family, bool supported) {
    return (wanted == StepFamily::kAuto || wanted == family) && supported;
  };
  const bool persistent = takes(StepFamily::kPersistent, persistent_supported(p));
  const bool chain = takes(StepFamily::kChain, chain_supported(p));
  const bool split = takes(StepFamily::kSplit, split_supported(p));
  const bool mesh = takes(StepFamily::kMesh, mesh_supported(p));
  if (persistent && (p.rows <= kPersistentRows || !(chain || split || mesh))) return StepFamily::kPersistent;
  if (split && (p.rows >= kSplitRows || !(chain || mesh))) return StepFamily::kSplit;
  if (mesh && ((p.rows >= kMeshRowsLeast && p.rows <= kMeshRowsMost) || !chain)) return StepFamily::kMesh;
  return chain ? StepFamily::kChain : StepFamily::kAuto;
}

void set_arch(StepParams& p, int device_index) {
  const int64_t forced = forced_arch();
  const int capability = cuda_device(device_index).capability;
  p.arch = forced < 0 ? 0 : forced > 0 ? static_cast<int>(std::min<int64_t>(forced, capability)) : capability;
}

void run_cuda(const StepParams& params, StepFamily wanted, int device_index, cudaStream_t stream) {
  StepParams p = params;
  set_arch(p, device_index);
  const StepFamily family = choose(p, wanted);
  check(family != StepFamily::kAuto, kOp, "no ",
        wanted == StepFamily::kPersistent ? "persistent "
        : wanted == StepFamily::kChain    ? "chained "
        : wanted == StepFamily::kSplit    ? "split "
        : wanted == StepFamily::kMesh     ? "mesh "
                                          : "",
        "CUDA kernel of this build takes ", p.rows, " rows of ", dtype_name(p.dtype), ", hidden ", p.hidden, ", ", p.heads,
        " heads of ", p.head_dim, " (", p.heads_kv, " of keys), intermediate ", p.intermediate, ", vocabulary ", p.vocab,
        p.probes != nullptr ? ", with probes" : "", " on compute capability ", cuda_device(device_index).capability,
        "; run the model's layers one by one");
  [[maybe_unused]] const size_t front = persistent_bytes(p);
  [[maybe_unused]] const size_t middle = split_bytes(p), mesh = mesh_bytes(p);
  const size_t needed = front + middle + mesh + chain_bytes(p);
  check(p.workspace_bytes >= needed, kOp, "workspace has ", p.workspace_bytes, " bytes, expected ", needed,
        " (decode_step_workspace)");
  check(reinterpret_cast<uintptr_t>(p.workspace) % 256 == 0, kOp, "workspace does not start at a multiple of 256 bytes");
#ifdef VIVACE_STEP_PERSISTENT
  if (family == StepFamily::kPersistent) {
    last_kernel = "step_persistent";
    p.workspace_bytes = front;
    return check_cuda(kOp, last_kernel, step_persistent(p, stream));
  }
#endif
#ifdef VIVACE_STEP_SPLIT
  if (family == StepFamily::kSplit) {
    last_kernel = "step_split";
    p.workspace = static_cast<char*>(p.workspace) + front;
    p.workspace_bytes = middle;
    return check_cuda(kOp, last_kernel, step_split(p, stream));
  }
#endif
#ifdef VIVACE_STEP_MESH
  if (family == StepFamily::kMesh) {
    last_kernel = "step_mesh";
    p.workspace = static_cast<char*>(p.workspace) + front + middle;
    p.workspace_bytes = mesh;
    return check_cuda(kOp, last_kernel, step_mesh(p, stream));
  }
#endif
#ifdef VIVACE_STEP_CHAIN
  if (family == StepFamily::kChain) {
    last_kernel = "step_chain";
    p.workspace = static_cast<char*>(p.workspace) + front + middle + mesh;
    p.workspace_bytes -= front + middle + mesh;
    return check_cuda(kOp, last_kernel, step_chain(p, stream));
  }
#endif
  static_cast<void>(stream);
}

#endif

}  // namespace

StepParams check_step(const StepArgs& a) {
  const Checker check(kOp, a.tokens, "tokens");
  StepParams p = shape_of(check, a.qkv, a.down, a.head, a.k_cache);
  check.dims(a.tokens, "tokens", 1, "(requests)");
  check.dims(a.row_request, "row_request", 1, "(rows)");
  p.requests = a.tokens.size(0);
  p.rows = a.row_request.size(0);
  p.tokens = check.int64_vector(a.tokens, "tokens", p.requests, "(requests)");
  p.positions = check.int64_vector(a.positions, "positions", p.requests, "(requests)");
  p.row_request = check.int64_vector(a.row_request, "row_request", p.rows, "(rows)");
  check(p.rows == 0 || p.requests > 0, "row_request has ", p.rows, " rows, tokens no request");

  check.dims(a.speech_emb, "speech_emb", 2, "(tokens, hidden)");
  check.dims(a.speech_pos_emb, "speech_pos_emb", 2, "(positions, hidden)");
  p.speech_tokens = a.speech_emb.size(0);
  p.speech_positions = a.speech_pos_emb.size(0);
  check(p.speech_tokens > 0 && p.speech_positions > 0, "an embedding is empty (speech_emb: ", a.speech_emb,
        ", speech_pos_emb: ", a.speech_pos_emb, ")");
  const int64_t layers = p.layers, hidden = p.hidden, width = p.heads * p.head_dim;
  p.speech_emb = weight(check, p, a.speech_emb, "speech_emb", {p.speech_tokens, hidden}, "(tokens, hidden)");
  p.speech_pos_emb =
      weight(check, p, a.speech_pos_emb, "speech_pos_emb", {p.speech_positions, hidden}, "(positions, hidden)");
  p.input_norm = weight(check, p, a.input_norm, "input_norm", {layers, hidden}, "(layers, hidden)");
  p.qkv = weight(check, p, a.qkv, "qkv", {layers, width + 2 * p.heads_kv * p.head_dim, hidden},
                 "(layers, (heads + 2 * heads_kv) * head_dim, hidden)");
  p.out = weight(check, p, a.out, "out", {layers, hidden, width}, "(layers, hidden, heads * head_dim)");
  p.post_norm = weight(check, p, a.post_norm, "post_norm", {layers, hidden}, "(layers, hidden)");
  p.gate_up =
      weight(check, p, a.gate_up, "gate_up", {layers, 2 * p.intermediate, hidden}, "(layers, 2 * intermediate, hidden)");
  p.down = weight(check, p, a.down, "down", {layers, hidden, p.intermediate}, "(layers, hidden, intermediate)");
  p.norm = weight(check, p, a.norm, "norm", {hidden}, "(hidden)");
  p.head = weight(check, p, a.head, "head", {p.vocab, hidden}, "(vocab, hidden)");
  check(a.eps >= 0.0 && std::isfinite(a.eps), "eps is ", a.eps, ", expected a finite number of at least 0");
  p.eps = static_cast<float>(a.eps);
  check_cache(check, a, p);
  check_rotary(check, a, p);
  check_probes(check, a, p);
  check.device(a.workspace, "workspace");
  check.dtype(a.workspace, "workspace", DType::kUInt8);
  check.contiguous(a.workspace, "workspace");
  p.workspace = a.workspace.data;
  p.workspace_bytes = static_cast<size_t>(a.workspace.numel());
  return p;
}

void run_step(const StepParams& p, [[maybe_unused]] StepFamily family, DeviceType device, int device_index,
              [[maybe_unused]] void* stream) {
  check_device(kOp, device, device_index);
  if (p.rows == 0) return;
  if (device == DeviceType::kCpu) {
    last_kernel = "cpu";
    return cpu::decode_step(p);
  }
#ifdef VIVACE_WITH_CUDA
  run_cuda(p, family, device_index, static_cast<cudaStream_t>(stream));
#endif
}

int64_t step_workspace(const TensorView& qkv, const TensorView& down, const TensorView& head, const TensorView& k_cache,
                       int64_t rows, [[maybe_unused]] bool probes, [[maybe_unused]] StepFamily family) {
  const char* op = "decode_step_workspace";
  const Checker check(op, qkv, "qkv");
  [[maybe_unused]] StepParams p = shape_of(check, qkv, down, head, k_cache);
  check(rows >= 0, "rows is ", rows, ", expected at least 0");
  check_device(op, qkv.device, qkv.device_index);
  if (qkv.device == DeviceType::kCpu) return 0;
#ifdef VIVACE_WITH_CUDA
  static float probe;
  p.rows = p.requests = rows;
  if (probes) p.probes = &probe;  // a family may refuse them
  set_arch(p, qkv.device_index);
  std::copy_n(k_cache.strides.begin(), 4, p.k_stride);
  std::copy_n(k_cache.strides.begin(), 4, p.v_stride);
  if (choose(p, family) == StepFamily::kAuto) return -1;
  return static_cast<int64_t>(persistent_bytes(p) + split_bytes(p) + mesh_bytes(p) + chain_bytes(p));
#else
  return -1;
#endif
}

const char* last_step_kernel() { return last_kernel; }

}  // namespace vivace
