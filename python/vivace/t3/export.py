"""From a checkpoint to a .vivace archive that the C++ host runs."""

import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from vivace.t3 import archive
from vivace.t3.checkpoint import checkpoint_config, load_model
from vivace.t3.config import preset
from vivace.t3.locate import CheckpointFiles, locate
from vivace.t3.manifest import DTYPES, dtype_name, make_manifest
from vivace.t3.model import T3
from vivace.t3.tokenizer import write_demo_tokenizer
from vivace.t3.voice import convert_voice, write_random_voice
from vivace.t3.weights import CheckpointError, RandomWeights, Weights, open_weights


def export(
    output: str | Path,
    checkpoint: str | Path | None = None,
    *,
    dtype: str | torch.dtype = "bf16",
    variant: str | None = None,
    random: bool = False,
    seed: int = 0,
    shape: str = "real",
    head_dim: int | None = None,
    assets: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict:
    """Writes a T3 model as a .vivace archive.

    Args:
        output: the archive.
        checkpoint: a .safetensors or torch file with Chatterbox's tensor names, a directory of Chatterbox's files, or
            a Hub id "owner/name" or "owner/name:file" (needs the extra `hub`).
        dtype: of weights and activations: "bf16", "fp16", "fp32" or torch's. Logits are always float32.
        variant: "english" or "multilingual", where there is a choice; None: what the checkpoint is, else english.
        random: instead of a checkpoint, a fresh model of `shape` ("real" or "tiny") from `seed`.
        head_dim: of a checkpoint that does not have Chatterbox's 64.
        assets: folder to write tokenizer.json and voice.safetensors to: the checkpoint directory's or repository's own,
            or, for a random model, a demo tokenizer and voice.
        progress: called with a line at each stage.

    Returns:
        {"path", "bytes", "seconds", "manifest", "assets"}.

    Raises:
        CheckpointError: the checkpoint is damaged or not a T3 model; names the tensors.
        FileNotFoundError, ValueError: an argument is wrong.
    """
    began = time.monotonic()
    say = progress or (lambda line: None)
    output = Path(output)
    name = dtype_name(dtype)
    if random == (checkpoint is not None):
        raise ValueError("vivace.t3.export: expected either a checkpoint or random=True")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"vivace.t3.export: there is no folder {output.parent} to write {output.name} to")

    files: CheckpointFiles | None = None
    weights: Weights
    if random:
        config = preset(shape, variant or "english")
        weights = RandomWeights(config, seed)
        say(f"a random {config.variant} T3, seed {seed}")
    else:
        files = locate(checkpoint, variant, assets is not None)
        if assets is not None and files.tokenizer is None and files.voice is None:
            raise CheckpointError(
                f"vivace.t3.export: {checkpoint} has no tokenizer and no conds.pt for the assets; "
                "give a directory or a Hub id"
            )
        say(f"reading {files.model}")
        weights = open_weights(files.model)
        config = checkpoint_config(weights, head_dim)
        if variant is not None and variant != config.variant:
            raise CheckpointError(f"vivace: {files.model} is a {config.variant} T3, expected {variant}")

    model = load_model(weights, config, DTYPES[name])
    parameters = sum(parameter.numel() for parameter in model.parameters())
    say(f"{config.num_layers} layers of {config.hidden_size}, {parameters / 1e6:,.1f} M parameters, {name}")
    manifest = archive.save(script(model), make_manifest(config, name, weights.source, parameters), output)
    written = write_assets(Path(assets), files, seed) if assets is not None else []
    size, seconds = output.stat().st_size, time.monotonic() - began
    say(f"wrote {output}, {size / 1e6:,.1f} MB, in {seconds:.1f} s" + "".join(f"; {path}" for path in written))
    return {
        "path": str(output),
        "bytes": size,
        "seconds": round(seconds, 3),
        "manifest": manifest,
        "assets": [str(path) for path in written],
    }


def script(model: T3) -> torch.jit.ScriptModule:
    """The module in TorchScript, its operators loaded."""
    from vivace.library import load as load_operators

    load_operators()
    with warnings.catch_warnings():
        # TorchScript is deprecated in favour of torch.export; it is what a C++ host can call method by method.
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(model)


def write_assets(folder: Path, files: CheckpointFiles | None, seed: int) -> list[Path]:
    """tokenizer.json and voice.safetensors beside a model; returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, voice = folder / "tokenizer.json", folder / "voice.safetensors"
    if files is None:
        write_demo_tokenizer(tokenizer)
        write_random_voice(voice, seed)
        return [tokenizer, voice]
    written = []
    if files.tokenizer is not None:
        if files.tokenizer.resolve() != tokenizer.resolve():
            shutil.copyfile(files.tokenizer, tokenizer)
        written.append(tokenizer)
    if files.voice is not None:
        convert_voice(files.voice, voice)
        written.append(voice)
    return written
