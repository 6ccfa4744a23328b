// The central directory of a zip file.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "host/input_file.h"

namespace vivace {

struct ZipEntry {
  std::string name;      // as in the file, with folders
  uint64_t offset;       // of its bytes in the file, past its local header
  uint64_t stored_size;  // bytes in the file
  uint64_t size;         // bytes once decompressed
  bool deflated;
};

/// The entries of a zip or zip64 file, in the order of the directory; throws FileError. Strict, so that no two readers can
/// see different archives in one file: nothing may follow the end-of-directory record, names are the same in both headers,
/// and neither entries nor directory overlap.
std::vector<ZipEntry> read_zip_directory(const InputFile& file);

}  // namespace vivace
