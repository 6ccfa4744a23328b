"""The C++ engine over a T3 that lies in memory."""

import contextlib
import hashlib
import os
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vivace.chatterbox import random_state
from vivace.chatterbox.errors import OUT_OF_MEMORY, RESTORED, memory_error
from vivace.chatterbox.request import Outcome, Request, exaggeration_of, prompt_of, speaker_of
from vivace.chatterbox.source import ModuleWeights
from vivace.engine import Engine, GenerationError
from vivace.policy import logger
from vivace.t3 import T3Config, archive, load_model, script
from vivace.t3.manifest import dtype_name, make_manifest

_VOICES = 64  # kept with their embeddings
_PROGRESS_SECONDS = 0.1  # between two looks at how far a request is
_MOST_AT_ONCE = 8  # requests that the engine grows to by itself; each takes half a gigabyte of KV cache in bfloat16


@contextlib.contextmanager
def memory_file(name: str) -> Iterator[Path]:
    """A path to a file that is on no disk where the system has such, and that is gone afterwards."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create(name)
        try:
            yield Path(f"/proc/{os.getpid()}/fd/{descriptor}")
        finally:
            os.close(descriptor)
    else:
        with tempfile.TemporaryDirectory(prefix="vivace-") as folder:
            yield Path(folder) / name


class EngineBackend:
    """Opens the engine, and opens it anew when a request needs more room than it has.

    Args:
        capacity: positions of a row of the KV cache.
        max_requests: generating at once.
        fixed_capacity, fixed_requests: that one was asked for: a request that needs more is an error, and more requests
            than that wait for each other.
    """

    def __init__(
        self,
        t3: nn.Module,
        config: T3Config,
        *,
        device: torch.device,
        dtype: torch.dtype,
        capacity: int,
        max_requests: int,
        fixed_capacity: bool,
        fixed_requests: bool,
        aligned: bool,
        rng: str,
        cuda_graphs: bool,
    ):
        self.t3, self.config, self.device, self.dtype = t3, config, device, dtype
        self.capacity, self.max_requests = capacity, max_requests
        self.fixed_capacity, self.fixed_requests = fixed_capacity, fixed_requests
        self.aligned, self.cuda_graphs = aligned, cuda_graphs
        self.rng = rng if rng != "auto" else "torch" if device.type == "cpu" else "philox"
        self.engine: Engine | None = None
        self._room = threading.Condition()
        self._active = 0  # requests that hold the engine as it is
        self._closed = False
        self._drawing = threading.Lock()  # torch's default generator serves one request at a time
        self._voices: OrderedDict[str, Any] = OrderedDict()
        self._open(capacity, max_requests)

    def generate(self, requests: list[Request]) -> list[Outcome]:
        """Generates the requests together, as many at once as there is room for.

        Raises:
            GenerationError: the engine or a callback failed; torch.OutOfMemoryError: for lack of memory.
        """
        if not requests:
            return []
        with contextlib.ExitStack() as stack:
            engine = stack.enter_context(self._with_room(requests))
            continues = self.rng == "torch" and any(request.seed is None for request in requests)
            if continues:
                stack.enter_context(self._drawing)
            ids: list[int] = []
            try:
                for request in requests:
                    ids.append(self._submit(engine, request))
                outcomes = [self._wait(engine, id, request) for id, request in zip(ids, requests, strict=True)]
            except BaseException as error:  # Ctrl-C too
                for id in ids:
                    with contextlib.suppress(ValueError, GenerationError):  # what was not waited for
                        engine.cancel(id)
                        engine.wait(id, 5.0)
                if self._closed and isinstance(error, ValueError):
                    raise RuntimeError(RESTORED) from None
                raise
            if self._closed and any(outcome.finish_reason == "cancelled" for outcome in outcomes):
                raise RuntimeError(RESTORED)
            if continues:
                for request, outcome in zip(requests, outcomes, strict=True):
                    if request.seed is None:
                        random_state.advance(
                            self.device,
                            self.config.speech_vocab_size,
                            len(outcome.tokens) + (outcome.finish_reason == "stop"),
                        )
            return outcomes

    def stats(self) -> dict[str, Any]:
        return {} if self.engine is None else self.engine.stats()

    def close(self) -> None:
        """Requests in flight, and those that wait for room, end with an error."""
        with self._room:
            self._closed = True
            self._room.notify_all()
        self._drop()

    def _drop(self) -> None:
        engine, self.engine = self.engine, None
        self._voices.clear()
        if engine is not None:
            engine.close()

    # Opening

    def _open(self, capacity: int, max_requests: int) -> None:
        began = time.monotonic()
        weights = ModuleWeights(self.t3)
        model = load_model(weights, self.config, self.dtype)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        manifest = make_manifest(self.config, dtype_name(self.dtype), weights.source, parameters)
        try:
            with memory_file("t3.vivace") as path:
                archive.write(script(model), manifest, path)
                del model
                self.engine = Engine(
                    path,
                    device=str(self.device),
                    max_requests=max_requests,
                    capacity=capacity,
                    max_queue=1 << 16,
                    cuda_graphs=self.cuda_graphs,
                    verify=False,
                )
        except Exception as error:
            raise memory_error(error, "vivace: no room for the engine") or error from None
        self.capacity, self.max_requests = capacity, max_requests
        self._voices.clear()
        logger.info(
            "vivace: engine %s on %s, %d requests of %d positions, ready in %.1f s",
            dtype_name(self.dtype),
            self.device,
            max_requests,
            capacity,
            time.monotonic() - began,
        )

    @contextlib.contextmanager
    def _with_room(self, requests: list[Request]) -> Iterator[Engine]:
        """Holds an engine that is large enough for the requests."""
        prompt = self.config.cond_length + 4  # start and stop around the text where they are missing, and two BOS
        capacity = max(prompt + len(request.text_tokens) + request.max_new_tokens for request in requests)
        with self._room:
            while True:
                if self._closed:
                    raise RuntimeError(RESTORED)
                grown = self._grown(capacity, len(requests))
                if grown == (self.capacity, self.max_requests):
                    if self.engine is None:  # opening it for a larger request has failed
                        self._open(*grown)
                    engine = self.engine
                    self._active += 1
                    break
                if self._active == 0:
                    self._reopen(*grown)
                else:
                    self._room.wait()
        try:
            yield engine
        finally:
            with self._room:
                self._active -= 1
                self._room.notify_all()

    def _grown(self, capacity: int, requests: int) -> tuple[int, int]:
        grows = not self.fixed_capacity and capacity > self.capacity
        return (
            -(-capacity // 256) * 256 if grows else self.capacity,
            self.max_requests if self.fixed_requests else max(self.max_requests, min(requests, _MOST_AT_ONCE)),
        )

    def _reopen(self, capacity: int, max_requests: int) -> None:
        logger.info("vivace: engine opened anew for %d requests of %d positions", max_requests, capacity)
        self._drop()
        self._open(capacity, max_requests)  # where it fails, the next request opens it as it was

    # One request

    def _submit(self, engine: Engine, request: Request) -> int:
        seed, state = request.seed, b""
        if seed is None and self.rng == "torch":
            seed, state = random_state.capture(self.device)
        elif seed is None:
            seed = random_state.draw_seed()
        callback = None
        if request.on_tokens is not None:

            def callback(_id: int, new: list[int], tokens: int, most: int):
                return request.on_tokens(request.index, new, tokens, most)

        return engine.submit(
            text_tokens=request.text_tokens,
            voice=self._voice(engine, request),
            temperature=request.temperature,
            top_p=max(request.top_p, 1e-9),  # 0 keeps the likeliest token, as it does in transformers
            min_p=request.min_p,
            repetition_penalty=request.repetition_penalty,
            cfg_weight=request.cfg_weight,
            exaggeration=exaggeration_of(request.t3_cond),
            seed=seed,
            rng=self.rng,
            generator_state=state,
            max_tokens=request.max_new_tokens,
            ignore_stop=not request.stop_on_eos,
            alignment=self.aligned,
            on_tokens=callback,
        )

    def _wait(self, engine: Engine, id: int, request: Request) -> Outcome:
        try:
            if request.progress is None:
                result = engine.wait(id)
            else:
                result = engine.wait(id, _PROGRESS_SECONDS)
                while not result.finish_reason:
                    request.progress(len(result.tokens))
                    result = engine.wait(id, _PROGRESS_SECONDS)
                request.progress(len(result.tokens))
        except GenerationError as error:
            raise memory_error(error, OUT_OF_MEMORY) or error from None
        if result.detail:
            logger.warning("vivace: %s", result.detail)
        return Outcome(result.tokens, result.finish_reason)

    def _voice(self, engine: Engine, request: Request) -> Any:
        """The engine's object of this voice. It keeps its embedding as long as the object lives."""
        speaker = speaker_of(request.t3_cond, self.config.speaker_embed_size)
        prompt = prompt_of(request.t3_cond)
        key = hashlib.sha256(speaker.numpy().tobytes() + b"/" + prompt.numpy().tobytes()).hexdigest()
        with self._room:
            if key not in self._voices:
                self._voices[key] = engine.make_voice(speaker[0].tolist(), prompt[0].tolist())
            self._voices.move_to_end(key)
            if len(self._voices) > _VOICES:
                self._voices.popitem(last=False)
            return self._voices[key]
