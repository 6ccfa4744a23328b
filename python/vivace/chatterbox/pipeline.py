"""Whole pipelines: several texts at once, tokens as they come.

A pipeline's own generate() does everything around T3. It runs twice for a text: until it calls T3.inference, whose
arguments are kept, and again with T3.inference returning the tokens. So what it does before and after (normalisation,
vocoder, watermark) is the installed Chatterbox's in every version.
"""

import contextlib
import dataclasses
import inspect
import queue
import threading
from collections.abc import Iterator, Sequence
from types import MethodType
from typing import Any

from torch import Tensor

from vivace.chatterbox.random_state import draw_seed
from vivace.chatterbox.request import Request, TokenCallback
from vivace.chatterbox.session import Capture, Captured, Replay, Session, session_of
from vivace.chatterbox.source import find_t3


def attach(model: Any, session: Session) -> None:
    """Gives a pipeline the methods generate_batch and stream_tokens."""
    if model is session.t3 or not callable(getattr(model, "generate", None)):
        return
    for function in (generate_batch, stream_tokens):
        if function.__name__ not in vars(model) and not hasattr(type(model), function.__name__):
            session.patches.set(model, function.__name__, MethodType(function, model))


def generate_batch(
    model: Any,
    texts: Sequence[str],
    *,
    seed: int | None = None,
    max_new_tokens: int | None = None,
    on_tokens: TokenCallback | None = None,
    **options: Any,
) -> list[Tensor]:
    """Speech of several texts, generated together.

    Args:
        model: an accelerated ChatterboxTTS or ChatterboxMultilingualTTS.
        texts: any number; max_requests of accelerate() generate at once.
        seed: text i draws with seed + i; None: from torch's generator.
        max_new_tokens: speech tokens of a text at most (25 a second); None: as generate() has it, 1000.
        on_tokens: called as on_tokens(index, new_tokens, tokens_so_far, max_new_tokens), on a thread of the engine's;
            returning False ends that text with what it has.
        options: of the model's generate(): audio_prompt_path, exaggeration, language_id, ... A list of as many as
            there are texts gives each its own.

    Returns:
        What generate() returns for each: (1, samples) float32 with the watermark.

    Raises:
        ValueError: the model is not accelerated, or an option is out of range. As Engine.wait for failures.
    """
    session = _session(model)
    if isinstance(texts, str):
        raise TypeError("vivace.generate_batch: texts is one string, expected a list of them")
    texts = list(texts)
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("vivace.generate_batch: texts has what is no string")
    each = [_options_of(options, index, len(texts)) for index in range(len(texts))]
    requests, conditionals, sample = [], [], None
    for index, text in enumerate(texts):
        # A voice's sample is read once for neighbours that share it.
        if sample is not None and each[index].get("audio_prompt_path") == sample:
            del each[index]["audio_prompt_path"]
        else:
            sample = each[index].get("audio_prompt_path")
        arguments = _arguments(model, session, text, each[index])
        if max_new_tokens is not None:
            arguments["max_new_tokens"] = max_new_tokens
        number = draw_seed() if seed is None else seed + index
        requests.append(session.request(arguments, on_tokens).with_seed(number, index))
        conditionals.append(getattr(model, "conds", None))
    outcomes = session.generate(requests)
    waves = []
    for text, chosen, conds, outcome in zip(texts, each, conditionals, outcomes, strict=True):
        chosen.pop("audio_prompt_path", None)
        if conds is not None:
            model.conds = conds
        replay = Replay(session.tensor(outcome))
        waves.append(session.within(replay, lambda text=text, chosen=chosen: model.generate(text, **chosen)))
    return waves


def stream_tokens(
    model: Any, text: str, *, chunk: int = 1, max_new_tokens: int | None = None, **options: Any
) -> Iterator[list[int]]:
    """Speech tokens of a text while they are generated, without the stop token and without the vocoder.

    Args:
        model: an accelerated ChatterboxTTS or ChatterboxMultilingualTTS.
        chunk: tokens in each list; the last may be shorter.
        max_new_tokens, options: as in generate_batch.

    Yields:
        Lists of speech tokens. Closing the iterator ends the request.
    """
    if chunk < 1:
        raise ValueError(f"vivace.stream_tokens: chunk is {chunk}, expected at least 1")
    session = _session(model)
    arguments = _arguments(model, session, text, options)
    if max_new_tokens is not None:
        arguments["max_new_tokens"] = max_new_tokens
    return _stream(session, session.request(arguments), chunk)


def _stream(session: Session, request: Request, chunk: int) -> Iterator[list[int]]:
    arrived: queue.SimpleQueue = queue.SimpleQueue()
    stopped = threading.Event()

    def on_tokens(_index: int, new: list[int], _tokens: int, _most: int) -> bool:
        arrived.put(new)
        return not stopped.is_set()

    def work() -> None:
        try:
            session.generate([dataclasses.replace(request, on_tokens=on_tokens)])
            arrived.put(None)
        except BaseException as error:
            arrived.put(error)

    thread = threading.Thread(target=work, name="vivace-stream", daemon=True)
    thread.start()
    waiting: list[int] = []
    try:
        while (item := arrived.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            waiting.extend(item)
            while len(waiting) >= chunk:
                yield waiting[:chunk]
                del waiting[:chunk]
        if waiting:
            yield waiting
    finally:
        stopped.set()
        thread.join()


def _session(model: Any) -> Session:
    session = session_of(find_t3(model))
    if session is None:
        raise ValueError("vivace: the model is not accelerated: vivace.accelerate(model) first")
    if model is session.t3:
        raise TypeError(
            "vivace: expected a ChatterboxTTS or ChatterboxMultilingualTTS, this is a T3: call its inference()"
        )
    return session


def _arguments(model: Any, session: Session, text: str, options: dict[str, Any]) -> dict[str, Any]:
    """The arguments with which generate(text, **options) calls T3.inference."""
    inspect.signature(model.generate).bind(text, **options)  # a TypeError before any work
    capture = Capture()
    with contextlib.suppress(Captured):
        session.within(capture, lambda: model.generate(text, **options))
    if capture.arguments is None:
        raise RuntimeError(f"vivace: {type(model).__name__}.generate returned without calling T3.inference")
    return capture.arguments


def _options_of(options: dict[str, Any], index: int, count: int) -> dict[str, Any]:
    """The options of one text: of a list of options its own."""
    chosen = {}
    for name, value in options.items():
        if isinstance(value, (list, tuple)):
            if len(value) != count:
                raise ValueError(f"vivace.generate_batch: {name} has {len(value)} values, expected {count}")
            value = value[index]
        chosen[name] = value
    return chosen
