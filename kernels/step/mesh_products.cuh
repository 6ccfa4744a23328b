// The products of the mesh step. The rows are the M of wgmma: warp w of either warpgroup has rows w, w + 4, ... Operand A
// comes from registers, into which a lane reads its part straight from where other CTAs have written it; the weights, B,
// from the ring.
#pragma once

#include "kernels/common/wgmma.cuh"
#include "kernels/step/mesh_residual.cuh"

namespace vivace::mesh {

/// Operand A, kCount groups of 32 columns: a lane's vectors of row row_, and of the one 32 further on.
template <int kCount>
struct Operand {
  uint4 v[kCount][2];
};

template <typename T>
class Products {
 public:
  __device__ __forceinline__ Products(const Cta& c, int warp, int lane)
      : c_(c),
        lane_(lane),
        half_(warp / 4),
        pair_(warp % 4),
        row_(lane / 4 * 4 + pair_),
        first_(min(row_, last_row(c.rows, pair_))),
        second_(min(row_ + 32, last_row(c.rows, pair_))),
        has_rows_(pair_ < c.rows),
        has_second_(pair_ + 32 < c.rows) {}

  /// Partial sums of q, k and v: the group's head, over the columns of the CTA's block.
  __device__ __forceinline__ void qkv(int layer, Position& ring) {
    Operand<kColumns / 32> a;
    if (layer == 0) {
      embed(a);
    } else {
      gather<true>(a, x(kColumns / 32 * c_.block), kHidden / 32, kLastPhase);
    }
    if (threadIdx.x == 0) c_.allow(kMoreUnderWay);
    // The first warpgroup has q and the first half of k, the second v and the other half.
    float sum[32], k[16];
    clear(sum);
    clear(k);
    Position at = ring;
    const uint8_t* stage[3];
#pragma unroll
    for (int m = 0; m < 3; ++m) stage[m] = c_.wait(at), at.next();
    sm90::wgmma_fence();
#pragma unroll
    for (int g = 0; g < kColumns / 32; ++g) {
      multiply<64>(sum, a.v[g], (half_ == 0 ? stage[0] : stage[2]) + g / 2 * 8192 + g % 2 * 64);
      multiply<32>(k, a.v[g], stage[1] + g / 2 * 8192 + half_ * 4096 + g % 2 * 64);
    }
    sm90::wgmma_commit();
    finish(ring, 3);
    sm90::wgmma_hold(sum);
    sm90::wgmma_hold(k);
    const size_t pitch = kBlocks * kFresh * 2;
    uint8_t* to = c_.at<uint8_t>(Layout::fresh) + c_.group * kMaxRows * pitch + c_.block * kFresh * 2;
    send(sum, to + half_ * 256, pitch, phase_of(layer));
    send(k, to + 128 + half_ * 64, pitch, phase_of(layer));
  }

  /// Partial sums of `out` over the group's head.
  __device__ __forceinline__ void out(int layer, Position& ring) {
    Operand<kDim / 32> a;
    gather<false>(a, c_.attention(), kDim / 32, phase_of(layer));
    share<1>(a, ring, kMiddlePhase);
  }

  /// silu(gate) * up of the CTA's intermediates.
  __device__ __forceinline__ void gate_up(int layer, Position& ring) {
    float all[32], sum[16];
    clear(all);
    uint4 squares;
    multiply_arriving(all, squares, ring, kMiddlePhase);
    add_halves(sum, all);
    const float scale = inverse(squares, kMiddlePhase);
    float gated[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) gated[i] = silu(sum[i] * scale) * (sum[8 + i] * scale);
    const int row = row_ + 32 * half_;
    if (row < c_.rows) {
      uint8_t* to = c_.gated() + place_of(row, c_.block, kMiddle / 32) + lane_ % 4 * 16;
      step::store_b128(to, vector_of<T>(gated, phase_of(layer)));
    }
    __syncwarp();
  }

  /// Partial sums of `down` over the group's intermediates.
  __device__ __forceinline__ void down(int layer, Position& ring) {
    Operand<kMiddle / 32> a;
    gather<true>(a, c_.gated(), kMiddle / 32, phase_of(layer));
    if (threadIdx.x == 0 && c_.has_many_keys()) c_.allow(kSomeUnderWay);
    share<kMiddle / 64>(a, ring, kLastPhase);
    if (threadIdx.x == 0 && c_.has_many_keys()) c_.allow(kUnderWay);
  }

  __device__ __forceinline__ void head(Position& ring) {
    const StepParams& p = c_.args.p;
    Operand<kHidden / 64> a;
    gather<true>(a, half_of_x(), kHidden / 32, kLastPhase);
    uint4 squares = ask_for_squares(kLastPhase);
    const float scale = inverse(squares, kLastPhase);
    if (c_.rest() > 0) sm90::named_barrier_arrive(kLast, kConsumers + kBeside);
#pragma unroll 1
    for (int tile = c_.cta; c_.has_tile(tile); tile += kCtas) {
      float sum[16];
      {
        float all[32];
        clear(all);
        start(all, a, ring);
        finish(ring, kHidden / 128);
        add_halves(sum, all);
      }
      const int row = row_ + 32 * half_;
      if (row < c_.rows) {
#pragma unroll
        for (int i = 0; i < 16; ++i) {
          const int64_t feature = 64 * tile + i / 2 * 8 + lane_ % 4 * 2 + i % 2;
          if (feature < p.vocab) p.logits[row * p.vocab + feature] = sum[i] * scale;
        }
      }
      __syncwarp();
    }
  }

 private:
  /// Of those that warp `pair` has; any, if it has none.
  static __device__ __forceinline__ int last_row(int rows, int pair) {
    return min((rows - 1 - pair) / 4 * 4 + pair, rows - 1);
  }

  static __device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }

  template <int kCount>
  static __device__ __forceinline__ void clear(float (&sum)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum[i] = 0.0f;
    sm90::wgmma_hold(sum);
  }

  /// sum += A (32 columns) times kN features, K-major in blocks of 64 columns, of which `weights` are 32.
  template <int kN>
  static __device__ __forceinline__ void multiply(float (&sum)[kN / 2], const uint4 (&a)[2], const uint8_t* weights) {
    const uint32_t low = sm90::wgmma_descriptor_low(weights, 0);
    sm90::Wgmma<T, kN>::rs_k(sum, {a[0].x, a[1].x, a[0].y, a[1].y}, sm90::wgmma_descriptor_of(low), true);
    sm90::Wgmma<T, kN>::rs_k(sum, {a[0].z, a[1].z, a[0].w, a[1].w}, sm90::wgmma_descriptor_of(low + 2), true);
  }

  /// Starts sum += A times 64 features, over the next stages, one for each two groups of columns: the half of each that is
  /// the warpgroup's, 64 columns.
  template <int kOperands>
  __device__ __forceinline__ void start(float (&sum)[32], const Operand<kOperands>& a, Position at) const {
#pragma unroll
    for (int s = 0; s < kOperands / 2; ++s) {
      const uint8_t* stage = c_.wait(at) + half_ * 8192;
      at.next();
      sm90::wgmma_fence();
      multiply<64>(sum, a.v[2 * s], stage);
      multiply<64>(sum, a.v[2 * s + 1], stage + 64);
    }
    sm90::wgmma_commit();
  }

  /// The products under way, which read the next `stages` stages, are complete.
  __device__ __forceinline__ void finish(Position& ring, int stages) const {
    sm90::wgmma_wait<0>();
#pragma unroll
    for (int s = 0; s < stages; ++s) release(ring);
  }

  /// First values of the residual stream, times the first gain.
  template <int kCount>
  __device__ __forceinline__ void embed(Operand<kCount>& a) const {
    const T* gain = static_cast<const T*>(c_.args.p.input_norm);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const Embedding<T> embedding(c_, r == 0 ? first_ : second_);
#pragma unroll
      for (int g = 0; g < kCount; ++g) {
        const int group = kCount * c_.block + g;
        float x[8];
        embedding.load(group, lane_, x);
#pragma unroll
        for (int i = 0; i < 8; ++i) x[i] *= to_float(gain[32 * group + column_of(lane_, i)]);
        a.v[g][r] = vector_of<T>(x, kLastPhase);
      }
    }
  }

  /// Waits for a vector of each warp that sends something of x of these rows: to ask for all of it again and again holds up
  /// others. CTAs pair, pair + 4, ... of the group's blocks have sent it, of which two warps have a row.
  template <int kCount>
  __device__ __forceinline__ void look_at_x(const uint8_t* x, uint32_t phase) const {
    const int owner = pair_ + lane_ / 4 % 4 * 4;
    const int row = owner < c_.rows ? owner + (c_.rows - 1 - owner) / kGroups * kGroups : pair_;
    const int group = kCount == kColumns / 32 ? lane_ % 4 : lane_ % 4 * 4 + 1 + lane_ / 16 * 2;
    poll(phase, x + place_of(row, group, kHidden / 32) + lane_ % 4 * 16);
  }

  /// Reads operand A, of rows of `groups` groups, until all of it has the phase. With kPolls a few vectors are looked at
  /// first.
  template <bool kPolls, int kCount>
  __device__ __forceinline__ void gather(Operand<kCount>& a, const uint8_t* place, int groups, uint32_t phase) const {
#pragma unroll
    for (int g = 0; g < kCount; ++g) a.v[g][0] = a.v[g][1] = make_uint4(0, 0, 0, 0);
    if (!has_rows_) return;
    const uint8_t* from = place + lane_ % 4 * 16;
    const uint8_t* first = from + place_of(row_, 0, groups);
    const uint8_t* second = first + second_pitch(groups);
    if constexpr (kPolls) {
      if constexpr (kCount == kMiddle / 32) {  // 8 CTAs, rows below 32 and above
        const int row = lane_ / 8 % 2 == 1 && has_second_ ? pair_ + 32 : pair_;
        poll(phase, from + place_of(row, lane_ % 8, groups));
      } else {
        look_at_x<kCount>(place, phase);
      }
    }
    uint32_t wrong;
    step::Watchdog<kTurns> watchdog;
    do {
      watchdog.check();
      wrong = 0;
      if (row_ < c_.rows) {
#pragma unroll
        for (int g = 0; g < kCount; ++g) a.v[g][0] = step::load_b128(first + kGroupPitch * g);
      }
      if (row_ + 32 < c_.rows) {
#pragma unroll
        for (int g = 0; g < kCount; ++g) a.v[g][1] = step::load_b128(second + kGroupPitch * g);
#pragma unroll
        for (int g = 0; g < kCount; ++g) wrong |= a.v[g][1].x ^ phase;
      }
      if (row_ < c_.rows) {
#pragma unroll
        for (int g = 0; g < kCount; ++g) wrong |= a.v[g][0].x ^ phase;
      }
    } while (__any_sync(~0u, wrong & 1));
  }

  /// x from a group of columns on; the first group of the warpgroup's half.
  __device__ __forceinline__ const uint8_t* x(int group) const { return c_.at<uint8_t>(Layout::x) + kGroupPitch * group; }
  __device__ __forceinline__ const uint8_t* half_of_x() const { return x(half_ * (kHidden / 64)); }

  /// The squares of the row whose sums this thread completes, whether they are there or not; and, when they are, 1 / rms.
  __device__ __forceinline__ uint4 ask_for_squares(uint32_t phase) const {
    if (!has_rows_) return make_uint4(phase, phase, phase, phase);
    return step::load_b128(squares_of(c_, half_ == 0 ? first_ : second_, lane_));
  }
  __device__ __forceinline__ float inverse(uint4& squares, uint32_t phase) const {
    step::Watchdog<kTurns> watchdog;
    while (__any_sync(~0u, wrong_phase(squares, phase) & 1)) {
      watchdog.check();
      squares = ask_for_squares(phase);
    }
    return inverse_rms(squares, c_.args.p.eps);
  }

  /// A part of the half of x, 64 columns for a stage of weights: a lane's vectors of the rows that there are.
  __device__ __forceinline__ void load_part(Operand<kHidden / 64>& a, int part, const uint8_t* from) const {
    if (row_ < c_.rows) {
#pragma unroll
      for (int g = 2 * part; g < 2 * part + 2; ++g) a.v[g][0] = step::load_b128(from + kGroupPitch * g);
    }
    if (row_ + 32 < c_.rows) {
#pragma unroll
      for (int g = 2 * part; g < 2 * part + 2; ++g)
        a.v[g][1] = step::load_b128(from + second_pitch(kHidden / 32) + kGroupPitch * g);
    }
  }

  /// Waits for a part that has been asked for.
  __device__ __forceinline__ void wait_part(Operand<kHidden / 64>& a, int part, const uint8_t* from, uint32_t phase) const {
    if (!has_rows_) return;
    step::Watchdog<kTurns> watchdog;
#pragma unroll 1
    while (true) {
      uint32_t wrong = 0;
      if (row_ < c_.rows) wrong |= (a.v[2 * part][0].x ^ phase) | (a.v[2 * part + 1][0].x ^ phase);
      if (row_ + 32 < c_.rows) wrong |= (a.v[2 * part][1].x ^ phase) | (a.v[2 * part + 1][1].x ^ phase);
      if (!__any_sync(~0u, wrong & 1)) return;
      watchdog.check();
      load_part(a, part, from);
    }
  }

  /// Sums over the warpgroup's half of the columns of x, 64 features, while x arrives. All parts but the last are asked for
  /// at once (registers); a stage is released as soon as it has been multiplied.
  __device__ __forceinline__ void multiply_arriving(float (&sum)[32], uint4& squares, Position& ring, uint32_t phase) const {
    constexpr int kParts = kHidden / 128, kAtOnce = kParts - 1;
    Operand<kHidden / 64> a;
#pragma unroll
    for (int g = 0; g < 2 * kAtOnce; ++g) a.v[g][0] = a.v[g][1] = make_uint4(0, 0, 0, 0);
    const uint8_t* from = half_of_x() + place_of(row_, 0, kHidden / 32) + lane_ % 4 * 16;
    if (has_rows_) {
      look_at_x<kHidden / 64>(half_of_x(), phase);
#pragma unroll
      for (int part = 0; part < kAtOnce; ++part) load_part(a, part, from);
    }
    squares = ask_for_squares(phase);
    Position at = ring;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      wait_part(a, part, from, phase);
      if (part == 0 && threadIdx.x == 0) c_.allow(kMoreUnderWay);
      const uint8_t* stage = c_.wait(at) + half_ * 8192;
      at.next();
      sm90::wgmma_fence();
      multiply<64>(sum, a.v[2 * part], stage);
      multiply<64>(sum, a.v[2 * part + 1], stage + 64);
      sm90::wgmma_commit();
      if (part == 0) continue;
      sm90::wgmma_wait<1>();
      release(ring);
      const int next = part - 1 + kAtOnce;
      if (next < kParts) {
#pragma unroll
        for (int g = 2 * next; g < 2 * next + 2; ++g) a.v[g][0] = a.v[g][1] = make_uint4(0, 0, 0, 0);
        load_part(a, next, from);
      }
    }
    finish(ring, 1);
  }

  __device__ __forceinline__ void release(Position& ring) const {
    if (lane_ == 0) c_.release(ring);
    ring.next();
  }

  /// The sums of both warpgroups, each over half of the columns, with 64 features: of each two rows a warpgroup gets one.
  __device__ __forceinline__ void add_halves(float (&result)[16], float (&sum)[32]) const {
    sm90::wgmma_hold(sum);
    const int thread = static_cast<int>(threadIdx.x);
    float4(&halves)[4][kConsumers] = c_.shared.halves;
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // of eights of features 2 i and 2 i + 1
      halves[i][thread] = half_ == 0 ? make_float4(sum[8 * i + 2], sum[8 * i + 3], sum[8 * i + 6], sum[8 * i + 7])
                                     : make_float4(sum[8 * i], sum[8 * i + 1], sum[8 * i + 4], sum[8 * i + 5]);
    }
    sm90::named_barrier_sync(kPair + pair_, 64);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float4 other = halves[i][thread ^ (kConsumers / 2)];
      result[4 * i] = (half_ == 0 ? sum[8 * i] : sum[8 * i + 2]) + other.x;
      result[4 * i + 1] = (half_ == 0 ? sum[8 * i + 1] : sum[8 * i + 3]) + other.y;
      result[4 * i + 2] = (half_ == 0 ? sum[8 * i + 4] : sum[8 * i + 6]) + other.z;
      result[4 * i + 3] = (half_ == 0 ? sum[8 * i + 5] : sum[8 * i + 7]) + other.w;
    }
    sm90::named_barrier_sync(kPair + pair_, 64);
  }

  /// kCount stages of 128 features times 64 columns; a warpgroup has half of the features.
  template <int kCount>
  __device__ __forceinline__ void share(const Operand<2 * kCount>& a, Position& ring, uint32_t phase) const {
    float sum[32];
    clear(sum);
    start(sum, a, ring);
    finish(ring, kCount);
    sm90::wgmma_hold(sum);
    send(sum, c_.at<uint8_t>(Layout::sums) + place_of_sums(c_.block, 0, c_.group) + half_ * kSumsHalf, kSumsPitch, phase);
  }

  /// Partial sums of groups of columns that lie side by side, rounded, to the lane's rows, `pitch` bytes apart.
  template <int kCount>
  __device__ __forceinline__ void send(const float (&sum)[kCount], uint8_t* to, size_t pitch, uint32_t phase) const {
    to += row_ * pitch + lane_ % 4 * 16;
#pragma unroll
    for (int r = 0; r < 2; ++r, to += 32 * pitch) {
      if (row_ + 32 * r >= c_.rows) continue;
#pragma unroll
      for (int g = 0; g < kCount / 16; ++g) step::store_b128(to + g * 64, part(sum, g, r, phase));
    }
    __syncwarp();
  }
  /// Of one group, the lane's vector of row row_ or of the one 32 further on.
  template <int kCount>
  __device__ __forceinline__ uint4 part(const float (&sum)[kCount], int g, int r, uint32_t phase) const {
    const float* x = sum + 16 * g + 2 * r;
    const float columns[8] = {x[0], x[1], x[4], x[5], x[8], x[9], x[12], x[13]};
    return vector_of<T>(columns, phase);
  }

  const Cta& c_;
  int lane_, half_, pair_, row_, first_, second_;
  bool has_rows_, has_second_;
};

}  // namespace vivace::mesh
