// Errors of the operators: one wording for Python, C++ and the command line.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace vivace {

/// A bad argument: "vivace.attention: k has head_dim 96, q has 64 (k: [2, 128, 4, 96], q: [2, 128, 4, 64])".
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Throws Error("vivace.<op>: <parts...>") unless `ok`.
template <typename... Parts>
void check(bool ok, const char* op, const Parts&... parts) {
  if (ok) return;
  std::ostringstream text;
  text << "vivace." << op << ": ";
  (text << ... << parts);
  throw Error(text.str());
}

}  // namespace vivace
