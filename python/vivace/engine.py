"""Speech tokens from text: `generate` for a call, `Engine` for a process that serves many.

Both stand on the C++ engine (vivace._C), which is loaded when one of them is first used.
"""

import json
import os
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vivace import extension

if TYPE_CHECKING:
    import torch

__all__ = ["Engine", "GenerationError", "Result", "generate"]

TokenCallback = Callable[[int, list[int], int, int], bool | None]

_WAIT_SECONDS = 0.1  # between looks at the signals: Ctrl-C reaches a thread that waits in C++


class GenerationError(RuntimeError):
    """The engine failed while it worked on a request."""


@dataclass(frozen=True)
class Result:
    """What a request generated.

    Attributes:
        tokens: speech tokens (25 a second), without the stop token.
        finish_reason: "stop", "length" or "cancelled"; "" while it runs.
        detail: with "length", what was reached where it was not max_tokens: the KV cache's capacity.
        prompt_tokens: positions in front of the first speech token.
        seconds: from submission to the end.
        queue_seconds: of these, before work on it began.
        time_to_first_token: seconds from submission.
        tokens_per_second: after the first token.
    """

    id: int
    tokens: list[int]
    finish_reason: str
    detail: str
    prompt_tokens: int
    seconds: float
    queue_seconds: float
    time_to_first_token: float
    tokens_per_second: float


class Engine:
    """A loaded model that generates for several requests at once.

    Args:
        model: file written by `vivace export`.
        tokenizer: tokenizer.json, for requests that give a text; English models.
        device: "auto", "cpu", "cuda" or "cuda:<index>", or a torch.device.
        dtype: "auto" (as exported), "float32", "bfloat16" or "float16" (in short "fp32", "bf16", "fp16"), or a
            torch.dtype.
        max_requests: generating at once.
        max_rows: rows of the KV cache; 0: two for each request (guided ones need two).
        capacity: positions of a row: prompt and generated tokens. A request whose row is full ends with "length".
        max_queue: requests waiting beyond those; `submit` raises BlockingIOError when they are there.
        threads: CPU threads of torch, for the whole process; 0: as they are.
        cuda_graphs: replay captured steps on CUDA; VIVACE_CUDA_GRAPHS=0 turns them off too.
        fused_step: decode steps by `vivace.decode_step` instead of layer by layer: "auto" (on CUDA, where its kernels
            take the model), "on" (on the CPU too) or "off"; VIVACE_FUSED_STEP=0 or 1 wins. stats()["fused_steps"]
            counts them.
        deterministic: a request's tokens are the same whatever else is in the batch, bit for bit.
        warm_up: on CUDA, load kernels and capture graphs now and not during the first requests.
        verify: recompute the digest of the model's records before loading it.

    Raises:
        OSError: a file is missing, damaged or of another kind.
        ValueError: an option is out of range, or there is not enough memory for the cache.
        ImportError: vivace._C is missing or was built for another torch.
    """

    def __init__(
        self,
        model: str | os.PathLike,
        *,
        tokenizer: str | os.PathLike | None = None,
        device: "str | torch.device" = "auto",
        dtype: "str | torch.dtype" = "auto",
        max_requests: int = 8,
        max_rows: int = 0,
        capacity: int = 2048,
        max_queue: int = 256,
        threads: int = 0,
        cuda_graphs: bool = True,
        fused_step: str = "auto",
        deterministic: bool = False,
        warm_up: bool = True,
        verify: bool = True,
    ):
        from vivace import library

        module = extension.load()
        self._tokenizer = None if tokenizer is None else module.EnTokenizer(os.fspath(tokenizer))
        engine = module.Engine(
            model=os.fspath(model),
            operators=str(library.load()),  # the same copy serves Python and the engine: one can be registered once
            device=str(device),
            dtype=str(dtype).removeprefix("torch."),
            max_requests=max_requests,
            max_rows=max_rows,
            capacity=capacity,
            max_queue=max_queue,
            threads=threads,
            cuda_graphs=cuda_graphs,
            fused_step=fused_step,
            deterministic=deterministic,
            warm_up=warm_up,
            verify=verify,
        )
        self.manifest: dict[str, Any] = json.loads(engine.manifest_json)
        self._voices: dict[str, Any] = {}
        # Ended at the latest when Python exits, while callbacks can still run.
        self._held = [engine]
        self._finalizer = weakref.finalize(self, self._held.clear)

    def close(self) -> None:
        """Ends every request as cancelled and frees the model."""
        self._finalizer()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def _engine(self):
        if not self._held:
            raise ValueError("vivace.Engine: the engine is closed")
        return self._held[0]

    def submit(
        self,
        text: str | None = None,
        *,
        text_tokens: Sequence[int] | None = None,
        voice: str | os.PathLike,
        temperature: float | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        top_k: int = 0,
        repetition_penalty: float | None = None,
        cfg_weight: float | None = None,
        exaggeration: float | None = None,
        seed: int = 0,
        rng: str = "philox",
        generator_state: bytes = b"",
        max_tokens: int = 1000,
        ignore_stop: bool = False,
        alignment: bool = True,
        on_tokens: TokenCallback | None = None,
    ) -> int:
        """Queues a request and returns its id at once.

        Args:
            text: normalised and tokenized as Chatterbox does it; needs the engine's `tokenizer`.
            text_tokens: token ids instead of a text; start and stop tokens are added where they are missing.
            voice: voice.safetensors, written by `vivace voice`; read once and kept. Or what `load_voice` gave.
            temperature, top_p, min_p, repetition_penalty, cfg_weight, exaggeration: None: the model's default.
                temperature 0 always takes the likeliest token; cfg_weight 0 runs one row instead of two.
            top_k: keep the k likeliest tokens; 0: all.
            seed: of the draws.
            rng: "philox" (draws that depend on seed and step alone) or "torch" (Chatterbox's tokens after
                torch.manual_seed(seed)).
            generator_state: with rng "torch", the bytes of a torch.Generator's get_state() to go on from, not a seed.
            max_tokens: speech tokens at most; fewer where the engine's capacity ends before them.
            ignore_stop: the stop token ends nothing, and stays among the tokens.
            alignment: multilingual models: watch the alignment heads, as Chatterbox 0.1.7 does.
            on_tokens: called as on_tokens(id, new_tokens, tokens_so_far, max_tokens) on the engine's thread; returning
                False ends the request with what was generated.

        Raises:
            ValueError: an argument is out of range, or the prompt fills the engine's capacity.
            OSError: the voice file is not usable. BlockingIOError: the queue is full.
        """
        if (text is None) == (text_tokens is None):
            raise ValueError("vivace.submit: expected either text or text_tokens")
        if text_tokens is None:
            text_tokens = self.tokenize(text)
        defaults = self.manifest["defaults"]

        def value(given: float | None, name: str) -> float:
            return defaults[name] if given is None else given

        return self._engine.submit(
            text_tokens=_ids("submit", text_tokens),
            voice=self._voice(voice),
            temperature=value(temperature, "temperature"),
            top_p=value(top_p, "top_p"),
            min_p=value(min_p, "min_p"),
            top_k=top_k,
            repetition_penalty=value(repetition_penalty, "repetition_penalty"),
            cfg_weight=value(cfg_weight, "cfg_weight"),
            exaggeration=value(exaggeration, "exaggeration"),
            seed=seed,
            rng=rng,
            generator_state=generator_state,
            max_new_tokens=max_tokens,
            ignore_stop=ignore_stop,
            alignment=alignment,
            on_tokens=on_tokens,
        )

    def wait(self, id: int, timeout: float | None = None) -> Result:
        """Blocks until the request has finished, at most `timeout` seconds; then its id is forgotten.

        With a timeout that passes, the result so far (finish_reason ""). Ctrl-C raises KeyboardInterrupt; the request
        goes on.

        Raises:
            GenerationError: the engine, or the request's callback, failed.
            ValueError: there is no such request.
        """
        remaining = timeout
        while True:
            step = _WAIT_SECONDS if remaining is None else min(_WAIT_SECONDS, max(remaining, 0.0))
            answer = self._engine.wait(id, step)  # without the GIL
            if remaining is not None:
                remaining -= step
            if answer["status"] == "finished" or (remaining is not None and remaining <= 0):
                break
        if answer["finish_reason"] == "error":
            raise GenerationError(answer["error"])
        return Result(**{name: answer[name] for name in Result.__dataclass_fields__})

    def poll(self, id: int) -> Result:
        """The result so far, without waiting; a finished one is handed out once, by poll or wait."""
        return self.wait(id, 0)

    def cancel(self, id: int) -> bool:
        """Ends a request with what it has; False when it had finished or is unknown."""
        return self._engine.cancel(id)

    def stats(self) -> dict[str, Any]:
        """Counters since the engine started: tokens, steps, seconds, bytes; queued and running are of now."""
        return self._engine.stats()

    def tokenize(self, text: str) -> list[int]:
        """Text token ids without start and stop, of the text as Chatterbox normalises it."""
        _check_text("Engine", text)
        if self._tokenizer is None:
            raise ValueError("vivace.Engine: a text needs the engine's tokenizer (tokenizer=...), or give text_tokens")
        if self.manifest["variant"] != "english":
            raise ValueError(
                "vivace.Engine: the model is multilingual: tokenize with Chatterbox's MTLTokenizer and give text_tokens"
            )
        return self._tokenizer.encode(text)

    def load_voice(self, path: str | os.PathLike) -> Any:
        """A voice that the caller keeps; `submit` takes it in place of a path."""
        return self._engine.load_voice(os.fspath(path))

    def make_voice(self, speaker_emb: Sequence[float], prompt_tokens: Sequence[int]) -> Any:
        """A voice from its parts, for `submit`: the voice encoder's embedding and the speech tokens of its sample,
        which may be as many as the model has positions for.

        Raises:
            ValueError: a size is not the model's, a token is out of range, or a number is not finite.
        """
        return self._engine.make_voice(list(map(float, speaker_emb)), list(map(int, prompt_tokens)))

    def _voice(self, path: Any):
        if not isinstance(path, (str, os.PathLike)):
            return path
        key = os.path.abspath(os.fspath(path))
        if key not in self._voices:
            self._voices[key] = self._engine.load_voice(key)
        return self._voices[key]


def generate(
    model: str | os.PathLike,
    text: str | Sequence[str] | None = None,
    *,
    text_tokens: Sequence[int] | Sequence[Sequence[int]] | None = None,
    tokenizer: str | os.PathLike | None = None,
    voice: str | os.PathLike,
    seed: int = 0,
    max_tokens: int = 1000,
    batch: int = 8,
    device: "str | torch.device" = "auto",
    dtype: "str | torch.dtype" = "auto",
    threads: int = 0,
    on_tokens: TokenCallback | None = None,
    **sampling: Any,
) -> Result | list[Result]:
    """Loads a model and turns text into speech tokens.

    Args:
        model: file written by `vivace export`.
        text: one text, or several; several run as a batch with seeds seed, seed + 1, ...
        text_tokens: token ids instead of `text`, for one text or several: sequences, tensors or arrays.
        tokenizer: tokenizer.json; needed with `text`.
        voice: voice.safetensors, written by `vivace voice`.
        seed, max_tokens, on_tokens, sampling: as in `Engine.submit`.
        batch: texts generating at once.
        device, dtype, threads: as in `Engine`.

    Returns:
        A Result, or a list of them in the order of the texts when several were given.

    Raises:
        As Engine, Engine.submit and Engine.wait. On Ctrl-C all requests end and KeyboardInterrupt is raised.

    Each call loads the model anew: keep an `Engine` to generate often.
    """
    if (text is None) == (text_tokens is None):
        raise ValueError("vivace.generate: expected either text or text_tokens")
    module = extension.load()
    if text is not None:
        several = not isinstance(text, str)
        texts = list(text) if several and isinstance(text, Iterable) else [text]
        for one in texts:
            _check_text("generate", one)
        if tokenizer is None:
            raise ValueError("vivace.generate: text needs tokenizer=tokenizer.json, or give text_tokens")
        english = module.EnTokenizer(os.fspath(tokenizer))
        prompts = [english.encode(one) for one in texts]
    else:
        ids = _plain(text_tokens)
        several = len(ids) > 0 and not isinstance(ids[0], int)
        prompts = [_ids("generate", one) for one in (ids if several else [ids])]
    if not prompts:
        return []

    manifest = json.loads(module.manifest_json(os.fspath(model)))
    if text is not None and manifest["variant"] != "english":
        raise ValueError(
            "vivace.generate: the model is multilingual: tokenize with Chatterbox's MTLTokenizer and give text_tokens"
        )
    # Conditioning, start and stop of the text, two start-of-speech positions, and what is generated.
    longest = max(len(prompt) for prompt in prompts)
    with Engine(
        model,
        device=device,
        dtype=dtype,
        threads=threads,
        max_requests=max(1, min(batch, len(prompts))),
        capacity=max(1, manifest["conditioning"]["length"] + longest + 4 + max_tokens),
        max_queue=len(prompts),
    ) as engine:
        ids = [
            engine.submit(
                text_tokens=prompt, voice=voice, seed=seed + i, max_tokens=max_tokens, on_tokens=on_tokens, **sampling
            )
            for i, prompt in enumerate(prompts)
        ]
        results = [engine.wait(id) for id in ids]
    return results if several else results[0]


def _check_text(where: str, text: Any) -> None:
    if not isinstance(text, str):
        raise TypeError(f"vivace.{where}: a text is of type {type(text).__name__}, expected str")


def _plain(tokens: Any) -> list[Any]:
    """Token ids, or rows of them, out of sequences, torch tensors and numpy arrays."""
    return [one.tolist() if hasattr(one, "tolist") else one for one in tokens]


def _ids(where: str, tokens: Any) -> list[int]:
    ids = _plain(tokens)
    for one in ids:
        if not isinstance(one, int):
            raise TypeError(f"vivace.{where}: text_tokens has a {type(one).__name__}, expected integers")
    return ids
