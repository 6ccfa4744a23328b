#include "csrc/parallel.h"

namespace vivace {

namespace {
void run_serial(int64_t begin, int64_t end, int64_t, void (*fn)(void*, int64_t, int64_t), void* context) {
  if (begin < end) fn(context, begin, end);
}
ParallelFor current = run_serial;
}  // namespace

void set_parallel_for(ParallelFor parallel_for) { current = parallel_for != nullptr ? parallel_for : run_serial; }

namespace detail {
void parallel_for(int64_t begin, int64_t end, int64_t grain, void (*fn)(void*, int64_t, int64_t), void* context) {
  current(begin, end, grain, fn, context);
}
}  // namespace detail

}  // namespace vivace
