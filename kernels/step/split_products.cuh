// The products of the split step and what follows from them.
//
// A half's 64 rows are the M operand of wgmma, the features of the warpgroup are N. A thread holds rows lane / 4 and + 8 of
// its warp's 16, features 8 u + 2 (lane % 4) + {0, 1}: acc[4 u + {0, 1}] and acc[4 u + {2, 3}]. The warpgroups of a CTA are
// two workers, 2 cta and 2 cta + 1: a worker has an eighth of a head's q, k and v, 8 features of the residual, 32 of gate
// and up.
#pragma once

#include "kernels/common/wgmma.cuh"
#include "kernels/step/split_parts.cuh"
#include "kernels/step/table.cuh"

namespace vivace::split {

template <typename T, typename S>
class Products {
 public:
  __device__ __forceinline__ Products(const ProductCta<S>& c, int group, int warp, int lane)
      : c_(c),
        worker_(2 * c.cta + group),
        group_(group),
        warp_(warp),
        lane_(lane),
        row_(16 * warp + lane / 4),
        feature_(2 * (lane % 4)) {
    begin(other_, 1);
    begin(mine_, 0);
  }

  /// Everything of a step, in the order of the loading threads.
  __device__ __forceinline__ void run() {
    const int layers = static_cast<int>(c_.args.p.layers);
    for (int half = 0; half < 2; ++half) embed(half);
    for (int half = 0; half < 2; ++half) qkv(0, half);
    for (int layer = 0; layer < layers; ++layer) {
      for (int half = 0; half < 2; ++half) {
        out(layer, half);
        gate_up(half);
        down(half);
        add_down(layer, half);
        if (layer + 1 < layers) {
          qkv(layer + 1, half);
        } else {
          head(half);
        }
      }
    }
  }

 private:
  using L = Layout<S::heads>;

  /// What this thread keeps of its two rows of a half.
  struct Half {
    float residual[4];  // features feature_ + {0, 1} of the worker's 8
    int cache_row[2], newest[2];
    float cosine[2][2], sine[2][2];  // (row, feature)
  };
  /// The state is in registers, which have no index: the halves take turns.
  __device__ __forceinline__ void turn() {
    const Half last = mine_;
    mine_ = other_;
    other_ = last;
  }
  __device__ __forceinline__ bool has(int i, int half) const { return row_ + 8 * i < c_.rows_of(half); }

  __device__ __forceinline__ void begin(Half& mine, int half) {
    const StepParams& p = c_.args.p;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = half * c_.first() + row_ + 8 * i;
      mine.cache_row[i] = 0;
      mine.newest[i] = -1;
      mine.cosine[i][0] = mine.cosine[i][1] = mine.sine[i][0] = mine.sine[i][1] = 0.0f;
      if (!has(i, half)) continue;
      mine.cache_row[i] = max(0, p.cache_batch_idx[row]);
      mine.newest[i] = c_.newest(row);
      const int64_t last = p.rotary_positions - 1, n = p.cache_seqlens[row];
      const int64_t at = (n < 0 ? 0 : n < last ? n : last) * 32 + 4 * (worker_ % 8) + feature_ % 4;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const bool fp32 = p.rotary_dtype == DType::kFloat32;
        mine.cosine[i][j] =
            fp32 ? static_cast<const float*>(p.rotary_cos)[at + j] : to_float(static_cast<const T*>(p.rotary_cos)[at + j]);
        mine.sine[i][j] =
            fp32 ? static_cast<const float*>(p.rotary_sin)[at + j] : to_float(static_cast<const T*>(p.rotary_sin)[at + j]);
      }
    }
  }

  /// The residual stream's first values; what the first layer reads.
  __device__ __forceinline__ void embed(int half) {
    const StepParams& p = c_.args.p;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      mine_.residual[2 * i] = mine_.residual[2 * i + 1] = 0.0f;
      if (!has(i, half)) continue;
      const int64_t request = clamp_index(p.row_request[half * c_.first() + row_ + 8 * i], p.requests);
      const int64_t token = clamp_index(p.tokens[request], p.speech_tokens);
      const int64_t position = clamp_index(p.positions[request], p.speech_positions);
      const float2 a = pair(p.speech_emb, token * S::hidden + 8 * worker_ + feature_);
      const float2 b = pair(p.speech_pos_emb, position * S::hidden + 8 * worker_ + feature_);
      mine_.residual[2 * i] = to_float(from_float<T>(a.x + b.x));
      mine_.residual[2 * i + 1] = to_float(from_float<T>(a.y + b.y));
    }
    send_residual(pair(p.input_norm, 8 * worker_ + feature_), half);
    turn();
  }

  /// Ends the half's turn.
  __device__ __forceinline__ void qkv(int layer, int half) {
    const StepParams& p = c_.args.p;
    const Squares squares = load_squares(half);
    float acc[12];
    multiply<24, 2>(acc, 6144, group_ * 3072);
    normalise(squares);
    const bool high = feature_ >= 4;
    const int head = worker_ / 8;
    const int64_t dim = 4 * (worker_ % 8) + feature_ % 4 + (high ? 32 : 0);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = row_ + 8 * i;
      const float scale = c_.shared.inverse[row];
      float v[3][2];
#pragma unroll
      for (int m = 0; m < 3; ++m) v[m][0] = acc[4 * m + 2 * i] * scale, v[m][1] = acc[4 * m + 2 * i + 1] * scale;
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float other = __shfl_xor_sync(~0u, v[m][j], 2);
          v[m][j] = v[m][j] * mine_.cosine[i][j] + (high ? other : -other) * mine_.sine[i][j];
        }
      }
      if (!has(i, half)) continue;
      store(c_.template at<T>(half, L::q) + row * S::hidden + head * 64 + dim, v[0][0], v[0][1]);
      if (mine_.newest[i] < 0) continue;  // padding, or a cache that is full
      const int64_t key = mine_.newest[i] * int64_t{64} + dim;
      store(static_cast<T*>(p.k_cache) + layer * p.k_stride[0] + mine_.cache_row[i] * p.k_stride[1] + head * p.k_stride[3] +
                key,
            v[1][0], v[1][1]);
      store(static_cast<T*>(p.v_cache) + layer * p.v_stride[0] + mine_.cache_row[i] * p.v_stride[1] + head * p.v_stride[3] +
                key,
            v[2][0], v[2][1]);
    }
    signal(Counters::queries + half);
    turn();
  }

  __device__ __forceinline__ void out(int layer, int half) {
    const float2 gain = pair(c_.args.p.post_norm, int64_t{layer} * S::hidden + 8 * worker_ + feature_);
    float acc[4];
    multiply<8, S::out_blocks>(acc, 2048, group_ * 1024);
#pragma unroll
    for (int i = 0; i < 4; ++i) mine_.residual[i] += acc[i];
    send_residual(gain, half);
  }

  __device__ __forceinline__ void gate_up(int half) {
    const Squares squares = load_squares(half);
    float acc[32];
    multiply<64, 1>(acc, 16384, group_ * 8192);
    normalise(squares);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = row_ + 8 * i;
      const float scale = c_.shared.inverse[row];
      if (!has(i, half)) continue;
      T* to = c_.template at<T>(half, L::gated) + row * S::intermediate + 32 * worker_ + feature_;
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        const float* gate = acc + 4 * u + 2 * i;
        store(to + 8 * u, silu(gate[0] * scale) * (gate[16] * scale), silu(gate[1] * scale) * (gate[17] * scale));
      }
    }
    signal(Counters::gated + 4 * half + c_.slice);
  }

  /// Sums over the CTA's quarter of the columns, for the owners of the features.
  __device__ __forceinline__ void down(int half) {
    float acc[16];
    multiply<32, 2>(acc, 8192, group_ * 4096);
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      float* to = sums(half, 8 * c_.tile + 4 * group_ + u, c_.slice);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (has(i, half)) *reinterpret_cast<float2*>(to + 64 * i) = make_float2(acc[4 * u + 2 * i], acc[4 * u + 2 * i + 1]);
      }
    }
    signal(Counters::down + 32 * half + 2 * c_.tile + group_);
  }
  __device__ __forceinline__ void add_down(int layer, int half) {
    const StepParams& p = c_.args.p;
    const bool last = layer + 1 == static_cast<int>(p.layers);
    const float2 gain =
        pair(last ? p.norm : p.input_norm, (last ? 0 : int64_t{layer + 1} * S::hidden) + 8 * worker_ + feature_);
    wait_ready();
    float2 part[S::slices][2];
#pragma unroll
    for (int s = 0; s < S::slices; ++s) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        part[s][i] = has(i, half) ? __ldcg(reinterpret_cast<const float2*>(sums(half, worker_, s) + 64 * i))
                                  : make_float2(0.0f, 0.0f);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float2 sum = part[0][i];
#pragma unroll
      for (int s = 1; s < S::slices; ++s) sum.x += part[s][i].x, sum.y += part[s][i].y;
      mine_.residual[2 * i] += sum.x;
      mine_.residual[2 * i + 1] += sum.y;
    }
    send_residual(gain, half);
  }

  /// Ends the half's turn.
  __device__ __forceinline__ void head(int half) {
    const StepParams& p = c_.args.p;
    const Squares squares = load_squares(half);
    for (int tile = c_.cta; c_.has_tile(tile); tile += S::products) {
      float acc[16];
      multiply<32, 2>(acc, 8192, group_ * 4096);
      if (tile == c_.cta) normalise(squares);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (!has(i, half)) continue;
        const int64_t row = half * c_.first() + row_ + 8 * i;
        const float scale = c_.shared.inverse[row_ + 8 * i];
#pragma unroll
        for (int u = 0; u < 4; ++u) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int64_t at = int64_t{64} * tile + 32 * group_ + 8 * u + feature_ + j;
            if (at < p.vocab) p.logits[row * p.vocab + at] = acc[4 * u + 2 * i + j] * scale;
          }
        }
      }
    }
    turn();
  }

  __device__ __forceinline__ void wait_ready() {
    barrier_wait(&c_.shared.ready, ready_);
    ready_ ^= 1;
  }

  static __device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }
  static __device__ __forceinline__ float2 pair(const void* from, int64_t at) {
    return unpack2<T>(*reinterpret_cast<const uint32_t*>(static_cast<const T*>(from) + at));
  }
  static __device__ __forceinline__ void store(T* to, float a, float b) {
    *reinterpret_cast<uint32_t*>(to) = pack2<T>(a, b);
  }
  /// (64, 8) of an owner's features and a slice: this thread's two.
  __device__ __forceinline__ float* sums(int half, int owner, int slice) const {
    return c_.template at<float>(half, L::sums) + (owner * S::slices + slice) * (kHalf * 8) + row_ * 8 + feature_;
  }

  /// Makes what this warpgroup has written known, and counts it.
  __device__ __forceinline__ void signal(int counter) {
    sm90::named_barrier_sync(1 + group_, 128);
    if (warp_ == 0 && lane_ == 0) add_release(c_.counter(counter));
  }

  /// This worker's 8 features of residual * gain, and their squares.
  __device__ __forceinline__ void send_residual(float2 gain, int half) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = row_ + 8 * i;
      const float a = mine_.residual[2 * i], b = mine_.residual[2 * i + 1];
      float sum = a * a + b * b;
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      if (!has(i, half)) continue;
      store(c_.template at<T>(half, L::x) + row * S::hidden + 8 * worker_ + feature_, a * gain.x, b * gain.y);
      if (feature_ == 0) c_.template at<float>(half, L::squares)[row * S::workers + worker_] = sum;
    }
    signal(Counters::x + half);
  }

  /// Partial sums of squares of rows 4 group + warp, + 8, ...: four a lane.
  static constexpr int kRowsOfWarp = 8;
  struct Squares {
    float4 part[kRowsOfWarp];
  };
  __device__ __forceinline__ Squares load_squares(int half) {
    wait_ready();
    Squares squares;
#pragma unroll
    for (int i = 0; i < kRowsOfWarp; ++i) {
      const int row = 4 * group_ + warp_ + i * 8;
      squares.part[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (row < c_.rows_of(half) && lane_ < S::workers / 4) {
        squares.part[i] =
            __ldcg(reinterpret_cast<const float4*>(c_.template at<float>(half, L::squares) + row * S::workers) + lane_);
      }
    }
    return squares;
  }
  __device__ __forceinline__ void normalise(const Squares& squares) const {
    float sum[kRowsOfWarp];
#pragma unroll
    for (int i = 0; i < kRowsOfWarp; ++i) {
      const float4 part = squares.part[i];
      sum[i] = (part.x + part.y) + (part.z + part.w);
    }
    // Lanes 4 i ... 4 i + 3 end with the sum of row i.
#pragma unroll
    for (int half = kRowsOfWarp / 2; half > 0; half /= 2) {
      const bool upper = lane_ & (4 * half);
#pragma unroll
      for (int i = 0; i < half; ++i) {
        const float mine = upper ? sum[i + half] : sum[i], other = upper ? sum[i] : sum[i + half];
        sum[i] = mine + __shfl_xor_sync(~0u, other, 4 * half);
      }
    }
    sum[0] += __shfl_xor_sync(~0u, sum[0], 1);
    sum[0] += __shfl_xor_sync(~0u, sum[0], 2);
    sm90::named_barrier_sync(3, 256);  // what was there has been read
    if (lane_ % 4 == 0) {
      c_.shared.inverse[4 * group_ + warp_ + lane_ / 4 * 8] = rsqrtf(sum[0] * (1.0f / S::hidden) + c_.args.p.eps);
    }
    sm90::named_barrier_sync(3, 256);
  }

  /// sum = x (64, hidden) times kN features; a stage of the ring has kPerStage blocks, `block_bytes` apart, which begin at
  /// `offset`, eights of features 1024 bytes apart, swizzled.
  template <int kN, int kPerStage>
  __device__ __forceinline__ void multiply(float (&sum)[kN / 2], uint32_t block_bytes, uint32_t offset) {
    constexpr int kStep = kPerStage < S::group ? kPerStage : S::group;
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) sum[i] = 0.0f;
    sm90::wgmma_hold(sum);
    int stage_read = -1, x_read = -1;  // what products under way still read for the last time
    for (int b = 0; b < S::blocks; b += kStep) {
      if (b % kPerStage == 0) barrier_wait(&c_.shared.full[ring_.slot], ring_.parity);
      if (b % S::group == 0) barrier_wait(&c_.shared.x_full[x_.slot], x_.parity);
      const uint32_t stage = ptx::shared_address(c_.ring) + ring_.slot * kStageBytes + offset + b % kPerStage * block_bytes;
      const uint32_t x = ptx::shared_address(c_.x) + (x_.slot * S::group + b % S::group) * S::block_bytes;
      sm90::wgmma_fence();
#pragma unroll
      for (int i = 0; i < kStep; ++i) {
        const uint64_t w = sm90::wgmma_descriptor(stage + i * block_bytes, 0);
        const uint64_t a = sm90::wgmma_descriptor(x + i * S::block_bytes, 0);
#pragma unroll
        for (int k = 0; k < 4; ++k) sm90::Wgmma<T, kN>::ss(sum, a + 2 * k, w + 2 * k, true);  // 32 bytes further
      }
      sm90::wgmma_commit();
      sm90::wgmma_wait<1>();
      release(stage_read, x_read);
      const bool ends_stage = (b + kStep) % kPerStage == 0, ends_x = (b + kStep) % S::group == 0;
      stage_read = ends_stage ? ring_.slot : -1;
      x_read = ends_x ? x_.slot : -1;
      if (ends_stage) ring_.next(S::stages);
      if (ends_x) x_.next(S::groups);
    }
    sm90::wgmma_wait<0>();
    release(stage_read, x_read);
    sm90::wgmma_hold(sum);
  }
  __device__ __forceinline__ void release(int stage, int x) const {
    if (lane_ != 0) return;
    if (stage >= 0) sm90::barrier_arrive(&c_.shared.empty[stage]);
    if (x >= 0) sm90::barrier_arrive(&c_.shared.x_empty[x]);
  }

  const ProductCta<S>& c_;
  int worker_, group_, warp_, lane_, row_, feature_;
  uint32_t ready_ = 0;
  Position ring_, x_;
  Half mine_, other_;
};

}  // namespace vivace::split
