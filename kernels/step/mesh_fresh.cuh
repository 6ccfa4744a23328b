// q, k and v of the rows that a CTA attends: sums of what its group has sent, rotated, for attention and the cache.
#pragma once

#include "kernels/step/mesh_residual.cuh"

namespace vivace::mesh {

/// Warp u has the CTA's unit u. A lane has 8 of the 192 columns, lanes from 24 on have those of others once more.
template <typename T>
class Fresh {
 public:
  __device__ __forceinline__ Fresh(const Cta& c, int warp, int lane)
      : c_(c), warp_(warp), lane_(lane), group_(min(lane / 4, kFresh / 32 - 1)) {}

  /// Rotary tables.
  __device__ __forceinline__ void begin() const {
    if (warp_ >= c_.shared.unit_count) return;
    const StepParams& p = c_.args.p;
    const int row = c_.shared.units[warp_].row;
    const int64_t at = clamp_index(p.cache_seqlens[row], p.rotary_positions) * (kDim / 2) + lane_;
    const bool fp32 = p.rotary_dtype == DType::kFloat32;
    c_.shared.rotary[warp_][0][lane_] =
        fp32 ? static_cast<const float*>(p.rotary_cos)[at] : to_float(static_cast<const T*>(p.rotary_cos)[at]);
    c_.shared.rotary[warp_][1][lane_] =
        fp32 ? static_cast<const float*>(p.rotary_sin)[at] : to_float(static_cast<const T*>(p.rotary_sin)[at]);
    __syncwarp();
  }

  __device__ __forceinline__ void collect(int layer) const {
    if (warp_ >= c_.shared.unit_count) return;
    const Unit unit = c_.shared.units[warp_];
    constexpr int kPitch = kFresh * 2;
    const uint8_t* from = opaque(c_.at<uint8_t>(Layout::fresh) + (c_.group * kMaxRows + unit.row) * kBlocks * kPitch +
                                 group_ * 64 + lane_ % 4 * 16);
    const uint32_t phase = phase_of(layer);
    Parts<T, kBlocks> parts(phase);
    uint4 squares;
    uint32_t wrong;
    step::Watchdog<kTurns> watchdog;
    do {
      watchdog.check();
      parts.load(from, kPitch, phase);
      squares = step::load_b128(squares_of(c_, unit.row, lane_));
      wrong = wrong_phase(squares, kFirstPhase) | parts.wrong(phase);
    } while (__any_sync(~0u, wrong & 1));
    const float scale = inverse_rms(squares, c_.args.p.eps);
    float x[8];
    parts.add_up(x);
    const int half = group_ % 2, matrix = group_ / 2;
    const float(&rotary)[2][kDim / 2] = c_.shared.rotary[warp_];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float mine = x[i] * scale, other = __shfl_xor_sync(~0u, mine, 4);  // 32 columns away
      const int column = column_of(lane_, i);
      const float cosine = rotary[0][column], sine = rotary[1][column];
      x[i] = matrix == 2 ? mine : mine * cosine + (half ? other : -other) * sine;
    }
    if (lane_ < 4 * (kFresh / 32)) {
      const StepParams& p = c_.args.p;
      T* cache = nullptr;
      if (unit.newest >= 0 && matrix > 0) {
        T* base = static_cast<T*>(matrix == 1 ? p.k_cache : p.v_cache);
        const int64_t(&stride)[4] = matrix == 1 ? p.k_stride : p.v_stride;
        cache = base + layer * stride[0] + unit.cache_row * stride[1] + unit.newest * int64_t{kDim} + c_.group * stride[3];
      }
      uint16_t* to = c_.shared.fresh[warp_][matrix];
#pragma unroll
      for (int i = 0; i < 8; i += 2) {
        const uint32_t word = pack2<T>(x[i], x[i + 1]);
        const int column = 32 * half + column_of(lane_, i);
        *reinterpret_cast<uint32_t*>(to + column) = word;
        if (cache != nullptr) *reinterpret_cast<uint32_t*>(cache + column) = word;
      }
    }
    __syncwarp();
  }

 private:
  const Cta& c_;
  int warp_, lane_, group_;
};

}  // namespace vivace::mesh
