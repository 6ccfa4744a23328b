import os
import subprocess
from types import SimpleNamespace

import pytest
from programs import built


@pytest.fixture(scope="session")
def executable():
    """The C++ executable: the installed package's, else the build's."""
    from vivace import cli

    path = cli.find_executable() or built("bin/vivace")
    if path is None:
        pytest.skip("the vivace executable is not built")
    return path


@pytest.fixture(scope="session")
def assets(tmp_path_factory):
    """A tiny random model with a tokenizer and a voice."""
    from vivace import t3

    folder = tmp_path_factory.mktemp("assets")
    model = folder / "t3.vivace"
    t3.export(model, random=True, seed=3, shape="tiny", dtype="fp32", assets=folder)
    return SimpleNamespace(model=model, tokenizer=folder / "tokenizer.json", voice=folder / "voice.safetensors")


@pytest.fixture
def vivace(executable):
    """Runs the executable: vivace("generate", ..., input="...")."""

    def run(*arguments, input="", env=None):
        return subprocess.run(
            [str(executable), *map(str, arguments)],
            input=input,
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "VIVACE_DEVICE": "cpu", **(env or {})},
        )

    return run


@pytest.fixture
def generate(vivace, assets):
    """Runs `vivace generate` with the model, tokenizer and voice of `assets`."""

    def run(*arguments, **options):
        files = ("--model", assets.model, "--tokenizer", assets.tokenizer, "--voice", assets.voice)
        return vivace("generate", *files, *arguments, **options)

    return run
