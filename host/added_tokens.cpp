#include "host/added_tokens.h"

#include <algorithm>
#include <utility>

#include "host/unicode.h"

namespace vivace {
namespace {

/// Where the code point that ends before `offset` begins.
size_t previous_begin(std::string_view text, size_t offset) {
  do {
    --offset;
  } while (offset > 0 && (static_cast<unsigned char>(text[offset]) & 0xC0) == 0x80);
  return offset;
}

bool word_ends_at(std::string_view text, size_t offset) {
  if (offset == 0) return false;
  size_t begin = previous_begin(text, offset);
  return is_word(next_code_point(text, begin));
}

bool word_begins_at(std::string_view text, size_t offset) {
  return offset < text.size() && is_word(next_code_point(text, offset));
}

}  // namespace

void AddedTokens::add(AddedToken token) {
  int32_t node = 0;
  for (const char c : token.content) {
    const auto byte = static_cast<unsigned char>(c);
    const auto& children = nodes_[node].children;
    const auto child =
        std::find_if(children.begin(), children.end(), [byte](const auto& entry) { return entry.first == byte; });
    if (child != children.end()) {
      node = child->second;
      continue;
    }
    const auto created = static_cast<int32_t>(nodes_.size());
    nodes_[node].children.emplace_back(byte, created);
    nodes_.emplace_back();
    node = created;
  }
  nodes_[node].token = static_cast<int32_t>(tokens_.size());
  tokens_.push_back(std::move(token));
}

const AddedToken* AddedTokens::longest_at(std::string_view text, size_t offset) const {
  const AddedToken* longest = nullptr;
  const Node* node = &nodes_[0];
  for (; offset < text.size(); ++offset) {
    const auto byte = static_cast<unsigned char>(text[offset]);
    const auto child = std::find_if(node->children.begin(), node->children.end(),
                                    [byte](const auto& entry) { return entry.first == byte; });
    if (child == node->children.end()) break;
    node = &nodes_[child->second];
    if (node->token >= 0) longest = &tokens_[node->token];
  }
  return longest;
}

void AddedTokens::split(std::string_view text, const std::function<void(std::string_view piece, int32_t id)>& piece) const {
  size_t done = 0;                        // where the piece that was reported last ends
  size_t space_begin = 0, space_end = 0;  // a run of white space that was walked already: rstrip stays linear
  for (size_t at = 0; at < text.size();) {
    const AddedToken* token = longest_at(text, at);
    if (token == nullptr) {
      ++at;
      continue;
    }
    size_t begin = at, end = at + token->content.size();
    at = end;
    if (token->single_word && (word_ends_at(text, begin) || word_begins_at(text, end))) continue;
    if (token->lstrip) {
      begin = std::max(begin, done);
      while (begin > done) {
        const size_t before = previous_begin(text, begin);
        size_t cursor = before;
        if (!is_white_space(next_code_point(text, cursor))) break;
        begin = before;
      }
    }
    if (token->rstrip) {
      if (end < space_begin || end >= space_end) {
        space_begin = space_end = end;
        for (size_t cursor = end; cursor < text.size(); space_end = cursor) {
          if (!is_white_space(next_code_point(text, cursor))) break;
        }
      }
      end = space_end;
    }
    // A token of white space may lie in what the one before it stripped. As in the library it counts again, unless it
    // strips to the left itself: then nothing of it is left.
    if (begin >= end) continue;
    if (done < begin) piece(text.substr(done, begin - done), -1);
    piece(text.substr(begin, end - begin), token->id);
    done = end;
  }
  if (done < text.size()) piece(text.substr(done), -1);
}

}  // namespace vivace
