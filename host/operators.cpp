#include "host/operators.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <dlfcn.h>

#include <cstdlib>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "host/error.h"

namespace vivace {
namespace {

bool registered() { return c10::Dispatcher::singleton().findSchema({"vivace::attention_with_kvcache", ""}).has_value(); }

std::string own_directory() {
  Dl_info info{};
  if (dladdr(reinterpret_cast<const void*>(&find_operators), &info) == 0 || info.dli_fname == nullptr) return ".";
  return std::filesystem::absolute(info.dli_fname).parent_path().string();
}

}  // namespace

std::string find_operators() {
  if (const char* path = std::getenv("VIVACE_OPS_LIBRARY"); path != nullptr && *path != '\0') return path;
  const std::string path = own_directory() + "/libvivace_ops.so";
  check(std::filesystem::exists(path), "operators", "no operator library: ", path,
        " does not exist; set VIVACE_OPS_LIBRARY to libvivace_ops.so");
  return path;
}

void load_operators(const std::string& path) {
  if (registered()) return;
  const std::string library = path.empty() ? find_operators() : path;
  // Global: the library's symbols must be found by what it loads, and it stays for the life of the process.
  if (dlopen(library.c_str(), RTLD_NOW | RTLD_GLOBAL) == nullptr) {
    const char* reason = dlerror();
    throw Error("vivace.operators: could not load " + printable(library) + ": " + (reason == nullptr ? "unknown" : reason));
  }
  check(registered(), "operators", printable(library), " was loaded but registers no vivace operators");
}

std::string operators_build_info() {
  auto op = c10::Dispatcher::singleton().findSchemaOrThrow("vivace::build_info", "");
  torch::jit::Stack stack;
  op.callBoxed(&stack);
  return stack.back().toStringRef();
}

bool operators_have_cuda() {
  const auto info = nlohmann::json::parse(operators_build_info(), nullptr, /*allow_exceptions=*/false);
  return info.is_object() && info.contains("cuda") && !info["cuda"].is_null();
}

}  // namespace vivace
