// Text to token ids: the byte-pair encoding of a Hugging Face tokenizer.json, as Chatterbox uses it.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace vivace {

/// Equal to `tokenizers.Tokenizer.from_file(path).encode(text).ids` for the files of the kind Chatterbox ships: a BPE model
/// behind the Whitespace pre-tokenizer, with added tokens and no normalizer. What another file asks for beyond that is
/// refused when it is loaded. Immutable, so any number of threads may share one.
class Tokenizer {
 public:
  /// Throws FileError naming file and JSON path.
  static Tokenizer from_file(const std::string& path);
  /// From the JSON text itself; `name` stands for the file in errors.
  static Tokenizer from_json(std::string_view json, const std::string& name);

  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;
  ~Tokenizer();

  /// The ids of UTF-8 `text`, O(n log n); throws Error when it is not UTF-8.
  std::vector<int64_t> encode(std::string_view text) const;

  /// The tokens' texts joined by single spaces; ids without a token are left out.
  std::string decode(std::span<const int64_t> ids) const;

  /// -1 when there is no such token.
  int64_t token_to_id(std::string_view token) const noexcept;
  /// One past the largest id.
  int64_t vocab_size() const noexcept;

 private:
  struct Model;
  explicit Tokenizer(std::unique_ptr<const Model> model);
  std::unique_ptr<const Model> model_;
};

/// Chatterbox's English tokenizer: spaces become the token [SPACE] before the encoding. Neither [START] nor [STOP] is added.
class EnTokenizer {
 public:
  /// Throws FileError, also when the vocabulary lacks [START] or [STOP].
  explicit EnTokenizer(const std::string& path);
  explicit EnTokenizer(Tokenizer tokenizer, const std::string& name = "tokenizer");

  std::vector<int64_t> encode(std::string_view text) const;
  /// Back to text, without [STOP] and [UNK].
  std::string decode(std::span<const int64_t> ids) const;

  const Tokenizer& tokenizer() const noexcept { return tokenizer_; }

 private:
  Tokenizer tokenizer_;
};

}  // namespace vivace
