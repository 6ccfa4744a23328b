"""`vivace bench step` on the CPU with a tiny model: what is measured, and that all candidates compute the same."""

import json

import pytest
import torch

from vivace import cli, t3
from vivace.bench import step, step_peers, step_state

SEED = 5


@pytest.fixture(scope="module")
def weights():
    return step_state.random_weights("tiny", torch.float32, "cpu", SEED)


def arguments(*flags):
    return cli.build_parser().parse_args(["bench", "step", *flags])


def test_the_published_table_is_the_default_on_a_gpu():
    cases = step.cases(arguments(), cpu=False)
    assert [(c.rows, c.tokens) for c in cases] == [
        *((rows, 300) for rows in (1, 2, 40, 128)),
        *((rows, tokens) for rows in (2, 128) for tokens in (1000, 3000)),
    ]
    assert {(c.dtype, c.shape) for c in cases} == {("bf16", "real")}
    small = step.cases(arguments(), cpu=True)
    assert {c.shape for c in small} == {"tiny"} and max(c.rows for c in small) == 2
    chosen = step.cases(arguments("--rows", "2-8*2", "--tokens", "5,6", "--dtype", "fp16"), cpu=False)
    assert len(chosen) == 6 and {c.dtype for c in chosen} == {"fp16"}


def test_an_even_number_of_rows_is_half_as_many_guided_requests(weights):
    assert [step_state.requests_of(rows) for rows in (1, 2, 3, 40)] == [1, 1, 3, 20]
    state = step_state.make_state(weights, 6, 10, SEED)
    assert state.requests == 3 and state.row_request.tolist() == [0, 1, 2, 0, 1, 2]
    sampling = step_state.make_sampling(state, SEED)
    assert sampling.rows.tolist() == [[0, 3], [1, 4], [2, 5]] and sampling.cfg_weight.tolist() == [0.5] * 3
    alone = step_state.make_sampling(step_state.make_state(weights, 3, 10, SEED), SEED)
    assert alone.rows.tolist() == [[0, -1], [1, -1], [2, -1]] and alone.cfg_weight.tolist() == [0.0] * 3


def test_the_bytes_of_a_step_are_its_weights_and_its_cache(weights):
    state = step_state.make_state(weights, 2, 10, SEED)
    c = weights.config
    layer = c.hidden_size * (3 * c.hidden_size + c.hidden_size + 3 * c.intermediate_size + 2)
    expected = 4 * (c.num_layers * layer + c.hidden_size + c.speech_vocab_size * c.hidden_size)
    assert weights.step_bytes() == expected
    assert state.kv_bytes() == 2 * 10 * 2 * c.num_layers * c.num_kv_heads * c.head_dim * 4


def test_every_step_of_a_measurement_is_the_same(weights):
    state = step_state.make_state(weights, 4, 12, SEED)
    run, logits = step_state.own_step(state, SEED)
    before = logits().clone()
    for _ in range(3):
        tokens = run().clone()
        assert tokens.shape == (2,) and tokens.max() < weights.config.speech_vocab_size
    assert state.cache_seqlens.tolist() == [12] * 4 and torch.equal(logits(), before)


@pytest.mark.parametrize("rows", [1, 4])
def test_the_operators_one_by_one_give_the_fused_steps_logits(weights, rows):
    state = step_state.make_state(weights, rows, 9, SEED)
    torch.testing.assert_close(
        step_state.fused_logits(state)(), step_state.operator_logits(state)(), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("rows", [1, 4])
def test_transformers_computes_the_same_logits(weights, rows):
    pytest.importorskip("transformers")
    state = step_state.make_state(weights, rows, 9, SEED)
    peer = step_peers.Peer(step_peers.llama(weights), state)
    with torch.no_grad(), peer.context():
        theirs = peer.logits_function()()
    ours = step_state.operator_logits(state)()
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-3)
    assert ours.std() > 0.1  # logits that are all alike would be equal too


def test_an_archives_decoder_is_read_into_the_stacked_weights(tmp_path):
    path = tmp_path / "t3.vivace"
    t3.export(path, random=True, seed=3, shape="tiny", dtype="fp32")
    weights = step_state.archive_weights(path, None, "cpu")
    state = step_state.make_state(weights, 2, 7, SEED)
    model = t3.load(path)
    with torch.no_grad():
        theirs = model.decode(
            state.tokens,
            state.positions,
            state.row_request,
            state.k_cache,
            state.v_cache,
            state.cache_seqlens,
            state.cache_batch_idx,
            None,
        )
    torch.testing.assert_close(step_state.operator_logits(state)(), theirs, rtol=1e-4, atol=1e-4)


def test_figures_are_held_against_the_floor_and_the_quickest_peer():
    row = step.step_row(
        10**9, [1e-3] * 3, 0.5e-3, {"compile": [4e-3], "eager": [20e-3]}, {"copy_gb_s": 1500, "read_gb_s": 1800}
    )
    assert row["ms"] == 1.0 and row["gbps"] == 1000 and row["mb"] == 1000
    assert row["floor_ms"] == 0.5 and row["floor_ratio"] == 2.0 and row["percent_read"] == 50  # the floor's 2,000 GB/s
    assert (row["peer"], row["peer_ms"], row["ratio_best"], row["ratio_eager"]) == ("compile", 4.0, 4.0, 20.0)
    assert "floor_ms" not in step.step_row(10**9, [1e-3], None, {}, {})


@pytest.mark.usefixtures("quick_ceilings")
def test_a_run_prints_the_documented_fields(capsys, tmp_path):
    flags = ["--device", "cpu", "--rows", "1,2", "--tokens", "6", "-r", "2", "--warmup", "1", "-o", "json"]
    assert cli.main(["bench", "step", *flags, "--output", str(tmp_path / "run.md")]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["rows"] for row in rows] == [1, 2]
    for row in rows:
        assert {"rows", "tokens", "dtype", "arch", "ms", "gbps", "floor_ms", "hash"} <= row.keys()
        assert row["op"] == "step" and row["arch"] == "cpu" and row["shape"] == "tiny" and row["path"] == "cpu"
    assert rows[0]["hash"] != rows[1]["hash"]
    text = (tmp_path / "run.md").read_text()
    assert "**Token step, milliseconds" in text and "x floor" in text and "CPU figures" in text
    assert cli.main(["bench", "step", *flags, "--peers", "none"]) == 0
    assert [row["hash"] for row in json.loads(capsys.readouterr().out)] == [row["hash"] for row in rows]
