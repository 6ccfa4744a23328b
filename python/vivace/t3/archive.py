"""A .vivace file: a TorchScript archive with a manifest, and a digest that covers everything else in it."""

import hashlib
import json
import os
import tempfile
import warnings
import zipfile
from pathlib import Path

import torch

from vivace.t3.manifest import FORMAT, MANIFEST_NAME, OPERATORS

#: Not covered by the digest: the manifest holds it, and torch derives the id from more than the contents.
UNCOVERED = (f"extra/{MANIFEST_NAME}", ".data/serialization_id")


class ArchiveError(ValueError):
    """A file that is not a vivace archive, or not the one that was written."""


def records_digest(path: str | Path) -> str:
    """SHA-256 over the archive's records in byte order of their names: name, a zero byte, SHA-256 of the contents.

    A record's name is its path below the archive's top folder.
    """
    digest = hashlib.sha256()
    with zipfile.ZipFile(path) as archive:
        records = {info.filename.partition("/")[2].encode(): info for info in archive.infolist()}
        for name in sorted(records):
            if name.decode() in UNCOVERED:
                continue
            record = hashlib.sha256()
            with archive.open(records[name]) as file:
                while chunk := file.read(1 << 22):
                    record.update(chunk)
            digest.update(name + b"\0" + record.digest())
    return digest.hexdigest()


def read_manifest(path: str | Path) -> dict:
    """The manifest of an archive of this format; the digest is not checked (verify does).

    Raises:
        ArchiveError: the file is no archive, has no manifest, or is of another format.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.partition("/")[2] == UNCOVERED[0]]
            if not names:
                raise ArchiveError(
                    f"vivace: {path} has no manifest ({MANIFEST_NAME}): it was not written by vivace export"
                )
            manifest = json.loads(archive.read(names[0]))
    except (zipfile.BadZipFile, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArchiveError(f"vivace: {path} is not a whole vivace archive ({error})") from error
    for key, expected in (("format", FORMAT), ("kind", "t3"), ("operators", OPERATORS)):
        found = manifest.get(key) if isinstance(manifest, dict) else None
        if found != expected:
            raise ArchiveError(f"vivace: {path}: manifest's {key} is {found!r}, expected {expected!r}")
    return manifest


def verify(path: str | Path) -> dict:
    """The manifest, after the digest was found right.

    Raises:
        ArchiveError: as read_manifest, or the contents are not those that the manifest's digest was made of.
    """
    manifest = read_manifest(path)
    expected = manifest.get("digest", {}).get("records")
    try:
        found = records_digest(path)
    except zipfile.BadZipFile as error:  # a record's checksum
        raise ArchiveError(f"vivace: {path} is damaged ({error})") from error
    if found != expected:
        raise ArchiveError(f"vivace: {path} is damaged: its digest is {found}, the manifest says {expected}")
    return manifest


def save(module: torch.jit.ScriptModule, manifest: dict, path: str | Path) -> dict:
    """Writes the archive and returns the manifest with its digest. The file appears whole or not at all."""
    path = Path(path)
    # Under its own name in a folder beside it: torch names the archive's top folder after the file.
    with tempfile.TemporaryDirectory(prefix=".vivace-", dir=path.parent) as folder:
        written = Path(folder) / path.name
        _jit_save(module, manifest, written)
        digest = {"algorithm": "sha256", "records": records_digest(written)}
        manifest = {**manifest, "digest": digest}
        _jit_save(module, manifest, written)
        verify(written)
        os.replace(written, path)
    return manifest


def load(path: str | Path, device: str | torch.device = "cpu") -> torch.jit.ScriptModule:
    """The verified archive as a module on `device`; its `manifest` attribute is the manifest.

    Raises:
        ArchiveError: as verify.
    """
    from vivace.library import load as load_operators

    load_operators()
    manifest = verify(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        module = torch.jit.load(str(path), map_location=device)
    module.manifest = manifest
    return module.eval()


def write(module: torch.jit.ScriptModule, manifest: dict, path: str | Path) -> None:
    """Writes an archive for a reader that reads it at once and does not verify it: its digest is zeros."""
    _jit_save(module, {**manifest, "digest": {"algorithm": "sha256", "records": "0" * 64}}, Path(path))


def _jit_save(module: torch.jit.ScriptModule, manifest: dict, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(module, str(path), _extra_files={MANIFEST_NAME: json.dumps(manifest, indent=1)})
