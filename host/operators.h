// The operator library: finding and loading libvivace_ops.so, without which no exported model can be loaded.
#pragma once

#include <string>

namespace vivace {

/// $VIVACE_OPS_LIBRARY, else libvivace_ops.so beside libvivace_host.so. Throws Error naming the places looked at.
std::string find_operators();

/// Loads the library (once a process; `path` empty: find_operators()) unless the operators are registered already, as they
/// are after `import vivace`. Throws Error with the loader's own reason.
void load_operators(const std::string& path = "");

/// torch.ops.vivace.build_info() as JSON text; the operators must be loaded.
std::string operators_build_info();

/// True when the loaded library has CUDA kernels.
bool operators_have_cuda();

}  // namespace vivace
