#include "host/error.h"

#include <utility>

#include "host/unicode.h"

namespace vivace {

FileError::FileError(std::string path, const std::string& message) : Error(path + ": " + message), path_(std::move(path)) {}

FileError::FileError(std::string path, uint64_t offset, const std::string& message)
    : Error(path + ": at byte " + std::to_string(offset) + ": " + message), path_(std::move(path)) {}

std::string printable(std::string_view text, size_t limit) {
  constexpr char kHex[] = "0123456789abcdef";
  std::string result = "\"";
  size_t offset = 0;
  while (offset < text.size() && offset < limit) {
    const size_t begin = offset;
    const char32_t c = next_code_point(text, offset);
    // Bidirectional controls could reorder the message on a terminal.
    const bool reorders = (c >= 0x202A && c <= 0x202E) || (c >= 0x2066 && c <= 0x2069);
    if (c == U'"' || c == U'\\') {
      result += '\\';
      result += static_cast<char>(c);
    } else if (c != kInvalidCodePoint && c >= 0x20 && !(c >= 0x7F && c < 0xA0) && !reorders) {
      result.append(text, begin, offset - begin);
    } else {
      if (c == kInvalidCodePoint) offset = begin + 1;
      for (size_t i = begin; i < offset; ++i) {
        const auto byte = static_cast<unsigned char>(text[i]);
        result.append("\\x").append(1, kHex[byte >> 4]).append(1, kHex[byte & 15]);
      }
    }
  }
  result += offset < text.size() ? "\"..." : "\"";
  return result;
}

}  // namespace vivace
