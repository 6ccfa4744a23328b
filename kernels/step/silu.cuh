// silu, the gate of SwiGLU (arXiv 2002.05202), as the steps' products compute it.
#pragma once

namespace vivace::step {

__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }

}  // namespace vivace::step
