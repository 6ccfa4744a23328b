// What this machine offers, without torch's types: for `vivace info` and Python.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace vivace {

struct Machine {
  struct Device {
    std::string name;         // "cpu", "cuda:0": what EngineOptions::device takes
    std::string description;  // "NVIDIA H200"
    int64_t free_bytes;
  };
  std::vector<Device> devices;  // CUDA devices only where the operators can use them
  std::string operators;        // build_info() of the operator library, JSON; empty when it does not load
  std::string operators_error;  // why not
};

/// Never throws: what is missing is said in `operators_error`.
Machine inspect_machine();

}  // namespace vivace
