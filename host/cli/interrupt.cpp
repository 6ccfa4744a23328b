#include "host/cli/interrupt.h"

#include <signal.h>

#include <atomic>

namespace vivace::cli {
namespace {

std::atomic<bool> flag{false};
static_assert(std::atomic<bool>::is_always_lock_free, "set from a signal handler");
struct sigaction previous_int, previous_term;

}  // namespace

InterruptScope::InterruptScope() {
  struct sigaction action {};
  action.sa_handler = [](int) { flag.store(true); };
  action.sa_flags = SA_RESETHAND;  // the next one has its usual effect
  sigaction(SIGINT, &action, &previous_int);
  sigaction(SIGTERM, &action, &previous_term);
}

InterruptScope::~InterruptScope() {
  sigaction(SIGINT, &previous_int, nullptr);
  sigaction(SIGTERM, &previous_term, nullptr);
}

bool InterruptScope::interrupted() { return flag.load(); }

}  // namespace vivace::cli
