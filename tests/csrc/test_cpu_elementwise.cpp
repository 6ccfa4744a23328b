#include <cmath>

#include "csrc/cpu/kernels.h"
#include "csrc/cpu/ops.h"
#include "csrc/error.h"
#include "tests/csrc/tensors.h"
#include "tests/host/catch.h"

using vivace::random_tensor;
using vivace::cpu::BFloat16;
using vivace::cpu::Float16;
using vivace::cpu::from_float;
using vivace::cpu::to_float;

TEST_CASE("every fp16 value survives the way to fp32 and back") {
  for (uint32_t bits = 0; bits < 0x10000u; ++bits) {
    const float value = to_float(Float16{static_cast<uint16_t>(bits)});
    if (std::isnan(value)) {
      REQUIRE(std::isnan(to_float(from_float<Float16>(value))));
    } else {
      REQUIRE(from_float<Float16>(value).bits == bits);
    }
  }
}

TEST_CASE("rounding to 16 bits goes to the nearest, ties to even") {
  CHECK(from_float<Float16>(65519.0f).bits == 0x7bffu);
  CHECK(from_float<Float16>(65520.0f).bits == 0x7c00u);
  CHECK(from_float<Float16>(1.0f + 1.0f / 2048.0f).bits == 0x3c00u);
  CHECK(from_float<Float16>(1.0f + 3.0f / 2048.0f).bits == 0x3c02u);
  CHECK(from_float<Float16>(0x1p-25f).bits == 0u);
  CHECK(from_float<Float16>(0x1.8p-25f).bits == 1u);
  CHECK(from_float<BFloat16>(1.0f + 1.0f / 256.0f).bits == 0x3f80u);
  CHECK(from_float<BFloat16>(1.0f + 3.0f / 256.0f).bits == 0x3f82u);
  CHECK(std::isnan(to_float(from_float<BFloat16>(std::nanf("")))));
}

TEST_CASE("every instruction set rounds rms_norm, silu_gate and rotary alike") {
  const int64_t width = 83;  // no multiple of a vector
  const std::vector<float> x = random_tensor(2 * width, 3), weight = random_tensor(width, 4);
  const std::vector<float> cos = random_tensor(20, 5), sin = random_tensor(20, 6);
  std::vector<float> expected;
  for (auto* set = vivace::cpu::available_kernels(); *set != nullptr; ++set) {
    CAPTURE((*set)->name);
    std::vector<float> out(static_cast<size_t>(4 * width));
    const vivace::cpu::TypedKernels& kernel = (*set)->float32;
    kernel.rms_norm(x.data(), nullptr, weight.data(), out.data(), width, 1e-5f);
    kernel.silu_gate(x.data(), out.data() + width, width);
    kernel.rotary(x.data(), 0, out.data() + 2 * width, 0, 1, width, 40, cos.data(), sin.data(), false);
    kernel.rotary(x.data(), 0, out.data() + 3 * width, 0, 1, width, 40, cos.data(), sin.data(), true);
    if (expected.empty()) expected = out;
    for (size_t i = 0; i < out.size(); ++i) {
      REQUIRE(std::abs(out[i] - expected[i]) <= 1e-6f * (1.0f + std::abs(expected[i])));
    }
  }
}

TEST_CASE("exp of every instruction set is within two units of the C library's and flushes what is tiny") {
  std::vector<float> x, out;
  for (float value = -87.0f; value < 88.7f; value += 0.0137f) x.push_back(value);
  out.resize(x.size());
  for (auto* set = vivace::cpu::available_kernels(); *set != nullptr; ++set) {
    CAPTURE((*set)->name);
    (*set)->exp(x.data(), 0.0f, out.data(), static_cast<int64_t>(x.size()));
    for (size_t i = 0; i < x.size(); ++i) {
      const double exact = std::exp(static_cast<double>(x[i]));
      REQUIRE(std::abs(out[i] - exact) <= 2.0 * 0x1p-24 * 2.0 * exact);
    }
    const float special[3] = {-INFINITY, INFINITY, NAN};
    float result[3];
    (*set)->exp(special, 0.0f, result, 3);
    CHECK(result[0] == 0.0f);
    CHECK(result[1] == INFINITY);
    CHECK(std::isnan(result[2]));
  }
}

TEST_CASE("a rotary position outside the table is an error that names the token") {
  const std::vector<float> table(4 * 8, 1.0f);
  std::vector<float> x(3 * 16, 1.0f);
  const int32_t positions[3] = {0, 4, 1};
  vivace::RotaryParams p;
  p.x = p.out = x.data();
  p.x_stride[0] = p.out_stride[0] = p.x_stride[1] = p.out_stride[1] = 16;
  p.cos = p.sin = table.data();
  p.positions = positions;
  p.tokens = 3;
  p.heads = 1;
  p.head_dim = p.rotary_dim = 16;
  p.max_position = 4;
  CHECK_THROWS_WITH(vivace::cpu::rotary(p), ContainsSubstring("token 1 has position 4"));
  for (const float value : x) CHECK(value == 1.0f);
}
