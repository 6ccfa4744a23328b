#include "csrc/cpu/kernels.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>

#include "csrc/error.h"

namespace vivace::cpu {

namespace {

std::atomic<const Kernels*> forced{nullptr};

struct Available {
  const Kernels* sets[4] = {&kBaselineKernels};
  const Kernels* chosen = &kBaselineKernels;
  Available() {
#if defined(__x86_64__)
    int count = 1;
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (avx2) sets[count++] = &kAvx2Kernels;
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      sets[count++] = &kAvx512Kernels;
    }
    chosen = sets[count - 1];
#endif
    const char* name = std::getenv("VIVACE_CPU");
    if (name != nullptr && *name != '\0') chosen = named(name);
  }

 private:
  const Kernels* named(const char* name) const {
    std::string names;
    for (int i = 0; sets[i] != nullptr; ++i) {
      if (std::strcmp(sets[i]->name, name) == 0) return sets[i];
      names += (i == 0 ? "" : ", ") + std::string(sets[i]->name);
    }
    throw Error("vivace.cpu: the environment's VIVACE_CPU is \"" + std::string(name) + "\", expected one of " + names +
                " (what this machine runs)");
  }
};

const Available& available() {
  static const Available instance;
  return instance;
}

}  // namespace

const Kernels& kernels() {
  const Kernels* set = forced.load(std::memory_order_relaxed);
  return set != nullptr ? *set : *available().chosen;
}

const Kernels* const* available_kernels() { return available().sets; }

void force_kernels(const Kernels* chosen) { forced.store(chosen, std::memory_order_relaxed); }

}  // namespace vivace::cpu
