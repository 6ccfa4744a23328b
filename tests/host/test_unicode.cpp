#include <random>
#include <string>

#include "host/error.h"
#include "host/unicode.h"
#include "tests/host/catch.h"

using namespace vivace;

TEST_CASE("every scalar value survives the way to UTF-8 and back") {
  for (char32_t c = 0; c < 0x110000; ++c) {
    if (c >= 0xD800 && c <= 0xDFFF) continue;
    std::string text;
    append_utf8(text, c);
    size_t offset = 0;
    if (next_code_point(text, offset) != c || offset != text.size()) FAIL("code point " << static_cast<uint32_t>(c));
  }
  SUCCEED();
}

TEST_CASE("what is not UTF-8 is refused: stray, cut, overlong, surrogate, too large") {
  for (const std::string text : {"\x80", "\xbf", "\xc3", "\xe2\x82", "\xf0\x9f\x98", "\xc0\x80", "\xc1\xbf", "\xe0\x80\x80",
                                 "\xe0\x9f\xbf", "\xf0\x80\x80\x80", "\xf0\x8f\xbf\xbf", "\xed\xa0\x80", "\xed\xbf\xbf",
                                 "\xf4\x90\x80\x80", "\xf5\x80\x80\x80", "\xff", "\xc3\x41", "\xe2\x41\x80"}) {
    size_t offset = 0;
    CHECK(next_code_point(text, offset) == kInvalidCodePoint);
    CHECK(offset == 0);
    CHECK_THROWS_AS(check_utf8("ok " + text, "test"), Error);
  }
}

TEST_CASE("random bytes are read to the end or refused, never beyond") {
  std::mt19937 random(20);
  for (int round = 0; round < 20000; ++round) {
    std::string text(random() % 12, '\0');
    for (char& c : text) c = static_cast<char>(random() % 3 == 0 ? random() : 0x80 | random() % 0x80);
    text.shrink_to_fit();
    for (size_t offset = 0; offset < text.size();) {
      if (next_code_point(text, offset) == kInvalidCodePoint) break;
      REQUIRE(offset <= text.size());
    }
  }
}

TEST_CASE("names in errors cannot drive a terminal") {
  CHECK(printable("a\"b\\") == R"("a\"b\\")");
  CHECK(printable("\x1b[31m\n\xff") == R"("\x1b[31m\x0a\xff")");
  CHECK(printable("\u202eevil") == R"("\xe2\x80\xaeevil")");
  CHECK(printable("naïve 日本") == "\"naïve 日本\"");
  CHECK(printable(std::string(100, 'x'), 3) == "\"xxx\"...");
}
