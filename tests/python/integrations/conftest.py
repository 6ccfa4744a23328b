"""transformers with vivace registered, and put back afterwards."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

pytest.importorskip("transformers", reason="needs transformers")


@pytest.fixture
def registered():
    from vivace import policy
    from vivace import transformers as ours

    policy.forget()
    ours.register()
    yield ours
    ours.unregister()


@pytest.fixture
def pretend_gpu(monkeypatch):
    """A machine whose GPU allows our kernels, as far as the policy knows; tensors stay on the CPU."""
    from vivace import policy

    policy.forget()
    monkeypatch.setattr(policy, "_why_not", lambda device, dtype, head_dim: None)
    monkeypatch.setattr(policy, "_what_allows_it", lambda device, dtype: "a GPU that the test pretends")
    yield
    policy.forget()
