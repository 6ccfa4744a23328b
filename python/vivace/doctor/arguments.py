"""The command line of `vivace doctor`."""

import argparse
import sys

SUMMARY = "what works here, what a model would run on and why, what to type"
EPILOG = """exit status:
  0  vivace's kernels run on this GPU, and with --model in every layer of it
  2  wrong usage
  3  vivace works, but not on a GPU: none, too old, AMD's or Apple's
  4  the operators do not load, or the self-test or --t3 failed
  5  the model of --model cannot be read, or has layers that would not run on vivace
"""


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "doctor", help=SUMMARY, description=SUMMARY, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        metavar="PATH|HUB_ID",
        help="what each layer of it would run on: a .vivace file, a T3 checkpoint or its folder, a transformers model",
    )
    parser.add_argument(
        "--t3",
        nargs="?",
        const="real",
        choices=("real", "tiny"),
        help="build a T3 with random weights: initialisation, forward, memory, shapes, tokens (real needs 2.2 GB)",
    )
    parser.add_argument("--no-self-test", action="store_true", help="do not run the operators")
    parser.add_argument("--json", action="store_true", help="print everything as JSON on stdout")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from vivace.doctor import doctor

    report = doctor(arguments.model, self_test=not arguments.no_self_test, t3=arguments.t3 or False)
    print(report.json() if arguments.json else report)
    sys.stdout.flush()
    return report.status
