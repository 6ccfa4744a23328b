// What any text may need.
#pragma once

#include <string>
#include <string_view>

namespace vivace {

/// `text` with every `from`, looked for from left to right, replaced by `to`.
inline std::string replace_all(std::string_view text, std::string_view from, std::string_view to) {
  std::string result;
  size_t copied = 0;
  for (size_t at; (at = text.find(from, copied)) != std::string_view::npos; copied = at + from.size()) {
    result.append(text.substr(copied, at - copied)).append(to);
  }
  return result.append(text.substr(copied));
}

}  // namespace vivace
