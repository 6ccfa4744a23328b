"""The `vivace` command. What exports, converts or measures is Python; the rest is the C++ executable."""

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from vivace import plan
from vivace.bench import arguments as bench_arguments
from vivace.doctor import arguments as doctor_arguments
from vivace.report import arguments as report_arguments

PACKAGE = Path(__file__).resolve().parent

#: Commands of the C++ executable, run without importing torch.
HOST_COMMANDS = {
    "generate": "text to speech tokens with an exported model",
    "info": "what an exported model is, and what this machine can run",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0, 1 for a failure, 130 for Ctrl-C; some commands have more, which
    their --help lists. Wrong usage raises SystemExit(2), as argparse does.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in HOST_COMMANDS:
        return run_host(argv)
    arguments = build_parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(
            str(error) if str(error).startswith("vivace") else f"vivace {arguments.command}: {error}", file=sys.stderr
        )
        return 1
    except KeyboardInterrupt:
        return 130


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vivace", description="Chatterbox T3 on vivace's operators: export a model, then generate speech tokens."
    )
    parser.add_argument("--version", action="version", version=f"vivace {package_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    export = commands.add_parser("export", help="a checkpoint, or a random model, to a .vivace file for the C++ host")
    source = export.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--checkpoint",
        metavar="FILE|DIR|HUB_ID",
        help="t3_*.safetensors or a torch file, a directory of Chatterbox's files, or owner/name[:file] on the Hub",
    )
    source.add_argument("--random", action="store_true", help="a freshly initialised model: its tokens are noise")
    export.add_argument("--seed", type=int, default=0, help="of --random (default 0)")
    export.add_argument("--shape", choices=("real", "tiny"), default="real", help="of --random (default real)")
    export.add_argument(
        "--variant", choices=("english", "multilingual"), help="where there is a choice (default english)"
    )
    export.add_argument(
        "--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="of the weights (default bf16)"
    )
    export.add_argument("--head-dim", type=int, help="of a checkpoint whose heads are not of Chatterbox's 64")
    export.add_argument("-o", "--output", required=True, type=Path, metavar="FILE", help="t3.vivace")
    export.add_argument(
        "--assets",
        type=Path,
        metavar="DIR",
        help="also write tokenizer.json and voice.safetensors: the checkpoint's, or for --random a demo's",
    )
    export.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
    export.add_argument("-q", "--quiet", action="store_true", help="no progress on stderr")
    export.set_defaults(run=run_export)

    voice = commands.add_parser("voice", help="Chatterbox's conds.pt to voice.safetensors")
    voice.add_argument("input", nargs="?", type=Path, metavar="conds.pt|voice.safetensors")
    voice.add_argument("--random", action="store_true", help="a voice that nobody has, for demos and tests")
    voice.add_argument("--seed", type=int, default=0, help="of --random (default 0)")
    voice.add_argument("-o", "--output", required=True, type=Path, metavar="FILE", help="voice.safetensors")
    voice.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
    voice.set_defaults(run=run_voice)

    bench_arguments.add_parser(commands)
    doctor_arguments.add_parser(commands)
    report_arguments.add_parser(commands)
    plan.add_parser(commands)

    version = commands.add_parser("version", help="versions of vivace and torch")
    version.set_defaults(run=run_version)

    for name, summary in HOST_COMMANDS.items():
        # For the list in --help only: main() hands these over before parsing.
        commands.add_parser(name, help=summary, add_help=False)
    return parser


def run_export(arguments: argparse.Namespace) -> int:
    def progress(line: str) -> None:
        if not arguments.quiet:
            print(f"vivace export: {line}", file=sys.stderr, flush=True)

    from vivace.t3 import export

    summary = export(
        arguments.output,
        arguments.checkpoint,
        dtype=arguments.dtype,
        variant=arguments.variant,
        random=arguments.random,
        seed=arguments.seed,
        shape=arguments.shape,
        head_dim=arguments.head_dim,
        assets=arguments.assets,
        progress=progress,
    )
    if arguments.json:
        print(json.dumps(summary))
    return 0


def run_voice(arguments: argparse.Namespace) -> int:
    if arguments.random == (arguments.input is not None):
        raise ValueError("vivace voice: expected either a voice file or --random")
    from vivace.t3.voice import convert_voice, write_random_voice

    if arguments.random:
        tensors = write_random_voice(arguments.output, arguments.seed)
    else:
        tensors = convert_voice(arguments.input, arguments.output)
    if arguments.json:
        print(
            json.dumps({"path": str(arguments.output), "tensors": {name: list(t.shape) for name, t in tensors.items()}})
        )
    else:
        print(f"vivace voice: wrote {arguments.output} ({len(tensors)} tensors)", file=sys.stderr)
    return 0


def run_version(arguments: argparse.Namespace) -> int:
    from importlib.metadata import PackageNotFoundError, version

    try:
        torch_version = version("torch")
    except PackageNotFoundError:
        torch_version = "not installed"
    print(f"vivace {package_version()}\ntorch {torch_version}\npython {sys.version.split()[0]}")
    return 0


def run_host(argv: list[str]) -> int:
    """Replaces this process by the C++ executable."""
    executable = find_executable()
    if executable is None:
        override = os.environ.get("VIVACE_EXECUTABLE")
        where = f"VIVACE_EXECUTABLE is {override}" if override else f"there is no {PACKAGE / 'bin' / 'vivace'}"
        print(
            f"vivace {argv[0]}: the C++ executable is missing ({where}); build it with pip install . or CMake, "
            "or set VIVACE_EXECUTABLE to it",
            file=sys.stderr,
        )
        return 1
    environment = dict(os.environ)
    torch = importlib.util.find_spec("torch")  # finds it without importing it
    if torch is not None and torch.origin is not None:
        # Last, for a torch that is not installed beside this package, where the executable looks for it.
        libraries = [environment.get("LD_LIBRARY_PATH"), str(Path(torch.origin).parent / "lib")]
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, libraries))
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(executable, [str(executable), *argv], environment)


def find_executable() -> Path | None:
    """$VIVACE_EXECUTABLE if set, else vivace/bin/vivace in the package."""
    override = os.environ.get("VIVACE_EXECUTABLE")
    candidate = Path(override) if override else PACKAGE / "bin" / "vivace"
    return candidate if candidate.is_file() and os.access(candidate, os.X_OK) else None


def package_version() -> str:
    return (PACKAGE / "VERSION").read_text().strip()


if __name__ == "__main__":
    sys.exit(main())
