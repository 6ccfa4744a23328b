#include "host/safetensors.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <optional>
#include <utility>

#include "host/error.h"
#include "host/json.h"

namespace vivace {
namespace {

static_assert(std::endian::native == std::endian::little, "tensors are mapped as they lie in the file: little-endian");

constexpr uint64_t kLengthBytes = 8;
constexpr uint64_t kMaxHeader = 100'000'000;  // the format's own limit

struct DtypeBits {
  std::string_view name;
  int bits;
};
constexpr DtypeBits kDtypes[] = {
    {"BOOL", 8}, {"U8", 8},      {"I8", 8},      {"U16", 16},    {"I16", 16},    {"U32", 32},    {"I32", 32},
    {"U64", 64}, {"I64", 64},    {"F16", 16},    {"BF16", 16},   {"F32", 32},    {"F64", 64},    {"C64", 64},
    {"F4", 4},   {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"F8_E4M3", 8}, {"F8_E5M2", 8}, {"F8_E8M0", 8},
};

/// Bytes of a tensor; nothing when the product overflows or is not a whole number of bytes.
std::optional<uint64_t> bytes_of(const std::vector<int64_t>& shape, int bits) {
  uint64_t total = static_cast<uint64_t>(bits);
  for (const int64_t size : shape) {
    if (__builtin_mul_overflow(total, static_cast<uint64_t>(size), &total)) return std::nullopt;
  }
  if (total % 8 != 0) return std::nullopt;
  return total / 8;
}

/// A tensor of the header, before its bytes are looked at.
struct Entry {
  std::string name;
  SafetensorsView view;
  uint64_t begin, end;  // in the data section
};

Entry parse_entry(const std::string& name, const nlohmann::json& json, const std::string& file) {
  const JsonValue value(json, file, "tensor " + printable(name));
  Entry entry{name, {}, 0, 0};
  entry.view.dtype = value["dtype"].string();
  const int bits = safetensors_dtype_bits(entry.view.dtype);
  if (bits == 0) value["dtype"].fail("a dtype of the format, such as \"F32\"");

  const JsonValue shape = value["shape"];
  for (size_t i = 0, count = shape.array(); i < count; ++i) {
    entry.view.shape.push_back(shape.at(i).integer(0, INT64_MAX));
  }
  const JsonValue offsets = value["data_offsets"];
  if (offsets.array() != 2) offsets.fail("two offsets");
  entry.begin = static_cast<uint64_t>(offsets.at(0).integer(0, INT64_MAX));
  entry.end = static_cast<uint64_t>(offsets.at(1).integer(0, INT64_MAX));

  const std::optional<uint64_t> expected = bytes_of(entry.view.shape, bits);
  if (entry.end < entry.begin || !expected || *expected != entry.end - entry.begin) {
    throw FileError(file, "tensor " + printable(name) + ": data_offsets [" + std::to_string(entry.begin) + ", " +
                              std::to_string(entry.end) + "], expected " +
                              (expected ? std::to_string(*expected) + " bytes" : "a size that fits 64 bits") + " for " +
                              describe(entry.view));
  }
  return entry;
}

}  // namespace

int safetensors_dtype_bits(std::string_view dtype) noexcept {
  const auto found =
      std::find_if(std::begin(kDtypes), std::end(kDtypes), [dtype](const DtypeBits& row) { return row.name == dtype; });
  return found == std::end(kDtypes) ? 0 : found->bits;
}

std::string describe(const SafetensorsView& view) {
  std::string text = view.dtype + " [";
  for (size_t i = 0; i < view.shape.size(); ++i) text.append(i == 0 ? "" : ", ").append(std::to_string(view.shape[i]));
  return text + "]";
}

int64_t SafetensorsView::numel() const noexcept {
  int64_t count = 1;
  for (const int64_t size : shape) count *= size;  // cannot overflow: the reader checked the bytes
  return count;
}

Safetensors Safetensors::open(const std::string& path) {
  MappedFile file(path);
  Safetensors result = parse(file.bytes(), path);
  result.file_ = std::move(file);  // the mapping does not move
  return result;
}

Safetensors Safetensors::parse(std::span<const std::byte> bytes, const std::string& name) {
  if (bytes.size() < kLengthBytes) {
    throw FileError(
        name, 0,
        "the file has " + std::to_string(bytes.size()) + " bytes, expected 8 for the length of a safetensors header");
  }
  uint64_t header_size = 0;
  std::memcpy(&header_size, bytes.data(), kLengthBytes);
  const uint64_t room = bytes.size() - kLengthBytes;
  if (std::memcmp(bytes.data(), "PK\3\4", 4) == 0) {
    throw FileError(name, 0, "a zip archive (torch.save writes such), expected safetensors; `vivace voice` converts voices");
  }
  if (header_size > room || header_size > kMaxHeader) {
    throw FileError(name, 0,
                    "the header's length is " + std::to_string(header_size) + ", expected at most " +
                        std::to_string(std::min(room, kMaxHeader)) + " (the file has " + std::to_string(bytes.size()) +
                        " bytes): truncated, or not safetensors");
  }
  const std::string_view header(reinterpret_cast<const char*>(bytes.data()) + kLengthBytes, header_size);
  if (!header.starts_with('{')) {
    throw FileError(name, kLengthBytes, "the header starts with " + printable(header.substr(0, 1)) + ", expected \"{\"");
  }

  Safetensors result;
  result.path_ = name;
  const nlohmann::json json = parse_json(header, name, "header", 4);
  std::vector<Entry> entries;
  for (const auto& [key, value] : json.items()) {
    if (key != "__metadata__") {
      entries.push_back(parse_entry(key, value, name));
      continue;
    }
    JsonValue(value, name, "__metadata__").object();
    for (const auto& [meta_key, meta_value] : value.items()) {
      result.metadata_[meta_key] = JsonValue(meta_value, name, "__metadata__ " + printable(meta_key)).string();
    }
  }

  // In file order, each tensor must begin where the one before ends: no overlap, no hole that hides bytes.
  std::sort(entries.begin(), entries.end(),
            [](const Entry& a, const Entry& b) { return std::pair(a.begin, a.end) < std::pair(b.begin, b.end); });
  const uint64_t data_begin = kLengthBytes + header_size;
  const uint64_t data_size = bytes.size() - data_begin;
  uint64_t expected_begin = 0;
  for (Entry& entry : entries) {
    if (entry.begin != expected_begin) {
      throw FileError(name, data_begin + entry.begin,
                      "tensor " + printable(entry.name) + " begins at data offset " + std::to_string(entry.begin) +
                          ", expected " + std::to_string(expected_begin) + ", where the tensor before it ends (" +
                          (entry.begin < expected_begin ? "overlap" : "gap") + ")");
    }
    if (entry.end > data_size) {
      throw FileError(name, data_begin + entry.begin,
                      "tensor " + printable(entry.name) + " ends at data offset " + std::to_string(entry.end) +
                          ", the file has " + std::to_string(data_size) + " bytes of data: truncated");
    }
    expected_begin = entry.end;
    entry.view.data = bytes.subspan(data_begin + entry.begin, entry.end - entry.begin);
    result.tensors_.emplace(std::move(entry.name), std::move(entry.view));
  }
  if (expected_begin != data_size) {
    throw FileError(name, data_begin + expected_begin,
                    std::to_string(data_size - expected_begin) + " bytes after the last tensor, expected none");
  }
  return result;
}

const SafetensorsView* Safetensors::find(std::string_view name) const noexcept {
  const auto found = tensors_.find(name);
  return found == tensors_.end() ? nullptr : &found->second;
}

const SafetensorsView& Safetensors::at(std::string_view name) const {
  if (const SafetensorsView* view = find(name)) return *view;
  std::string names;
  size_t listed = 0;
  for (const auto& [present, view] : tensors_) {
    if (listed++ == 20) {
      names += ", ...";
      break;
    }
    names.append(listed == 1 ? "" : ", ").append(printable(present));
  }
  throw FileError(path_, "no tensor " + printable(name) + "; it has " + (names.empty() ? "none" : names));
}

}  // namespace vivace
