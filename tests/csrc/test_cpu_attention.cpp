#include <cmath>
#include <cstring>
#include <limits>
#include <thread>

#include "csrc/cpu/kernels.h"
#include "csrc/cpu/ops.h"
#include "csrc/error.h"
#include "csrc/parallel.h"
#include "tests/csrc/tensors.h"
#include "tests/host/catch.h"

namespace {

using vivace::Call;

int thread_count = 1;

/// Cuts [begin, end) into thread_count ranges, backwards, each on a thread of its own.
void run_threads(int64_t begin, int64_t end, int64_t, void (*fn)(void*, int64_t, int64_t), void* context) {
  std::vector<std::thread> threads;
  for (int64_t t = thread_count - 1; t >= 0; --t) {
    const int64_t from = begin + (end - begin) * t / thread_count, to = begin + (end - begin) * (t + 1) / thread_count;
    if (from < to) threads.emplace_back([=] { fn(context, from, to); });
  }
  for (std::thread& thread : threads) thread.join();
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

float largest_difference(const std::vector<float>& a, const std::vector<float>& b) {
  float difference = 0.0f;
  for (size_t i = 0; i < a.size(); ++i) difference = std::max(difference, std::abs(a[i] - b[i]));
  return difference;
}

struct Shape {
  int64_t batch, queries, keys, heads, heads_kv, head_dim;
};
// Decode over several chunks of keys, decode of a group of heads, prefill over several blocks of rows.
const Shape kShapes[] = {{2, 1, 700, 4, 4, 64}, {3, 2, 333, 8, 2, 40}, {2, 230, 230, 3, 1, 64}};

}  // namespace

TEST_CASE("attention gives the same bits on any number of threads") {
  for (const Shape& shape : kShapes) {
    std::vector<float> first;
    vivace::set_parallel_for(run_threads);
    for (thread_count = 1; thread_count <= 7; thread_count += 3) {
      Call call(shape.batch, shape.queries, shape.keys, shape.heads, shape.heads_kv, shape.head_dim);
      call.params.causal = true;
      vivace::cpu::attention_forward(call.params);
      if (thread_count == 1) first = call.out;
      CHECK(same_bits(call.out, first));
    }
    vivace::set_parallel_for(nullptr);
  }
}

TEST_CASE("a sequence gives the same bits alone and in a batch") {
  for (const Shape& shape : kShapes) {
    Call batch(shape.batch, shape.queries, shape.keys, shape.heads, shape.heads_kv, shape.head_dim);
    vivace::cpu::attention_forward(batch.params);
    Call alone(shape.batch, shape.queries, shape.keys, shape.heads, shape.heads_kv, shape.head_dim);
    alone.params.batch = 1;
    vivace::cpu::attention_forward(alone.params);
    const size_t row = static_cast<size_t>(shape.queries * shape.heads * shape.head_dim);
    CHECK(std::memcmp(alone.out.data(), batch.out.data(), row * sizeof(float)) == 0);
  }
}

TEST_CASE("every instruction set gives the same attention up to rounding") {
  for (const Shape& shape : kShapes) {
    std::vector<float> baseline, baseline_lse;
    for (auto* set = vivace::cpu::available_kernels(); *set != nullptr; ++set) {
      CAPTURE((*set)->name, shape.queries, shape.head_dim);
      vivace::cpu::force_kernels(*set);
      Call call(shape.batch, shape.queries, shape.keys, shape.heads, shape.heads_kv, shape.head_dim);
      call.params.causal = true;
      call.params.window_left = 150;
      call.params.softcap = 20.0f;
      vivace::cpu::attention_forward(call.params);
      vivace::cpu::force_kernels(nullptr);
      if (baseline.empty()) {
        baseline = call.out;
        baseline_lse = call.lse;
      }
      // Sums of some hundred fp32 terms in another order.
      CHECK(largest_difference(call.out, baseline) < 2e-6f);
      CHECK(largest_difference(call.lse, baseline_lse) < 4e-6f);
    }
  }
}

TEST_CASE("an append past the capacity names the row and writes nothing") {
  Call call(2, 2, 8, 2, 2, 16);
  call.use_cache({3, 7}, 2);
  const std::vector<float> k = call.k, v = call.v;
  CHECK_THROWS_AS(vivace::cpu::attention_forward(call.params), vivace::Error);
  CHECK_THROWS_WITH(vivace::cpu::attention_forward(call.params), ContainsSubstring("row 1") && ContainsSubstring("7 keys") &&
                                                                     ContainsSubstring("9 in all") &&
                                                                     ContainsSubstring("capacity is 8"));
  CHECK(same_bits(call.k, k));
  CHECK(same_bits(call.v, v));
}

TEST_CASE("an append writes the new keys after the old ones and nothing else") {
  Call call(2, 2, 8, 2, 2, 16);
  call.use_cache({3, 6}, 2);
  std::vector<float> expected = call.k;
  const size_t row = 2 * 16;
  std::memcpy(expected.data() + 3 * row, call.k_new.data(), 2 * row * sizeof(float));
  std::memcpy(expected.data() + (8 + 6) * row, call.k_new.data() + 2 * row, 2 * row * sizeof(float));
  vivace::cpu::attention_forward(call.params);
  CHECK(same_bits(call.k, expected));
}

TEST_CASE("NaN in keys and values that a row does not see stays out of it") {
  for (const int64_t queries : {1, 3, 80}) {
    Call clean(1, queries, 150, 4, 2, 64), dirty(1, queries, 150, 4, 2, 64);
    for (Call* call : {&clean, &dirty}) {
      call->params.causal = true;
      call->params.window_left = 9;
    }
    const size_t row = 2 * 64, hidden = static_cast<size_t>(150 - queries - 9) * row;  // before the first query's window
    for (size_t i = 0; i < hidden; ++i) dirty.k[i] = dirty.v[i] = std::numeric_limits<float>::quiet_NaN();
    for (size_t i = 149 * row; i < 150 * row; ++i) dirty.v[i] = std::numeric_limits<float>::infinity();
    vivace::cpu::attention_forward(clean.params);
    vivace::cpu::attention_forward(dirty.params);
    const size_t before_last = static_cast<size_t>(queries - 1) * 4 * 64;
    for (size_t i = 0; i < before_last; ++i) REQUIRE(dirty.out[i] == clean.out[i]);
    for (size_t i = before_last; i < dirty.out.size(); ++i) REQUIRE(!std::isfinite(dirty.out[i]));
  }
}

TEST_CASE("rows that see no key are 0 with lse -inf") {
  for (const int64_t queries : {3, 90}) {
    Call call(1, queries, 2, 2, 1, 24);
    call.params.causal = true;
    vivace::cpu::attention_forward(call.params);
    const size_t empty = static_cast<size_t>(queries - 2);
    for (size_t i = 0; i < empty * 2 * 24; ++i) REQUIRE(call.out[i] == 0.0f);
    for (size_t h = 0; h < 2; ++h) {
      for (size_t i = 0; i < static_cast<size_t>(queries); ++i) {
        REQUIRE(std::isinf(call.lse[h * static_cast<size_t>(queries) + i]) == (i < empty));
      }
    }
  }
}

TEST_CASE("tensors without elements are no work") {
  for (const Shape& shape : {Shape{0, 3, 4, 2, 2, 8}, Shape{2, 0, 4, 2, 2, 8}, Shape{2, 3, 0, 2, 2, 8}}) {
    Call call(shape.batch, shape.queries, shape.keys, shape.heads, shape.heads_kv, shape.head_dim);
    std::fill(call.out.begin(), call.out.end(), 5.0f);
    vivace::cpu::attention_forward(call.params);
    for (const float x : call.out) CHECK(x == 0.0f);
  }
}
