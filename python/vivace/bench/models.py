"""The models of `vivace bench generate --models`: archives as they are, checkpoints exported, with their assets."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Model:
    """An archive and what a request to it needs."""

    name: str
    archive: Path
    tokenizer: Path
    voice: Path
    manifest: dict


def prepare(
    sources: list[str], folder: Path, shape: str, dtype: str, seed: int, files: dict[str, Path | None]
) -> tuple[list[Model], dict[str, str]]:
    """The models of ``sources``, or a random one; and why the others are not among them.

    Args:
        sources: archives or checkpoints.
        folder: for what has to be made.
        shape: of the random model.
        dtype: that a checkpoint is exported in.
        files: "tokenizer" and "voice" for all of them, where given.
    """
    from vivace import t3

    assets = folder / "random"
    assets.mkdir()
    random = assets / "random.vivace"
    models, failed = [], {}
    if not sources:
        t3.export(random, random=True, seed=seed, shape=shape, dtype=dtype, assets=assets)
    names = unique([Path(source).name for source in sources])
    for name, source in zip(names, sources, strict=True) if sources else [("random", str(random))]:
        try:
            models.append(one(name, Path(source), folder, assets, dtype, files, seed))
        except Exception as error:  # any file may be given
            lines = str(error).strip().splitlines()
            failed[name] = lines[0][:200] if lines else type(error).__name__
    return models, failed


def one(name: str, source: Path, folder: Path, assets: Path, dtype: str, files: dict, seed: int) -> Model:
    from vivace import t3
    from vivace.t3 import archive, tokenizer, voice

    path = source
    if not is_archive(source):
        path = folder / f"{name}.vivace"
        t3.export(path, str(source), dtype=dtype)
    manifest = archive.read_manifest(path)
    if manifest["variant"] != "english":
        raise ValueError("the model is multilingual: its texts are tokenized by Chatterbox's Python package")
    beside = source if source.is_dir() else source.parent
    found = {}
    for kind, file in (("tokenizer", "tokenizer.json"), ("voice", "voice.safetensors")):
        found[kind] = next(
            (p for p in (files[kind], beside / file, assets / file) if p is not None and p.is_file()), None
        )
    if found["tokenizer"] is None:
        found["tokenizer"] = assets / "tokenizer.json"
        tokenizer.write_demo_tokenizer(found["tokenizer"])
    if found["voice"] is None:
        found["voice"] = assets / "voice.safetensors"
        voice.write_random_voice(found["voice"], seed)
    return Model(name, path, found["tokenizer"], found["voice"], manifest)


def is_archive(path: Path) -> bool:
    from vivace.t3 import archive

    try:
        archive.read_manifest(path)
    except (archive.ArchiveError, OSError):
        if path.suffix == ".vivace":
            raise
        return False
    return True


def unique(names: list[str]) -> list[str]:
    """Names that were given twice get their number."""
    return [
        name if names.count(name) == 1 else f"{name} ({names[: i + 1].count(name)})" for i, name in enumerate(names)
    ]
