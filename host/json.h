// JSON out of files that may be hostile: bounded depth, no duplicate keys, and errors that name the path of a value.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace vivace {

/// Throws FileError(file, "<what>: ...") for text that is not JSON (with its line and column), a nesting deeper than
/// `max_depth`, or an object with the same key twice (readers would disagree on which one counts).
nlohmann::json parse_json(std::string_view text, const std::string& file, const std::string& what, int max_depth = 16);

/// A value and where it stands; every getter throws FileError "<file>: <what>: <path> is <value>, expected <expected>".
class JsonValue {
 public:
  JsonValue(const nlohmann::json& value, std::string file, std::string what);

  /// The member `key` of an object; a missing one is an error.
  JsonValue operator[](const char* key) const;
  /// The element `index` of an array.
  JsonValue at(size_t index) const;
  /// False for a missing member as for null.
  bool has(const char* key) const;

  int64_t integer(int64_t smallest, int64_t largest) const;
  double number(double smallest, double largest) const;
  bool boolean() const;
  const std::string& string() const;
  /// One of `allowed`: its index.
  size_t one_of(std::initializer_list<std::string_view> allowed) const;
  /// The number of elements.
  size_t array() const;
  const JsonValue& object() const;

  const nlohmann::json& value() const noexcept { return *value_; }
  const std::string& path() const noexcept { return path_; }
  [[noreturn]] void fail(const std::string& expected) const;

 private:
  const nlohmann::json* value_;
  std::string file_, what_, path_;
};

}  // namespace vivace
