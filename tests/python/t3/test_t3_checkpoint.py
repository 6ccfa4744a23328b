"""Checkpoints: right ones load, wrong ones say what is wrong."""

import sys
import types
import warnings

import pytest
import torch
from safetensors.torch import save_file

from vivace import t3
from vivace.t3.layout import checkpoint_shapes, infer_config, layout
from vivace.t3.locate import locate

CONFIG = t3.T3Config(
    hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=64, perceiver_queries=4
)


@pytest.fixture
def state():
    """A small model's state dict, all of its 38 tensors."""
    weights = t3.RandomWeights(CONFIG, seed=1)
    return {name: weights.read(name) for name in weights.shapes}


def save(folder, state, name="t3_cfg.safetensors"):
    path = folder / name
    save_file(state, path)
    return path


def config_of(path):
    return t3.checkpoint_config(t3.open_weights(path))


def test_the_real_checkpoints_have_292_tensors_and_the_published_size():
    for variant, parameters in (("english", 532_405_248), ("multilingual", 535_989_248)):
        config = t3.preset("real", variant)
        shapes = checkpoint_shapes(config) | {
            "tfmr.embed_tokens.weight": (8, config.hidden_size),
            "text_head.weight": (config.text_vocab_size, config.hidden_size),
        }
        assert len(shapes) == 292
        assert sum(torch.Size(shape).numel() for shape in shapes.values()) == parameters


def test_the_configuration_is_read_from_the_shapes():
    for config in (CONFIG, t3.preset("real"), t3.preset("tiny", "multilingual")):
        inferred = infer_config(checkpoint_shapes(config))
        assert inferred == config
    assert infer_config(checkpoint_shapes(t3.T3Config(head_dim=128, num_heads=8, num_kv_heads=2)), 128).num_heads == 8


def test_every_parameter_of_the_module_is_laid_out_once():
    entries = layout(CONFIG)
    parameters = {name: tuple(parameter.shape) for name, parameter in t3.T3(CONFIG).named_parameters()}
    assert {entry.parameter: entry.shape for entry in entries} == parameters
    assert len(entries) == len(parameters)


def test_safetensors_and_torch_files_give_the_same_model(tmp_path, state):
    paths = [save(tmp_path, state), tmp_path / "plain.pt", tmp_path / "wrapped.pt", tmp_path / "old.pt"]
    torch.save(state, paths[1])
    torch.save({"model": [state]}, paths[2])
    torch.save(state, paths[3], _use_new_zipfile_serialization=False)
    models = [t3.load_model(t3.open_weights(path), CONFIG, torch.float32).state_dict() for path in paths]
    for model in models[1:]:
        for name, tensor in models[0].items():
            assert torch.equal(tensor, model[name]), name
    qkv = torch.cat([state[f"tfmr.layers.1.self_attn.{name}_proj.weight"] for name in "qkv"])
    assert torch.equal(models[0]["backbone.layers.1.qkv.weight"], qkv)


def test_unused_tensors_may_be_there_or_not(tmp_path, state):
    path = save(
        tmp_path, state | {"tfmr.embed_tokens.weight": torch.zeros(8, 32), "text_head.weight": torch.zeros(704, 32)}
    )
    assert config_of(path) == CONFIG


def test_missing_unexpected_and_misshapen_tensors_are_all_named(tmp_path, state):
    del state["tfmr.layers.0.mlp.up_proj.weight"], state["speech_pos_emb.emb.weight"]
    state["lora.weight"] = torch.zeros(1)
    state["tfmr.layers.1.self_attn.o_proj.weight"] = torch.zeros(32, 5)
    state["text_head.weight"] = torch.zeros(1, 32)
    with pytest.raises(t3.CheckpointError) as error:
        config_of(save(tmp_path, state))
    message = str(error.value)
    assert "2 missing: speech_pos_emb.emb.weight, tfmr.layers.0.mlp.up_proj.weight" in message
    assert "1 unexpected: lora.weight" in message
    assert "tfmr.layers.1.self_attn.o_proj.weight [32, 5], expected [32, 128]" in message
    assert "text_head.weight [1, 32], expected [704, 32]" in message


def test_a_long_list_of_missing_tensors_is_cut(tmp_path):
    with pytest.raises(t3.CheckpointError, match=r"missing: .* and \d+ more"):
        config_of(save(tmp_path, {"tfmr.norm.weight": torch.ones(32)}))


def test_a_missing_layer_is_missing_tensors(tmp_path, state):
    for name in [name for name in state if name.startswith("tfmr.layers.0.")]:
        del state[name]
    with pytest.raises(t3.CheckpointError, match=r"9 missing: tfmr\.layers\.0\.input_layernorm\.weight"):
        config_of(save(tmp_path, state))


def test_a_truncated_safetensors_file_names_the_tensors_that_are_cut_off(tmp_path, state):
    path = save(tmp_path, state)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(t3.CheckpointError, match=rf"has {len(whole) - 20} of {len(whole)} bytes; cut off: \w+"):
        t3.open_weights(path)
    path.write_bytes(whole[:200])
    with pytest.raises(t3.CheckpointError, match=r"the header has \d+ bytes, the file 200"):
        t3.open_weights(path)


def test_damaged_and_foreign_files_are_refused(tmp_path, state):
    path = tmp_path / "t3.pt"
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(t3.CheckpointError, match="is not a whole torch file"):
        t3.open_weights(path)
    for contents in (b"", b"PK", b"not a checkpoint at all"):
        path.write_bytes(contents)
        with pytest.raises(t3.CheckpointError, match=r"not a whole torch file|neither a safetensors nor a torch file"):
            t3.open_weights(path)
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    with warnings.catch_warnings(), pytest.raises(t3.CheckpointError, match="is a TorchScript archive") as refused:
        warnings.simplefilter("error")
        t3.open_weights(path)
    assert "weights_only" not in str(refused.value)
    torch.save([1, 2], path)
    with pytest.raises(t3.CheckpointError, match="no state dict"):
        t3.open_weights(path)


def test_a_torch_file_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    torch.save({"tfmr.norm.weight": Evil()}, tmp_path / "t3.pt")
    with pytest.raises(t3.CheckpointError):
        t3.open_weights(tmp_path / "t3.pt")
    assert not (tmp_path / "owned").exists()


def test_turbo_and_quantised_checkpoints_are_refused_by_name(tmp_path, state):
    with pytest.raises(t3.CheckpointError, match="GPT-2 T3"):
        config_of(save(tmp_path, {"tfmr.h.0.ln_1.weight": torch.ones(4)}))
    state["speech_head.weight"] = state["speech_head.weight"].to(torch.int8)
    with pytest.raises(t3.CheckpointError, match=r"speech_head\.weight is torch\.int8, expected a floating type"):
        t3.load_model(t3.open_weights(save(tmp_path, state)), CONFIG, torch.float32)


def test_a_directory_gives_the_model_of_the_variant_and_its_assets(tmp_path):
    for name in ("t3_cfg.safetensors", "t3_mtl23ls_v2.safetensors", "tokenizer.json", "mtl_tokenizer.json", "conds.pt"):
        (tmp_path / name).write_bytes(b"")
    assert locate(tmp_path).model.name == "t3_cfg.safetensors"
    files = locate(tmp_path, "multilingual", assets=True)
    assert [files.model.name, files.tokenizer.name, files.voice.name] == [
        "t3_mtl23ls_v2.safetensors",
        "mtl_tokenizer.json",
        "conds.pt",
    ]
    (tmp_path / "t3_cfg.safetensors").unlink()
    assert locate(tmp_path).model.name == "t3_mtl23ls_v2.safetensors"
    with pytest.raises(t3.CheckpointError, match=r"no T3 checkpoint \(looked for t3_cfg\.safetensors\)"):
        locate(tmp_path, "english")


def test_a_hub_id_is_downloaded_file_by_file(tmp_path, monkeypatch):
    from vivace.t3 import locate as module

    class EntryNotFoundError(Exception):
        pass

    asked = []

    def hf_hub_download(repository, name):
        asked.append((repository, name))
        if name == "t3_cfg.safetensors":
            raise EntryNotFoundError
        return str(tmp_path / name)

    hub, errors = types.ModuleType("huggingface_hub"), types.ModuleType("huggingface_hub.errors")
    hub.hf_hub_download = hf_hub_download
    errors.EntryNotFoundError = EntryNotFoundError
    errors.LocalEntryNotFoundError = type("LocalEntryNotFoundError", (EntryNotFoundError,), {})
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    files = module.locate("some/chatterbox")
    assert files.model == tmp_path / "t3_mtl23ls_v2.safetensors"
    assert asked == [("some/chatterbox", "t3_cfg.safetensors"), ("some/chatterbox", "t3_mtl23ls_v2.safetensors")]
    assert module.locate("some/chatterbox:t3_mtl23ls_v3.safetensors").model.name == "t3_mtl23ls_v3.safetensors"


def test_without_huggingface_hub_a_hub_id_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(t3.CheckpointError, match=r'pip install "vivace\[hub\]"'):
        locate("ResembleAI/chatterbox")


def test_a_missing_file_is_not_taken_for_a_hub_id():
    for name in ("folder/t3_cfg.safetensors", "/nowhere/t3", "t3"):
        with pytest.raises(FileNotFoundError, match="neither a file, nor a directory, nor a Hub id"):
            locate(name)


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="num_heads is 3, expected a multiple of num_kv_heads"):
        t3.T3Config(num_heads=3, num_kv_heads=2)
    with pytest.raises(ValueError, match="num_layers is 0"):
        t3.T3Config(num_layers=0)
    with pytest.raises(ValueError, match="hidden_size is 30, expected a multiple of perceiver_heads"):
        t3.T3Config(hidden_size=30)
