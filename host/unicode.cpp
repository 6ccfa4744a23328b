#include "host/unicode.h"

#include <algorithm>
#include <iterator>

#include "host/error.h"
#include "host/unicode/tables.h"

namespace vivace {
namespace {

template <typename Range, size_t N>
const Range* find_range(const Range (&table)[N], char32_t c) noexcept {
  const auto after = std::upper_bound(std::begin(table), std::end(table), c,
                                      [](char32_t value, const Range& range) { return value < range.first; });
  if (after == std::begin(table)) return nullptr;
  const auto range = std::prev(after);
  return c <= range->last ? range : nullptr;
}

}  // namespace

char32_t next_code_point(std::string_view text, size_t& offset) noexcept {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
  if (offset >= text.size()) return kInvalidCodePoint;
  const unsigned char lead = byte(offset);
  if (lead < 0x80) return static_cast<char32_t>(text[offset++]);

  const size_t length = lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : 2;
  if (lead < 0xC2 || lead > 0xF4 || text.size() - offset < length) return kInvalidCodePoint;
  char32_t c = lead & (0x7F >> length);
  for (size_t i = 1; i < length; ++i) {
    if ((byte(offset + i) & 0xC0) != 0x80) return kInvalidCodePoint;
    c = c << 6 | (byte(offset + i) & 0x3F);
  }
  constexpr char32_t kSmallest[] = {0, 0, 0x80, 0x800, 0x10000};  // below: an overlong form
  if (c < kSmallest[length] || (c >= 0xD800 && c <= 0xDFFF) || c > 0x10FFFF) return kInvalidCodePoint;
  offset += length;
  return c;
}

void append_utf8(std::string& text, char32_t c) {
  const auto tail = [&](int shift) { text += static_cast<char>(0x80 | (c >> shift & 0x3F)); };
  if (c < 0x80) {
    text += static_cast<char>(c);
  } else if (c < 0x800) {
    text += static_cast<char>(0xC0 | c >> 6);
    tail(0);
  } else if (c < 0x10000) {
    text += static_cast<char>(0xE0 | c >> 12);
    tail(6);
    tail(0);
  } else {
    text += static_cast<char>(0xF0 | c >> 18);
    tail(12);
    tail(6);
    tail(0);
  }
}

void check_utf8(std::string_view text, const char* op) {
  for (size_t offset = 0; offset < text.size();) {
    if (next_code_point(text, offset) != kInvalidCodePoint) continue;
    constexpr char kHex[] = "0123456789abcdef";
    const auto byte = static_cast<unsigned char>(text[offset]);
    check(false, op, "text is not UTF-8: byte 0x", kHex[byte >> 4], kHex[byte & 15], " at offset ", offset, " of ",
          text.size());
  }
}

bool is_word(char32_t c) noexcept { return find_range(unicode::kWord, c) != nullptr; }
bool is_white_space(char32_t c) noexcept { return find_range(unicode::kWhiteSpace, c) != nullptr; }
bool is_python_space(char32_t c) noexcept { return find_range(unicode::kPythonSpace, c) != nullptr; }
bool is_python_lower(char32_t c) noexcept { return find_range(unicode::kPythonLower, c) != nullptr; }

void append_python_upper(std::string& text, char32_t c) {
  const auto longer = std::find_if(std::begin(unicode::kUpperLonger), std::end(unicode::kUpperLonger),
                                   [c](const unicode::UpperLonger& entry) { return entry.from == c; });
  if (longer != std::end(unicode::kUpperLonger)) {
    for (const char32_t upper : longer->to) {
      if (upper != 0) append_utf8(text, upper);
    }
    return;
  }
  const unicode::UpperRun* run = find_range(unicode::kUpperRuns, c);
  const bool mapped = run != nullptr && (c - run->first) % static_cast<char32_t>(run->step) == 0;
  append_utf8(text, mapped ? static_cast<char32_t>(static_cast<int64_t>(c) + run->delta) : c);
}

std::string_view python_unicode_version() noexcept { return unicode::kPythonVersion; }

}  // namespace vivace
