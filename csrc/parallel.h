// Where the CPU implementations get their threads. The operator library hands in torch's intra-op pool; without it they run
// on the calling thread.
#pragma once

#include <cstdint>

namespace vivace {

/// Calls fn(context, begin, end) over disjoint ranges that cover [begin, end), at least `grain` long each.
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, void (*fn)(void*, int64_t, int64_t), void* context);

void set_parallel_for(ParallelFor parallel_for);

namespace detail {
void parallel_for(int64_t begin, int64_t end, int64_t grain, void (*fn)(void*, int64_t, int64_t), void* context);
}

template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  detail::parallel_for(
      begin, end, grain, [](void* context, int64_t b, int64_t e) { (*static_cast<const F*>(context))(b, e); },
      const_cast<F*>(&f));
}

}  // namespace vivace
