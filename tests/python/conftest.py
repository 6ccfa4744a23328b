"""Shared by all Python tests: the device fixture, a seed for each test, and where the operator library is."""

import faulthandler
import importlib.util
import json
import os
import sys
import zlib
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads of several workers would starve each other

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "fixtures")]  # `reference`, `chatterbox_t3`
if importlib.util.find_spec("vivace") is None:
    sys.path.insert(0, str(ROOT / "python"))

import pytest  # noqa: E402
import torch  # noqa: E402

HANG_SECONDS = float(os.environ.get("VIVACE_TEST_TIMEOUT", "0"))  # a test that takes longer ends the process; 0: never


def why_no_gpu():
    """Why tests marked gpu cannot run here, or None."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    import vivace.ops  # noqa: F401

    if not json.loads(torch.ops.vivace.build_info()).get("cuda"):
        return "the operator library was built without CUDA"
    return None


def why_no_chatterbox():
    """Why tests marked chatterbox cannot run here, or None."""
    if importlib.util.find_spec("chatterbox") is None:
        return "needs chatterbox-tts 0.1.7: .ci/setup test installs it"
    return None


def pytest_collection_modifyitems(items):
    for marker, look in (("gpu", why_no_gpu), ("chatterbox", why_no_chatterbox)):
        marked = [item for item in items if item.get_closest_marker(marker)]
        reason = look() if marked else None
        if reason is not None:
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


def seed_of(item):
    """$VIVACE_TEST_SEED, or one that follows from the test's name."""
    return int(os.environ.get("VIVACE_TEST_SEED", zlib.crc32(item.nodeid.encode())))


@pytest.fixture(autouse=True)
def seed(request):
    """Seeds torch; the value is in the failure message."""
    value = seed_of(request.node)
    torch.manual_seed(value)
    return value


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    if not report.failed:
        return
    report.sections.append(("seed", f"VIVACE_TEST_SEED={seed_of(item)}"))
    if "gpu" in item.keywords:
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:  # sticky: every later test of this process would fail for it
            item.session.shouldstop = f"the CUDA context was lost in {item.nodeid}: {error}"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item):
    if HANG_SECONDS > 0:
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
    yield
    if HANG_SECONDS > 0:
        faulthandler.cancel_dump_traceback_later()
