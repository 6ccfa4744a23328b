// The decode kernel for a device.
#include "kernels/attention/launch.h"
#include "kernels/attention/workspace.h"

namespace vivace {

int64_t attention_decode_workspace(const AttentionParams& p) { return attention_workspace(p).bytes; }

cudaError_t attention_decode(const AttentionParams& p, cudaStream_t stream) {
  const cudaError_t direct = attention_decode_direct(p, stream);
  if (direct != cudaErrorNotSupported) return direct;
#ifdef VIVACE_WITH_SM90
  if (p.arch == 90) {
    const cudaError_t status = attention_decode_sm90(p, stream);
    if (status != cudaErrorNotSupported) return status;
  }
#endif
  return attention_decode_sm80(p, stream);
}

}  // namespace vivace
