// Tokens that are cut out of the text before anything else looks at it: [START], [laughter], ...
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace vivace {

struct AddedToken {
  std::string content;
  int32_t id;
  bool single_word;  // only where no word character touches it
  bool lstrip;       // takes the white space before it
  bool rstrip;       // takes the white space after it
};

/// A set of added tokens, searched from left to right, the longest first where several begin at one place.
class AddedTokens {
 public:
  void add(AddedToken token);

  /// Calls `piece(text, id)` for each part of `text` in order; id -1: not a token.
  void split(std::string_view text, const std::function<void(std::string_view piece, int32_t id)>& piece) const;

 private:
  /// A node of a trie over bytes.
  struct Node {
    std::vector<std::pair<unsigned char, int32_t>> children;
    int32_t token = -1;  // the token that ends here
  };

  /// The longest token at `text[offset]`, nullptr when none begins there.
  const AddedToken* longest_at(std::string_view text, size_t offset) const;

  std::vector<AddedToken> tokens_;
  std::vector<Node> nodes_ = {Node{}};
};

}  // namespace vivace
