"""From a checkpoint to the module."""

import os
from concurrent.futures import ThreadPoolExecutor

import torch

from vivace.t3.config import T3Config
from vivace.t3.layout import UNUSED, Entry, checkpoint_shapes, infer_config, layout
from vivace.t3.model import T3
from vivace.t3.weights import CheckpointError, Weights, listing


def checkpoint_config(weights: Weights, head_dim: int | None = None) -> T3Config:
    """The configuration of a checkpoint, every tensor checked against it.

    Args:
        head_dim: of the attention heads, which shapes do not tell; None is Chatterbox's 64.

    Raises:
        CheckpointError: tensors are missing, unexpected or misshapen; all of them are named.
    """
    if any(name.startswith("tfmr.h.") for name in weights.shapes):
        raise CheckpointError("vivace: this is a GPT-2 T3 (Chatterbox Turbo or Nano); only the Llama T3 is supported")
    try:
        config = infer_config(weights.shapes, head_dim)
    except ValueError as error:
        raise CheckpointError(f"vivace: this is not a T3 checkpoint: {error}") from error
    expected = checkpoint_shapes(config)
    optional = {UNUSED[0]: None, UNUSED[1]: (config.text_vocab_size, config.hidden_size)}
    found = weights.shapes
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected and name not in optional]
    misshapen = [
        f"{name} {list(found[name])}, expected {list(shape)}"
        for name, shape in (expected | optional).items()
        if shape is not None and name in found and found[name] != shape
    ]
    problems = [
        f"{len(names)} {kind}: {listing(names)}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
        if names
    ]
    if problems:
        raise CheckpointError("vivace: the checkpoint is not a T3 model; tensors " + "; ".join(problems))
    return config


def load_model(weights: Weights, config: T3Config, dtype: torch.dtype) -> T3:
    """The module with these weights in `dtype`, in evaluation mode, without gradients. Holds one copy in memory."""

    def load(entry: Entry) -> torch.Tensor:
        parts = []
        for name, _ in entry.tensors:
            tensor = weights.read(name)
            if not tensor.is_floating_point():
                raise CheckpointError(f"vivace: tensor {name} is {tensor.dtype}, expected a floating type")
            parts.append(tensor.to(dtype))
        return torch.cat(parts).view(entry.shape)

    with torch.device("meta"):
        model = T3(config)
    entries = layout(config)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        state = dict(zip((entry.parameter for entry in entries), pool.map(load, entries), strict=True))
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)
