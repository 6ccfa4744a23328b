// vivace generate: text to speech tokens.
#include <fmt/format.h>
#include <spdlog/spdlog.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <fstream>
#include <iostream>
#include <iterator>
#include <sstream>

#include "host/archive.h"
#include "host/cli/cli.h"
#include "host/cli/interrupt.h"
#include "host/cli/report.h"
#include "host/engine.h"
#include "host/error.h"
#include "host/punc_norm.h"
#include "host/tokenizer.h"

namespace vivace::cli {
namespace {

struct Options {
  std::string model, tokenizer, voice, text, file, text_tokens, output;
  bool lines = false, json = false, quiet = false, no_verify = false, no_alignment = false;
  std::string device = "auto", dtype = "auto", rng = "philox";
  bool ignore_stop = false, deterministic = false;
  int64_t seed = 0, max_tokens = 1000, batch = 8, warm_up = 0, repeat = 1;
  int threads = 0;
  // Without a value here the model's manifest gives it.
  std::optional<float> temperature, top_p, min_p, repetition_penalty, cfg_weight, exaggeration;
  int32_t top_k = 0;
};

struct Line {
  std::string text;
  std::vector<int64_t> tokens;
};

std::string read_all(std::istream& in) { return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()}; }

/// "1,2,3" or "1 2 3" or a JSON list.
std::vector<int64_t> parse_ids(std::string text) {
  std::replace_if(
      text.begin(), text.end(), [](char c) { return c == ',' || c == '[' || c == ']'; }, ' ');
  std::istringstream in(text);
  std::vector<int64_t> ids;
  for (std::string word; in >> word;) {
    size_t used = 0;
    int64_t id = 0;
    try {
      id = std::stoll(word, &used);
    } catch (const std::exception&) {
    }
    check(used == word.size(), "generate", "--text-tokens has ", printable(word), ", expected integers");
    ids.push_back(id);
  }
  return ids;
}

/// The texts to speak; where the input is one text, it is taken as it is, however long.
std::vector<Line> read_input(const Options& options) {
  std::string text;
  if (!options.text_tokens.empty()) return {{"", parse_ids(options.text_tokens)}};
  if (!options.text.empty()) {
    text = options.text;
  } else if (!options.file.empty() && options.file != "-") {
    std::ifstream in(options.file, std::ios::binary);
    if (!in) throw FileError(options.file, "cannot be opened for reading");
    text = read_all(in);
  } else {
    check(options.file == "-" || isatty(STDIN_FILENO) != 1, "generate",
          "no text: give --text, --file or --text-tokens, or pipe it in");
    text = read_all(std::cin);
  }
  if (!options.lines) return {{text, {}}};
  std::vector<Line> lines;
  std::istringstream in(text);
  for (std::string line; std::getline(in, line);) {
    if (!line.empty() && line.back() == '\r') line.pop_back();
    if (line.find_first_not_of(" \t") != std::string::npos) lines.push_back({line, {}});
  }
  check(!lines.empty(), "generate", "--lines: the input has no line with text");
  return lines;
}

void tokenize(std::vector<Line>& lines, const Options& options, const Manifest& manifest) {
  if (!options.text_tokens.empty()) return;
  check(manifest.variant == Manifest::Variant::kEnglish, "generate",
        "the model is multilingual, whose texts are tokenized by Chatterbox's Python package; give --text-tokens");
  check(!options.tokenizer.empty(), "generate", "--tokenizer is missing: tokenizer.json of the checkpoint");
  const EnTokenizer tokenizer(options.tokenizer);
  check(tokenizer.tokenizer().vocab_size() <= manifest.text.vocab_size, "generate", "the tokenizer has ",
        tokenizer.tokenizer().vocab_size(), " tokens, the model's text vocabulary ", manifest.text.vocab_size);
  for (Line& line : lines) line.tokens = tokenizer.encode(punc_norm(line.text));
}

Request make_request(const Line& line, const Options& options, const Manifest& manifest, std::shared_ptr<const Voice> voice,
                     int64_t index) {
  Request request;
  request.text_tokens = line.tokens;
  request.voice = std::move(voice);
  request.max_new_tokens = options.max_tokens;
  request.alignment = !options.no_alignment;
  request.ignore_stop = options.ignore_stop;
  const auto& defaults = manifest.defaults;
  const auto value = [](const std::optional<float>& given, double fallback) {
    return given.value_or(static_cast<float>(fallback));
  };
  request.exaggeration = value(options.exaggeration, defaults.exaggeration);
  SamplingOptions& s = request.sampling;
  s.temperature = value(options.temperature, defaults.temperature);
  s.top_p = value(options.top_p, defaults.top_p);
  s.min_p = value(options.min_p, defaults.min_p);
  s.repetition_penalty = value(options.repetition_penalty, defaults.repetition_penalty);
  s.cfg_weight = value(options.cfg_weight, defaults.cfg_weight);
  s.top_k = options.top_k;
  s.seed = options.seed + index;  // lines of one text should not repeat each other's draws
  s.rng = options.rng == "torch" ? Rng::kTorch : Rng::kPhilox;
  return request;
}

void write(const std::string& path, const std::string& text) {
  std::ofstream out(path, std::ios::binary | std::ios::trunc);
  out << text;
  out.close();
  if (!out) throw FileError(path, "cannot be written");
}

/// One run of all requests: results in their order.
std::vector<Result> run(Engine& engine, const std::vector<Request>& requests, ProgressBar& bar) {
  std::vector<uint64_t> ids;
  for (const Request& request : requests) ids.push_back(engine.submit(request));
  std::vector<Result> results;
  for (const uint64_t id : ids) {
    Result result = engine.wait(id, 0.05);
    while (result.status != Status::kFinished) {
      if (InterruptScope::interrupted()) {
        for (const uint64_t other : ids) engine.cancel(other);
      }
      result = engine.wait(id, 0.05);
    }
    bar.finish_request();
    results.push_back(std::move(result));
  }
  return results;
}

/// The first requests, as many as run at once, for a few tokens whose results nobody wants.
void warm_up(Engine& engine, std::vector<Request> requests, int64_t batch, int64_t tokens) {
  requests.resize(static_cast<size_t>(std::min<int64_t>(batch, static_cast<int64_t>(requests.size()))));
  std::vector<uint64_t> ids;
  for (Request& request : requests) {
    request.max_new_tokens = std::min(tokens, request.max_new_tokens);
    request.on_tokens = nullptr;
    ids.push_back(engine.submit(request));
  }
  for (const uint64_t id : ids) {
    const Result result = engine.wait(id);
    if (result.finish_reason == FinishReason::kError) throw Error(result.error);
  }
}

int generate(const Options& options) {
  const auto seconds_since = [](std::chrono::steady_clock::time_point start) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  // Cheap things first: what is wrong with them should not have to wait for the weights.
  const Manifest manifest = Archive::open(options.model).manifest();
  std::vector<Line> lines = read_input(options);
  tokenize(lines, options, manifest);
  const auto voice = std::make_shared<const Voice>(load_voice(options.voice, manifest));
  const int64_t count = static_cast<int64_t>(lines.size());
  ProgressBar bar(count * options.repeat, count * options.max_tokens * options.repeat, !options.quiet);
  std::vector<Request> requests;
  EngineOptions engine_options;
  engine_options.capacity = 0;
  for (int64_t i = 0; i < count; ++i) {
    Request request = make_request(lines[static_cast<size_t>(i)], options, manifest, voice, i);
    request.on_tokens = [&bar](const Progress& progress) {
      bar.add_tokens(static_cast<int64_t>(progress.new_tokens.size()));
      return !InterruptScope::interrupted();
    };
    engine_options.capacity = std::max(engine_options.capacity, required_capacity(manifest, request));
    requests.push_back(std::move(request));
  }
  engine_options.model = options.model;
  engine_options.device = options.device;
  engine_options.dtype = options.dtype;
  engine_options.threads = options.threads;
  engine_options.max_requests = std::min(options.batch, count);
  engine_options.max_rows = engine_options.max_requests * (requests.front().sampling.cfg_weight > 0 ? 2 : 1);
  engine_options.max_queue = count;
  engine_options.deterministic = options.deterministic;
  engine_options.small_stack = true;
  engine_options.verify = !options.no_verify;

  const InterruptScope interrupt;
  const auto loading = std::chrono::steady_clock::now();
  Engine engine(engine_options);
  const double load_seconds = seconds_since(loading);
  const Stats loaded = engine.stats();
  spdlog::debug("model loaded in {:.2f} s: weights {:.2f} s, kernels and graphs {:.2f} s", load_seconds, loaded.load_seconds,
                loaded.warm_up_seconds);
  if (!loaded.not_fused.empty() && loaded.device != "cpu") {
    spdlog::warn("decode steps go layer by layer: {}", loaded.not_fused);
  }
  if (options.warm_up > 0) warm_up(engine, requests, engine_options.max_requests, options.warm_up);
  const Stats before = engine.stats();
  std::vector<Result> results;
  nlohmann::ordered_json runs = nlohmann::ordered_json::array();
  double seconds = 0;
  for (int64_t i = 0; i < options.repeat && (i == 0 || !InterruptScope::interrupted()); ++i) {
    const auto start = std::chrono::steady_clock::now();
    results = run(engine, requests, bar);
    seconds = seconds_since(start);
    runs.push_back(run_json(results, seconds));
  }
  bar.clear();

  const Stats stats = since(engine.stats(), before);
  nlohmann::ordered_json outputs = nlohmann::ordered_json::array();
  for (size_t i = 0; i < results.size(); ++i) {
    outputs.push_back(to_json(results[i], options.model, lines[i].text, lines[i].tokens, requests[i]));
  }
  const nlohmann::ordered_json tokens_json = options.lines ? outputs : outputs[0];
  if (!options.output.empty() && options.output != "-") write(options.output, tokens_json.dump() + "\n");
  if (options.json) {
    nlohmann::ordered_json stats_json = to_json(stats);
    stats_json["load_seconds"] = load_seconds;
    const nlohmann::ordered_json json = {{"results", outputs}, {"seconds", seconds}, {"runs", runs}, {"stats", stats_json}};
    fmt::print("{}\n", json.dump());
  } else if (options.output.empty() || options.output == "-") {
    fmt::print("{}\n", tokens_json.dump());
  }
  if (!options.quiet) fmt::print(stderr, "{}\n", summary(results, stats, seconds));

  const auto failed =
      std::find_if(results.begin(), results.end(), [](const Result& r) { return r.finish_reason == FinishReason::kError; });
  if (failed != results.end()) throw Error(failed->error);
  return InterruptScope::interrupted() ? kInterrupted : kOk;
}

}  // namespace

std::function<int()> add_generate(CLI::App& app) {
  auto o = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand("generate", "turn text into speech tokens");
  command->add_option("--model,-m", o->model, "model written by `vivace export`")->envname("VIVACE_MODEL")->required();
  command->add_option("--tokenizer", o->tokenizer, "tokenizer.json of the checkpoint")->envname("VIVACE_TOKENIZER");
  command->add_option("--voice", o->voice, "voice.safetensors, written by `vivace voice`")
      ->envname("VIVACE_VOICE")
      ->required();

  CLI::Option_group* input = command->add_option_group("input", "one of; without any, the text is read from stdin");
  input->add_option("--text,-t", o->text, "text to speak")->envname("VIVACE_TEXT");
  input->add_option("--file,-f", o->file, "file with the text, UTF-8; -: stdin")->envname("VIVACE_FILE");
  input->add_option("--text-tokens", o->text_tokens, "text token ids, \"1,2,3\"; start and stop are added where missing")
      ->envname("VIVACE_TEXT_TOKENS");
  input->require_option(0, 1);
  command
      ->add_flag("--lines", o->lines, "each line of the input is a request, with seed, seed + 1, ...; the output is a list")
      ->envname("VIVACE_LINES");

  command->add_option("--seed", o->seed, "seed of the draws")->envname("VIVACE_SEED")->capture_default_str();
  command->add_option("--rng", o->rng, "philox (the same draws on any device, in any batch) or torch (Chatterbox's draws)")
      ->check(CLI::IsMember({"philox", "torch"}))
      ->envname("VIVACE_RNG")
      ->capture_default_str();
  const std::string from_model = "; default: the model's";
  command->add_option("--temperature", o->temperature, "0: always the likeliest token" + from_model)
      ->envname("VIVACE_TEMPERATURE");
  command->add_option("--top-p", o->top_p, "keep the likeliest tokens that make up this mass" + from_model)
      ->envname("VIVACE_TOP_P");
  command->add_option("--min-p", o->min_p, "drop tokens below this share of the likeliest" + from_model)
      ->envname("VIVACE_MIN_P");
  command->add_option("--top-k", o->top_k, "keep the k likeliest tokens; 0: all")
      ->envname("VIVACE_TOP_K")
      ->capture_default_str();
  command->add_option("--repetition-penalty", o->repetition_penalty, "1: none" + from_model)
      ->envname("VIVACE_REPETITION_PENALTY");
  command->add_option("--cfg-weight", o->cfg_weight, "classifier-free guidance; 0: none, at half the work" + from_model)
      ->envname("VIVACE_CFG_WEIGHT");
  command->add_option("--exaggeration", o->exaggeration, "emotion" + from_model)->envname("VIVACE_EXAGGERATION");
  command->add_option("--max-tokens", o->max_tokens, "speech tokens at most; 25 are a second")
      ->envname("VIVACE_MAX_TOKENS")
      ->capture_default_str();
  command->add_flag("--ignore-stop", o->ignore_stop, "go on past the stop token, to --max-tokens")
      ->envname("VIVACE_IGNORE_STOP");
  command->add_flag("--no-alignment", o->no_alignment, "multilingual: do not watch the alignment heads")
      ->envname("VIVACE_NO_ALIGNMENT");

  command->add_option("--device", o->device, "auto, cpu, cuda, cuda:<index>")
      ->envname("VIVACE_DEVICE")
      ->capture_default_str();
  command->add_option("--dtype", o->dtype, "auto (as exported), float32, bfloat16, float16")
      ->envname("VIVACE_DTYPE")
      ->capture_default_str();
  command->add_option("--batch", o->batch, "requests generating at once with --lines")
      ->check(CLI::Range(1, 4096))
      ->envname("VIVACE_BATCH")
      ->capture_default_str();
  command->add_option("--threads", o->threads, "CPU threads; 0: all cores")
      ->check(CLI::Range(0, 4096))
      ->envname("VIVACE_THREADS")
      ->capture_default_str();
  command->add_flag("--deterministic", o->deterministic, "a text's tokens do not depend on the texts beside it, bit for bit")
      ->envname("VIVACE_DETERMINISTIC");
  command->add_option("--warmup", o->warm_up, "generate so many tokens first, which count for nothing")
      ->check(CLI::Range(0, 1 << 20))
      ->envname("VIVACE_WARMUP")
      ->capture_default_str();
  command->add_option("--repeat", o->repeat, "run everything so many times with one engine; the results are the last run's")
      ->check(CLI::Range(1, 1 << 20))
      ->envname("VIVACE_REPEAT")
      ->capture_default_str();
  command->add_flag("--no-verify", o->no_verify, "do not recompute the model's digest")->envname("VIVACE_NO_VERIFY");

  command->add_option("--output,-o", o->output, "write the tokens here as JSON; default, and -: stdout")
      ->envname("VIVACE_OUTPUT");
  command->add_flag("--json", o->json, "results and statistics as one JSON object on stdout")->envname("VIVACE_JSON");
  command->add_flag("--quiet,-q", o->quiet, "no progress and no summary")->envname("VIVACE_QUIET");
  command->footer(
      "One text is one request of at most --max-tokens tokens (1000 are 40 s of speech) and at most 2048 text tokens;\n"
      "Chatterbox speaks best in pieces of a sentence or two (about 300 characters): use --lines for more.\n"
      "Ctrl-C writes what was generated and exits with 130.");
  return [o] { return generate(*o); };
}

}  // namespace vivace::cli
