// The products of the mesh step. The rows are the M of wgmma: warp w of either warpgroup has rows w, w + 4, ... Operand A
// comes from registers, into which a lane reads its part straight from where other CTAs have written it; the weights, B,
// from the ring.
#pragma once

#include "kernels/common/wgmma.cuh"
#include "kernels/step/mesh_residual.cuh"
#include "kernels/step/silu.cuh"

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
    gather<true>(a, x(kColumns / 32 * c_.block), kHidden / 32, kFirstPhase);
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

  /// Partial sums of `out` over the group's head, of 64 features.
  __device__ __forceinline__ void out(float (&sum)[32], int layer, Position& ring) const {
    Operand<kDim / 32> a;
    gather<false>(a, c_.attention(), kDim / 32, phase_of(layer));
    product(sum, a, ring);
  }

  /// Partial sums of `down` over the group's intermediates, of 64 features.
  __device__ __forceinline__ void down(float (&sum)[32], int layer, Position& ring) const {
    Operand<kMiddle / 32> a;
    gather<true>(a, c_.gated(), kMiddle / 32, phase_of(layer));
    if (threadIdx.x == 0 && c_.has_many_keys()) c_.allow(kSomeUnderWay);
    product(sum, a, ring);
  }

  /// The same to those who add them up.
  __device__ __forceinline__ void share(const float (&sum)[32], uint32_t phase) const {
    send(sum, c_.at<uint8_t>(Layout::sums) + place_of_sums(c_.block, 0, c_.group) + half_ * kSumsHalf, kSumsPitch, phase);
  }

  /// x of the middle of a layer, or before the head, normalised, times 64 features: of row row_ + 32 half_.
  __device__ __forceinline__ void multiply_x(float (&result)[16], bool is_head, Position& ring) const {
    static_assert(kMiddlePhase == kHeadPhase);
    float sum[32];
    uint4 squares;
    {
      Operand<kHidden / 64> a;
      gather<true>(a, x(half_ * (kHidden / 64)) + (is_head ? Layout::head_x : 0), kHidden / 32, kMiddlePhase);
      if (threadIdx.x == 0) c_.allow(kMoreUnderWay);
      squares = ask_for_squares(is_head);
      product(sum, a, ring);
    }
    add_halves(result, sum);
    const float scale = inverse(squares, is_head);
#pragma unroll
    for (int i = 0; i < 16; ++i) result[i] *= scale;
  }

  /// silu(gate) * up of the CTA's intermediates.
  __device__ __forceinline__ void gate(const float (&sum)[16], int layer) const {
    float gated[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) gated[i] = step::silu(sum[i]) * sum[8 + i];
    const int row = row_ + 32 * half_;
    if (row < c_.rows) {
      uint8_t* to = c_.gated() + place_of(row, c_.block, kMiddle / 32) + lane_ % 4 * 16;
      step::store_b128(to, vector_of<T>(gated, phase_of(layer)));
    }
    __syncwarp();
  }

  /// Logits of a tile of 64.
  __device__ __forceinline__ void store(const float (&sum)[16], int tile) const {
    const StepParams& p = c_.args.p;
    const int row = row_ + 32 * half_;
    if (row < c_.rows) {
      float* to = opaque(p.logits + row * p.vocab + 64 * tile + lane_ % 4 * 2);
      const int left = static_cast<int>(p.vocab) - 64 * tile - lane_ % 4 * 2;
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        if (i / 2 * 8 + i % 2 < left) to[i / 2 * 8 + i % 2] = sum[i];
      }
    }
    __syncwarp();
  }

 private:
  /// Of those that warp `pair` has; any, if it has none.
  static __device__ __forceinline__ int last_row(int rows, int pair) {
    return min((rows - 1 - pair) / 4 * 4 + pair, rows - 1);
  }

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

  /// A times 64 features, over the next stages, one for each two groups of columns: the half of each that is the
  /// warpgroup's, 64 columns. A stage is released as soon as it has been multiplied.
  template <int kOperands>
  __device__ __forceinline__ void product(float (&sum)[32], const Operand<kOperands>& a, Position& ring) const {
    clear(sum);
    Position at = ring;
#pragma unroll
    for (int s = 0; s < kOperands / 2; ++s) {
      const uint8_t* stage = c_.wait(at) + half_ * 8192;
      at.next();
      sm90::wgmma_fence();
      multiply<64>(sum, a.v[2 * s], stage);
      multiply<64>(sum, a.v[2 * s + 1], stage + 64);
      sm90::wgmma_commit();
      if (s == 0) continue;
      sm90::wgmma_wait<1>();
      release(ring);
    }
    finish(ring, 1);
    sm90::wgmma_hold(sum);
  }

  /// The products under way, which read the next `stages` stages, are complete.
  __device__ __forceinline__ void finish(Position& ring, int stages) const {
    sm90::wgmma_wait<0>();
#pragma unroll
    for (int s = 0; s < stages; ++s) release(ring);
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
    for (int g = 0; g < kCount; ++g) a.v[g][0] = a.v[g][1] = make_uint4(0, 0, 0, 0);  // or they are kept over a layer
    if (!has_rows_) return;
    const uint8_t* from = place + lane_ % 4 * 16;
    const uint8_t* first = from + place_of(row_, 0, groups);
    if constexpr (kPolls) {
      if constexpr (kCount == kMiddle / 32) {  // 8 CTAs, rows below 32 and above
        const int row = lane_ / 8 % 2 == 1 && has_second_ ? pair_ + 32 : pair_;
        poll(phase, from + place_of(row, lane_ % 8, groups));
      } else {
        look_at_x<kCount>(place, phase);
      }
    }
    step::Watchdog<kTurns> watchdog;
    do {
      watchdog.check();
      load(a, first, groups);
    } while (__any_sync(~0u, wrong(a, phase) & 1));
  }

  /// Asks for operand A. Rows that there are not keep what they have: nobody reads their sums.
  template <int kCount>
  __device__ __forceinline__ void load(Operand<kCount>& a, const uint8_t* from, int groups) const {
    from = opaque(from);
#pragma unroll
    for (int g = 0; g < kCount; ++g) load_b128_if(a.v[g][0], from + kGroupPitch * g, row_ < c_.rows);
    from = opaque(from + second_pitch(groups));
#pragma unroll
    for (int g = 0; g < kCount; ++g) load_b128_if(a.v[g][1], from + kGroupPitch * g, row_ + 32 < c_.rows);
  }
  /// Whose lowest bit says that a vector does not have the phase.
  template <int kCount>
  __device__ __forceinline__ uint32_t wrong(const Operand<kCount>& a, uint32_t phase) const {
    uint32_t x = 0, y = 0;
#pragma unroll
    for (int g = 0; g < kCount; ++g) x |= a.v[g][0].x ^ phase, y |= a.v[g][1].x ^ phase;
    return (row_ < c_.rows ? x : 0) | (row_ + 32 < c_.rows ? y : 0);
  }

  /// x from a group of columns on.
  __device__ __forceinline__ const uint8_t* x(int group) const { return c_.at<uint8_t>(Layout::x) + kGroupPitch * group; }

  /// The squares of the row whose sums this thread completes, whether they are there or not; and, when they are, 1 / rms.
  __device__ __forceinline__ uint4 ask_for_squares(bool is_head) const {
    if (!has_rows_) return make_uint4(kMiddlePhase, kMiddlePhase, kMiddlePhase, kMiddlePhase);
    return step::load_b128(squares_of(c_, half_ == 0 ? first_ : second_, lane_) + (is_head ? Layout::head_squares : 0));
  }
  __device__ __forceinline__ float inverse(uint4& squares, bool is_head) const {
    step::Watchdog<kTurns> watchdog;
    while (__any_sync(~0u, wrong_phase(squares, kMiddlePhase) & 1)) {
      watchdog.check();
      squares = ask_for_squares(is_head);
    }
    return inverse_rms(squares, c_.args.p.eps);
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
