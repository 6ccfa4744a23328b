#include "host/bpe.h"

#include <functional>
#include <queue>
#include <tuple>

#include "host/unicode.h"

namespace vivace {
namespace {

/// A token of the word, in a list that merging shortens.
struct Symbol {
  int32_t id;
  int32_t previous, next;  // -1 at the ends
  bool alive;
};

/// A pair that could be merged: the symbol at `left` and the one after it.
struct Candidate {
  int32_t rank, left, id;
  bool operator>(const Candidate& other) const noexcept { return std::tie(rank, left) > std::tie(other.rank, other.left); }
};

}  // namespace

void Bpe::encode(std::string_view word, std::vector<int64_t>& ids) const {
  if (ignore_merges) {
    if (const auto whole = vocab.find(word); whole != vocab.end()) {
      ids.push_back(whole->second);
      return;
    }
  }

  std::vector<Symbol> symbols;
  bool after_unk = false;
  for (size_t offset = 0; offset < word.size();) {
    const size_t begin = offset;
    next_code_point(word, offset);
    const auto known = vocab.find(word.substr(begin, offset - begin));
    const bool is_unk = known == vocab.end();
    const bool fused = is_unk && after_unk && fuse_unk;
    after_unk = is_unk;
    if (fused || (is_unk && unk_id < 0)) continue;
    const auto index = static_cast<int32_t>(symbols.size());
    if (index > 0) symbols.back().next = index;
    symbols.push_back({is_unk ? unk_id : known->second, index - 1, -1, true});
  }

  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> queue;
  const auto propose = [&](int32_t left) {
    if (left < 0 || symbols[left].next < 0) return;
    const auto merge = merges.find(pair_key(symbols[left].id, symbols[symbols[left].next].id));
    if (merge != merges.end()) queue.push({merge->second.rank, left, merge->second.id});
  };
  for (int32_t i = 0; i + 1 < static_cast<int32_t>(symbols.size()); ++i) propose(i);

  while (!queue.empty()) {
    const Candidate best = queue.top();
    queue.pop();
    Symbol& left = symbols[best.left];
    if (!left.alive || left.next < 0) continue;
    Symbol& right = symbols[left.next];
    // The pair may have changed since it was proposed. Only its result is compared, as in the library.
    const auto merge = merges.find(pair_key(left.id, right.id));
    if (merge == merges.end() || merge->second.id != best.id) continue;

    left.id = best.id;
    left.next = right.next;
    right.alive = false;
    if (left.next >= 0) symbols[left.next].previous = best.left;
    propose(left.previous);
    propose(best.left);
  }

  for (const Symbol& symbol : symbols) {
    if (symbol.alive) ids.push_back(symbol.id);
  }
}

}  // namespace vivace
