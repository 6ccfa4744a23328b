// vivace info FILE: the manifest, and what this machine can run.
#include <fmt/format.h>

#include <nlohmann/json.hpp>
#include <thread>

#include "host/archive.h"
#include "host/cli/cli.h"
#include "host/machine.h"

namespace vivace::cli {
namespace {

using nlohmann::json;

json machine_json() {
  const Machine machine = inspect_machine();
  json devices = json::array();
  for (const auto& device : machine.devices) {
    devices.push_back({{"name", device.name}, {"description", device.description}, {"free_bytes", device.free_bytes}});
  }
  return {{"vivace", VIVACE_VERSION},
          {"torch", VIVACE_TORCH_VERSION},
          {"cores", std::thread::hardware_concurrency()},
          {"devices", devices},
          {"operators", machine.operators.empty() ? json(nullptr) : json::parse(machine.operators, nullptr, false)},
          {"operators_error", machine.operators_error.empty() ? json(nullptr) : json(machine.operators_error)}};
}

void print_model(const json& m, int64_t file_size) {
  const json& model = m["model"];
  fmt::print("model        T3 {}, {} layers x {}, {} heads ({} kv) of {}, {:.0f} M parameters, {}\n",
             m["variant"].get<std::string>(), model["num_layers"].get<int64_t>(), model["hidden_size"].get<int64_t>(),
             model["num_heads"].get<int64_t>(), model["num_kv_heads"].get<int64_t>(), model["head_dim"].get<int64_t>(),
             model["parameters"].get<double>() / 1e6, m["dtype"].get<std::string>());
  fmt::print("file         {:.1f} MiB, format {}, by {}, torch {}\n", static_cast<double>(file_size) / (1 << 20),
             m["format"].get<int64_t>(), m["producer"].get<std::string>(), m["torch"].get<std::string>());
  const json& source = m["source"];
  if (source.contains("random_seed")) {
    fmt::print("source       random weights, seed {}: its tokens are noise\n", source["random_seed"].get<int64_t>());
  } else {
    fmt::print("source       {} (sha256 {})\n", source["name"].get<std::string>(), source["sha256"].get<std::string>());
  }
  fmt::print("vocabulary   text {} (at most {} tokens), speech {} (at most {})\n", m["text"]["vocab_size"].get<int64_t>(),
             m["text"]["max_tokens"].get<int64_t>(), m["speech"]["vocab_size"].get<int64_t>(),
             m["speech"]["max_tokens"].get<int64_t>());
  fmt::print("conditioning {} positions; alignment heads: {}\n", m["conditioning"]["length"].get<int64_t>(),
             m["alignment_heads"].dump());
  fmt::print("defaults     {}\n", m["defaults"].dump());
  fmt::print("digest       {}\n", m["digest"]["records"].get<std::string>());
}

void print_machine(const json& machine) {
  fmt::print("machine      vivace {}, torch {}, {} cores\n", machine["vivace"].get<std::string>(),
             machine["torch"].get<std::string>(), machine["cores"].get<unsigned>());
  for (const json& device : machine["devices"]) {
    fmt::print("device       {}: {}, {:.1f} GiB free\n", device["name"].get<std::string>(),
               device["description"].get<std::string>(), device["free_bytes"].get<double>() / (1 << 30));
  }
  if (machine["operators"].is_null()) {
    fmt::print("operators    not usable: {}\n", machine["operators_error"].get<std::string>());
  } else {
    fmt::print("operators    {}\n", machine["operators"].dump());
  }
}

}  // namespace

std::function<int()> add_info(CLI::App& app) {
  struct Options {
    std::string file;
    bool json = false, verify = false;
  };
  auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand("info", "show a model's manifest and what this machine can run");
  command->add_option("file", options->file, "model written by `vivace export`; without it, the machine alone");
  command->add_flag("--verify", options->verify, "recompute the digest of the model's records");
  command->add_flag("--json", options->json, "JSON on stdout");
  return [options] {
    json report = {{"machine", machine_json()}};
    int64_t file_size = 0;
    if (!options->file.empty()) {
      const Archive archive = Archive::open(options->file);
      file_size = static_cast<int64_t>(archive.file_size());
      report["file"] = options->file;
      report["file_bytes"] = file_size;
      report["manifest"] = json::parse(archive.manifest().json);
      if (options->verify) {
        verify_archive(options->file);
        report["digest_verified"] = true;
      }
    }
    if (options->json) {
      fmt::print("{}\n", report.dump(2));
      return kOk;
    }
    if (report.contains("manifest")) print_model(report["manifest"], file_size);
    if (options->verify && report.contains("manifest")) fmt::print("             verified\n");
    print_machine(report["machine"]);
    return kOk;
  };
}

}  // namespace vivace::cli
