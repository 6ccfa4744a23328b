// Operators without tensors: what this library was built for, and which kernel family it uses.
#include "torch_ext/build_info.h"

#include <string>

#include "csrc/arch.h"
#include "csrc/attention.h"
#include "torch_ext/tensors.h"

namespace vivace {
namespace {

/// Found by its first word in the file itself, so that Python can say what a library that does not load was built for.
constexpr char kMarked[] = "VIVACE_BUILD_INFO=" VIVACE_BUILD_INFO;

std::string build_info() {
  const char* volatile text = kMarked;  // volatile: the compiler shall not take the text apart
  return text + sizeof("VIVACE_BUILD_INFO=") - 1;
}

std::string attention_kernel() { return last_attention_kernel(); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vivace, m) {
  m.def("force_arch(int arch) -> int");
  m.def("build_info() -> str");
  m.def("attention_kernel() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(vivace, CompositeExplicitAutograd, m) {
  m.impl("force_arch", TORCH_BOX(&force_arch));
  m.impl("build_info", TORCH_BOX(&build_info));
  m.impl("attention_kernel", TORCH_BOX(&attention_kernel));
}

}  // namespace vivace
