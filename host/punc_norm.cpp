#include "host/punc_norm.h"

#include <initializer_list>
#include <utility>

#include "host/text.h"
#include "host/unicode.h"

namespace vivace {
namespace {

using Replacement = std::pair<std::string_view, std::string_view>;

// In this order: a later one sees what an earlier one wrote (" - " before the dashes; " ," after the colons).
constexpr Replacement kReplacements[] = {
    {"...", ", "}, {"…", ", "}, {":", ","},  {" - ", ", "}, {";", ", "}, {"—", "-"},
    {"–", "-"},    {" ,", ","}, {"“", "\""}, {"”", "\""},   {"‘", "'"},  {"’", "'"},
};

bool ends_with_any(std::string_view text, std::initializer_list<std::string_view> enders) {
  for (const std::string_view ender : enders) {
    if (text.ends_with(ender)) return true;
  }
  return false;
}

}  // namespace

std::string punc_norm(std::string_view text, PuncNorm variant) {
  check_utf8(text, "punc_norm");
  if (text.empty()) return "You need to add some text for me to talk.";

  std::string result;
  result.reserve(text.size() + 8);
  size_t offset = 0;
  if (const char32_t first = next_code_point(text, offset); is_python_lower(first)) {
    append_python_upper(result, first);
  } else {
    offset = 0;
  }

  // " ".join(text.split()): words with one space between, none at the ends.
  bool space_due = false;
  while (offset < text.size()) {
    const size_t begin = offset;
    if (is_python_space(next_code_point(text, offset))) {
      space_due = !result.empty();
      continue;
    }
    if (space_due) result += ' ';
    space_due = false;
    result.append(text, begin, offset - begin);
  }

  for (const auto& [from, to] : kReplacements) result = replace_all(result, from, to);

  result.erase(result.find_last_not_of(' ') + 1);
  const bool ended = ends_with_any(result, {".", "!", "?", "-", ","}) ||
                     (variant == PuncNorm::kMultilingual && ends_with_any(result, {"、", "，", "。", "？", "！"}));
  if (!ended) result += '.';
  return result;
}

}  // namespace vivace
