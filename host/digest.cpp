#include "host/digest.h"

#include <openssl/evp.h>

#include <stdexcept>

namespace vivace {

struct Sha256::Context {
  EVP_MD_CTX* handle = EVP_MD_CTX_new();
  ~Context() { EVP_MD_CTX_free(handle); }
  void start() {
    if (handle == nullptr || EVP_DigestInit_ex(handle, EVP_sha256(), nullptr) != 1) {
      throw std::runtime_error("vivace.digest: OpenSSL offers no SHA-256");
    }
  }
};

Sha256::Sha256() : context_(std::make_unique<Context>()) { context_->start(); }
Sha256::~Sha256() = default;
Sha256::Sha256(Sha256&&) noexcept = default;
Sha256& Sha256::operator=(Sha256&&) noexcept = default;

Sha256& Sha256::update(std::span<const std::byte> bytes) {
  if (EVP_DigestUpdate(context_->handle, bytes.data(), bytes.size()) != 1) {
    throw std::runtime_error("vivace.digest: EVP_DigestUpdate failed");
  }
  return *this;
}

Sha256Digest Sha256::finish() {
  Sha256Digest digest{};
  if (EVP_DigestFinal_ex(context_->handle, digest.data(), nullptr) != 1) {
    throw std::runtime_error("vivace.digest: EVP_DigestFinal_ex failed");
  }
  context_->start();
  return digest;
}

std::string to_hex(std::span<const uint8_t> bytes) {
  constexpr char kHex[] = "0123456789abcdef";
  std::string text;
  text.reserve(2 * bytes.size());
  for (const uint8_t byte : bytes) {
    text += kHex[byte >> 4];
    text += kHex[byte & 15];
  }
  return text;
}

}  // namespace vivace
