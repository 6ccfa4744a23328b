// Reader of the safetensors format: an 8-byte little-endian length, a JSON header, the tensors' bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "host/mapped_file.h"

namespace vivace {

/// One tensor inside a mapped file; valid as long as the Safetensors it came from.
struct SafetensorsView {
  std::string dtype;           // "F32", "BF16", "I64", ... as the format names them
  std::vector<int64_t> shape;  // row-major; empty: a scalar
  std::span<const std::byte> data;

  int64_t numel() const noexcept;
};

class Safetensors {
 public:
  /// Maps and checks a file: throws FileError naming file, byte offset, what came and what was expected.
  /// Checked: header length, JSON (depth, duplicate keys), dtypes, shapes against byte ranges, ranges inside the file,
  /// in order, without gaps or overlap.
  static Safetensors open(const std::string& path);
  /// The same over bytes already in memory, which must outlive the result; `name` stands for the file in errors.
  static Safetensors parse(std::span<const std::byte> bytes, const std::string& name);

  const std::string& path() const noexcept { return path_; }
  const std::map<std::string, SafetensorsView, std::less<>>& tensors() const noexcept { return tensors_; }
  const std::map<std::string, std::string, std::less<>>& metadata() const noexcept { return metadata_; }

  /// nullptr when there is none of that name.
  const SafetensorsView* find(std::string_view name) const noexcept;
  /// Throws FileError listing the names that are there.
  const SafetensorsView& at(std::string_view name) const;

 private:
  MappedFile file_;
  std::string path_;
  std::map<std::string, SafetensorsView, std::less<>> tensors_;
  std::map<std::string, std::string, std::less<>> metadata_;
};

/// "F32 [1, 256]"
std::string describe(const SafetensorsView& view);

/// Bits of one element of a safetensors dtype, 0 when unknown.
int safetensors_dtype_bits(std::string_view dtype) noexcept;

}  // namespace vivace
