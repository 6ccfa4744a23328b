"""Voices: conds.pt to safetensors."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vivace import t3


def conds():
    return {
        "t3": {
            "speaker_emb": torch.rand(1, 256, dtype=torch.float64),
            "clap_emb": None,
            "cond_prompt_speech_tokens": torch.arange(150, dtype=torch.int32)[None],
            "cond_prompt_speech_emb": None,
            "emotion_adv": 0.5 * torch.ones(1, 1, 1),
        },
        "gen": {
            "prompt_token": torch.arange(250)[None],
            "prompt_token_len": torch.tensor([250]),
            "prompt_feat": torch.rand(1, 500, 80),
            "prompt_feat_len": None,
            "embedding": torch.rand(1, 192),
        },
    }


def test_conds_keep_what_t3_and_the_vocoder_need(tmp_path):
    original = conds()
    torch.save(original, tmp_path / "conds.pt")
    t3.convert_voice(tmp_path / "conds.pt", tmp_path / "voice.safetensors")
    voice = load_file(tmp_path / "voice.safetensors")
    assert set(voice) == {
        "t3.speaker_emb",
        "t3.cond_prompt_speech_tokens",
        "t3.emotion_adv",
        "gen.prompt_token",
        "gen.prompt_token_len",
        "gen.prompt_feat",
        "gen.embedding",
    }
    assert torch.equal(voice["t3.speaker_emb"], original["t3"]["speaker_emb"].float())
    assert torch.equal(voice["t3.cond_prompt_speech_tokens"], torch.arange(150)[None])
    assert voice["t3.cond_prompt_speech_tokens"].dtype == torch.int64
    assert torch.equal(voice["gen.prompt_feat"], original["gen"]["prompt_feat"])
    with safe_open(tmp_path / "voice.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "vivace-voice", "version": "1"}


def test_a_voice_has_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "other").touch()
    t3.write_random_voice(tmp_path / "voice.safetensors")
    assert (tmp_path / "voice.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "voice.safetensors"]


def test_a_converted_voice_converts_to_itself_even_in_place(tmp_path):
    torch.save(conds(), tmp_path / "conds.pt")
    voice = tmp_path / "voice.safetensors"
    t3.convert_voice(tmp_path / "conds.pt", voice)
    before = load_file(voice)
    t3.convert_voice(voice, voice)
    after = load_file(voice)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_random_voices_come_from_their_seed(tmp_path):
    first, again, other = (t3.write_random_voice(tmp_path / "voice.safetensors", seed) for seed in (1, 1, 2))
    assert torch.equal(first["t3.speaker_emb"], again["t3.speaker_emb"])
    assert not torch.equal(first["t3.speaker_emb"], other["t3.speaker_emb"])
    assert first["t3.speaker_emb"].norm().item() == pytest.approx(1.0, abs=1e-5)
    assert first["t3.cond_prompt_speech_tokens"].shape == (1, 150)
    assert int(first["t3.cond_prompt_speech_tokens"].max()) < 6561


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("speaker_emb", torch.zeros(1, 192), r"t3\.speaker_emb is \[1, 192\] torch.float32, expected \[1, 256\]"),
        ("speaker_emb", None, r"lacks t3\.speaker_emb"),
        ("cond_prompt_speech_tokens", torch.zeros(1, 5), "expected .* of an integer type"),
        ("cond_prompt_speech_tokens", torch.zeros(2, 5, dtype=torch.int64), r"is \[2, 5\]"),
        ("cond_prompt_speech_tokens", torch.tensor([[5, 9000]]), "tokens from 5 to 9000, expected 0 to 8193"),
        ("emotion_adv", torch.zeros(2), r"t3\.emotion_adv is \[2\]"),
    ],
)
def test_wrong_tensors_are_named(tmp_path, name, value, message):
    voice = conds()
    voice["t3"][name] = value
    torch.save(voice, tmp_path / "conds.pt")
    with pytest.raises(t3.CheckpointError, match=message):
        t3.convert_voice(tmp_path / "conds.pt", tmp_path / "voice.safetensors")
    assert not (tmp_path / "voice.safetensors").exists()


def test_damaged_and_foreign_files_are_refused(tmp_path):
    path, output = tmp_path / "conds.pt", tmp_path / "voice.safetensors"
    torch.save(conds(), path)
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(t3.CheckpointError, match="not a whole torch file"):
        t3.convert_voice(path, output)
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    with pytest.raises(t3.CheckpointError, match="is a TorchScript archive, expected Chatterbox's conds"):
        t3.convert_voice(path, output)
    torch.save({"state": 1}, path)
    with pytest.raises(t3.CheckpointError, match="has no 't3' conditionals"):
        t3.convert_voice(path, output)
    save_file({"t3.speaker_emb": torch.zeros(1, 256)}, path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(t3.CheckpointError, match="not a whole safetensors file"):
        t3.convert_voice(path, output)
    path.write_bytes(b"RIFF....WAVE")
    with pytest.raises(t3.CheckpointError, match="neither a safetensors nor a torch file"):
        t3.convert_voice(path, output)
