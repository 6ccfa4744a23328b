"""The operators, as Python functions over torch.ops.vivace. Importing this module loads the operator library.

The functions add to the operators: keyword arguments, tensors copied where their last dimension is not contiguous, a
window as a pair, and an error where a gradient is asked of an operator that has none. TorchScript, C++ and
torch.compile may call torch.ops.vivace directly; the checks of shapes and dtypes, and their words, are the same.

All raise RuntimeError with a text such as "vivace.attention: k has head_dim 96, q has 64 (k: [..], q: [..])".
Floating point tensors are float32, float16 or bfloat16 (on the CPU float64 too), computed in float32 and rounded once.
"""

from vivace.ops._attention import attention, attention_kernel, attention_varlen, attention_with_kvcache
from vivace.ops._build import build_info, force_arch
from vivace.ops._layers import add_rms_norm, rms_norm, rotary_embedding, rotary_embedding_, silu_gate
from vivace.ops._sampling import sample, sample_advance, sampling_probs
from vivace.ops._step import decode_step, decode_step_kernel, decode_step_workspace

__all__ = [
    "add_rms_norm",
    "attention",
    "attention_kernel",
    "attention_varlen",
    "attention_with_kvcache",
    "build_info",
    "decode_step",
    "decode_step_kernel",
    "decode_step_workspace",
    "force_arch",
    "rms_norm",
    "rotary_embedding",
    "rotary_embedding_",
    "sample",
    "sample_advance",
    "sampling_probs",
    "silu_gate",
]
