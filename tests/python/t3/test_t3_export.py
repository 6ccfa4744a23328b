"""Archives: what goes in comes out, and a changed byte is noticed."""

import json
import os
import subprocess
import sys
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from vivace import t3
from vivace.t3.archive import records_digest

SMALL = t3.T3Config(
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    text_vocab_size=704,
    max_text_tokens=30,
    max_speech_tokens=60,
    perceiver_queries=4,
)


@pytest.fixture(scope="module")
def model():
    return t3.load_model(t3.RandomWeights(SMALL, seed=1), SMALL, torch.float32)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random tiny model's archive and what export returned."""
    folder = tmp_path_factory.mktemp("tiny")
    return folder / "t3.vivace", t3.export(folder / "t3.vivace", random=True, seed=7, shape="tiny", assets=folder)


@torch.inference_mode()
def run(model, text=(255, 5, 9, 0), dtype=torch.float32):
    """Two guided requests of unequal length through every method; everything that comes out."""
    generator = torch.Generator().manual_seed(2)
    speaker = torch.randn(1, 256, generator=generator)
    cond = model.encode_voice(speaker, torch.randint(6561, (1, 11), generator=generator), 0.7)
    texts = [torch.tensor(text), torch.tensor(text[:-2] + text[-1:])]
    prompts = [model.embed_prompt(cond, tokens, drop) for tokens in texts for drop in (False, True)]
    lengths = torch.tensor([prompt.size(0) for prompt in prompts], dtype=torch.int32)
    starts = torch.cat([torch.zeros(1), lengths.cumsum(0)]).to(torch.int32)
    k_cache, v_cache = model.new_cache(5, 40)
    assert k_cache.dtype == v_cache.dtype == dtype
    rows = torch.tensor([3, 0, 4, 1], dtype=torch.int32)
    zeros = torch.zeros(4, dtype=torch.int32)
    hidden = model(torch.cat(prompts), k_cache, v_cache, zeros, rows, starts, int(lengths.max()), None)
    first = model.logits(hidden[starts[1:].long() - 1])
    second = model.decode(
        torch.tensor([100, 200]),
        torch.tensor([1, 1]),
        torch.tensor([0, 0, 1, 1]),
        k_cache,
        v_cache,
        lengths,
        rows,
        None,
    )
    assert first.dtype == second.dtype == torch.float32
    return cond, hidden, first, second, k_cache, v_cache


def test_the_scripted_module_is_the_eager_one_bit_for_bit(model):
    for ours, scripted in zip(run(model), run(t3.script(model)), strict=True):
        assert torch.equal(ours, scripted)


def test_rows_do_not_depend_on_what_else_is_in_the_call(model):
    # A prefill in two parts and alone gives what it gives in one piece beside other rows.
    with torch.inference_mode():
        *_, second, k_cache, _ = run(model)
        cond = model.encode_voice(
            torch.randn(1, 256, generator=(g := torch.Generator().manual_seed(2))),
            torch.randint(6561, (1, 11), generator=g),
            0.7,
        )
        prompt = model.embed_prompt(cond, torch.tensor([255, 5, 9, 0]), False)
        keys, values = model.new_cache(1, 20)
        row, length = torch.zeros(1, dtype=torch.int32), prompt.size(0)
        for begin, end in ((0, 5), (5, length)):
            starts = torch.tensor([0, end - begin], dtype=torch.int32)
            cached = torch.tensor([begin], dtype=torch.int32)
            model(prompt[begin:end], keys, values, cached, row, starts, end - begin, None)
        torch.testing.assert_close(keys[:, 0, :length], k_cache[:, 3, :length])
        request = torch.zeros(1, dtype=torch.int64)
        cached = torch.tensor([length], dtype=torch.int32)
        logits = model.decode(torch.tensor([100]), torch.tensor([1]), request, keys, values, cached, row, None)
        torch.testing.assert_close(logits[0], second[0])


def test_the_unconditional_row_keeps_the_positions_of_the_text(model):
    cond = torch.randn(6, 32)
    tokens = torch.tensor([255, 5, 9, 0])
    with_text, without = (model.embed_prompt(cond, tokens, drop) for drop in (False, True))
    assert torch.equal(without[6:10], model.text_pos_emb.weight[:4])
    assert torch.equal(with_text[6:10], model.text_emb(tokens) + without[6:10])
    assert torch.equal(with_text[:6], cond)
    assert torch.equal(with_text[10:], without[10:])


def test_too_much_text_and_wrong_voices_get_an_error_that_says_so(model):
    for module in (model, t3.script(model)):
        with pytest.raises(Exception, match="text_tokens has 33 tokens, expected at most 32"):
            module.embed_prompt(torch.zeros(6, 32), torch.zeros(33, dtype=torch.int64), False)
        with pytest.raises(Exception, match=r"speaker_emb has shape .*\[1, 192\].*, expected \[1, 256\]"):
            module.encode_voice(torch.zeros(1, 192), torch.zeros(1, 5, dtype=torch.int64), 0.5)
        with pytest.raises(Exception, match="prompt_tokens has shape"):
            module.encode_voice(torch.zeros(1, 256), torch.zeros(1, 0, dtype=torch.int64), 0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(model, dtype):
    half = t3.load_model(t3.RandomWeights(SMALL, seed=1), SMALL, dtype)
    assert half.rotary_table.dtype == torch.float32
    logits, expected = run(half, dtype=dtype)[3], run(model)[3]
    # Roundings of a chain of some twenty operations, each of an epsilon of values of the logits' size.
    bound = 20 * torch.finfo(dtype).eps * expected.abs().max()
    assert (logits - expected).abs().max() < bound
    assert not torch.equal(logits, expected)


def test_casting_the_rotary_table_is_refused(model):
    cast = t3.load_model(t3.RandomWeights(SMALL, seed=1), SMALL, torch.float32).to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"rotary_table is torch\.bfloat16, expected float32"):
        run(cast, dtype=torch.bfloat16)


def test_an_archive_runs_as_the_module_that_it_was_made_of(model, tmp_path):
    weights = t3.RandomWeights(SMALL, seed=1)
    save_file({name: weights.read(name) for name in weights.shapes}, tmp_path / "t3.safetensors")
    summary = t3.export(tmp_path / "out.vivace", tmp_path / "t3.safetensors", dtype=torch.float32, head_dim=16)
    manifest = summary["manifest"]
    assert manifest["source"]["name"] == "t3.safetensors"
    assert manifest["model"]["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    loaded = t3.load(tmp_path / "out.vivace")
    assert loaded.manifest == manifest
    for ours, exported in zip(run(model), run(loaded), strict=True):
        assert torch.equal(ours, exported)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.vivace", "t3.safetensors"]


def test_the_manifest_says_what_the_host_needs(tiny):
    manifest = t3.verify(tiny[0])
    assert manifest == tiny[1]["manifest"]
    assert {key: manifest[key] for key in ("format", "kind", "operators", "dtype", "variant", "source")} == {
        "format": 1,
        "kind": "t3",
        "operators": 1,
        "dtype": "bfloat16",
        "variant": "english",
        "source": {"random_seed": 7},
    }
    assert manifest["model"]["num_layers"] == 4
    assert manifest["model"]["max_positions"] == 34 + 2050 + 4100
    assert manifest["text"] == {"vocab_size": 704, "start_token": 255, "stop_token": 0, "max_tokens": 2048}
    assert manifest["speech"]["stop_token"] == 6562
    assert manifest["conditioning"] == {"speaker_embed_size": 256, "prompt_tokens": 150, "length": 34, "emotion": True}
    assert manifest["alignment_heads"] == []


def test_multilingual_models_have_alignment_heads_where_they_have_the_layers():
    assert t3.preset("tiny", "multilingual").alignment_heads == ((12, 15), (13, 11), (9, 2))
    assert t3.T3Config(text_vocab_size=2454, num_layers=13).alignment_heads == ()
    assert t3.preset("real", "english").alignment_heads == ()


def test_the_same_seed_gives_the_same_digest_and_another_seed_another(tiny, tmp_path):
    again = t3.export(tmp_path / "other-name.vivace", random=True, seed=7, shape="tiny")
    other = t3.export(tmp_path / "other-seed.vivace", random=True, seed=8, shape="tiny")
    assert again["manifest"]["digest"] == tiny[1]["manifest"]["digest"]
    assert other["manifest"]["digest"] != tiny[1]["manifest"]["digest"]


def test_the_digest_follows_the_rule_of_the_format(tiny):
    import hashlib

    with zipfile.ZipFile(tiny[0]) as archive:
        records = {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}
    del records["extra/vivace.json"], records[".data/serialization_id"]
    joined = b"".join(
        name.encode() + b"\0" + hashlib.sha256(records[name]).digest() for name in sorted(records, key=str.encode)
    )
    assert records_digest(tiny[0]) == hashlib.sha256(joined).hexdigest()
    assert any(name.startswith("data/") for name in records) or any(name.startswith("constants/") for name in records)


def rewrite(source, target, change):
    """A copy of an archive whose records went through change(name, contents)."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            contents = change(name.split("/", 1)[1], old.read(name))
            if contents is not None:
                new.writestr(name, contents)
    return target


def test_a_changed_weight_code_or_name_is_noticed(tiny, tmp_path):
    def flip(contents):
        return contents[:-1] + bytes([contents[-1] ^ 1])

    assert t3.verify(rewrite(tiny[0], tmp_path / "same.vivace", lambda name, contents: contents))
    changes = [
        lambda name, contents: flip(contents) if name == "data/3" else contents,
        lambda name, contents: (
            contents + b"\n# more" if name.startswith("code/") and name.endswith(".py") else contents
        ),
        lambda name, contents: None if name == "data/4" else contents,
    ]
    for index, change in enumerate(changes):
        path = rewrite(tiny[0], tmp_path / f"{index}.vivace", change)
        with pytest.raises(t3.ArchiveError, match="is damaged: its digest is"):
            t3.load(path)


def test_damaged_and_foreign_archives_are_refused(tiny, tmp_path):
    path = tmp_path / "bad.vivace"
    contents = bytearray(tiny[0].read_bytes())
    contents[len(contents) // 2] ^= 0xFF
    path.write_bytes(contents)
    with pytest.raises(t3.ArchiveError, match="is damaged"):
        t3.verify(path)
    path.write_bytes(contents[: len(contents) // 2])
    with pytest.raises(t3.ArchiveError, match="not a whole vivace archive"):
        t3.verify(path)
    torch.save({}, path)
    with pytest.raises(t3.ArchiveError, match="has no manifest"):
        t3.verify(path)

    def newer(name, contents):
        return json.dumps({**json.loads(contents), "format": 2}) if name == "extra/vivace.json" else contents

    with pytest.raises(t3.ArchiveError, match="manifest's format is 2, expected 1"):
        t3.verify(rewrite(tiny[0], path, newer))


def test_a_fresh_process_loads_the_archive_with_the_operators_alone(tiny):
    # What a C++ program does: the operator library, then the archive; no vivace package, no t3 module.
    from vivace.library import find

    code = (
        "import sys, torch; torch.ops.load_library(sys.argv[1]); m = torch.jit.load(sys.argv[2]);"
        "c = m.encode_voice(torch.ones(1, 256), torch.arange(20)[None], 0.5); print(list(c.shape), c.dtype)"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(find()), str(tiny[0])]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert result.stdout == "[34, 128] torch.bfloat16\n"


def test_assets_of_a_directory_are_its_own(tmp_path):
    source, out = tmp_path / "chatterbox", tmp_path / "assets"
    source.mkdir()
    weights = t3.RandomWeights(SMALL, seed=1)
    save_file({name: weights.read(name) for name in weights.shapes}, source / "t3_cfg.safetensors")
    (source / "tokenizer.json").write_text('{"mine": true}')
    voice = t3.write_random_voice(tmp_path / "voice.safetensors", seed=3)
    conds = {
        "t3": {name.removeprefix("t3."): tensor for name, tensor in voice.items()},
        "gen": {"embedding": torch.ones(2)},
    }
    torch.save(conds, source / "conds.pt")
    summary = t3.export(tmp_path / "t3.vivace", source, dtype="fp16", head_dim=16, assets=out)
    assert summary["assets"] == [str(out / "tokenizer.json"), str(out / "voice.safetensors")]
    assert (out / "tokenizer.json").read_text() == '{"mine": true}'
    assert torch.equal(load_file(out / "voice.safetensors")["gen.embedding"], torch.ones(2))
    with pytest.raises(t3.CheckpointError, match=r"has no tokenizer and no conds\.pt for the assets"):
        t3.export(tmp_path / "t3.vivace", source / "t3_cfg.safetensors", head_dim=16, assets=out)


def test_wrong_arguments_say_what_was_expected(tmp_path):
    with pytest.raises(ValueError, match="expected either a checkpoint or random=True"):
        t3.export(tmp_path / "t3.vivace")
    with pytest.raises(ValueError, match="dtype is int8, expected one of bf16"):
        t3.export(tmp_path / "t3.vivace", random=True, dtype="int8")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        t3.export(tmp_path / "nowhere" / "t3.vivace", random=True)
    with pytest.raises(ValueError, match="shape is 'huge'"):
        t3.export(tmp_path / "t3.vivace", random=True, shape="huge")
    assert not list(tmp_path.iterdir())
