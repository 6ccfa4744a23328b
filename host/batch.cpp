#include "host/batch.h"

#include <ATen/ATen.h>

#include <algorithm>

namespace vivace {
namespace {

enum Longs : int64_t { kPositions, kStep, kSeed, kAdvance, kRowRequest, kTurn, kLongs };
enum Ints : int64_t { kSeqlens, kCacheRows, kRowAdvance, kTopK, kLogitRows, kInts };
enum Floats : int64_t { kCfgWeight, kTemperature, kRepetitionPenalty, kMinP, kTopP, kFloats };

/// A step's tokens are read before the next but one is queued: two slots would do.
constexpr int64_t kHistorySlots = 4;

/// A zeroed host tensor that can be copied to the device without waiting; the host allocator keeps it until the copy is
/// done.
at::Tensor staging(at::IntArrayRef shape, at::ScalarType dtype, at::Device device) {
  return at::zeros(shape, at::TensorOptions().dtype(dtype).pinned_memory(device.is_cuda()));
}

}  // namespace

Batch::Batch(const Manifest& manifest, int64_t max_requests, int32_t scratch_row, at::Device device)
    : max_requests_(max_requests),
      start_token_(manifest.speech.start_token),
      scratch_row_(scratch_row),
      tokens_(at::zeros({max_requests}, at::TensorOptions().dtype(at::kLong).device(device))),
      seen_(at::zeros({max_requests, manifest.speech.vocab_size}, at::TensorOptions().dtype(at::kByte).device(device))),
      history_(staging({kHistorySlots, max_requests}, at::kLong, device)),
      turns_(static_cast<size_t>(max_requests)),
      longs_(at::zeros({kLongs, 2 * max_requests}, at::TensorOptions().dtype(at::kLong).device(device))),
      ints_(at::zeros({kInts, 2 * max_requests}, at::TensorOptions().dtype(at::kInt).device(device))),
      floats_(at::zeros({kFloats, max_requests}, at::TensorOptions().dtype(at::kFloat).device(device))) {}

int64_t Batch::rows() const {
  return size() + std::count_if(jobs_.begin(), jobs_.end(), [](const JobPtr& job) { return job->guided(); });
}
bool Batch::plain() const {
  return std::all_of(jobs_.begin(), jobs_.end(), [](const JobPtr& job) { return job->plain(); });
}
bool Batch::aligned() const {
  return std::any_of(jobs_.begin(), jobs_.end(), [](const JobPtr& job) { return job->alignment.has_value(); });
}

void Batch::add(JobPtr job) {
  at::Tensor seen = seen_.select(0, size());
  seen.zero_();
  seen.narrow(0, start_token_, 1).fill_(1);
  jobs_.push_back(std::move(job));
  changed_ = true;
}

void Batch::remove(int64_t index) {
  const int64_t last = size() - 1;
  if (index != last) {
    tokens_.narrow(0, index, 1).copy_(tokens_.narrow(0, last, 1));
    seen_.select(0, index).copy_(seen_.select(0, last));
    jobs_[static_cast<size_t>(index)] = jobs_.back();
  }
  jobs_.pop_back();
  changed_ = true;
}

void Batch::upload() {
  if (!changed_) return;
  changed_ = false;
  const at::Device device = tokens_.device();
  const at::Tensor longs = staging({kLongs, 2 * max_requests_}, at::kLong, device);
  const at::Tensor ints = staging({kInts, 2 * max_requests_}, at::kInt, device);
  const at::Tensor floats = staging({kFloats, max_requests_}, at::kFloat, device);
  auto l = longs.accessor<int64_t, 2>();
  auto i = ints.accessor<int32_t, 2>();
  auto f = floats.accessor<float, 2>();
  for (int64_t row = 0; row < 2 * max_requests_; ++row) i[kCacheRows][row] = scratch_row_;
  // logit_rows is (requests, 2): the last line of `ints`, read as pairs. Padding requests have none.
  int32_t* const logit_rows = &i[kLogitRows][0];
  std::fill_n(logit_rows, 2 * max_requests_, -1);
  std::copy(turns_.begin(), turns_.end(), &l[kTurn][0]);

  int64_t row = size();  // of the next unconditional one
  for (int64_t r = 0; r < size(); ++r) {
    const Job& job = *jobs_[static_cast<size_t>(r)];
    const SamplingOptions& sampling = job.request.sampling;
    l[kPositions][r] = job.issued;
    l[kStep][r] = job.issued;
    l[kSeed][r] = sampling.seed;
    l[kAdvance][r] = 1;
    i[kTopK][r] = sampling.top_k;
    f[kCfgWeight][r] = sampling.cfg_weight;
    f[kTemperature][r] = sampling.temperature;
    f[kRepetitionPenalty][r] = sampling.repetition_penalty;
    f[kMinP][r] = sampling.min_p;
    f[kTopP][r] = sampling.top_p;
    auto fill_row = [&](int64_t at, int32_t cache_row) {
      l[kRowRequest][at] = r;
      // Before the first decode step the cache holds the prompt; each step since has added one token.
      i[kSeqlens][at] = static_cast<int32_t>(job.prompt_tokens + std::max<int64_t>(job.issued - 1, 0));
      i[kCacheRows][at] = cache_row;
      i[kRowAdvance][at] = 1;
    };
    fill_row(r, job.cond_row);
    logit_rows[2 * r] = static_cast<int32_t>(r);
    if (job.guided()) {
      logit_rows[2 * r + 1] = static_cast<int32_t>(row);
      fill_row(row++, job.uncond_row);
    }
  }
  longs_.copy_(longs, /*non_blocking=*/true);
  ints_.copy_(ints, /*non_blocking=*/true);
  floats_.copy_(floats, /*non_blocking=*/true);
}

std::vector<int64_t> Batch::take_turns() {
  std::vector<int64_t> slots(jobs_.size());
  for (size_t r = 0; r < slots.size(); ++r) slots[r] = turns_[r]++ % kHistorySlots;
  return slots;
}

StepState Batch::state(int64_t first, int64_t n, int64_t m) const {
  auto longs = [&](int64_t line) { return longs_.select(0, line).narrow(0, first, n); };
  auto floats = [&](int64_t line) { return floats_.select(0, line).narrow(0, first, n); };
  StepState s;
  s.tokens = tokens_.narrow(0, first, n);
  s.positions = longs(kPositions);
  s.step = longs(kStep);
  s.seed = longs(kSeed);
  s.advance = longs(kAdvance);
  s.turn = longs(kTurn);
  s.history = history_.narrow(1, first, n);
  s.row_request = longs_.select(0, kRowRequest).narrow(0, 0, m);
  s.seqlens = ints_.select(0, kSeqlens).narrow(0, 0, m);
  s.cache_rows = ints_.select(0, kCacheRows).narrow(0, 0, m);
  s.row_advance = ints_.select(0, kRowAdvance).narrow(0, 0, m);
  s.top_k = ints_.select(0, kTopK).narrow(0, first, n);
  s.logit_rows = ints_.select(0, kLogitRows).view({max_requests_, 2}).narrow(0, first, n);
  s.seen = seen_.narrow(0, first, n);
  s.cfg_weight = floats(kCfgWeight);
  s.temperature = floats(kTemperature);
  s.repetition_penalty = floats(kRepetitionPenalty);
  s.min_p = floats(kMinP);
  s.top_p = floats(kTopP);
  return s;
}

}  // namespace vivace
