// libFuzzer: the safetensors reader on any bytes. See tests/fuzz/README.md.
#include <cstddef>
#include <cstdint>
#include <span>

#include "host/error.h"
#include "host/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    const auto file = vivace::Safetensors::parse(std::as_bytes(std::span(data, size)), "fuzz");
    unsigned sum = 0;  // reads every byte that a view promises
    for (const auto& [name, view] : file.tensors()) {
      for (const std::byte byte : view.data) sum += static_cast<unsigned>(byte);
    }
    volatile unsigned sink = sum;
    (void)sink;
  } catch (const vivace::Error&) {
  }
  return 0;
}
