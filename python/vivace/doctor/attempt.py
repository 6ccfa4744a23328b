"""Looking at what may be broken."""

from collections.abc import Callable
from typing import Any


def attempt(look: Callable[[], Any]) -> Any:
    """look()'s answer, or {"error": why not}. A broken library may raise anything, SystemExit too."""
    try:
        return look()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return {"error": first_line(error)}


def first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def failed(answer: Any) -> bool:
    return isinstance(answer, dict) and "error" in answer
