#include "host/tokenizer.h"

#include <algorithm>
#include <map>
#include <optional>
#include <utility>

#include "host/added_tokens.h"
#include "host/bpe.h"
#include "host/error.h"
#include "host/json.h"
#include "host/mapped_file.h"
#include "host/text.h"
#include "host/unicode.h"

namespace vivace {
namespace {

constexpr size_t kMaxFile = size_t{1} << 28;
constexpr int64_t kMaxId = (int64_t{1} << 20) - 1;

constexpr std::string_view kSpace = "[SPACE]";
constexpr std::string_view kStart = "[START]";
constexpr std::string_view kStop = "[STOP]";
constexpr std::string_view kUnk = "[UNK]";

/// Calls `word(text)` for each match of \w+|[^\w\s]+ in order.
template <typename Word>
void split_words(std::string_view text, Word&& word) {
  enum class Kind { kNone, kWord, kOther };
  const auto kind_of = [](char32_t c) { return is_word(c) ? Kind::kWord : is_white_space(c) ? Kind::kNone : Kind::kOther; };
  size_t begin = 0;
  Kind current = Kind::kNone;
  for (size_t offset = 0; offset < text.size();) {
    const size_t at = offset;
    const Kind kind = kind_of(next_code_point(text, offset));
    if (kind == current) continue;
    if (current != Kind::kNone) word(text.substr(begin, at - begin));
    begin = at;
    current = kind;
  }
  if (current != Kind::kNone) word(text.substr(begin));
}

bool flag(const JsonValue& object, const char* key, bool absent) { return object.has(key) ? object[key].boolean() : absent; }

void refuse(const JsonValue& object, const char* key) {
  if (object.has(key)) object[key].fail("null: not supported");
}

/// The two halves of a merge: "a b" (older files) or ["a", "b"].
std::pair<std::string, std::string> merge_halves(const JsonValue& merge) {
  if (merge.value().is_array()) {
    if (merge.array() != 2) merge.fail("a pair of tokens");
    return {merge.at(0).string(), merge.at(1).string()};
  }
  const std::string& text = merge.string();
  const size_t space = text.find(' ');
  if (space == std::string::npos || text.find(' ', space + 1) != std::string::npos) merge.fail("two tokens and one space");
  return {text.substr(0, space), text.substr(space + 1)};
}

int32_t known_token(const Bpe& bpe, const std::string& token, const JsonValue& where) {
  const auto found = bpe.vocab.find(token);
  if (found == bpe.vocab.end()) where.fail("tokens of model.vocab (" + printable(token) + " is not one)");
  return found->second;
}

Bpe parse_bpe(const JsonValue& model) {
  if (model.has("type")) model["type"].one_of({"BPE"});
  for (const char* key : {"dropout", "continuing_subword_prefix", "end_of_word_suffix"}) {
    if (!model.has(key)) continue;
    const nlohmann::json& value = model[key].value();
    // An empty affix and a dropout of 0 change nothing, and exporters write them.
    if (value.is_string() && value.get_ref<const std::string&>().empty()) continue;
    if (value.is_number() && value.get<double>() == 0) continue;
    model[key].fail("null: not supported");
  }
  if (flag(model, "byte_fallback", false)) model["byte_fallback"].fail("false: not supported");

  Bpe bpe;
  bpe.fuse_unk = flag(model, "fuse_unk", false);
  bpe.ignore_merges = flag(model, "ignore_merges", false);
  const JsonValue vocab = model["vocab"].object();
  for (const auto& [token, id] : vocab.value().items()) {
    if (!id.is_number_integer()) vocab[token.c_str()].fail("an id");
    const auto number = id.get<int64_t>();
    if (number < 0 || number > kMaxId) vocab[token.c_str()].fail("an id from 0 to " + std::to_string(kMaxId));
    bpe.vocab.emplace(token, static_cast<int32_t>(number));
  }
  if (model.has("unk_token")) bpe.unk_id = known_token(bpe, model["unk_token"].string(), model["unk_token"]);

  const JsonValue merges = model["merges"];
  for (size_t i = 0, count = merges.array(); i < count; ++i) {
    const JsonValue merge = merges.at(i);
    const auto [left, right] = merge_halves(merge);
    const uint64_t key = Bpe::pair_key(known_token(bpe, left, merge), known_token(bpe, right, merge));
    bpe.merges[key] = {static_cast<int32_t>(i), known_token(bpe, left + right, merge)};
  }
  return bpe;
}

}  // namespace

struct Tokenizer::Model {
  Bpe bpe;
  bool splits_words = false;  // the Whitespace pre-tokenizer
  // Two searches, one after the other: "normalized" tokens are looked for in what the others leave.
  AddedTokens verbatim, normalized;
  std::map<std::string, int32_t, std::less<>> added;
  std::vector<std::optional<std::string>> tokens;  // by id

  void set_token(int32_t id, const std::string& token) {
    if (tokens.size() <= static_cast<size_t>(id)) tokens.resize(static_cast<size_t>(id) + 1);
    tokens[id] = token;
  }

  void parse_added_tokens(const JsonValue& list);
};

void Tokenizer::Model::parse_added_tokens(const JsonValue& list) {
  auto next_free = static_cast<int32_t>(bpe.vocab.size());
  for (size_t i = 0, count = list.array(); i < count; ++i) {
    const JsonValue entry = list.at(i);
    AddedToken token{};
    token.content = entry["content"].string();
    token.id = static_cast<int32_t>(entry["id"].integer(0, kMaxId));
    token.single_word = flag(entry, "single_word", false);
    token.lstrip = flag(entry, "lstrip", false);
    token.rstrip = flag(entry, "rstrip", false);
    const bool is_normalized = flag(entry, "normalized", !flag(entry, "special", false));
    if (token.content.empty()) entry["content"].fail("a text");

    // The library gives ids itself, whatever the file says: the vocabulary's, else the next free one.
    const auto in_vocab = bpe.vocab.find(token.content);
    const int32_t given = in_vocab != bpe.vocab.end() ? in_vocab->second : next_free;
    if (token.id != given) {
      entry["id"].fail(std::to_string(given) + ", the id that " + printable(token.content) + " gets");
    }
    next_free = std::max(next_free, token.id + 1);
    if (!added.emplace(token.content, token.id).second) entry["content"].fail("a token that was not added before");
    set_token(token.id, token.content);
    (is_normalized ? normalized : verbatim).add(std::move(token));
  }
}

Tokenizer::Tokenizer(std::unique_ptr<const Model> model) : model_(std::move(model)) {}
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;
Tokenizer::~Tokenizer() = default;

Tokenizer Tokenizer::from_file(const std::string& path) { return from_json(read_text_file(path, kMaxFile), path); }

Tokenizer Tokenizer::from_json(std::string_view text, const std::string& name) {
  const nlohmann::json json = parse_json(text, name, "tokenizer");
  const JsonValue root(json, name, "tokenizer");
  for (const char* key : {"normalizer", "post_processor", "truncation", "padding"}) refuse(root, key);

  auto model = std::make_unique<Model>();
  if (root.has("pre_tokenizer")) {
    root["pre_tokenizer"]["type"].one_of({"Whitespace"});
    model->splits_words = true;
  }
  model->bpe = parse_bpe(root["model"]);
  for (const auto& [token, id] : model->bpe.vocab) {
    const size_t index = static_cast<size_t>(id);
    if (index < model->tokens.size() && model->tokens[index]) {
      throw FileError(name, "tokenizer: model.vocab gives the id " + std::to_string(id) + " to " + printable(token) +
                                " and to " + printable(*model->tokens[index]));
    }
    model->set_token(id, token);
  }
  if (root.has("added_tokens")) model->parse_added_tokens(root["added_tokens"]);
  return Tokenizer(std::move(model));
}

std::vector<int64_t> Tokenizer::encode(std::string_view text) const {
  check_utf8(text, "tokenizer");
  std::vector<int64_t> ids;
  const auto encode_plain = [&](std::string_view plain) {
    if (model_->splits_words) {
      split_words(plain, [&](std::string_view word) { model_->bpe.encode(word, ids); });
    } else {
      model_->bpe.encode(plain, ids);
    }
  };
  model_->verbatim.split(text, [&](std::string_view piece, int32_t id) {
    if (id >= 0) {
      ids.push_back(id);
      return;
    }
    model_->normalized.split(piece, [&](std::string_view inner, int32_t inner_id) {
      if (inner_id >= 0) {
        ids.push_back(inner_id);
      } else {
        encode_plain(inner);
      }
    });
  });
  return ids;
}

std::string Tokenizer::decode(std::span<const int64_t> ids) const {
  std::string text;
  bool first = true;
  for (const int64_t id : ids) {
    if (id < 0 || id >= vocab_size() || !model_->tokens[id]) continue;
    if (!std::exchange(first, false)) text += ' ';
    text += *model_->tokens[id];
  }
  return text;
}

int64_t Tokenizer::token_to_id(std::string_view token) const noexcept {
  if (const auto found = model_->added.find(token); found != model_->added.end()) return found->second;
  const auto found = model_->bpe.vocab.find(token);
  return found == model_->bpe.vocab.end() ? -1 : found->second;
}

int64_t Tokenizer::vocab_size() const noexcept { return static_cast<int64_t>(model_->tokens.size()); }

EnTokenizer::EnTokenizer(const std::string& path) : EnTokenizer(Tokenizer::from_file(path), path) {}

EnTokenizer::EnTokenizer(Tokenizer tokenizer, const std::string& name) : tokenizer_(std::move(tokenizer)) {
  for (const std::string_view token : {kStart, kStop}) {
    if (tokenizer_.token_to_id(token) < 0) {
      throw FileError(name, "the tokenizer has no token " + printable(token) + ": not one of Chatterbox's");
    }
  }
}

std::vector<int64_t> EnTokenizer::encode(std::string_view text) const {
  return tokenizer_.encode(replace_all(text, " ", kSpace));
}

std::string EnTokenizer::decode(std::span<const int64_t> ids) const {
  std::string text = replace_all(tokenizer_.decode(ids), " ", "");
  text = replace_all(text, kSpace, " ");
  for (const std::string_view token : {kStop, kUnk}) text = replace_all(text, token, "");
  return text;
}

}  // namespace vivace
