// Loads the operator library into LibTorch without Python, runs a TorchScript module that calls its operators, and compares
// with torch's own attention. Usage: load_operators LIBVIVACE_OPS MODULE.pt; prints the largest difference and whether
// torch's CUDA part is in the process.
#include <dlfcn.h>
#include <torch/script.h>

#include <fstream>
#include <iostream>
#include <string>

namespace {
bool torch_cuda_is_loaded() {
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    if (line.find("libtorch_cuda") != std::string::npos) return true;
  }
  return false;
}
}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "usage: load_operators LIBVIVACE_OPS MODULE.pt\n";
    return 2;
  }
  if (dlopen(argv[1], RTLD_NOW | RTLD_GLOBAL) == nullptr) {
    std::cerr << dlerror() << "\n";
    return 1;
  }
  try {
    const c10::InferenceMode inference;
    torch::jit::Module module = torch::jit::load(argv[2]);
    at::manual_seed(1);
    const at::Tensor q = at::randn({2, 7, 4, 64}), k = at::randn({2, 7, 4, 64}), v = at::randn({2, 7, 4, 64});
    const at::Tensor out = module.forward({q, k, v}).toTensor();
    const at::Tensor expected =
        at::scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), {}, 0.0, true)
            .transpose(1, 2);
    const double difference = (out - expected).abs().max().item<double>();
    std::cout << difference << (torch_cuda_is_loaded() ? " with" : " without") << " torch CUDA\n";
    if (!(difference < 1e-5)) return 1;
    try {
      module.forward({q, k.slice(3, 0, 32), v});
    } catch (const std::exception& error) {
      if (std::string(error.what()).find("vivace.attention: k has head_dim 32, q has 64") != std::string::npos) return 0;
      std::cerr << error.what() << "\n";
    }
    std::cerr << "a wrong head_dim did not give the operator's error\n";
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
  }
  return 1;
}
