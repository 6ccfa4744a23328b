#include <string>
#include <utility>

#include "host/error.h"
#include "host/punc_norm.h"
#include "tests/host/catch.h"

using vivace::punc_norm;
using vivace::PuncNorm;

TEST_CASE("an empty text becomes Chatterbox's own sentence") {
  CHECK(punc_norm("") == "You need to add some text for me to talk.");
}

TEST_CASE("a text of white space alone becomes a full stop") {
  CHECK(punc_norm(" ") == ".");
  CHECK(punc_norm("\n\t\u00a0\u3000\x1c\u0085") == ".");
}

TEST_CASE("the first letter is capitalised as Python does it") {
  const std::pair<std::string, std::string> cases[] = {
      {"hello.", "Hello."},
      {"Hello.", "Hello."},
      {"ßa.", "SSa."},
      {"ŉx.", "ʼNx."},
      {"ﬁx.", "FIx."},
      {"ǆ.", "Ǆ."},
      {"ǅ.", "ǅ."},
      {"ªa.", "ªa."},
      {"ΐ.", "\u0399\u0308\u0301."},
      {"ⅷ.", "Ⅷ."},
      {"ⓐ.", "Ⓐ."},
      {"1a.", "1a."},
      {"\U00010428.", "\U00010400."},
      {" hello.", "hello."},
  };
  for (const auto& [text, expected] : cases) CHECK(punc_norm(text) == expected);
}

TEST_CASE("runs of white space become one space and vanish at the ends") {
  CHECK(punc_norm("A\n\n b\u2003\u00a0c \x1f d. ") == "A b c d.");
  CHECK(punc_norm("A\u200b\ufeff b.") == "A\u200b\ufeff b.");  // zero width: not white space
}

TEST_CASE("uncommon punctuation is replaced in Chatterbox's order") {
  const std::pair<std::string, std::string> cases[] = {
      {"A...", "A,"},         {"A....", "A, ."},   {"A…b", "A, b."}, {"A: b", "A, b."}, {"A : b", "A, b."},
      {"A - b", "A, b."},     {"A – b", "A - b."}, {"A—b", "A-b."},  {"A;b", "A, b."},  {"“A” ‘b’", "\"A\" 'b'."},
      {"A - - b", "A, - b."}, {"A … b", "A,  b."}, {"A ,b", "A,b."}, {"A…", "A,"},      {"A …,", "A,,"},
  };
  for (const auto& [text, expected] : cases) CHECK(punc_norm(text) == expected);
}

TEST_CASE("a full stop is added where no sentence ender stands") {
  for (const char* text : {"A.", "A!", "A?", "A-", "A,"}) CHECK(punc_norm(text) == text);
  CHECK(punc_norm("A") == "A.");
  CHECK(punc_norm("A\"") == "A\".");
}

TEST_CASE("the multilingual variant also takes full-width sentence enders") {
  for (const char* text : {"你好。", "你好！", "你好？", "你好，", "你好、"}) {
    CHECK(punc_norm(text, PuncNorm::kMultilingual) == text);
    CHECK(punc_norm(text, PuncNorm::kEnglish) == std::string(text) + ".");
  }
}

TEST_CASE("punc_norm names the byte where a text is not UTF-8") {
  CHECK_THROWS_WITH(punc_norm("ab\xff"),
                    ContainsSubstring("vivace.punc_norm: text is not UTF-8: byte 0xff at offset 2 of 3"));
}
