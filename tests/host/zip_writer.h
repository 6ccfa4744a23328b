// A writer of small zip files, honest or not, laid out as torch does: data descriptors, zip64 end records.
#pragma once

#include <zlib.h>

#include <cstdint>
#include <string>
#include <vector>

#include "tests/host/files.h"

namespace vivace::testing {

struct ZipItem {
  std::string name, content;
  bool deflate = false;
  // Lies, for hostile files:
  std::string local_name = {};  // in the local header; empty: the same
  uint16_t flags = 0x808;       // data descriptor, UTF-8
  int method = -1;              // in the directory; -1: what it is
  int64_t size = -1;            // decompressed size in the directory; -1: what it is
  int64_t stored_size = -1;
  int64_t header_offset = -1;
  bool zip64_extra = false;  // sizes and offset in a zip64 field
};

inline std::string deflated(const std::string& content) {
  z_stream stream{};
  deflateInit2(&stream, 9, Z_DEFLATED, -MAX_WBITS, 8, Z_DEFAULT_STRATEGY);
  std::string result(deflateBound(&stream, content.size()), '\0');
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(content.data()));
  stream.avail_in = static_cast<uInt>(content.size());
  stream.next_out = reinterpret_cast<Bytef*>(result.data());
  stream.avail_out = static_cast<uInt>(result.size());
  deflate(&stream, Z_FINISH);
  result.resize(stream.total_out);
  deflateEnd(&stream);
  return result;
}

inline std::string zip_of(const std::vector<ZipItem>& items, bool zip64_end = true) {
  std::string text, directory;
  for (const ZipItem& item : items) {
    const std::string stored = item.deflate ? deflated(item.content) : item.content;
    const auto crc = static_cast<uint32_t>(
        crc32(0, reinterpret_cast<const Bytef*>(item.content.data()), static_cast<uInt>(item.content.size())));
    const uint16_t method = item.deflate ? 8 : 0;
    const std::string& local_name = item.local_name.empty() ? item.name : item.local_name;
    const uint64_t header_offset = item.header_offset >= 0 ? static_cast<uint64_t>(item.header_offset) : text.size();
    const uint64_t size = item.size >= 0 ? static_cast<uint64_t>(item.size) : item.content.size();
    const uint64_t stored_size = item.stored_size >= 0 ? static_cast<uint64_t>(item.stored_size) : stored.size();

    append<uint32_t>(text, 0x04034b50);
    append<uint16_t>(text, 20);
    append<uint16_t>(text, item.flags);
    append<uint16_t>(text, method);
    append<uint32_t>(text, 0);                              // time
    for (int i = 0; i < 3; ++i) append<uint32_t>(text, 0);  // crc and sizes follow in the descriptor
    append<uint16_t>(text, static_cast<uint16_t>(local_name.size()));
    append<uint16_t>(text, 4);
    text += local_name;
    append<uint16_t>(text, 0x4246);  // torch pads with such a field, so that tensors are aligned
    append<uint16_t>(text, 0);
    text += stored;
    append<uint32_t>(text, 0x08074b50);
    append<uint32_t>(text, crc);
    append<uint32_t>(text, static_cast<uint32_t>(stored.size()));
    append<uint32_t>(text, static_cast<uint32_t>(item.content.size()));

    append<uint32_t>(directory, 0x02014b50);
    append<uint32_t>(directory, 0x00140014);  // versions
    append<uint16_t>(directory, item.flags);
    append<uint16_t>(directory, item.method >= 0 ? static_cast<uint16_t>(item.method) : method);
    append<uint32_t>(directory, 0);
    append<uint32_t>(directory, crc);
    const auto small = [&](uint64_t number) { return item.zip64_extra ? 0xFFFFFFFF : static_cast<uint32_t>(number); };
    append<uint32_t>(directory, small(stored_size));
    append<uint32_t>(directory, small(size));
    append<uint16_t>(directory, static_cast<uint16_t>(item.name.size()));
    append<uint16_t>(directory, item.zip64_extra ? 28 : 0);
    append<uint16_t>(directory, 0);  // comment
    append<uint16_t>(directory, 0);  // disk
    append<uint16_t>(directory, 0);
    append<uint32_t>(directory, 0);
    append<uint32_t>(directory, small(header_offset));
    directory += item.name;
    if (item.zip64_extra) {
      append<uint16_t>(directory, 1);
      append<uint16_t>(directory, 24);
      for (const uint64_t number : {size, stored_size, header_offset}) append<uint64_t>(directory, number);
    }
  }

  const uint64_t offset = text.size(), entries = items.size();
  text += directory;
  if (zip64_end) {
    const uint64_t end64 = text.size();
    append<uint32_t>(text, 0x06064b50);
    append<uint64_t>(text, 44);
    append<uint32_t>(text, 0x002d031e);
    append<uint32_t>(text, 0);
    append<uint32_t>(text, 0);
    append<uint64_t>(text, entries);
    append<uint64_t>(text, entries);
    append<uint64_t>(text, directory.size());
    append<uint64_t>(text, offset);
    append<uint32_t>(text, 0x07064b50);
    append<uint32_t>(text, 0);
    append<uint64_t>(text, end64);
    append<uint32_t>(text, 1);
  }
  append<uint32_t>(text, 0x06054b50);
  append<uint32_t>(text, 0);
  append<uint16_t>(text, static_cast<uint16_t>(entries));
  append<uint16_t>(text, static_cast<uint16_t>(entries));
  append<uint32_t>(text, static_cast<uint32_t>(directory.size()));
  append<uint32_t>(text, static_cast<uint32_t>(offset));
  append<uint16_t>(text, 0);
  return text;
}

}  // namespace vivace::testing
