"""What follows from the times: medians, spread, rates, ratios. No torch."""

import math
import statistics
from collections.abc import Sequence

from vivace.bench.cells import Cell

#: Names of torch's own backends; the others are separate packages.
TORCH_PEERS = ("cudnn", "fa2", "efficient", "sdpa")


def summarise(samples: Sequence[float]) -> dict:
    """median, lower and upper quartile (inclusive method), minimum and count of samples.

    Raises:
        ValueError: there are none.
    """
    if not samples:
        raise ValueError("vivace bench: no samples to summarise")
    ordered = sorted(samples)
    q1, median, q3 = statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else (ordered[0],) * 3
    return {"median": median, "q1": q1, "q3": q3, "min": ordered[0], "n": len(ordered)}


def timed(samples: Sequence[float], name: str, factor: float = 1.0) -> dict:
    """What every row says of its samples in seconds: NAME, NAME_q1, NAME_q3, NAME_min (each times ``factor``), samples,
    and spread_percent, the distance of the quartiles over the median.
    """
    summary = summarise(samples)
    found = {
        name + ("" if key == "median" else f"_{key}"): significant(summary[key] * factor, 5)
        for key in ("median", "q1", "q3", "min")
    }
    spread = 100 * (summary["q3"] - summary["q1"]) / summary["median"]
    return found | {"samples": summary["n"], "spread_percent": significant(spread, 3)}


def significant(value: float, digits: int = 4) -> float:
    return float(f"{value:.{digits}g}")


def finite(value: float) -> float | None:
    """None for NaN and infinity, which JSON cannot say."""
    return value if math.isfinite(value) else None


def rate(cell: Cell, work: float, seconds: float) -> dict:
    """TFLOP/s of ``work`` operations, or GB/s of ``work`` bytes for decode; nothing for overhead."""
    if cell.op == "overhead":
        return {}
    if cell.op == "decode":
        return {"gbps": significant(work / seconds / 1e9)}
    return {"tflops": significant(work / seconds / 1e12)}


def row(cell: Cell, work: float, ours: Sequence[float], peers: dict[str, tuple[str, Sequence[float]]], ceilings: dict):
    """The figures of one cell.

    Args:
        cell: what was measured.
        work: operations, or bytes for decode.
        ours: seconds of each sample.
        peers: name -> its layout and seconds of each sample; of two layouts the better one.
        ceilings: matmul_tflops, copy_gb_s, read_gb_s, as far as measured.

    Returns:
        us, us_q1, us_q3, us_min, samples, spread_percent; tflops or gbps; percent_matmul or percent_read; for each
        peer us_NAME, tflops_NAME or gbps_NAME, layout_NAME, ratio_NAME (above 1: vivace is faster); best, the fastest
        peer, and ratio_best.
    """
    own = statistics.median(ours)
    figures = timed(ours, "us", 1e6) | rate(cell, work, own)
    read = max(ceilings.get("copy_gb_s", 0), ceilings.get("read_gb_s", 0))
    if "tflops" in figures and ceilings.get("matmul_tflops"):
        figures["percent_matmul"] = significant(100 * figures["tflops"] / ceilings["matmul_tflops"], 3)
    if "gbps" in figures and read:
        figures["percent_read"] = significant(100 * figures["gbps"] / read, 3)
    medians = {name: statistics.median(samples) for name, (_, samples) in peers.items()}
    for name, seconds in medians.items():
        figures[f"us_{name}"] = significant(seconds * 1e6, 5)
        figures |= {f"{key}_{name}": value for key, value in rate(cell, work, seconds).items()}
        figures[f"layout_{name}"] = peers[name][0]
        figures[f"ratio_{name}"] = significant(seconds / own)
    if medians:
        figures["best"] = min(medians, key=medians.get)
        figures["ratio_best"] = significant(medians[figures["best"]] / own)
        torchs = [seconds for name, seconds in medians.items() if name in TORCH_PEERS]
        if torchs:
            figures["ratio_torch"] = significant(min(torchs) / own)
    return figures


def better_layouts(samples: dict[tuple[str, str], Sequence[float]]) -> dict[str, tuple[str, Sequence[float]]]:
    """(peer, layout) -> samples, to peer -> (layout, samples) of the lower median."""
    best = {}
    for (name, layout), times in samples.items():
        if times and (name not in best or statistics.median(times) < statistics.median(best[name][1])):
            best[name] = layout, times
    return best
