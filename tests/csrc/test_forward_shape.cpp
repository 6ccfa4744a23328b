// Which tile a call of the sm90 forward kernel takes is host code: what it promises is checked without a GPU.
#include "kernels/attention/forward_sm90_shape.cuh"
#include "tests/host/catch.h"

using vivace::sm90::consumers_64;
using vivace::sm90::long_128;

namespace {

constexpr int kMultiprocessors = 132;

int64_t tiles(int64_t rows, int64_t pairs, int consumers) { return (rows + 64 * consumers - 1) / (64 * consumers) * pairs; }

}  // namespace

TEST_CASE("large batches take four consumers, small ones as many tiles as fit one round") {
  for (const bool causal : {false, true}) CHECK(consumers_64(512, 1024, causal, kMultiprocessors) == 4);
  CHECK(consumers_64(16384, 32, false, kMultiprocessors) == 4);
  // Two requests of eight heads: the fastest of those measured.
  CHECK(consumers_64(500, 16, false, kMultiprocessors) == 1);
  CHECK(consumers_64(1000, 16, false, kMultiprocessors) == 2);
  CHECK(consumers_64(1500, 16, false, kMultiprocessors) == 3);
  CHECK(consumers_64(2000, 16, false, kMultiprocessors) == 4);
  CHECK(consumers_64(2500, 16, false, kMultiprocessors) == 3);
  CHECK(consumers_64(1, 1, true, kMultiprocessors) == 1);
}

TEST_CASE("tiles of one consumer are only taken where the grid has room for them") {
  for (int64_t rows = 1; rows <= 4096; rows += 61) {
    for (const int64_t pairs : {1, 16, 32, 160}) {
      const int consumers = consumers_64(rows, pairs, false, kMultiprocessors);
      REQUIRE(consumers >= 1);
      REQUIRE(consumers <= 4);
      if (consumers == 1) CHECK(tiles(rows, pairs, 1) <= 2 * kMultiprocessors);
    }
  }
}

TEST_CASE("tiles of 192 rows are taken where they fit the length") {
  for (const int64_t rows : {192, 576, 768, 1536, 2048, 4096, 16384}) CHECK(long_128(rows));
  for (const int64_t rows : {1, 64, 128, 512, 1024}) CHECK_FALSE(long_128(rows));
}
