"""The flags of `vivace bench`. No torch, so that --help is quick."""

import argparse
from pathlib import Path

from vivace.bench import lists

OPS = ("forward", "varlen", "decode", "overhead")
MASKS = ("full", "causal")
DTYPES = ("bf16", "fp16", "fp32")
ARCHS = ("auto", "90", "80", "generic")
PEERS = ("cudnn", "fa2", "efficient", "sdpa", "flash_attn", "fa3", "fa4")
PRESETS = ("h200", "extra")
FORMATS = ("md", "csv", "json")


def add_parser(commands) -> None:
    """Adds `bench` to the command's subparsers."""
    bench = commands.add_parser("bench", help="measure the operators on this machine, beside other libraries")
    subjects = bench.add_subparsers(dest="subject", metavar="SUBJECT", required=True)
    add_attention(subjects)


def add_attention(subjects) -> None:
    parser = subjects.add_parser(
        "attention",
        help="attention forward, decoding and the cost of a call, against torch's SDPA backends and flash-attn",
        description="Attention forward in TFLOP/s and decoding in GB/s, against torch's SDPA backends and flash-attn. "
        "Flags marked LIST take values and ranges: 64,128 or 1-4 or 2-8+2 or 512-16384*2. Without a preset and without "
        "such flags: the h200 preset on a GPU, a small grid on a CPU.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--preset",
        type=lists.words(PRESETS),
        metavar="LIST",
        help="h200: the table of peers on an H200; extra: other head dims, GQA, varlen, seqlen_q != seqlen_k, windows, "
        "S3Gen's blocks. The lists below then choose among its cells",
    )
    grid = parser.add_argument_group("cells")
    grid.add_argument("--op", type=lists.words(OPS), metavar="LIST", help=", ".join(OPS))
    grid.add_argument("--d", type=lists.positive, metavar="LIST", help="head dims (64,128)")
    grid.add_argument("--s", type=lists.positive, metavar="LIST", help="query lengths of forward (512-16384*2)")
    grid.add_argument("--s-k", type=lists.positive, metavar="LIST", help="key lengths of forward (as --s)")
    grid.add_argument("--mask", type=lists.words(MASKS), metavar="LIST", help="full, causal (both)")
    grid.add_argument("--window", type=lists.windows, metavar="LIST", help="keys seen before a query's own (none: all)")
    grid.add_argument("--lengths", type=lists.lengths, metavar="LIST", help="of varlen, COUNTxMIN-MAX (64x60-400)")
    grid.add_argument("--rows", type=lists.positive, metavar="LIST", help="of decode (2,16,40,128)")
    grid.add_argument("--kv", type=lists.positive, metavar="LIST", help="cached keys of decode (512,1024,4096)")
    grid.add_argument("--heads", type=lists.positive, metavar="LIST", help="query heads (2048 / d; of decode 1024 / d)")
    grid.add_argument("--heads-kv", type=lists.positive, metavar="LIST", help="key heads (as --heads)")
    grid.add_argument("--batch", type=lists.positive, metavar="LIST", help="of forward (16384 tokens in all)")
    grid.add_argument("--dtype", type=lists.words(DTYPES), metavar="LIST", help="bf16, fp16, fp32 (bf16; CPU: fp32)")
    how = parser.add_argument_group("how")
    archs = f"kernels: {', '.join(ARCHS)} (auto)"
    how.add_argument("--arch", type=lists.words(ARCHS), default=["auto"], metavar="LIST", help=archs)
    how.add_argument(
        "--peers",
        type=lists.words((*PEERS, "none")),
        metavar="LIST",
        help=f"{', '.join(PEERS)}, none (all that are installed)",
    )
    how.add_argument("-r", "--repetitions", type=int, default=15, metavar="N", help="timed samples of each (15)")
    how.add_argument("--warmup", type=int, default=3, metavar="N", help="calls before them (3)")
    how.add_argument("--seed", type=int, default=0, help="of the inputs (0)")
    how.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: the GPU, if any")
    out = parser.add_argument_group("output")
    out.add_argument("-o", "--format", choices=FORMATS, default="md", help="on stdout (md)")
    out.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="also write FILE after each cell; .md, .csv or .json says the format",
    )
    out.add_argument("--list", action="store_true", help="print the cells and measure nothing")
    parser.set_defaults(run=run_attention, preset=[], peers=None, output=None, list=False)


def run_attention(arguments: argparse.Namespace) -> int:
    from vivace.bench import attention

    return attention.run(arguments)
