// The first kernel of the chain: x = speech_emb[token] + speech_pos_emb[position] for every row, as the residual stream,
// times the first norm's gain, and its partial sums of squares.
#pragma once

#include "kernels/common/ptx.cuh"
#include "kernels/common/vector.cuh"
#include "kernels/step/step.h"
#include "kernels/step/table.cuh"

namespace vivace {

struct EmbedArgs {
  int32_t rows, hidden;
  int64_t requests, tokens, positions;  // sizes of the tables
  const int64_t* token;                 // (requests)
  const int64_t* position;              // (requests)
  const int64_t* row_request;           // (rows)
  const void* token_table;              // (tokens, hidden)
  const void* position_table;           // (positions, hidden)
  const void* gain;                     // (hidden)
  float* residual;                      // (rows, hidden)
  void* x_next;                         // (rows, hidden)
  float* squares;                       // (rows, hidden / square_width)
  int32_t square_width;                 // 16 or 64
};

inline constexpr int kEmbedThreads = 128;

/// A CTA a row; a thread 8 elements at a time.
template <typename T>
__global__ void __launch_bounds__(kEmbedThreads) embed_kernel(const __grid_constant__ EmbedArgs args) {
  const int64_t row = blockIdx.x;
  ptx::grid_dependency_launch();
  const int64_t request = clamp_index(args.row_request[row], args.requests);
  const int64_t token = clamp_index(args.token[request], args.tokens);
  const int64_t position = clamp_index(args.position[request], args.positions);
  const int lanes = args.square_width / 8;  // that share a part
  for (int at = 0; at < args.hidden; at += kEmbedThreads * 8) {
    const int i = at + static_cast<int>(threadIdx.x) * 8;
    const bool exists = i < args.hidden;
    float x[8], y[8], sum = 0.0f;
    if (exists) {
      load_vector<8>(static_cast<const T*>(args.token_table) + token * args.hidden + i, x);
      load_vector<8>(static_cast<const T*>(args.position_table) + position * args.hidden + i, y);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        x[j] = to_float(from_float<T>(x[j] + y[j]));
        sum += x[j] * x[j];
      }
      store_vector<8>(args.residual + row * args.hidden + i, x);
      load_vector<8>(static_cast<const T*>(args.gain) + i, y);
#pragma unroll
      for (int j = 0; j < 8; ++j) x[j] *= y[j];
      store_vector<8>(static_cast<T*>(args.x_next) + row * args.hidden + i, x);
    }
    for (int distance = lanes / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    if (exists && static_cast<int>(threadIdx.x) % lanes == 0) {
      args.squares[row * (args.hidden / args.square_width) + i / args.square_width] = sum;
    }
  }
}

}  // namespace vivace
