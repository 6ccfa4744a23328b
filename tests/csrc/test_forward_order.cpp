// The order of the sm90 forward kernel's tiles is host code too: what it promises is checked without a GPU.
#include <set>
#include <utility>

#include "kernels/attention/forward_sm90_order.cuh"
#include "tests/host/catch.h"

using vivace::sm90::masked_order;
using vivace::sm90::MaskedOrder;
using vivace::sm90::MaskedShape;

namespace {

/// Causal, 16,384 tokens in all, as docs/performance.md measures.
MaskedShape causal(int seqlen, int pairs, int rows, int most) {
  return {(seqlen + rows - 1) / rows, pairs, rows, 128, seqlen, seqlen, -1, 0, 132, most};
}

}  // namespace

TEST_CASE("an order holds every tile once") {
  for (const MaskedOrder order :
       {MaskedOrder{7, 13, 4}, MaskedOrder{1, 5, 5}, MaskedOrder{128, 16, 3}, MaskedOrder{3, 1, 1}}) {
    std::set<std::pair<int, int>> seen;
    for (int index = 0; index < order.row_blocks * order.pairs; ++index) {
      int row = -1, pair = -1;
      order.find(index, row, pair);
      REQUIRE(row >= 0);
      REQUIRE(row < order.row_blocks);
      REQUIRE(pair >= 0);
      REQUIRE(pair < order.pairs);
      seen.insert({row, pair});
    }
    CHECK(seen.size() == static_cast<size_t>(order.row_blocks) * order.pairs);
  }
}

TEST_CASE("the last group of an order ends with the shortest tiles") {
  const MaskedOrder order{10, 8, 4};
  int row, pair;
  order.find(79, row, pair);
  CHECK(row == 0);
  CHECK(pair == 7);
}

TEST_CASE("the cost of a tile is what its rows see") {
  MaskedShape shape = causal(1024, 1, 128, 1);
  CHECK(shape.cost(0) == 17);
  CHECK(shape.cost(7) == 87);
  shape.window_left = 100;
  CHECK(shape.cost(0) == 17);
  CHECK(shape.cost(7) == 27);
  shape.window_left = -1;
  shape.seqlen_k = 512;  // more queries than keys: the first rows see nothing
  CHECK(shape.cost(0) < 10);
  CHECK(shape.cost(7) == 47);
}

TEST_CASE("a chosen order loads the grid evenly where another would idle for a third") {
  const struct {
    int seqlen, pairs, rows, most;
  } shapes[] = {{512, 512, 128, 80}, {1024, 256, 128, 40},  {2048, 128, 128, 20}, {4096, 64, 128, 10}, {8192, 32, 128, 5},
                {16384, 16, 128, 2}, {512, 1024, 192, 160}, {2048, 256, 192, 40}, {16384, 32, 192, 5}};
  for (const auto& s : shapes) {
    const MaskedShape shape = causal(s.seqlen, s.pairs, s.rows, s.most);
    CHECK(shape.balance(masked_order(shape)) > 0.95);
  }
  CHECK(causal(4096, 64, 128, 10).balance(MaskedOrder{32, 64, 4}) < 0.7);
}

TEST_CASE("an order is the same when it is asked for again, and its groups fit L2") {
  const MaskedShape shape = causal(3000, 96, 128, 9);
  const MaskedOrder first = masked_order(shape), again = masked_order(shape);
  CHECK(first.group == again.group);
  CHECK(first.group >= 1);
  CHECK(shape.balance(first) > 0.95);
  CHECK(masked_order(causal(100, 3, 128, 3)).groups() >= 1);
}
