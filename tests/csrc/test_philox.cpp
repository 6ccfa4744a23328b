#include "kernels/common/philox.h"
#include "tests/host/catch.h"

using vivace::Philox4;

namespace {
void check_words(const Philox4& drawn, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  CHECK(drawn.x[0] == a);
  CHECK(drawn.x[1] == b);
  CHECK(drawn.x[2] == c);
  CHECK(drawn.x[3] == d);
}
}  // namespace

TEST_CASE("philox4x32-10 gives the known answers of its authors") {
  check_words(vivace::philox4x32_10(0, 0, 0), 0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u);
  check_words(vivace::philox4x32_10(~uint64_t{0}, ~uint64_t{0}, ~uint64_t{0}), 0x408f276du, 0x41c83b0eu, 0xa20bc7c6u,
              0x6d5451fdu);
  check_words(vivace::philox4x32_10(0x299f31d0a4093822u, 0x85a308d3243f6a88u, 0x0370734413198a2eu), 0xd16cfe09u, 0x94fdccebu,
              0x5001e420u, 0x24126ea1u);
}

TEST_CASE("uniforms lie in (0, 1], so that their logarithm is finite") {
  CHECK(vivace::philox_uniform(0) == 1.0f / 16777216.0f);
  CHECK(vivace::philox_uniform(~uint32_t{0}) == 1.0f);
}

TEST_CASE("a dropout draw serves sixteen columns of one row") {
  const Philox4 first = vivace::dropout_draw(7, 3, 5, 11, 16), last = vivace::dropout_draw(7, 3, 5, 11, 31);
  for (int i = 0; i < 4; ++i) CHECK(first.x[i] == last.x[i]);
  const Philox4 next = vivace::dropout_draw(7, 3, 5, 11, 32), below = vivace::dropout_draw(7, 3, 5, 12, 16);
  CHECK(first.x[0] != next.x[0]);
  CHECK(first.x[0] != below.x[0]);
  CHECK(vivace::dropout_byte(Philox4{{0x03020100u, 0x07060504u, 0x0b0a0908u, 0x0f0e0d0cu}}, 13) == 13);
}
