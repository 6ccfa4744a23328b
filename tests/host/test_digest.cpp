#include "host/digest.h"

#include <string>

#include "tests/host/catch.h"

using namespace vivace;

TEST_CASE("SHA-256 of FIPS 180-4's examples") {
  Sha256 hash;
  CHECK(to_hex(hash.finish()) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  CHECK(to_hex(hash.update("abc").finish()) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  CHECK(to_hex(hash.update("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq").finish()) ==
        "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  for (int i = 0; i < 1000; ++i) hash.update(std::string(1000, 'a'));
  CHECK(to_hex(hash.finish()) == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

TEST_CASE("a digest does not depend on how the bytes came") {
  Sha256 hash;
  const Sha256Digest whole = hash.update("hello world").finish();
  CHECK(hash.update("hel").update("").update("lo world").finish() == whole);
}
