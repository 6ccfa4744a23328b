// UTF-8, and the character properties that the text path needs. Python's (str methods) and the tokenizer's
// (Unicode's \w and \s) differ, so each is its own table: host/unicode/tables.h, generated.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace vivace {

inline constexpr char32_t kInvalidCodePoint = 0xFFFFFFFF;

/// The code point that starts at `text[offset]`; advances `offset` past it. kInvalidCodePoint (and `offset` stays) when the
/// bytes are not UTF-8: truncated, overlong, a surrogate, or beyond U+10FFFF.
char32_t next_code_point(std::string_view text, size_t& offset) noexcept;

/// Appends `code_point` (a scalar value) as UTF-8.
void append_utf8(std::string& text, char32_t code_point);

/// Throws Error("vivace.<op>: text is not UTF-8: byte 0x.. at offset ..") unless `text` is well-formed UTF-8.
void check_utf8(std::string_view text, const char* op);

/// \w of the tokenizer's pre-tokenizer: Alphabetic, marks, decimal digits, connector punctuation, join controls.
bool is_word(char32_t c) noexcept;
/// \s of the tokenizer's pre-tokenizer: Unicode's White_Space.
bool is_white_space(char32_t c) noexcept;
/// Python's str.isspace of one character: White_Space and the separators U+001C..U+001F.
bool is_python_space(char32_t c) noexcept;
/// Python's str.islower of one character: Unicode's Lowercase, wider than category Ll.
bool is_python_lower(char32_t c) noexcept;
/// Appends Python's str.upper of one character, up to three code points ("ß" gives "SS").
void append_python_upper(std::string& text, char32_t c);

/// Unicode versions of the two sources of the tables, such as "14.0.0".
std::string_view python_unicode_version() noexcept;

}  // namespace vivace
