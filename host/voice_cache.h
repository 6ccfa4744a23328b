// What prompts of one voice have in common, kept between requests.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <list>
#include <memory>
#include <vector>

#include "host/kv_cache.h"
#include "host/model.h"
#include "host/request.h"

namespace vivace {

/// The embeddings of voices that some request still holds and, for the latest of them, keys and values of the beginning of
/// their prompts: what a position is computed from are the positions before it alone. Every row of a voice begins with its
/// embedding. An unconditional row goes on with the positions of the text without the text, so it has the beginning of
/// every other one. Used by the worker alone.
class VoiceCache {
 public:
  struct Entry {
    std::weak_ptr<const Voice> voice;
    float exaggeration;
    at::Tensor embedding;  // (length, hidden)
    at::Tensor k, v;       // (layers, positions, heads_kv, head_dim) of an unconditional row; undefined: not kept

    bool is_of(const Request& request) const {
      return exaggeration == request.exaggeration && voice.lock() == request.voice;
    }
    int64_t positions() const { return k.defined() ? k.size(1) : 0; }
    /// Positions of a row's prompt of `length`, of its voice, that need not be computed. The last two are always computed.
    int64_t known(bool unconditional, int64_t length) const;
  };

  /// The entry of a request's voice; made, without keys, where it is not there. Others stay where they are.
  Entry& of(const Request& request, Model& model);
  /// Likewise, or null where it is not there.
  const Entry* find(const Request& request) const;

  /// Writes the first `positions` keys and values to rows of the cache.
  static void copy(const Entry& entry, int64_t positions, const std::vector<int32_t>& rows, KvCache& cache);
  /// Keeps the first `positions` keys and values of a row whose prompt is queued; only where that is more than before.
  void keep(Entry& entry, int64_t positions, int32_t row, const KvCache& cache);

  void clear() { entries_.clear(); }

 private:
  std::list<Entry> entries_;  // the latest used last
};

}  // namespace vivace
