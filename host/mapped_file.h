// A file mapped into memory for reading.
#pragma once

#include <cstddef>
#include <span>
#include <string>

namespace vivace {

/// Read-only, private mapping of a regular file; unmapped by the destructor. Throws FileError when it cannot be opened.
/// A file that another process truncates while it is mapped kills the reader (SIGBUS), as with any mapping.
class MappedFile {
 public:
  MappedFile() = default;
  explicit MappedFile(const std::string& path);
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  ~MappedFile();

  std::span<const std::byte> bytes() const noexcept { return {data_, size_}; }

 private:
  const std::byte* data_ = nullptr;
  size_t size_ = 0;
};

/// The whole of a text file (at most `limit` bytes); throws FileError.
std::string read_text_file(const std::string& path, size_t limit);

}  // namespace vivace
