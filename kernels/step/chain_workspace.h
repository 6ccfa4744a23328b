// Layout of StepParams::workspace for the chain. Nothing in it outlives a call.
#pragma once

#include <cstddef>

#include "kernels/step/step.h"

namespace vivace {

/// Byte offsets; parts are aligned to 256 bytes.
struct ChainWorkspace {
  size_t residual = 0;   // (rows, hidden) fp32
  size_t x = 0;          // (rows, hidden): residual * gain of the norm that comes next
  size_t squares = 0;    // (rows, hidden / 16) fp32 partial sums of the residual's squares; a family may use fewer
  size_t q = 0;          // (rows, heads * head_dim), rotated
  size_t attention = 0;  // (rows, heads * head_dim)
  size_t gated = 0;      // (rows, intermediate)
  size_t lse = 0;        // (rows, heads) fp32, for probes
  size_t bytes = 0;      // of the whole
};

inline ChainWorkspace chain_workspace(const StepParams& p) {
  ChainWorkspace w;
  const auto part = [&](size_t bytes) {
    const size_t at = w.bytes;
    w.bytes = (at + bytes + 255) / 256 * 256;
    return at;
  };
  const size_t rows = static_cast<size_t>(p.rows);
  const size_t hidden = static_cast<size_t>(p.hidden);
  const size_t heads = static_cast<size_t>(p.heads * p.head_dim), inter = static_cast<size_t>(p.intermediate);
  w.residual = part(rows * hidden * 4);
  w.x = part(rows * hidden * 2);
  w.squares = part(rows * hidden / 16 * 4);
  w.q = part(rows * heads * 2);
  w.attention = part(rows * heads * 2);
  w.gated = part(rows * inter * 2);
  w.lse = part(rows * static_cast<size_t>(p.heads) * 4);
  return w;
}

}  // namespace vivace
