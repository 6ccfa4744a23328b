// Philox4x32-10, a counter-based generator: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
// The same bits on CPU and CUDA, so that what is drawn depends on its coordinates alone.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define VIVACE_HD __host__ __device__ __forceinline__
#else
#define VIVACE_HD inline
#endif

namespace vivace {

struct Philox4 {
  uint32_t x[4];
};

VIVACE_HD Philox4 philox4x32_10(uint64_t key, uint64_t counter_lo, uint64_t counter_hi) {
  uint32_t c0 = static_cast<uint32_t>(counter_lo), c1 = static_cast<uint32_t>(counter_lo >> 32);
  uint32_t c2 = static_cast<uint32_t>(counter_hi), c3 = static_cast<uint32_t>(counter_hi >> 32);
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0;
    const uint64_t p1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return Philox4{{c0, c1, c2, c3}};
}

/// Uniform in (0, 1], 24 bits.
VIVACE_HD float philox_uniform(uint32_t bits) { return static_cast<float>((bits >> 8) + 1) * (1.0f / 16777216.0f); }

/// Sampling: the uniform of vocabulary entry i at `step` of a request with `seed`.
VIVACE_HD float sampling_uniform(int64_t seed, int64_t step, int64_t i) {
  const Philox4 r = philox4x32_10(static_cast<uint64_t>(seed), static_cast<uint64_t>(i >> 2), static_cast<uint64_t>(step));
  return philox_uniform(r.x[i & 3]);
}

/// Dropout keeps element (head_row, i, j), head_row = batch index * heads + head, iff its byte is at most
/// floor((1 - p) * 255), as flash-attn does; survivors are scaled by 1 / (1 - p). One draw serves the 16 columns
/// 16 * (j / 16) ... + 15 of a row: byte j % 4 of word (j % 16) / 4.
VIVACE_HD uint32_t dropout_threshold(float p) {
  return static_cast<uint32_t>((1.0f - p) * 255.0f + 1e-3f);  // p was rounded to fp32: 0.6 shall give 102, not 101
}
VIVACE_HD uint32_t dropout_byte(const Philox4& draw, int column) {
  return (draw.x[(column & 15) >> 2] >> ((column & 3) * 8)) & 0xffu;
}
VIVACE_HD Philox4 dropout_draw(int64_t seed, int64_t offset, int64_t head_row, int64_t i, int64_t j) {
  return philox4x32_10(static_cast<uint64_t>(seed), (static_cast<uint64_t>(i) << 32) | static_cast<uint32_t>(j >> 4),
                       static_cast<uint64_t>(offset) + (static_cast<uint64_t>(head_row) << 32));
}

}  // namespace vivace
