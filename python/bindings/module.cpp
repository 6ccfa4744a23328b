// vivace._C: the C++ engine, over plain Python values. python/vivace/engine.py is its public face.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "host/archive.h"
#include "host/engine.h"
#include "host/machine.h"
#include "host/punc_norm.h"
#include "host/tokenizer.h"

namespace py = pybind11;

namespace vivace {
namespace {

/// Joining the engine's thread while holding the GIL would wait for ever on a callback that needs it.
struct EngineDeleter {
  void operator()(Engine* engine) const {
    const py::gil_scoped_release release;
    delete engine;
  }
};

const char* status_name(Status status) {
  return status == Status::kQueued ? "queued" : status == Status::kRunning ? "running" : "finished";
}

Rng parse_rng(const std::string& name) {
  check(name == "philox" || name == "torch", "generate", "rng is ", printable(name), ", expected philox or torch");
  return name == "torch" ? Rng::kTorch : Rng::kPhilox;
}

/// The engine's thread calls it without the GIL; what Python raises ends the request with an error.
TokenCallback wrap_callback(py::object callback) {
  if (callback.is_none()) return {};
  // Copied and destroyed by threads without the GIL: the reference count needs it.
  std::shared_ptr<py::object> held(new py::object(std::move(callback)), [](py::object* object) {
    const py::gil_scoped_acquire gil;
    delete object;
  });
  return [held](const Progress& progress) {
    const py::gil_scoped_acquire gil;
    py::list tokens;
    for (const int64_t token : progress.new_tokens) tokens.append(token);
    try {
      const py::object answer = (*held)(progress.id, tokens, progress.tokens, progress.max_new_tokens);
      return answer.is_none() || answer.cast<bool>();
    } catch (py::error_already_set& error) {
      throw std::runtime_error(error.what());  // the Python error must not outlive the GIL
    } catch (const py::cast_error&) {
      throw std::runtime_error("on_tokens returned neither None nor a bool");
    }
  };
}

py::dict to_dict(const Result& result) {
  py::dict d;
  d["id"] = result.id;
  d["status"] = status_name(result.status);
  d["finish_reason"] = to_string(result.finish_reason);
  d["error"] = result.error;
  d["detail"] = result.detail;
  d["tokens"] = result.tokens;
  d["prompt_tokens"] = result.prompt_tokens;
  d["seconds"] = result.seconds;
  d["queue_seconds"] = result.queue_seconds;
  d["time_to_first_token"] = result.time_to_first_token;
  d["tokens_per_second"] = result.tokens_per_second;
  return d;
}

py::dict to_dict(const Stats& s) {
  py::dict d;
  d["device"] = s.device;
  d["device_name"] = s.device_name;
  d["dtype"] = s.dtype;
  d["queued"] = s.queued;
  d["running"] = s.running;
  d["submitted"] = s.submitted;
  d["finished"] = s.finished;
  d["cancelled"] = s.cancelled;
  d["failed"] = s.failed;
  d["prompt_tokens"] = s.prompt_tokens;
  d["prompt_tokens_reused"] = s.prompt_tokens_reused;
  d["generated_tokens"] = s.generated_tokens;
  d["decode_steps"] = s.decode_steps;
  d["decode_rows"] = s.decode_rows;
  d["graph_replays"] = s.graph_replays;
  d["graph_captures"] = s.graph_captures;
  d["eager_steps"] = s.eager_steps;
  d["fused_steps"] = s.fused_steps;
  d["not_fused"] = s.not_fused;
  d["prefill_seconds"] = s.prefill_seconds;
  d["decode_seconds"] = s.decode_seconds;
  d["load_seconds"] = s.load_seconds;
  d["warm_up_seconds"] = s.warm_up_seconds;
  d["weight_bytes"] = s.weight_bytes;
  d["cache_bytes"] = s.cache_bytes;
  d["workspace_bytes"] = s.workspace_bytes;
  d["peak_memory_bytes"] = s.peak_memory_bytes;
  d["device_memory_bytes"] = s.device_memory_bytes;
  return d;
}

}  // namespace
}  // namespace vivace

PYBIND11_MODULE(_C, m) {
  using namespace vivace;
  m.doc() = "vivace's C++ engine; use it through vivace.generate and vivace.Engine.";
  m.attr("version") = VIVACE_VERSION;
  m.attr("torch_version") = VIVACE_TORCH_VERSION;

  // Python's own exceptions with our words: a missing or damaged file, a full queue, a bad argument.
  py::register_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const FileError& error) {
      py::set_error(PyExc_OSError, error.what());
    } catch (const QueueFull& error) {
      py::set_error(PyExc_BlockingIOError, error.what());
    } catch (const Error& error) {
      py::set_error(PyExc_ValueError, error.what());
    }
  });

  py::class_<Voice, std::shared_ptr<Voice>>(m, "Voice");
  py::class_<EnTokenizer, std::shared_ptr<EnTokenizer>>(m, "EnTokenizer")
      .def(py::init<const std::string&>(), py::arg("path"))
      .def(
          "encode", [](const EnTokenizer& tokenizer, const std::string& text) { return tokenizer.encode(punc_norm(text)); },
          py::arg("text"));

  py::class_<Engine, std::unique_ptr<Engine, EngineDeleter>>(m, "Engine")
      .def(py::init([](std::string model, std::string operators, std::string device, std::string dtype, int64_t max_requests,
                       int64_t max_rows, int64_t capacity, int64_t max_queue, int threads, bool cuda_graphs,
                       std::string fused_step, bool deterministic, bool warm_up, bool verify) {
             EngineOptions options;
             options.model = std::move(model);
             options.operators = std::move(operators);
             options.device = std::move(device);
             options.dtype = std::move(dtype);
             options.max_requests = max_requests;
             options.max_rows = max_rows;
             options.capacity = capacity;
             options.max_queue = max_queue;
             options.threads = threads;
             options.cuda_graphs = cuda_graphs;
             options.fused_step = std::move(fused_step);
             options.deterministic = deterministic;
             options.warm_up = warm_up;
             options.verify = verify;
             const py::gil_scoped_release release;
             return std::unique_ptr<Engine, EngineDeleter>(new Engine(options));
           }),
           py::kw_only(), py::arg("model"), py::arg("operators"), py::arg("device"), py::arg("dtype"),
           py::arg("max_requests"), py::arg("max_rows"), py::arg("capacity"), py::arg("max_queue"), py::arg("threads"),
           py::arg("cuda_graphs"), py::arg("fused_step"), py::arg("deterministic"), py::arg("warm_up"), py::arg("verify"))
      .def(
          "load_voice",
          [](const Engine& engine, const std::string& path) {
            return std::make_shared<Voice>(load_voice(path, engine.manifest()));
          },
          py::arg("path"))
      .def(
          "make_voice",
          [](const Engine& engine, std::vector<float> speaker_emb, std::vector<int64_t> prompt_tokens) {
            return std::make_shared<Voice>(make_voice(std::move(speaker_emb), std::move(prompt_tokens), engine.manifest()));
          },
          py::arg("speaker_emb"), py::arg("prompt_tokens"))
      .def(
          "submit",
          [](Engine& engine, std::vector<int64_t> text_tokens, std::shared_ptr<Voice> voice, float temperature, float top_p,
             float min_p, int32_t top_k, float repetition_penalty, float cfg_weight, float exaggeration, int64_t seed,
             const std::string& rng, py::bytes generator_state, int64_t max_new_tokens, bool ignore_stop, bool alignment,
             py::object on_tokens) {
            Request request;
            request.text_tokens = std::move(text_tokens);
            request.voice = std::move(voice);
            request.sampling = {cfg_weight,     repetition_penalty,          temperature, top_k, min_p, top_p, seed,
                                parse_rng(rng), std::string(generator_state)};
            request.exaggeration = exaggeration;
            request.max_new_tokens = max_new_tokens;
            request.ignore_stop = ignore_stop;
            request.alignment = alignment;
            request.on_tokens = wrap_callback(std::move(on_tokens));
            const py::gil_scoped_release release;
            return engine.submit(std::move(request));
          },
          py::kw_only(), py::arg("text_tokens"), py::arg("voice"), py::arg("temperature"), py::arg("top_p"),
          py::arg("min_p"), py::arg("top_k"), py::arg("repetition_penalty"), py::arg("cfg_weight"), py::arg("exaggeration"),
          py::arg("seed"), py::arg("rng"), py::arg("generator_state"), py::arg("max_new_tokens"), py::arg("ignore_stop"),
          py::arg("alignment"), py::arg("on_tokens"))
      .def(
          "wait",
          [](Engine& engine, uint64_t id, double timeout) {
            Result result;
            {
              const py::gil_scoped_release release;
              result = engine.wait(id, timeout);
            }
            return to_dict(result);
          },
          py::arg("id"), py::arg("timeout"))
      .def("cancel", &Engine::cancel, py::arg("id"), py::call_guard<py::gil_scoped_release>())
      .def("stats", [](const Engine& engine) { return to_dict(engine.stats()); })
      .def_property_readonly("manifest_json", [](const Engine& engine) { return engine.manifest().json; });

  m.def(
      "manifest_json", [](const std::string& path) { return Archive::open(path).manifest().json; }, py::arg("path"));
  m.def("info", [] {
    const Machine machine = inspect_machine();
    py::list devices;
    for (const auto& device : machine.devices) {
      py::dict d;
      d["name"] = device.name;
      d["description"] = device.description;
      d["free_bytes"] = device.free_bytes;
      devices.append(d);
    }
    py::dict d;
    d["devices"] = devices;
    d["operators"] = machine.operators;
    d["operators_error"] = machine.operators_error;
    return d;
  });
}
