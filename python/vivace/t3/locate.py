"""The files behind what a user calls a checkpoint: a file, a directory of Chatterbox's files, or a Hub id."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vivace.t3.weights import CheckpointError

#: Chatterbox's names of T3, newest use first, and of the tokenizer, for each variant.
T3_FILES = {
    "english": ("t3_cfg.safetensors",),
    "multilingual": ("t3_mtl23ls_v2.safetensors", "t3_mtl23ls_v3.safetensors", "t3_23lang.safetensors"),
}
TOKENIZER_FILES = {
    "english": ("tokenizer.json",),
    "multilingual": ("grapheme_mtl_merged_expanded_v1.json", "mtl_tokenizer.json"),
}
VOICE_FILE = "conds.pt"


@dataclass(frozen=True)
class CheckpointFiles:
    """model is always there; the others only where a directory or a Hub repository has them."""

    model: Path
    tokenizer: Path | None = None
    voice: Path | None = None


def locate(checkpoint: str | Path, variant: str | None = None, assets: bool = False) -> CheckpointFiles:
    """Finds, and from the Hub downloads, the files of a checkpoint.

    Args:
        checkpoint: a file; a directory; or owner/name on the Hugging Face Hub, with ":file" for one of several models.
        variant: "english" or "multilingual" where a directory or repository has both; None: english if there.
        assets: also look for the tokenizer and the voice.

    Raises:
        FileNotFoundError: no such file, and it does not look like a Hub id.
        CheckpointError: the directory or repository has no T3, or huggingface_hub is missing.
    """
    path = Path(checkpoint)
    if path.is_file():
        return CheckpointFiles(path)
    if path.is_dir():
        return _choose(str(path), variant, assets, lambda name: path / name if (path / name).is_file() else None)
    hub_id = re.fullmatch(r"([\w.-]+/[\w.-]+?)(?::([\w./-]+))?", str(checkpoint))
    if hub_id is None or hub_id[1].endswith((".safetensors", ".pt", ".pth", ".bin")):
        raise FileNotFoundError(
            f"vivace: checkpoint {checkpoint} is neither a file, nor a directory, nor a Hub id (owner/name)"
        )
    repository, file = hub_id.groups()
    fetch = _hub(repository)
    if file is None:
        return _choose(repository, variant, assets, fetch)
    model = fetch(file)
    if model is None:
        raise CheckpointError(f"vivace: {repository} on the Hub has no file {file}")
    variant = variant or ("english" if file in T3_FILES["english"] else "multilingual")
    return CheckpointFiles(model, *(_assets(variant, fetch) if assets else ()))


def _choose(where: str, variant: str | None, assets: bool, find: Callable[[str], Path | None]) -> CheckpointFiles:
    variants = [variant] if variant else list(T3_FILES)
    for candidate in variants:
        for name in T3_FILES[candidate]:
            model = find(name)
            if model is not None:
                return CheckpointFiles(model, *(_assets(candidate, find) if assets else ()))
    names = ", ".join(name for candidate in variants for name in T3_FILES[candidate])
    raise CheckpointError(f"vivace: {where} has no T3 checkpoint (looked for {names})")


def _assets(variant: str, find: Callable[[str], Path | None]) -> tuple[Path | None, Path | None]:
    tokenizer = next((path for name in TOKENIZER_FILES[variant] if (path := find(name)) is not None), None)
    return tokenizer, find(VOICE_FILE)


def _hub(repository: str) -> Callable[[str], Path | None]:
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError as error:
        raise CheckpointError(
            f"vivace: checkpoint {repository} is not a local file or directory, and downloading it from the Hugging "
            'Face Hub needs huggingface_hub: pip install "vivace[hub]"'
        ) from error

    def fetch(name: str) -> Path | None:
        try:
            return Path(hf_hub_download(repository, name))
        except EntryNotFoundError as error:
            if not isinstance(error, LocalEntryNotFoundError):  # that one means: no network, and not in the cache
                return None
            raise CheckpointError(f"vivace: cannot get {name} of {repository} from the Hub: {error}") from error
        except Exception as error:  # no such repository, no access, ...: each has its own class
            raise CheckpointError(f"vivace: cannot get {name} of {repository} from the Hub: {error}") from error

    return fetch
