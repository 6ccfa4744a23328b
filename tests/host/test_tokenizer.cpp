// The behaviour by example and what bad files do; parity with the library is in tests/python/host/test_tokenizer_parity.py.
#include "host/tokenizer.h"

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "host/error.h"
#include "tests/host/catch.h"
#include "tests/host/files.h"

using namespace vivace;
using namespace vivace::testing;
using Ids = std::vector<int64_t>;

namespace {

const nlohmann::json kFile = nlohmann::json::parse(R"({
  "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null, "decoder": null,
  "pre_tokenizer": {"type": "Whitespace"},
  "added_tokens": [
    {"id": 0, "content": "[STOP]", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true},
    {"id": 1, "content": "[UNK]", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true},
    {"id": 2, "content": "[SPACE]", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true},
    {"id": 3, "content": "[laughter]", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true},
    {"id": 4, "content": "[START]", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}],
  "model": {"type": "BPE", "dropout": null, "unk_token": "[UNK]", "continuing_subword_prefix": null, "end_of_word_suffix": null,
    "fuse_unk": false, "byte_fallback": false,
    "vocab": {"[STOP]": 0, "[UNK]": 1, "[SPACE]": 2, "[laughter]": 3, "[START]": 4, "a": 5, "b": 6, "c": 7, "[": 8, "]": 9,
              "ab": 10, "abc": 11, "bc": 12, ".": 13, "é": 14, "aa": 15},
    "merges": ["b c", "a b", "ab c", "a a"]}
})");

EnTokenizer english() { return EnTokenizer(Tokenizer::from_json(kFile.dump(), "tokenizer.json")); }

std::string error_for(const nlohmann::json& file) {
  return error_of([&] { Tokenizer::from_json(file.dump(), "tokenizer.json"); });
}

}  // namespace

TEST_CASE("merges are done by rank, from left to right") {
  CHECK(english().encode("abc") == Ids{5, 12});  // b+c comes before a+b
  CHECK(english().encode("aba") == Ids{10, 5});
  CHECK(english().encode("aaaaa") == Ids{15, 15, 5});
}

TEST_CASE("spaces become [SPACE], other white space vanishes") {
  CHECK(english().encode("a b  c") == Ids{5, 2, 6, 2, 2, 7});
  CHECK(english().encode("a\nb\u3000\u00a0c\t") == Ids{5, 6, 7});
  CHECK(english().encode("").empty());
}

TEST_CASE("words and punctuation do not merge with each other") {
  CHECK(english().encode("ab.bc]") == Ids{10, 13, 12, 9});
  CHECK(english().encode("e\u0301") == Ids{1, 1});  // a mark belongs to the word, and neither is known
}

TEST_CASE("tags are tokens, brackets that only look like tags are not") {
  CHECK(english().encode("[laughter]a") == Ids{3, 5});
  CHECK(english().encode("[[laughter]]") == Ids{8, 3, 9});
  CHECK(english().encode("[a]") == Ids{8, 5, 9});
  CHECK(english().encode("[UNK][SPACE]") == Ids{1, 2});
}

TEST_CASE("decoding gives the text back without [STOP] and [UNK]") {
  const EnTokenizer tokenizer = english();
  CHECK(tokenizer.decode(tokenizer.encode("abc ab.")) == "abc ab.");
  CHECK(tokenizer.decode(Ids{0, 5, 1, 999, -1, 2, 6}) == "a b");
  CHECK(tokenizer.tokenizer().decode(Ids{5, 12}) == "a bc");
  CHECK(tokenizer.tokenizer().vocab_size() == 16);
}

TEST_CASE("the tokenizer names the byte where a text is not UTF-8") {
  CHECK_THROWS_WITH(english().encode("ab \xc3("),
                    ContainsSubstring("vivace.tokenizer: text is not UTF-8: byte 0xc3 at offset 9"));
}

TEST_CASE("a file without [START] or [STOP] is not Chatterbox's") {
  auto file = kFile;
  file["added_tokens"].erase(4);
  file["model"]["vocab"]["[other]"] = 4;
  file["model"]["vocab"].erase("[START]");
  CHECK_THROWS_WITH(EnTokenizer(Tokenizer::from_json(file.dump(), "t.json"), "t.json"),
                    ContainsSubstring("no token \"[START]\""));
}

TEST_CASE("files that cannot be read are named") {
  CHECK_THROWS_WITH(EnTokenizer("/nonexistent.json"), ContainsSubstring("/nonexistent.json: cannot open"));
  CHECK_THAT(error_of([] { Tokenizer::from_json("", "t.json"); }), ContainsSubstring("t.json: tokenizer: not JSON"));
  CHECK_THAT(error_of([] { Tokenizer::from_json(std::string(100000, '['), "t.json"); }), ContainsSubstring("nested deeper"));
  CHECK_THAT(error_of([] { Tokenizer::from_json("[]", "t.json"); }), ContainsSubstring("is an array, expected an object"));
}

TEST_CASE("inconsistent files are refused by JSON path") {
  auto file = kFile;
  file["model"]["merges"].push_back("a  b");
  CHECK_THAT(error_for(file), ContainsSubstring("model.merges[4] is \"a  b\", expected two tokens and one space"));
  file = kFile;
  file["model"]["merges"].push_back({"c", "c"});
  CHECK_THAT(error_for(file), ContainsSubstring("\"cc\" is not one"));
  file = kFile;
  file["model"]["vocab"]["c"] = 5;
  CHECK_THAT(error_for(file), ContainsSubstring("gives the id 5"));
  file = kFile;
  file["model"]["vocab"]["c"] = int64_t{1} << 40;
  CHECK_THAT(error_for(file), ContainsSubstring("model.vocab.c is 1099511627776"));
  file = kFile;
  file["added_tokens"][3]["content"] = "";
  CHECK_THAT(error_for(file), ContainsSubstring("added_tokens[3].content is \"\""));
}

TEST_CASE("mutated tokenizer files never crash") {
  const std::string good = kFile.dump();
  std::mt19937 random(4);
  int refusals = 0;
  for (int round = 0; round < 4000; ++round) {
    const std::string text = mutate(good, random);
    refusals += refused([&] { Tokenizer::from_json(text, "mutated").encode("[laughter] abc [[a]] é ab.c"); });
  }
  CHECK(refusals > 2000);
}

TEST_CASE("mutated texts are encoded or refused") {
  const EnTokenizer tokenizer = english();
  const std::string good = "[laughter] abc [[a]] é ab.c 日本 \xf0\x9f\x98\x80 [SPACE] aaaa";
  std::mt19937 random(5);
  for (int round = 0; round < 4000; ++round) {
    const std::string text = mutate(good, random);
    refused([&] { tokenizer.decode(tokenizer.encode(text)); });
  }
  SUCCEED();
}
