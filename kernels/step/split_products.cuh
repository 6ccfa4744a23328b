// The products of the split step and what follows from them.
//
// A part's 64 rows are the M operand of wgmma, the features of the warpgroup are N. A thread holds rows lane / 4 and + 8 of
// its warp's 16, features 8 u + 2 (lane % 4) + {0, 1}: acc[4 u + {0, 1}] and acc[4 u + {2, 3}]. The warpgroups of a CTA are
// two workers, 2 cta and 2 cta + 1: a worker has an eighth of a head's q, k and v, 8 features of the residual, 32 of gate
// and up.
#pragma once

#include "kernels/common/wgmma.cuh"
#include "kernels/step/silu.cuh"
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
        feature_(2 * (lane % 4)) {}

  /// Everything of a step, in the order of the loading threads.
  __device__ __forceinline__ void run() {
    const int layers = static_cast<int>(c_.args.p.layers);
    embed();
#pragma unroll
    for (int i = 0; i < S::parts; ++i) begin(parts_[i], i);
    for (int part = 0; part < S::parts; ++part) qkv(0, part);
    for (int layer = 0; layer < layers; ++layer) {
      for (int part = 0; part < S::parts; ++part) {
        out(layer, part);
        gate_up(part);
        down(part);
        add_down(layer, part);
        if (layer + 1 < layers) {
          qkv(layer + 1, part);
        } else {
          head(part);
        }
      }
    }
  }

 private:
  using L = Layout<S::heads>;

  /// What this thread keeps of its two rows of a part.
  struct Part {
    float residual[4];  // features feature_ + {0, 1} of the worker's 8
    int cache_row[2], newest[2];
    float cosine[2][2], sine[2][2];  // (row, feature)
  };
  /// The state is in registers, which have no index: the parts take turns to be the first.
  __device__ __forceinline__ void turn() {
    const Part first = parts_[0];
#pragma unroll
    for (int i = 0; i + 1 < S::parts; ++i) parts_[i] = parts_[i + 1];
    parts_[S::parts - 1] = first;
  }
  __device__ __forceinline__ bool has(int i, int part) const { return row_ + 8 * i < c_.rows_of(part); }

  __device__ __forceinline__ void begin(Part& mine, int part) {
    const StepParams& p = c_.args.p;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = part * c_.most() + row_ + 8 * i;
      mine.cache_row[i] = 0;
      mine.newest[i] = -1;
      mine.cosine[i][0] = mine.cosine[i][1] = mine.sine[i][0] = mine.sine[i][1] = 0.0f;
      if (!has(i, part)) continue;
      mine.cache_row[i] = max(0, p.cache_batch_idx[row]);
      mine.newest[i] = step::newest_key(c_.args.p, row);
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

  /// The residual stream's first values; what the first layer reads. All parts' loads first: each waits for the one before.
  __device__ __forceinline__ void embed() {
    const StepParams& p = c_.args.p;
    int64_t request[S::parts][2], token[S::parts][2], position[S::parts][2];
    const auto each = [&](auto&& body) {
#pragma unroll
      for (int part = 0; part < S::parts; ++part) {
#pragma unroll
        for (int i = 0; i < 2; ++i) body(part, i);
      }
    };
    each([&](int part, int i) {  // past the end the last row again
      const int row = min(part * c_.most() + row_ + 8 * i, c_.rows - 1);
      request[part][i] = clamp_index(p.row_request[row], p.requests);
    });
    each([&](int part, int i) {
      token[part][i] = clamp_index(p.tokens[request[part][i]], p.speech_tokens);
      position[part][i] = clamp_index(p.positions[request[part][i]], p.speech_positions);
    });
    each([&](int part, int i) {
      const float2 a = pair(p.speech_emb, token[part][i] * S::hidden + 8 * worker_ + feature_);
      const float2 b = pair(p.speech_pos_emb, position[part][i] * S::hidden + 8 * worker_ + feature_);
      parts_[part].residual[2 * i] = to_float(from_float<T>(a.x + b.x));
      parts_[part].residual[2 * i + 1] = to_float(from_float<T>(a.y + b.y));
    });
    const float2 gain = pair(p.input_norm, 8 * worker_ + feature_);
    for (int part = 0; part < S::parts; ++part) {
      send_residual(gain, part);
      turn();
    }
  }

  /// Ends the part's turn.
  __device__ __forceinline__ void qkv(int layer, int part) {
    const StepParams& p = c_.args.p;
    const Squares squares = load_squares(part);
    float acc[12];
    multiply<24, 2>(acc, 3072, group_ * 6144);
    normalise(squares);
    const bool high = feature_ >= 4;
    const int head = worker_ / 8;
    const int dim = 4 * (worker_ % 8) + feature_ % 4 + (high ? 32 : 0);
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
          v[m][j] = v[m][j] * parts_[0].cosine[i][j] + (high ? other : -other) * parts_[0].sine[i][j];
        }
      }
      if (!has(i, part)) continue;
      uint32_t* fresh = reinterpret_cast<uint32_t*>(c_.fresh(layer, part, row, head)) + dim / 2;
#pragma unroll
      for (int m = 0; m < 3; ++m) store_relaxed(fresh + 32 * m, ~pack2<T>(v[m][0], v[m][1]));
      if (parts_[0].newest[i] < 0) continue;  // padding, or a cache that is full
      const int64_t key = parts_[0].newest[i] * int64_t{64} + dim;
      store(static_cast<T*>(p.k_cache) + layer * p.k_stride[0] + parts_[0].cache_row[i] * p.k_stride[1] +
                head * p.k_stride[3] + key,
            v[1][0], v[1][1]);
      store(static_cast<T*>(p.v_cache) + layer * p.v_stride[0] + parts_[0].cache_row[i] * p.v_stride[1] +
                head * p.v_stride[3] + key,
            v[2][0], v[2][1]);
    }
    turn();
  }

  __device__ __forceinline__ void out(int layer, int part) {
    const float2 gain = pair(c_.args.p.post_norm, int64_t{layer} * S::hidden + 8 * worker_ + feature_);
    float acc[4];
    multiply<8, S::out_blocks, true>(acc, 2048, group_ * 1024);
#pragma unroll
    for (int i = 0; i < 4; ++i) parts_[0].residual[i] += acc[i];
    send_residual(gain, part);
  }

  __device__ __forceinline__ void gate_up(int part) {
    const Squares squares = load_squares(part);
    float acc[32];
    multiply<64, 1>(acc, 16384, group_ * 8192);
    normalise(squares);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = row_ + 8 * i;
      const float scale = c_.shared.inverse[row];
      if (!has(i, part)) continue;
      T* to = c_.template eight<T>(part, L::gated, row, 32 * worker_) + feature_;
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        const float* gate = acc + 4 * u + 2 * i;
        store_kept(to + kPartRows * 8 * u, pack2<T>(step::silu(gate[0] * scale) * (gate[16] * scale),
                                                    step::silu(gate[1] * scale) * (gate[17] * scale)));
      }
    }
    signal(Counters::gated + 4 * part + c_.slice);
  }

  /// Sums over the CTA's quarter of the columns, for the owners of the features.
  __device__ __forceinline__ void down(int part) {
    float acc[16];
    multiply<32, 2>(acc, 8192, group_ * 4096);
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      float* to = sums(part, 8 * c_.tile + 4 * group_ + u, c_.slice);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float a = acc[4 * u + 2 * i], b = acc[4 * u + 2 * i + 1];
        const float2 sum = make_float2(a == 0.0f ? -0.0f : a, b == 0.0f ? -0.0f : b);
        if (has(i, part)) store_relaxed(reinterpret_cast<float2*>(to + 64 * i), sum);
      }
    }
    sm90::named_barrier_sync(1 + group_, 128);
    if (warp_ == 0 && lane_ == 0) add_relaxed(c_.counter(Counters::down + 32 * part + 2 * c_.tile + group_));
  }
  __device__ __forceinline__ void add_down(int layer, int part) {
    const StepParams& p = c_.args.p;
    const bool last = layer + 1 == static_cast<int>(p.layers);
    const float2 gain =
        pair(last ? p.norm : p.input_norm, (last ? 0 : int64_t{layer + 1} * S::hidden) + 8 * worker_ + feature_);
    wait_ready();
    float2 from[S::slices][2] = {};
    const auto each = [&](auto&& body) {
#pragma unroll
      for (int s = 0; s < S::slices; ++s) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (has(i, part)) body(from[s][i], reinterpret_cast<float2*>(sums(part, worker_, s) + 64 * i));
        }
      }
    };
    step::Watchdog<kMaxTurns> watchdog;
    for (bool there = false; !there; watchdog.check()) {
      there = true;
      each([](float2& to, const float2* at) { to = load_relaxed(at); });
      each([&](float2 x, const float2*) { there = there && is_there(x); });
      there = all_lanes(there);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float2 sum = from[0][i];
#pragma unroll
      for (int s = 1; s < S::slices; ++s) sum.x += from[s][i].x, sum.y += from[s][i].y;
      parts_[0].residual[2 * i] += sum.x;
      parts_[0].residual[2 * i + 1] += sum.y;
    }
    send_residual(gain, part);
    // Armed for the next layer: whoever writes there has heard of the x between `out` and gate_up.
    each([](float2, float2* at) { store_relaxed(at, make_float2(0.0f, 0.0f)); });
  }

  /// Ends the part's turn.
  __device__ __forceinline__ void head(int part) {
    const StepParams& p = c_.args.p;
    const Squares squares = load_squares(part);
    for (int tile = c_.cta; c_.has_tile(tile); tile += S::products) {
      float acc[32];
      multiply<64, 1>(acc, 16384, group_ * 8192);
      if (tile == c_.cta) normalise(squares);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (!has(i, part)) continue;
        const int64_t row = part * c_.most() + row_ + 8 * i;
        const float scale = c_.shared.inverse[row_ + 8 * i];
#pragma unroll
        for (int u = 0; u < 8; ++u) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int64_t at = int64_t{S::tile} * tile + S::tile / 2 * group_ + 8 * u + feature_ + j;
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

  static __device__ __forceinline__ float2 pair(const void* from, int64_t at) {
    return unpack2<T>(*reinterpret_cast<const uint32_t*>(static_cast<const T*>(from) + at));
  }
  static __device__ __forceinline__ void store(T* to, float a, float b) {
    *reinterpret_cast<uint32_t*>(to) = pack2<T>(a, b);
  }
  /// (64, 8) of an owner's features and a slice: this thread's two.
  __device__ __forceinline__ float* sums(int part, int owner, int slice) const {
    return c_.template at<float>(part, L::sums) + (owner * S::slices + slice) * (kPartRows * 8) + row_ * 8 + feature_;
  }

  /// Makes what this warpgroup has written known, and counts it.
  __device__ __forceinline__ void signal(int counter) {
    sm90::named_barrier_sync(1 + group_, 128);
    if (warp_ == 0 && lane_ == 0) add_release(c_.counter(counter));
  }

  /// This worker's 8 features of residual * gain, and their squares.
  __device__ __forceinline__ void send_residual(float2 gain, int part) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = row_ + 8 * i;
      const float a = parts_[0].residual[2 * i], b = parts_[0].residual[2 * i + 1];
      float sum = a * a + b * b;
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      if (!has(i, part)) continue;
      store_kept(c_.template eight<T>(part, L::x, row, 8 * worker_) + feature_, pack2<T>(a * gain.x, b * gain.y));
      if (feature_ == 0) {
        store_kept(c_.template at<float>(part, L::squares) + row * S::workers + worker_, __float_as_uint(sum));
      }
    }
    signal(Counters::x + part);
  }

  /// Partial sums of squares of rows 4 group + warp, + 8, ...: four a lane.
  static constexpr int kRowsOfWarp = 8;
  struct Squares {
    float4 part[kRowsOfWarp];
  };
  __device__ __forceinline__ Squares load_squares(int part) {
    wait_ready();
    Squares squares;
#pragma unroll
    for (int i = 0; i < kRowsOfWarp; ++i) {
      const int row = 4 * group_ + warp_ + i * 8;
      squares.part[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (row < c_.rows_of(part) && lane_ < S::workers / 4) {
        squares.part[i] =
            __ldcg(reinterpret_cast<const float4*>(c_.template at<float>(part, L::squares) + row * S::workers) + lane_);
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
    for (int width = kRowsOfWarp / 2; width > 0; width /= 2) {
      const bool upper = lane_ & (4 * width);
#pragma unroll
      for (int i = 0; i < width; ++i) {
        const float mine = upper ? sum[i + width] : sum[i], other = upper ? sum[i] : sum[i + width];
        sum[i] = mine + __shfl_xor_sync(~0u, other, 4 * width);
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

  /// sum = x (64, hidden) times kN features; x in blocks of 64 columns, swizzled rows or eights of columns. A stage of the
  /// ring has kPerStage blocks, `block_bytes` apart, which begin at `offset`, eights of features 1024 bytes apart, swizzled.
  template <int kN, int kPerStage, bool kSwizzled = false>
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
        const uint64_t a = kSwizzled ? sm90::wgmma_descriptor(x + i * S::block_bytes, 0) : eights(x + i * S::block_bytes);
        constexpr int kNext = kSwizzled ? 2 : 2 * kPartRows;  // 16 columns further, in 16 bytes
#pragma unroll
        for (int k = 0; k < 4; ++k) sm90::Wgmma<T, kN>::ss(sum, a + kNext * k, w + 2 * k, true);
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
  /// Descriptor of (columns / 8, 64 rows, 8): not swizzled, 8 rows are 128 bytes, the next 8 columns 64 rows further.
  static __device__ __forceinline__ uint64_t eights(uint32_t address) {
    return static_cast<uint64_t>((address & 0x3ffff) >> 4) | static_cast<uint64_t>(kPartRows) << 16 |
           uint64_t{128 >> 4} << 32;
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
  Part parts_[S::parts];  // the first is the one at work
};

}  // namespace vivace::split
