#include "csrc/rotary.h"

#include "csrc/arch.h"
#include "csrc/check.h"
#include "csrc/cpu/ops.h"

#ifdef VIVACE_WITH_CUDA
#include "kernels/rotary/rotary_launch.h"
#endif

namespace vivace {

namespace {
template <typename Index>
void check_positions(const Checker& check, const TensorView& positions, int64_t max_position) {
  const auto* values = static_cast<const Index*>(positions.data);
  for (int64_t i = 0; i < positions.numel(); ++i) {
    check(values[i] >= 0 && values[i] < max_position, "positions[", i, "] is ", values[i], ", cos has ", max_position,
          " positions");
  }
}
}  // namespace

RotaryCall check_rotary(const TensorView& x, const TensorView& cos, const TensorView& sin, const TensorView& positions,
                        bool interleaved, bool in_place) {
  const Checker check(in_place ? "rotary_embedding_" : "rotary_embedding", x, "x");
  check(x.dims == 3 || x.dims == 4, "x has ", x.dims, " dimensions ", x,
        ", expected (tokens, heads, head_dim) or (batch, seqlen, heads, head_dim)");
  check.floating(x, "x");
  check.last_dim_contiguous(x, "x");
  if (in_place) check.not_expanded(x, "x");
  for (const auto* t : {&cos, &sin}) {
    const char* name = t == &cos ? "cos" : "sin";
    check.device(*t, name);
    check(t->dtype == DType::kFloat32 || t->dtype == x.dtype, name, " is ", dtype_name(t->dtype),
          ", expected float32 or x's ", dtype_name(x.dtype));
    check.dims(*t, name, 2, "(max_position, rotary_dim / 2)");
    check.contiguous(*t, name);
  }
  check.dtype(sin, "sin", cos.dtype);
  check.shape(sin, "sin", {cos.size(0), cos.size(1)}, "as cos");

  RotaryCall call;
  RotaryParams& p = call.params;
  p.dtype = x.dtype;
  p.x = x.data;
  p.cos = cos.data;
  p.sin = sin.data;
  p.table_dtype = cos.dtype;
  p.heads = x.size(-2);
  p.head_dim = x.size(-1);
  p.rotary_dim = 2 * cos.size(1);
  p.max_position = cos.size(0);
  p.interleaved = interleaved;
  p.seqlen = x.size(-3);
  p.x_stride[1] = x.stride(-2);
  check(p.rotary_dim >= 2 && p.rotary_dim <= p.head_dim, "cos has shape ", cos, ", that is rotary_dim ", p.rotary_dim,
        ", expected 2 to head_dim = ", p.head_dim);

  const Rows rows = rows_of(x, 2);
  const bool split = !rows.even && x.dims == 4;
  p.tokens = split ? x.size(1) : rows.count;
  p.x_stride[0] = split ? x.stride(1) : rows.stride;
  if (split) {
    call.batches = x.size(0);
    call.x_batch_stride = x.stride(0);
  }
  if (positions) {
    check.device(positions, "positions");
    check(positions.dtype == DType::kInt32 || positions.dtype == DType::kInt64, "positions is ", dtype_name(positions.dtype),
          ", expected int32 or int64");
    if (x.dims == 3) {
      check.shape(positions, "positions", {x.size(0)}, "(tokens)");
    } else {
      check.shape(positions, "positions", {x.size(0), x.size(1)}, "(batch, seqlen)");
    }
    check.contiguous(positions, "positions");
    if (x.device == DeviceType::kCpu && positions.dtype == DType::kInt32) {
      check_positions<int32_t>(check, positions, p.max_position);
    } else if (x.device == DeviceType::kCpu) {
      check_positions<int64_t>(check, positions, p.max_position);
    }
    p.positions = positions.data;
    p.position_dtype = positions.dtype;
  } else {
    check(p.seqlen <= p.max_position, "cos has ", p.max_position, " positions, x has ", p.seqlen, " tokens in a row (x: ", x,
          ")");
  }
  if (in_place) {
    p.out = x.data;
    p.out_stride[0] = p.x_stride[0];
    p.out_stride[1] = p.x_stride[1];
    call.out_batch_stride = call.x_batch_stride;
  }
  return call;
}

void set_rotary_output(RotaryCall& call, void* out) {
  RotaryParams& p = call.params;
  p.out = out;
  p.out_stride[1] = p.head_dim;
  p.out_stride[0] = p.heads * p.head_dim;
  call.out_batch_stride = p.tokens * p.out_stride[0];
}

void run_rotary(const RotaryCall& call, DeviceType device, int device_index, [[maybe_unused]] void* stream) {
  const char* op = call.params.out == call.params.x ? "rotary_embedding_" : "rotary_embedding";
  check_device(op, device, device_index);
  RotaryParams p = call.params;
  if (p.tokens == 0 || p.heads == 0) return;
  for (int64_t b = 0; b < call.batches; ++b) {
    if (device == DeviceType::kCpu) cpu::rotary(p);
#ifdef VIVACE_WITH_CUDA
    if (device == DeviceType::kCuda) check_cuda(op, "rotary_cuda", rotary_cuda(p, static_cast<cudaStream_t>(stream)));
#endif
    p.x = static_cast<const char*>(p.x) + call.x_batch_stride * size_of(p.dtype);
    p.out = static_cast<char*>(p.out) + call.out_batch_stride * size_of(p.dtype);
    if (p.positions != nullptr) p.positions = static_cast<const char*>(p.positions) + p.tokens * size_of(p.position_dtype);
  }
}

}  // namespace vivace
