// Hands torch's intra-op thread pool to the CPU implementations when the library is loaded.
#include "csrc/parallel.h"

#include <torch/csrc/stable/library.h>

#include <exception>
#include <mutex>

namespace vivace {
namespace {

/// torch_parallel_for is a C shim: it turns an exception into an error code and loses its text, so the first one is kept
/// here.
struct Body {
  void (*fn)(void*, int64_t, int64_t);
  void* context;
  std::mutex mutex;
  std::exception_ptr error;
};

void torch_parallel(int64_t begin, int64_t end, int64_t grain, void (*fn)(void*, int64_t, int64_t), void* context) {
  if (begin >= end) return;
  if (end - begin <= grain) return fn(context, begin, end);
  Body body{fn, context, {}, {}};
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(
      begin, end, grain,
      [](int64_t b, int64_t e, void* p) {
        Body& part = *static_cast<Body*>(p);
        try {
          part.fn(part.context, b, e);
        } catch (...) {
          const std::lock_guard<std::mutex> lock(part.mutex);
          if (!part.error) part.error = std::current_exception();
        }
      },
      &body));
  if (body.error) std::rethrow_exception(body.error);
}

[[maybe_unused]] const bool installed = (set_parallel_for(torch_parallel), true);

}  // namespace
}  // namespace vivace
