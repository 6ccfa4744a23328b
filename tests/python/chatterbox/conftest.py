import pytest


@pytest.fixture(params=["engine", "operators", "sdpa", "eager"])
def loop(request, monkeypatch):
    """Each loop in turn, with the options of accelerate() that give it."""
    if request.param == "operators":
        from vivace.chatterbox import choice

        monkeypatch.setattr(choice, "_loop", lambda: ("operators", "the test wants the loop in Python"))
    if request.param == "engine":
        needs_engine()
    return {"implementation": request.param if request.param in ("sdpa", "eager") else "auto"}


def needs_engine():
    from vivace import extension

    try:
        extension.load()
    except ImportError as error:
        pytest.skip(f"the engine does not load: {error}")


@pytest.fixture
def engine():
    needs_engine()
