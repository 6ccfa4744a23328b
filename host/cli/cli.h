// The commands of the `vivace` executable.
#pragma once

#include <CLI/CLI.hpp>

namespace vivace::cli {

/// Exit codes.
inline constexpr int kOk = 0, kFailed = 1, kUsage = 2, kInterrupted = 130;

/// Each adds its subcommand to `app`; the returned function runs it and gives the exit code.
std::function<int()> add_generate(CLI::App& app);
std::function<int()> add_info(CLI::App& app);

}  // namespace vivace::cli
