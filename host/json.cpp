#include "host/json.h"

#include <set>
#include <utility>
#include <vector>

#include "host/error.h"

namespace vivace {

using nlohmann::json;

json parse_json(std::string_view text, const std::string& file, const std::string& what, int max_depth) {
  std::vector<std::set<std::string>> keys;  // of the objects that are open
  const auto watch = [&](int depth, json::parse_event_t event, json& value) {
    switch (event) {
      case json::parse_event_t::object_start: keys.emplace_back(); [[fallthrough]];
      case json::parse_event_t::array_start:
        if (depth >= max_depth) {
          throw FileError(file, what + ": JSON nested deeper than " + std::to_string(max_depth) + " levels");
        }
        break;
      case json::parse_event_t::object_end: keys.pop_back(); break;
      case json::parse_event_t::key:
        if (!keys.back().insert(value.get<std::string>()).second) {
          throw FileError(file, what + ": JSON has the key " + printable(value.get<std::string>()) + " twice in one object");
        }
        break;
      default: break;
    }
    return true;
  };
  try {
    return json::parse(text.begin(), text.end(), watch);
  } catch (const json::exception& error) {
    std::string reason = error.what();  // "[json.exception.parse_error.101] parse error at line 1, column 2: ..."
    if (const size_t end = reason.find("] "); end != std::string::npos) reason.erase(0, end + 2);
    std::string shown = printable(reason, 300);
    throw FileError(file, what + ": not JSON: " + shown.substr(1, shown.size() - 2));
  }
}

JsonValue::JsonValue(const json& value, std::string file, std::string what)
    : value_(&value), file_(std::move(file)), what_(std::move(what)) {}

JsonValue JsonValue::operator[](const char* key) const {
  object();
  JsonValue member = *this;
  member.path_ = path_.empty() ? key : path_ + "." + key;
  const auto found = value_->find(key);
  if (found == value_->end()) throw FileError(file_, what_ + ": " + member.path_ + " is missing");
  member.value_ = &*found;
  return member;
}

JsonValue JsonValue::at(size_t index) const {
  JsonValue element = *this;
  element.path_ = path_ + "[" + std::to_string(index) + "]";
  element.value_ = &(*value_)[index];
  return element;
}

bool JsonValue::has(const char* key) const {
  object();
  const auto found = value_->find(key);
  return found != value_->end() && !found->is_null();
}

int64_t JsonValue::integer(int64_t smallest, int64_t largest) const {
  const std::string expected = "an integer from " + std::to_string(smallest) + " to " + std::to_string(largest);
  if (!value_->is_number_integer()) fail(expected);
  // Above int64 the parser keeps an unsigned, which get<int64_t> would wrap.
  if (value_->is_number_unsigned() && value_->get<uint64_t>() > static_cast<uint64_t>(INT64_MAX)) fail(expected);
  const auto value = value_->get<int64_t>();
  if (value < smallest || value > largest) fail(expected);
  return value;
}

double JsonValue::number(double smallest, double largest) const {
  std::ostringstream expected;
  expected << "a number from " << smallest << " to " << largest;
  if (!value_->is_number()) fail(expected.str());
  const auto value = value_->get<double>();
  if (!(value >= smallest && value <= largest)) fail(expected.str());
  return value;
}

bool JsonValue::boolean() const {
  if (!value_->is_boolean()) fail("true or false");
  return value_->get<bool>();
}

const std::string& JsonValue::string() const {
  if (!value_->is_string()) fail("a string");
  return value_->get_ref<const std::string&>();
}

size_t JsonValue::one_of(std::initializer_list<std::string_view> allowed) const {
  std::string expected;
  size_t index = 0;
  for (const std::string_view candidate : allowed) {
    if (value_->is_string() && value_->get_ref<const std::string&>() == candidate) return index;
    expected.append(index++ == 0 ? "" : " or ").append(printable(candidate));
  }
  fail(expected);
}

size_t JsonValue::array() const {
  if (!value_->is_array()) fail("an array");
  return value_->size();
}

const JsonValue& JsonValue::object() const {
  if (!value_->is_object()) fail("an object");
  return *this;
}

void JsonValue::fail(const std::string& expected) const {
  std::string came;
  if (value_->is_object()) {
    came = "an object";
  } else if (value_->is_array()) {
    came = "an array";
  } else if (value_->is_string()) {
    came = printable(value_->get_ref<const std::string&>());
  } else {
    came = value_->dump();
  }
  throw FileError(file_, what_ + ": " + (path_.empty() ? "the whole" : path_) + " is " + came + ", expected " + expected);
}

}  // namespace vivace
