// vivace: text to speech tokens from the command line.
#include <fmt/format.h>
#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>

#include <CLI/CLI.hpp>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <string>
#include <string_view>

#include "host/cli/cli.h"

int main(int argc, char** argv) {
  using namespace vivace::cli;
  // Messages go to stderr: stdout carries results alone.
  const auto logger = spdlog::stderr_color_mt("vivace");
  logger->set_pattern("vivace: %^%v%$");
  spdlog::set_default_logger(logger);
  if (const char* name = std::getenv("VIVACE_LOG_LEVEL"); name != nullptr && *name != '\0') {
    const auto level = spdlog::level::from_str(name);
    if (level == spdlog::level::off && std::string_view(name) != "off") {  // spdlog's answer to what it does not know
      spdlog::error("the environment's VIVACE_LOG_LEVEL is \"{}\", expected debug, info, warning, error or off", name);
      return kUsage;
    }
    spdlog::set_level(level);
  }

  CLI::App app(
      "Turns text into the speech tokens of Chatterbox's T3.\n"
      "Every option can also be set by an environment variable, named in its help.",
      "vivace");
  app.set_version_flag("--version", fmt::format("vivace {} (torch {})", VIVACE_VERSION, VIVACE_TORCH_VERSION));
  app.require_subcommand(1);
  std::map<std::string, std::function<int()>> commands;
  commands["generate"] = add_generate(app);
  commands["info"] = add_info(app);
  for (const char* name : {"export", "voice"}) {
    CLI::App* command =
        app.add_subcommand(name, "part of the Python package: pip install vivace, then `vivace " + std::string(name) + "`");
    command->allow_extras();
    command->group("");  // not in the list of commands
    commands[name] = [name] {
      spdlog::error("`vivace {}` is part of the Python package: `python -m vivace {} --help`", name, name);
      return kUsage;
    };
  }
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? kOk : kUsage;
  }
  try {
    return commands.at(app.get_subcommands().front()->get_name())();
  } catch (const std::exception& error) {
    // The operators' and the engine's own begin with "vivace.<who>: ".
    if (std::string_view(error.what()).starts_with("vivace.")) logger->set_pattern("%^%v%$");
    spdlog::error("{}", error.what());
    return kFailed;
  }
}
