"""The shape of a T3 model."""

import dataclasses
from dataclasses import dataclass

#: Text vocabulary of the English model; every other size is multilingual (2352 in 2025-09, 2454 since).
ENGLISH_TEXT_VOCAB = 704
MULTILINGUAL_TEXT_VOCABS = (2352, 2454)

#: (layer, head) whose attention follows the text; Chatterbox's multilingual model is watched through them.
ALIGNMENT_HEADS = ((12, 15), (13, 11), (9, 2))


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's frequency scaling ("llama3" in transformers)."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True)
class T3Config:
    """A T3 model: a Llama decoder with a conditioning encoder before it. The defaults are Chatterbox's English model.

    Raises:
        ValueError: a size is not positive, or the sizes do not fit together.
    """

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_layers: int = 30
    num_heads: int = 16
    num_kv_heads: int = 16
    head_dim: int = 64
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_scaling: RopeScaling | None = RopeScaling()

    text_vocab_size: int = ENGLISH_TEXT_VOCAB
    start_text_token: int = 255
    stop_text_token: int = 0
    max_text_tokens: int = 2048

    speech_vocab_size: int = 8194
    start_speech_token: int = 6561
    stop_speech_token: int = 6562
    first_invalid_speech_token: int = 6561  # tokens below it are S3 codes
    max_speech_tokens: int = 4096

    speaker_embed_size: int = 256
    prompt_tokens: int = 150  # usual length of a voice's prompt; the model takes any
    perceiver_queries: int = 32
    perceiver_heads: int = 4

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and not field.name.endswith("_token") and value <= 0:
                raise ValueError(f"vivace.T3Config: {field.name} is {value}, expected a positive number")
        if self.num_heads % self.num_kv_heads != 0:
            raise ValueError(
                f"vivace.T3Config: num_heads is {self.num_heads}, "
                f"expected a multiple of num_kv_heads ({self.num_kv_heads})"
            )
        if self.head_dim % 2 != 0:
            raise ValueError(
                f"vivace.T3Config: head_dim is {self.head_dim}, expected an even number (rotary embedding)"
            )
        if self.hidden_size % self.perceiver_heads != 0:
            raise ValueError(
                f"vivace.T3Config: hidden_size is {self.hidden_size}, expected a multiple of perceiver_heads "
                f"({self.perceiver_heads})"
            )

    @property
    def variant(self) -> str:
        return "english" if self.text_vocab_size == ENGLISH_TEXT_VOCAB else "multilingual"

    @property
    def cond_length(self) -> int:
        """Tokens of a voice: speaker, perceiver, emotion."""
        return 1 + self.perceiver_queries + 1

    @property
    def text_positions(self) -> int:
        return self.max_text_tokens + 2

    @property
    def speech_positions(self) -> int:
        return self.max_speech_tokens + 4

    @property
    def max_positions(self) -> int:
        """Tokens of the longest sequence that the learned position tables allow."""
        return self.cond_length + self.text_positions + self.speech_positions

    @property
    def alignment_heads(self) -> tuple[tuple[int, int], ...]:
        """(layer, head) pairs that forward() can probe; empty where the model is too small to have them."""
        if self.variant == "english":
            return ()
        if any(layer >= self.num_layers or head >= self.num_heads for layer, head in ALIGNMENT_HEADS):
            return ()
        return ALIGNMENT_HEADS


def preset(shape: str = "real", variant: str = "english") -> T3Config:
    """The configuration of a shape ("real": 530 M parameters, "tiny": a few, for tests and demos) and variant.

    The tiny multilingual model keeps the layers and heads that the alignment heads need.
    """
    if variant not in ("english", "multilingual"):
        raise ValueError(f"vivace.t3.preset: variant is {variant!r}, expected 'english' or 'multilingual'")
    text_vocab_size = ENGLISH_TEXT_VOCAB if variant == "english" else MULTILINGUAL_TEXT_VOCABS[-1]
    if shape == "real":
        return T3Config(text_vocab_size=text_vocab_size)
    if shape != "tiny":
        raise ValueError(f"vivace.t3.preset: shape is {shape!r}, expected 'real' or 'tiny'")
    num_layers, num_heads = (4, 2) if variant == "english" else (14, 16)
    return T3Config(
        hidden_size=128,
        intermediate_size=256,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        text_vocab_size=text_vocab_size,
    )
