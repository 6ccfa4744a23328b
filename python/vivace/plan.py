"""`vivace plan`: how many requests a GPU's memory holds at once. No torch.

Memory of the whole process = weights + keys and values + what the process holds besides: CUDA context, kernels and
libraries once, workspaces and logits for each row. The first two follow from the model's shape; the rest is measured by
`vivace bench generate`, and a run of it on the GPU in question may take the place of the figures below (--measured).
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

GIB = 2**30
SIZES = (8.0, 12.0, 16.0, 24.0)  # GiB, as cards are sold
RESERVE = 0.5  # GiB that driver and desktop hold on a card of one's own
TEXT_TOKENS = 110  # of a request: a long sentence or two
DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class Overhead:
    """What a process holds beside weights and cache, in bytes; ``source`` says where it was measured."""

    process: float
    row: float
    source: str


#: By `fit` (`vivace report docs/results/generate-h200.json --markdown` prints it); tests hold it to that file.
MEASURED = Overhead(process=635e6, row=0.9e6, source="one H200, driver 580, CUDA 13.0")


@dataclass(frozen=True)
class Shape:
    """A model as far as memory goes. The default is Chatterbox's English T3."""

    parameters: int = 531_676_160
    kv_bytes_per_token: int = 122_880  # 30 layers * 2 * 16 heads * 64 * 2 bytes
    conditioning: int = 34
    dtype: str = "bf16"

    @property
    def weight_bytes(self) -> int:
        return self.parameters * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Prediction:
    """Bytes on the GPU of one process."""

    requests: int
    rows: int
    weights: float
    kv: float
    overhead: float

    @property
    def total(self) -> float:
        return self.weights + self.kv + self.overhead


def shape_of(dtype: str = "bf16") -> Shape:
    base = Shape()
    return Shape(kv_bytes_per_token=base.kv_bytes_per_token // 2 * DTYPE_BYTES[dtype], dtype=dtype)


def model_shape(manifest: dict) -> Shape:
    """The shape of a file that vivace export wrote, from its manifest."""
    model, dtype = manifest["model"], manifest["dtype"]
    width = 2 * model["num_layers"] * model["num_kv_heads"] * model["head_dim"] * DTYPE_BYTES[dtype]
    return Shape(model["parameters"], width, manifest["conditioning"]["length"], dtype)


def predict(
    shape: Shape,
    requests: int,
    tokens: int,
    *,
    text_tokens: int = TEXT_TOKENS,
    guided: bool = True,
    overhead: Overhead = MEASURED,
) -> Prediction:
    """The memory of a process that generates ``tokens`` for each of ``requests`` at once.

    A row holds the conditioning, the text with its start and stop, two start-of-speech positions and the tokens.
    """
    rows = rows_of(requests, guided)
    positions = shape.conditioning + text_tokens + 4 + tokens
    return Prediction(
        requests,
        rows,
        shape.weight_bytes,
        rows * positions * shape.kv_bytes_per_token,
        overhead.process + rows * overhead.row,
    )


def rows_of(requests: int, guided: bool) -> int:
    return requests * (2 if guided else 1)


def aim(weights: float, kv: float) -> float:
    """Bytes that a process should stay within: its weights, keys and values, a tenth of them, and 0.6 GB."""
    return 1.1 * (weights + kv) + 0.6e9


def largest_batch(limit: float, shape: Shape, tokens: int, **options) -> Prediction | None:
    """The most requests whose process stays within ``limit`` bytes; None where not even one does."""
    one, two = (predict(shape, n, tokens, **options).total for n in (1, 2))
    if one > limit:
        return None
    requests = 1 + math.floor((limit - one) / (two - one))
    return predict(shape, requests, tokens, **options)


def fit(rows: Sequence[dict]) -> Overhead:
    """What processes held beside weights and cache, of `vivace bench generate`'s rows: least squares over their rows.

    Raises:
        ValueError: no row has the memory of a CUDA process.
    """
    points, source = [], ""
    for row in rows:
        if row.get("op") != "generate" or row.get("implementation") != "vivace" or row.get("vram_peak_gib") is None:
            continue
        known = predict(row_shape(row), row["requests"], row["max_tokens"], **row_options(row), overhead=NONE)
        points.append((known.rows, row["vram_peak_gib"] * GIB - known.total))
        source = f"one {row.get('gpu', 'GPU')}, driver {row.get('driver', 'unknown')}, {row.get('date', '')[:10]}"
    if not points:
        raise ValueError("vivace plan: the run has no generation of vivace on a GPU whose memory was measured")
    n = len(points)
    mean_x, mean_y = sum(x for x, _ in points) / n, sum(y for _, y in points) / n
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0
    return Overhead(round(mean_y - slope * mean_x), round(slope), source)


NONE = Overhead(0, 0, "")


def largest_error(rows: Sequence[dict], overhead: Overhead) -> float:
    """Of the predictions for these rows, in percent of what was measured."""
    errors = [0.0]
    for row in rows:
        if row.get("vram_peak_gib") is not None and row.get("implementation") == "vivace":
            errors.append(100 * (predict_row(row, overhead) / GIB / row["vram_peak_gib"] - 1))
    return max(errors, key=abs)


def predict_row(row: dict, overhead: Overhead = MEASURED) -> float:
    """Bytes that a process takes which does what a row of `vivace bench generate` did."""
    return predict(row_shape(row), row["requests"], row["max_tokens"], **row_options(row), overhead=overhead).total


def row_shape(row: dict) -> Shape:
    """The shape of the model that a row of `vivace bench generate` measured."""
    parameters = row["weight_bytes"] // DTYPE_BYTES[row["dtype"]]
    return Shape(parameters, row["kv_bytes_per_token"], Shape.conditioning, row["dtype"])


def row_options(row: dict) -> dict:
    framed = Shape.conditioning + 4  # conditioning, start and stop of the text, two start-of-speech positions
    return {"guided": row["cfg_weight"] > 0, "text_tokens": row["prompt_tokens"] - framed}


def add_parser(commands) -> None:
    """Adds `plan` to the command's subparsers."""
    plan = commands.add_parser(
        "plan",
        help="how many requests at once fit into a GPU's memory",
        description="How many requests at once fit into a GPU's memory: weights, KV cache, workspaces, CUDA context.",
    )
    plan.add_argument("--vram", type=sizes, default=list(SIZES), metavar="LIST", help="GiB of the card (8,12,16,24)")
    plan.add_argument("--tokens", type=int, default=1000, metavar="N", help="speech tokens of a request (1000 = 40 s)")
    plan.add_argument("--text-tokens", type=int, default=TEXT_TOKENS, metavar="N", help=f"of its text ({TEXT_TOKENS})")
    plan.add_argument("--no-guidance", action="store_true", help="cfg weight 0: one row a request instead of two")
    plan.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="(bf16)")
    plan.add_argument("--model", type=Path, metavar="FILE", help="written by vivace export (Chatterbox's English T3)")
    plan.add_argument("--reserve", type=float, default=RESERVE, metavar="GIB", help="for driver and desktop (0.5)")
    plan.add_argument(
        "--measured", type=Path, metavar="RUN.json", help="of vivace bench generate, on the GPU in question"
    )
    plan.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
    plan.set_defaults(run=run)


def sizes(text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of GiB, such as 12 or 8,24") from None
    if min(values) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} has a size that is not above 0")
    return values


def run(arguments: argparse.Namespace) -> int:
    """Prints the plan; 0, also where nothing fits."""
    if arguments.tokens < 1 or arguments.text_tokens < 1 or arguments.reserve < 0:
        raise ValueError("vivace plan: --tokens and --text-tokens must be 1 or more, --reserve 0 or more")
    shape = shape_of(arguments.dtype)
    if arguments.model is not None:
        from vivace.t3.archive import read_manifest

        shape = model_shape(read_manifest(arguments.model))
    overhead = MEASURED
    if arguments.measured is not None:
        from vivace.bench.output import read

        overhead = fit(read(arguments.measured))
    options = {
        "text_tokens": arguments.text_tokens,
        "guided": not arguments.no_guidance,
        "overhead": overhead,
    }
    plans = [
        (size, largest_batch((size - arguments.reserve) * GIB, shape, arguments.tokens, **options))
        for size in arguments.vram
    ]
    if arguments.json:
        found = [{"vram_gib": size, **(asdict(p) | {"total": p.total} if p else {"requests": 0})} for size, p in plans]
        print(json.dumps({"tokens": arguments.tokens, "overhead": asdict(overhead), "plans": found}))
    else:
        print(text(plans, shape, arguments, options))
    return 0


def text(plans, shape: Shape, arguments: argparse.Namespace, options: dict) -> str:
    """The plan for people."""
    one = predict(shape, 1, arguments.tokens, **options)
    seconds = arguments.tokens / 25
    lines = [
        f"{arguments.tokens} speech tokens ({seconds:g} s) a request, text of {arguments.text_tokens} tokens, "
        f"{'guided: 2 rows' if options['guided'] else 'no guidance: 1 row'}, {shape.dtype}",
        f"weights {one.weights / GIB:.2f} GiB, process {options['overhead'].process / GIB:.2f} GiB, "
        f"a request {(one.total - one.weights - options['overhead'].process) / GIB:.3f} GiB",
        "",
        "| VRAM, GiB | requests at once | process, GiB | left, GiB |",
        "|----------:|-----------------:|-------------:|----------:|",
    ]
    for size, plan in plans:
        if plan is None:
            lines.append(f"| {size:9g} | {0:16} | {'-':>12} | {'-':>9} |")
            continue
        left = size - plan.total / GIB
        lines.append(f"| {size:9g} | {plan.requests:16} | {plan.total / GIB:12.2f} | {left:9.2f} |")
    lines += ["", f"The process' part was measured on {options['overhead'].source}; another GPU's differs a little."]
    return "\n".join(lines)
