"""An accelerated T3: what stands in for its inference()."""

import contextlib
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from vivace.chatterbox.choice import Choice
from vivace.chatterbox.errors import OUT_OF_MEMORY, RESTORED, memory_error
from vivace.chatterbox.parking import Parking
from vivace.chatterbox.request import Outcome, Progress, Request, TokenCallback, request_of
from vivace.patches import Patches

#: Name of the session among the attributes of an accelerated T3.
ATTRIBUTE = "_vivace_session"


class Captured(BaseException):
    """Ends a pipeline's generate() where it has called T3.inference. No `except Exception` of others catches it."""


class Capture:
    """Within it, T3.inference keeps its arguments and raises Captured."""

    arguments: dict[str, Any] | None = None


class Replay:
    """Within it, T3.inference returns these tokens."""

    def __init__(self, tokens: Tensor):
        self.tokens, self.used = tokens, False


class Session:
    """Options, backend and undo log of one accelerated T3."""

    def __init__(self, t3: nn.Module, device: torch.device, choice: Choice, options: dict[str, Any]):
        self.t3, self.device, self.choice, self.options = t3, device, choice, options
        self.home = t3.speech_head.weight.device  # where T3 was, and where its tokens go
        self.patches, self.parking = Patches(), Parking()
        self.backend: Any = None
        self.signature = inspect.signature(type(t3).inference)
        self._here = threading.local()  # Capture or Replay of this thread

    def __deepcopy__(self, memo: dict) -> NoReturn:
        raise TypeError("vivace: this T3 is accelerated and cannot be copied or pickled: vivace.restore() first")

    def __reduce__(self) -> NoReturn:
        self.__deepcopy__({})

    def inference(self, *args: Any, **kwargs: Any) -> Tensor:
        """T3.inference: speech tokens (1, n) int64, with the stop token where it was drawn."""
        bound = self.signature.bind(self.t3, *args, **kwargs)
        bound.apply_defaults()
        arguments = dict(list(bound.arguments.items())[1:])
        mode = getattr(self._here, "mode", None)
        if isinstance(mode, Capture):
            mode.arguments = arguments
            raise Captured
        if isinstance(mode, Replay):
            mode.used = True
            return mode.tokens
        request = request_of(arguments, self.t3)
        with self._bar(request.max_new_tokens) as progress:
            return self.tensor(self.generate([replace(request, progress=progress)])[0])

    @contextlib.contextmanager
    def _bar(self, steps: int) -> Iterator[Progress | None]:
        """Chatterbox's progress bar, made as T3.inference makes it, by the tqdm that its module has: who has replaced
        that, to silence it say, is heard here too."""
        make = getattr(sys.modules.get(type(self.t3).__module__), "tqdm", None)
        bar = None if make is None else make(range(steps), desc="Sampling", dynamic_ncols=True)
        if not hasattr(bar, "update") or not hasattr(bar, "close"):  # no bar in its place
            yield None
            return
        shown = 0

        def progress(tokens: int) -> None:
            nonlocal shown
            bar.update(tokens - shown)
            shown = tokens

        try:
            yield progress
        finally:
            bar.close()

    def within(self, mode: Capture | Replay | None, call: Callable[[], Any]) -> Any:
        """call(), while this thread's T3.inference is in `mode`."""
        before = getattr(self._here, "mode", None)
        self._here.mode = mode
        try:
            return call()
        finally:
            self._here.mode = before

    def request(self, arguments: dict[str, Any], on_tokens: TokenCallback | None = None) -> Request:
        return request_of(arguments, self.t3, on_tokens)

    def generate(self, requests: list[Request]) -> list[Outcome]:
        backend = self.backend
        if backend is None:
            raise RuntimeError(RESTORED)
        if self.t3.speech_head.weight.device != self.home:
            raise RuntimeError(
                f"vivace: T3 was moved from {self.home} to {self.t3.speech_head.weight.device} after "
                "vivace.accelerate(): vivace.restore() it, move it, and accelerate it again"
            )
        return backend.generate(requests)

    def tensor(self, outcome: Outcome) -> Tensor:
        """What T3.inference returns for an outcome."""
        stop = [self.t3.hp.stop_speech_token] if outcome.finish_reason == "stop" else []
        try:
            return torch.tensor([[*outcome.tokens, *stop]], dtype=torch.long, device=self.home)
        except RuntimeError as error:
            raise memory_error(error, OUT_OF_MEMORY) or error from None

    def close(self) -> None:
        """Takes back every change. Can be called again where there was not enough memory for the weights."""
        backend, self.backend = self.backend, None
        if backend is not None:
            backend.close()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.parking.back()
        self.patches.undo()


def session_of(t3: nn.Module) -> Session | None:
    return vars(t3).get(ATTRIBUTE)
