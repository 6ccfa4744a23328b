#include "host/voice_cache.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "host/device.h"

namespace vivace {
namespace {

/// Voices whose keys are kept: 120 KiB a position of the real model, 15 MB after a prompt of 123.
constexpr int64_t kKept = 4;

/// Elements of 8 bytes, where head_dim allows it: copies by index go element by element.
at::Tensor wide(const at::Tensor& t) {
  return t.size(-1) * t.element_size() % 8 == 0 && t.element_size() < 8 ? t.view(at::kLong) : t;
}

}  // namespace

int64_t VoiceCache::Entry::known(bool unconditional, int64_t length) const {
  if (unconditional) return std::min(positions(), length - 2);
  return positions() < embedding.size(0) ? 0 : std::min(embedding.size(0), length - 2);
}

const VoiceCache::Entry* VoiceCache::find(const Request& request) const {
  for (const Entry& entry : entries_) {
    if (entry.is_of(request)) return &entry;
  }
  return nullptr;
}

VoiceCache::Entry& VoiceCache::of(const Request& request, Model& model) {
  entries_.remove_if([](const Entry& entry) { return entry.voice.expired(); });
  const auto found =
      std::find_if(entries_.begin(), entries_.end(), [&](const Entry& entry) { return entry.is_of(request); });
  if (found != entries_.end()) {
    entries_.splice(entries_.end(), entries_, found);
  } else {
    entries_.push_back(
        {request.voice, request.exaggeration, model.encode_voice(*request.voice, request.exaggeration), {}, {}});
  }
  return entries_.back();
}

void VoiceCache::copy(const Entry& entry, int64_t positions, const std::vector<int32_t>& rows, KvCache& cache) {
  if (positions == 0 || rows.empty()) return;
  const at::Tensor index = upload(std::vector<int64_t>(rows.begin(), rows.end()), entry.k.device());
  for (const auto& [from, to] : {std::pair(entry.k, cache.k()), std::pair(entry.v, cache.v())}) {
    const at::Tensor source = wide(from).narrow(1, 0, positions).unsqueeze(1);  // (layers, 1, positions, heads_kv, ...)
    const auto shape = source.sizes();
    wide(to)
        .narrow(2, 0, positions)
        .index_copy_(1, index, source.expand({shape[0], index.size(0), shape[2], shape[3], shape[4]}));
  }
}

void VoiceCache::keep(Entry& entry, int64_t positions, int32_t row, const KvCache& cache) {
  if (positions <= entry.positions()) return;
  const auto prefix = [&](const at::Tensor& from) {
    const at::Tensor part = from.select(1, row).narrow(1, 0, positions);  // (layers, positions, heads_kv, head_dim)
    // Laid out as the cache is, a head's keys side by side.
    return at::empty({part.size(0), part.size(2), positions, part.size(3)}, part.options()).transpose(1, 2).copy_(part);
  };
  entry.k = prefix(cache.k());
  entry.v = prefix(cache.v());
  int64_t kept = std::count_if(entries_.begin(), entries_.end(), [](const Entry& e) { return e.k.defined(); });
  for (Entry& other : entries_) {
    if (kept <= kKept) break;
    if (&other == &entry || !other.k.defined()) continue;
    other.k = other.v = at::Tensor();
    --kept;
  }
}

}  // namespace vivace
