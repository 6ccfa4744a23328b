"""The published runs in docs/results: whole, of one machine, with the documented fields."""

from pathlib import Path

import pytest

from vivace import plan
from vivace.bench import output, presets

RESULTS = Path(__file__).resolve().parents[3] / "docs/results"
FIELDS = {
    "attention": ("forward", "op d causal s dtype arch tflops ratio_cudnn ratio_fa2"),
    "attention-extra": ("forward", "op d causal s dtype arch tflops ratio_torch"),
    "decode": ("decode", "d hq hkv rows s page us gbps ratio_cudnn"),
    "step": ("step", "rows tokens dtype arch ms gbps floor_ms peer_ms"),
    "generate": ("generate", "requests tokens_per_s first_token_ms rtf vram_peak_gib vram_steady_gib samples"),
    "cards": ("generate", "requests tokens_per_s vram_peak_gib plan_gib"),
    "memory": ("generate", "requests positions weight_bytes cache_bytes vram_peak_gib vram_aim_gib"),
}


def rows_of(name):
    return output.read(RESULTS / f"{name}-h200.json")


@pytest.mark.parametrize("name", FIELDS)
def test_every_measurement_has_its_fields(name):
    op, fields = FIELDS[name]
    rows = [row for row in rows_of(name) if row["op"] == op]
    assert rows and not [row for row in rows if "error" in row]
    for row in rows:
        assert not set(fields.split()) - row.keys(), row["case"]
        assert row["gpu"] == "NVIDIA H200" and row["date"] and row["commit"] and row["seed"] == 0


def test_all_cells_are_there():
    def cells(name, *fields):
        return {tuple(row[field] for field in fields) for row in rows_of(name) if fields[0] in row}

    both = ("sm90a", "sm80")
    lengths = (512, 1024, 2048, 4096, 8192, 16384)
    masks = [(d, causal, s) for d in (64, 128) for causal in (False, True) for s in lengths]
    assert cells("attention", "d", "causal", "s", "arch") == {(*m, arch) for m in masks for arch in both}
    shapes = {(d, rows, s) for d in (64, 128) for rows in (2, 16, 40, 128) for s in (512, 1024, 4096)}
    pages = (0, presets.PAGE)
    assert cells("decode", "d", "rows", "s", "page") == {(*shape, page) for shape in shapes for page in pages}
    operators = [f"torch.ops.vivace.{name}" for name in ("attention", "attention_with_kvcache")]
    calls = {(call, language) for call in operators for language in ("Python", "C++")}
    assert cells("decode", "call", "from") == calls | {("vivace.attention", "Python")}
    steps = [(rows, 300) for rows in (1, 2, 40, 128)] + [(rows, n) for rows in (2, 128) for n in (1000, 3000)]
    assert cells("step", "rows", "tokens", "arch") == {(*s, arch) for s in steps for arch in both}
    own = {(n, "vivace") for n in (1, 2, 5, 10, 20, 64)}
    peers = {(1, f"Chatterbox {form}") for form in ("eager", "sdpa", "compiled")}
    assert cells("generate", "requests", "implementation") == own | peers
    assert cells("memory", "requests", "positions") == {(n, 1000) for n in (1, 20, 64)}
    extra = [cell.title() for cell in presets.extra()]
    assert sorted(row["case"].partition(" [")[0] for row in rows_of("attention-extra")) == sorted(extra * len(both))


def test_all_were_measured_in_one_round():
    rows = [row for name in FIELDS for row in rows_of(name)]
    assert len({(row["unit"], row["commit"], row["torch"]) for row in rows}) == 1


def test_the_planner_fills_each_card_and_is_right_within_five_percent():
    cards = sorted(rows_of("cards"), key=lambda row: row["requests"])
    for gib, row in zip((8, 12, 16, 24), cards, strict=True):
        assert gib - 1 < row["vram_peak_gib"] <= gib - plan.RESERVE, row["case"]
    for row in cards + rows_of("memory") + rows_of("generate"):
        if row["implementation"] == "vivace":
            assert abs(row["plan_gib"] / row["vram_peak_gib"] - 1) < 0.05, row["case"]


def test_processes_stay_within_their_memory():
    for row in (row for name in ("memory", "generate", "cards") for row in rows_of(name)):
        if row["implementation"] == "vivace":
            assert row["vram_peak_gib"] * plan.GIB <= plan.aim(row["weight_bytes"], row["cache_bytes"]), row["case"]
