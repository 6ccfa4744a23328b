"""The flags of `vivace bench`. No torch, so that --help is quick."""

import argparse
from pathlib import Path

from vivace import plan
from vivace.bench import lists

OPS = ("forward", "varlen", "decode", "overhead")
MASKS = ("full", "causal")
DTYPES = ("bf16", "fp16", "fp32")
ARCHS = ("auto", "90", "80", "generic")
PEERS = ("cudnn", "fa2", "efficient", "sdpa", "flash_attn", "fa3", "fa4")
STEP_PEERS = ("compile", "eager")
GENERATE_PEERS = ("eager", "sdpa", "compiled")
PRESETS = ("h200", "extra")
FORMATS = ("md", "csv", "json")


def add_parser(commands) -> None:
    """Adds `bench` to the command's subparsers."""
    bench = commands.add_parser(
        "bench",
        help="measure attention, T3's token step and whole generations on this machine, beside other libraries",
        description="Three subjects, measured in one way: machine facts first, warm-up, candidates in turns, medians "
        "with their spread, a hash of the output. A CPU measures a tiny model and says so.",
    )
    subjects = bench.add_subparsers(dest="subject", metavar="SUBJECT", required=True)
    add_attention(subjects)
    add_step(subjects)
    add_generate(subjects)
    add_compare(subjects)


def subject(subjects, name: str, help: str, description: str) -> argparse.ArgumentParser:
    return subjects.add_parser(
        name,
        help=help,
        description=f"{description} Flags marked LIST take values and ranges: 64,128 or 1-4 or 2-8+2 or 512-16384*2.",
        argument_default=argparse.SUPPRESS,
    )


def add_common(parser, repetitions: int, warmup: int, warmup_of: str) -> None:
    """The flags that all subjects share; they belong to `run.Bench`."""
    how = parser.add_argument_group("how")
    how.add_argument(
        "-r",
        "--repetitions",
        type=int,
        default=repetitions,
        metavar="N",
        help=f"timed samples of each ({repetitions})",
    )
    how.add_argument("--warmup", type=int, default=warmup, metavar="N", help=f"{warmup_of} before them ({warmup})")
    how.add_argument("--seed", type=int, default=0, help="of inputs, weights and draws (0)")
    how.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: the GPU, if any")
    out = parser.add_argument_group("output")
    out.add_argument("-o", "--format", choices=FORMATS, default="md", help="on stdout (md)")
    out.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="also write FILE after each case; .md, .csv or .json says the format",
    )
    out.add_argument(
        "--resume",
        type=Path,
        metavar="FILE",
        help="measure only what FILE (.json or .csv of a run that was interrupted, on this machine) does not have yet, "
        "and write FILE after each case; it need not exist",
    )
    out.add_argument("--list", action="store_true", help="print the cases and measure nothing")
    parser.set_defaults(output=None, resume=None, list=False)


def add_attention(subjects) -> None:
    parser = subject(
        subjects,
        "attention",
        "attention forward, decoding and the cost of a call, against torch's SDPA backends and flash-attn",
        "Attention forward in TFLOP/s and decoding in GB/s, against torch's SDPA backends and flash-attn. Without a "
        "preset and without lists: the h200 preset on a GPU, a small grid on a CPU.",
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
    grid.add_argument("--page", type=lists.numbers, metavar="LIST", help="keys a page of its cache (0: one piece)")
    grid.add_argument("--heads", type=lists.positive, metavar="LIST", help="query heads (2048 / d; of decode 1024 / d)")
    grid.add_argument("--heads-kv", type=lists.positive, metavar="LIST", help="key heads (as --heads)")
    grid.add_argument("--batch", type=lists.positive, metavar="LIST", help="of forward (16384 tokens in all)")
    grid.add_argument("--dtype", type=lists.words(DTYPES), metavar="LIST", help="bf16, fp16, fp32 (bf16; CPU: fp32)")
    choices = parser.add_argument_group("candidates")
    archs = f"kernels: {', '.join(ARCHS)} (auto)"
    choices.add_argument("--arch", type=lists.words(ARCHS), default=["auto"], metavar="LIST", help=archs)
    choices.add_argument(
        "--peers",
        type=lists.words((*PEERS, "none")),
        metavar="LIST",
        help=f"{', '.join(PEERS)}, none (all that are installed)",
    )
    add_common(parser, repetitions=15, warmup=3, warmup_of="calls")
    parser.set_defaults(run=run_attention, preset=[], peers=None)


def add_step(subjects) -> None:
    parser = subject(
        subjects,
        "step",
        "one token of T3 for 1 to 128 rows, against torch.compile of transformers' Llama",
        "T3's token step, from the last tokens to the drawn ones on the device: embedding, 30 layers, head, guidance, "
        "sampling. On a GPU as CUDA-graph replays; beside it a plain read of the same bytes (the floor) and "
        "transformers' LlamaModel with the same weights.",
    )
    grid = parser.add_argument_group("cases")
    grid.add_argument("--rows", type=lists.positive, metavar="LIST", help="2 a guided request (1,2,40,128; CPU: 1,2)")
    grid.add_argument(
        "--tokens", type=lists.positive, metavar="LIST", help="keys in the cache (300; and 1000,3000 at 2 and 128 rows)"
    )
    grid.add_argument("--dtype", type=lists.words(DTYPES), metavar="LIST", help="bf16, fp16, fp32 (bf16; CPU: fp32)")
    model = parser.add_argument_group("model")
    model.add_argument("--model", type=Path, metavar="FILE", help="written by vivace export (random weights)")
    model.add_argument("--shape", choices=("real", "tiny"), help="of random weights (real; CPU: tiny)")
    choices = parser.add_argument_group("candidates")
    archs = "kernels: auto, 90, 80 (auto)"
    choices.add_argument("--arch", type=lists.words(("auto", "90", "80")), default=["auto"], metavar="LIST", help=archs)
    choices.add_argument(
        "--peers",
        type=lists.words((*STEP_PEERS, "none")),
        metavar="LIST",
        help="of transformers' LlamaModel: compile (torch.compile, reduce-overhead, static cache), eager, none (both, "
        "where transformers is installed; CPU: eager)",
    )
    add_common(parser, repetitions=15, warmup=3, warmup_of="steps")
    parser.set_defaults(run=run_step, model=None, shape=None, peers=None)


def add_generate(subjects) -> None:
    parser = subject(
        subjects,
        "generate",
        "whole generations: tokens/s, time to first token, real-time factor, memory of the process",
        "Whole requests on the C++ engine, each batch in a process of its own whose memory is watched; Chatterbox's "
        "own T3 beside it for one request, where chatterbox-tts is installed.",
    )
    parser.add_argument(
        "--models",
        nargs="+",
        metavar="FILE",
        help="files written by vivace export, or checkpoints (.safetensors, torch files, directories), side by side "
        "(a random model of --shape)",
    )
    grid = parser.add_argument_group("cases")
    grid.add_argument("--batch", type=lists.positive, metavar="LIST", help="requests (1,2,5,10,20,64; CPU: 1,2)")
    grid.add_argument(
        "--vram",
        type=plan.sizes,
        metavar="LIST",
        help="GiB of cards: the batches that vivace plan puts into them; besides --batch, where that is given",
    )
    grid.add_argument("--max-tokens", type=int, metavar="N", help="of each request (1000; CPU: 32)")
    grid.add_argument("--cfg-weight", type=float, metavar="W", help="guidance; 0 runs one row a request (0.5)")
    grid.add_argument("--text", metavar="TEXT", help="of every request (one of 110 text tokens)")
    model = parser.add_argument_group("model")
    model.add_argument("--shape", choices=("real", "tiny"), help="of the random model (real; CPU: tiny)")
    model.add_argument("--dtype", choices=DTYPES, help="that checkpoints are exported in (bf16; CPU: fp32)")
    model.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="tokenizer.json (beside the model, else a demo's)"
    )
    model.add_argument("--voice", type=Path, metavar="FILE", help="voice.safetensors (beside the model, else a random)")
    choices = parser.add_argument_group("candidates")
    choices.add_argument(
        "--peers",
        type=lists.words((*GENERATE_PEERS, "none")),
        metavar="LIST",
        help="Chatterbox's T3 in these forms: eager, sdpa, compiled, none (all, where chatterbox-tts is installed)",
    )
    choices.add_argument("--peer-tokens", type=int, metavar="N", help="that a peer generates (200; CPU: 8)")
    choices.add_argument(
        "--peer-repetitions", type=int, metavar="N", help="samples of a peer, which take long (as --repetitions)"
    )
    add_common(parser, repetitions=3, warmup=32, warmup_of="tokens of each request")
    parser.set_defaults(
        run=run_generate,
        models=[],
        batch=None,
        vram=None,
        max_tokens=None,
        cfg_weight=0.5,
        text=None,
        shape=None,
        dtype=None,
        tokenizer=None,
        voice=None,
        peers=None,
        peer_tokens=None,
        peer_repetitions=None,
    )


def add_compare(subjects) -> None:
    parser = subjects.add_parser(
        "compare",
        help="what became slower or faster between two runs",
        description="Holds the cases of two runs of one machine against each other. Exit status: 0 nothing is slower, "
        "3 something is, 4 the machines differ, 1 the files cannot be compared.",
    )
    parser.add_argument("before", type=Path, metavar="A.json")
    parser.add_argument("after", type=Path, metavar="B.json")
    parser.add_argument(
        "--threshold", type=float, default=3.0, metavar="PERCENT", help="changes below it are noise (3)"
    )
    parser.add_argument(
        "--other-unit-threshold",
        type=float,
        default=7.0,
        metavar="PERCENT",
        help="the same where the GPUs are two of one kind (7)",
    )
    parser.add_argument("--different-machines", action="store_true", help="compare all the same")
    parser.add_argument("--all", action="store_true", help="print the unchanged cases too")
    parser.add_argument("-o", "--format", choices=("md", "json"), default="md", help="on stdout (md)")
    parser.set_defaults(run=run_compare)


def run_attention(arguments: argparse.Namespace) -> int:
    from vivace.bench import attention

    return attention.execute(arguments)


def run_step(arguments: argparse.Namespace) -> int:
    from vivace.bench import step

    return step.execute(arguments)


def run_generate(arguments: argparse.Namespace) -> int:
    from vivace.bench import generate

    return generate.execute(arguments)


def run_compare(arguments: argparse.Namespace) -> int:
    from vivace.bench import compare

    return compare.execute(arguments)
