"""Generation by the loop in Python, one request after the other."""

import threading
from typing import Any

import torch
from torch import nn

from vivace.chatterbox.errors import OUT_OF_MEMORY, RESTORED, memory_error
from vivace.chatterbox.loop import run
from vivace.chatterbox.request import Outcome, Request
from vivace.chatterbox.source import ModuleWeights
from vivace.t3 import T3Config, load_model


class PythonBackend:
    """The loop over vivace's T3 module on the operators, or over T3's own module."""

    def __init__(self, t3: nn.Module, config: T3Config, *, device: torch.device, dtype: torch.dtype, aligned: bool):
        self.t3, self.config, self.device, self.aligned = t3, config, device, aligned
        self.lock, self.closed = threading.RLock(), False

    def rows(self, request: Request) -> Any:
        raise NotImplementedError

    def generate(self, requests: list[Request]) -> list[Outcome]:
        outcomes = []
        for request in requests:
            with self.lock:  # T3Cond and, for torch's default generator, the order of draws
                if self.closed:
                    raise RuntimeError(RESTORED)
                try:
                    outcomes.append(run(self.rows(request), request, self.t3.hp, self.device, self.aligned))
                except (RuntimeError, MemoryError) as error:
                    raise memory_error(error, OUT_OF_MEMORY) or error from None
        return outcomes

    def stats(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        """Waits for the request that runs: T3's weights change next. Those that wait for it are refused."""
        with self.lock:
            self.closed = True


class OperatorBackend(PythonBackend):
    """On vivace's T3 module."""

    def __init__(self, t3: nn.Module, config: T3Config, *, device: torch.device, dtype: torch.dtype, aligned: bool):
        super().__init__(t3, config, device=device, dtype=dtype, aligned=aligned)
        from vivace.library import load

        load()
        try:
            self.model = load_model(ModuleWeights(t3), config, dtype).to(device)
        except RuntimeError as error:
            raise memory_error(error, "vivace: no room for T3's weights") or error from None

    def rows(self, request: Request) -> Any:
        from vivace.chatterbox.operator_rows import OperatorRows

        return OperatorRows(self.model, self.config, request, self.aligned)

    def close(self) -> None:
        super().close()
        self.model = None


class LlamaBackend(PythonBackend):
    """On T3's own module."""

    def rows(self, request: Request) -> Any:
        from vivace.chatterbox.llama_rows import LlamaRows

        return LlamaRows(self.t3, request, self.aligned)
