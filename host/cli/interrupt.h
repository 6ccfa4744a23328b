// Ctrl-C (SIGINT) and SIGTERM as a flag: the first ends generation cleanly, a second one the process.
#pragma once

namespace vivace::cli {

class InterruptScope {
 public:
  InterruptScope();
  ~InterruptScope();
  static bool interrupted();
};

}  // namespace vivace::cli
