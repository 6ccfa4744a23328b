"""Values of flags, and the cells that follow from them."""

import argparse
from pathlib import Path

import pytest

from vivace import cli
from vivace.bench import cells, lists, presets

REPOSITORY = Path(__file__).resolve().parents[3]


def arguments(*flags):
    return cli.build_parser().parse_args(["bench", "attention", *flags])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("64", [64]),
        ("64,128", [64, 128]),
        ("1-4", [1, 2, 3, 4]),
        ("2-9+3", [2, 5, 8]),
        ("512-16384*2", [512, 1024, 2048, 4096, 8192, 16384]),
        ("1-10*3,7", [1, 3, 9, 7]),
        ("5-5", [5]),
    ],
)
def test_lists_and_ranges_read_as_in_llama_bench(text, expected):
    assert lists.numbers(text) == expected


@pytest.mark.parametrize("text", ["", "a", "1,", "-1", "4-1", "1-8*1", "0-8*2", "1-8+0", "1-99999999", "1.5", "1-2-3"])
def test_anything_else_is_refused_with_its_text(text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"is not a number|never reaches|more than"):
        lists.numbers(text)


def test_packed_lengths_are_a_count_and_a_range():
    assert lists.lengths("64x60-400,1x5-5") == ["64x60-400", "1x5-5"]
    assert lists.split_lengths("64x60-400") == (64, 60, 400)
    for text in ("64", "0x1-2", "2x3-1", "2x0-1"):
        with pytest.raises(argparse.ArgumentTypeError, match="COUNTxMIN-MAX"):
            lists.split_lengths(text)


def test_a_wrong_word_names_the_choices(capsys):
    with pytest.raises(SystemExit) as end:
        arguments("--mask", "full,diagonal")
    assert end.value.code == 2
    assert "'diagonal' is none of full, causal" in capsys.readouterr().err


def test_the_grid_is_the_product_of_the_lists():
    found = list(cells.grid(arguments("--op", "forward", "--d", "64,128", "--s", "512-2048*2"), cpu=False))
    assert len(found) == 2 * 3 * 2  # both masks
    assert {(c.d, c.heads, c.batch * c.s) for c in found} == {(64, 32, 16384), (128, 16, 16384)}
    assert {c.dtype for c in found} == {"bf16"}


def test_a_flag_that_one_operator_has_says_which_is_meant():
    assert {c.op for c in cells.grid(arguments("--s", "512"), cpu=False)} == {"forward"}
    assert {c.op for c in cells.grid(arguments("--rows", "2", "--kv", "64"), cpu=False)} == {"decode"}
    assert {c.op for c in cells.grid(arguments("--lengths", "2x1-3", "--s", "8"), cpu=False)} == {"forward", "varlen"}
    assert {c.op for c in cells.grid(arguments("--d", "64"), cpu=False)} == {"forward", "decode", "overhead"}


def test_key_heads_that_do_not_divide_the_heads_are_an_error():
    with pytest.raises(ValueError, match="heads_kv 3 does not divide heads 8"):
        list(cells.grid(arguments("--heads", "8", "--heads-kv", "3"), cpu=False))


def test_pages_that_do_not_divide_the_keys_are_an_error():
    found = list(cells.grid(arguments("--rows", "2", "--kv", "64", "--page", "0,16", "--d", "64"), cpu=False))
    assert [c.page for c in found] == [0, 16] and "in pages of 16" in found[1].title() and found[1].key()["page"] == 16
    with pytest.raises(ValueError, match="page 48 does not divide kv 64"):
        list(cells.grid(arguments("--rows", "2", "--kv", "64", "--page", "48"), cpu=False))


def test_without_flags_a_gpu_runs_the_h200_preset_and_a_cpu_a_small_grid():
    assert presets.cells(arguments(), cpu=False) == list(presets.h200())
    small = presets.cells(arguments(), cpu=True)
    assert {c.op for c in small} == {"forward", "decode", "overhead"}
    assert max(c.batch * c.s for c in small) <= 256


def test_the_h200_preset_has_the_cells_and_bars_of_the_published_table():
    found = presets.cells(arguments("--preset", "h200"), cpu=False)
    forward = [c for c in found if c.op == "forward"]
    decode = [c for c in found if c.op == "decode"]
    assert len(forward) == 24 and [c.page for c in decode] == [0] * 24 + [presets.PAGE] * 24
    assert all(c.kv % presets.PAGE == 0 for c in decode)
    assert all(c.batch * c.s == 16384 and c.heads * c.d == 2048 and c.s_k == c.s for c in forward)
    bars = {(c.d, c.mask, c.s): c.bar for c in forward}
    assert bars[64, "full", 512] == 1.00 and bars[128, "causal", 2048] == 1.21 and bars[64, "full", 16384] == 1.19


def test_lists_choose_among_a_presets_cells():
    found = presets.cells(arguments("--preset", "h200", "--op", "forward", "--d", "128", "--mask", "causal"), cpu=False)
    assert [(c.d, c.mask, c.s) for c in found] == [(128, "causal", s) for s in presets.LENGTHS]
    decode = presets.cells(arguments("--preset", "h200", "--op", "decode", "--rows", "16", "--kv", "1024"), cpu=False)
    assert [(c.d, c.rows, c.kv) for c in decode] == [(64, 16, 1024), (128, 16, 1024)] * 2
    assert {c.page for c in decode} == {0, presets.PAGE}
    shaped = presets.cells(arguments("--preset", "h200", "--rows", "16"), cpu=False)
    assert {c.op for c in shaped} == {"forward", "decode"}
    with pytest.raises(ValueError, match="no cell of the preset"):
        presets.cells(arguments("--preset", "h200", "--d", "80"), cpu=False)


def test_bars_hold_for_the_dtype_they_were_measured_in():
    found = presets.cells(arguments("--preset", "h200", "--op", "forward", "--dtype", "bf16,fp16"), cpu=False)
    assert {c.dtype for c in found if c.bar is None} == {"fp16"}
    assert len(found) == 48


def test_the_extra_preset_covers_what_the_table_does_not():
    found = list(presets.extra())
    assert {96, 192, 256} <= {c.d for c in found}
    assert any(c.heads == 32 and c.heads_kv == 8 and c.op == "forward" for c in found)
    assert {c.lengths for c in found if c.op == "varlen"} == {"64x60-400", "16x500-4000"}
    assert any(c.s != c.s_k for c in found if c.op == "forward") and any(c.window == 512 for c in found)
    assert [c.s for c in found if c.batch == 2 and c.heads == 8] == [500, 1000, 1500, 2000, 2500]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [-1, 0, 3])
@pytest.mark.parametrize(("s", "s_k"), [(5, 9), (9, 5), (7, 7)])
def test_visible_pairs_are_those_of_the_mask(s, s_k, causal, window):
    pairs = 0
    for i in range(s):
        for j in range(s_k):
            distance = j - (i + s_k - s)
            pairs += (not causal or distance <= 0) and (window < 0 or -window <= distance <= (0 if causal else window))
    if causal and window < 0 and s == s_k:
        pairs = s * s / 2  # the convention for square causal masks
    assert cells.visible_pairs(s, s_k, causal, window) == pairs


def test_work_is_counted_as_the_published_table_counts_it():
    cell = cells.Cell("forward", d=64, causal=True, s=512, s_k=512, batch=32, heads=32, heads_kv=32)
    assert cells.flop(cell) == 4 * 32 * 32 * 512 * 512 * 64 / 2
    packed = cells.Cell("varlen", d=64, causal=False, batch=2, heads=3, heads_kv=3, lengths="2x4-8")
    assert cells.flop(packed, (4, 8)) == 4 * 64 * 3 * (16 + 64)
    decode = cells.Cell("decode", d=64, heads=16, heads_kv=16, rows=2, kv=512)
    assert cells.kv_bytes(decode) == 2 * 2 * 512 * 16 * 64 * 2


def test_help_needs_no_torch():
    import subprocess
    import sys

    code = "import sys; from vivace import cli\ntry: cli.main(['bench', 'attention', '--help'])\n"
    code += "except SystemExit: pass\nassert 'torch' not in sys.modules"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY / "python")
    assert run.returncode == 0, run.stderr
    assert "--heads-kv" in run.stdout
