// Byte-pair encoding of one word.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace vivace {

/// The model of a tokenizer.json: Hugging Face's `BPE` without dropout and byte fallback.
struct Bpe {
  struct Hash {
    using is_transparent = void;
    size_t operator()(std::string_view text) const noexcept { return std::hash<std::string_view>{}(text); }
  };
  struct Merge {
    int32_t rank;  // the lowest is merged first
    int32_t id;    // of the token that the pair becomes
  };

  std::unordered_map<std::string, int32_t, Hash, std::equal_to<>> vocab;
  std::unordered_map<uint64_t, Merge> merges;  // by pair_key(left id, right id)
  int32_t unk_id = -1;                         // -1: characters that the vocabulary lacks vanish
  bool fuse_unk = false;                       // a run of unknown characters becomes one unk
  bool ignore_merges = false;                  // a word that is a token needs no merges

  static uint64_t pair_key(int32_t left, int32_t right) noexcept {
    return uint64_t{static_cast<uint32_t>(left)} << 32 | static_cast<uint32_t>(right);
  }

  /// Appends the ids of `word` (UTF-8): its characters, merged pair by pair in the order of rank and, where ranks are equal,
  /// from left to right. O(n log n).
  void encode(std::string_view word, std::vector<int64_t>& ids) const;
};

}  // namespace vivace
