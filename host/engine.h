// Generates speech tokens for many requests at once.
//
// Threads and where they meet:
//   callers  any number; submit, poll, wait, cancel and stats take the engine's one mutex and never touch a tensor.
//   worker   one thread, started by the constructor, which owns the batch, the KV cache and the device's stream. It takes
//            the mutex to take requests from the queue, to read cancel flags and to append what it has to the results;
//            callbacks run on it with the mutex free.
//   device   CUDA work is queued on one stream; tokens come back through pinned memory and an event each step, one step
//            behind what is queued, so that reading never drains the device.
// A step of the worker is one function, Engine::Worker::step: admit, prefill, decode, sample, deliver, retire.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "host/error.h"
#include "host/manifest.h"
#include "host/request.h"
#include "host/stats.h"

namespace vivace {

struct EngineOptions {
  std::string model;            // file written by `vivace export`
  std::string operators;        // libvivace_ops.so; empty: find_operators() (operators.h)
  std::string device = "auto";  // "auto", "cpu", "cuda", "cuda:1"; auto: CUDA where device and operators have it
  std::string dtype = "auto";   // "auto" (as exported), "float32", "bfloat16", "float16"
  int64_t max_requests = 8;     // generating at once
  int64_t max_rows = 0;         // rows of the KV cache; 0: two for each request (guided requests need two, others one)
  int64_t capacity = 2048;      // positions a row can hold: prompt and generated tokens
  int64_t max_queue = 256;      // requests waiting; submit throws beyond
  int64_t max_prefill = 2048;   // positions in one prefill, whose buffers they size; a longer prompt goes alone
  int threads = 0;              // torch's intra-op threads (process-wide); 0: leave as is
  bool cuda_graphs = true;      // VIVACE_CUDA_GRAPHS=0 in the environment turns them off as well
  // Decode steps by vivace::decode_step, which is the whole decoder in one operator, instead of layer by layer. "auto": on
  // CUDA where its kernels take the model, "on": on the CPU as well, "off". VIVACE_FUSED_STEP=0 or 1 in the environment
  // wins.
  std::string fused_step = "auto";
  // A request's tokens are the same bit for bit whatever else is in the batch: one family of kernels for any number of rows,
  // and a prefill of its own for each request.
  bool deterministic = false;
  bool warm_up = true;  // CUDA: load kernels and capture graphs before the first request, not during it
  // CUDA: a context keeps 1 KiB of stack for every thread that the device can run, 0.24 GB on an H200, for kernels that call
  // functions whose depth is not known; none of ours or cuBLAS' do. It is a property of the process, so only its owner
  // should turn it on.
  bool small_stack = false;
  bool verify = true;  // recompute the archive's digest before it is loaded
};

class Engine {
 public:
  /// Verifies and loads the model and allocates the cache. Throws FileError for files, Error for options and for memory
  /// that is not there.
  explicit Engine(const EngineOptions& options);
  /// Ends every request as cancelled and joins the worker.
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  /// Queues a request and returns its id. Throws Error naming the argument when the request cannot run (a prompt and
  /// max_new_tokens beyond the capacity, a sampling option out of range), and QueueFull.
  uint64_t submit(Request request);

  /// The result so far. A finished result is handed out once, by poll or wait; then its id is forgotten.
  Result poll(uint64_t id);

  /// Blocks until the request has finished, at most `timeout_seconds` (negative: without limit); check `status`.
  Result wait(uint64_t id, double timeout_seconds = -1);

  /// Ends a request with what it has; false when it had finished or is unknown.
  bool cancel(uint64_t id);

  Stats stats() const;
  const Manifest& manifest() const;

 private:
  struct Worker;
  std::unique_ptr<Worker> worker_;
};

/// submit() found max_queue requests waiting.
class QueueFull : public Error {
 public:
  using Error::Error;
};

/// Positions a request takes at most: conditioning, framed text, two start-of-speech embeddings and the new tokens.
int64_t required_capacity(const Manifest& manifest, const Request& request);

}  // namespace vivace
