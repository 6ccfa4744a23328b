#include "csrc/attention_backward.h"

#include "csrc/arch.h"
#include "csrc/check.h"
#include "csrc/cpu/ops.h"

namespace vivace {

namespace {
void set_dense_strides(int64_t (&strides)[3], int64_t rows, int64_t heads, int64_t head_dim) {
  strides[2] = head_dim;
  strides[1] = heads * head_dim;
  strides[0] = rows * heads * head_dim;  // rows is 0 for variable length
}
}  // namespace

AttentionBackwardParams check_attention_backward(const char* op, const AttentionParams& forward, const TensorView& q,
                                                 const TensorView& dout, const TensorView& out,
                                                 const TensorView& softmax_lse) {
  const Checker check(op, q, "q");
  const AttentionParams& f = forward;
  const bool varlen = f.cu_seqlens_q != nullptr;
  for (const auto* t : {&dout, &out}) {
    const char* name = t == &dout ? "dout" : "out";
    check.device(*t, name);
    check.dtype(*t, name, f.dtype);
    if (varlen) {
      check.shape(*t, name, {f.total_q, f.heads, f.head_dim_v}, "(total_q, heads, head_dim_v)");
    } else {
      check.shape(*t, name, {f.batch, f.seqlen_q, f.heads, f.head_dim_v}, "(batch, seqlen_q, heads, head_dim_v)");
    }
    check.last_dim_contiguous(*t, name);
  }
  check.device(softmax_lse, "softmax_lse");
  check.dtype(softmax_lse, "softmax_lse", DType::kFloat32);
  if (varlen) {
    check.shape(softmax_lse, "softmax_lse", {f.heads, f.total_q}, "(heads, total_q)");
  } else {
    check.shape(softmax_lse, "softmax_lse", {f.batch, f.heads, f.seqlen_q}, "(batch, heads, seqlen_q)");
  }
  check.contiguous(softmax_lse, "softmax_lse");

  AttentionBackwardParams p;
  p.forward = forward;
  p.forward.out = out.data;
  p.forward.lse = static_cast<float*>(softmax_lse.data);
  p.dout = dout.data;
  const int first = varlen ? 0 : 1;
  for (int d = 0; d < 2; ++d) {
    p.forward.out_stride[d + 1] = out.strides[first + d];
    p.dout_stride[d + 1] = dout.strides[first + d];
  }
  p.forward.out_stride[0] = varlen ? 0 : out.strides[0];
  p.dout_stride[0] = varlen ? 0 : dout.strides[0];
  return p;
}

void set_attention_gradients(AttentionBackwardParams& p, void* dq, void* dk, void* dv) {
  const AttentionParams& f = p.forward;
  const bool varlen = f.cu_seqlens_q != nullptr;
  p.dq = dq;
  p.dk = dk;
  p.dv = dv;
  set_dense_strides(p.dq_stride, varlen ? 0 : f.seqlen_q, f.heads, f.head_dim);
  set_dense_strides(p.dk_stride, varlen ? 0 : f.seqlen_k, f.heads_kv, f.head_dim);
  set_dense_strides(p.dv_stride, varlen ? 0 : f.seqlen_k, f.heads_kv, f.head_dim_v);
}

void run_attention_backward(const char* op, const AttentionBackwardParams& p, DeviceType device, int device_index) {
  check_device(op, device, device_index);
  check(device == DeviceType::kCpu, op, "not there yet on CUDA (", dtype_name(p.forward.dtype), ", head_dim ",
        p.forward.head_dim, ", cuda:", device_index,
        "): there are no backward kernels; vivace.attention differentiates there by recomputation in torch");
  cpu::attention_backward(p);
}

}  // namespace vivace
