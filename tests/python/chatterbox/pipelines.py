"""Chatterbox's own pipelines around a tiny T3: generate() is the real one, vocoder and watermark are recorders."""

import torch
from chatterbox.mtl_tts import ChatterboxMultilingualTTS
from chatterbox.mtl_tts import Conditionals as MultilingualConditionals
from chatterbox.tts import ChatterboxTTS, Conditionals
from chatterbox_t3 import build_t3, conditionals

from vivace.t3 import preset, write_random_voice


class Vocoder:
    """Sound that shows the tokens: each token is four samples."""

    def __init__(self):
        self.calls = []

    def inference(self, speech_tokens, ref_dict):
        self.calls.append((speech_tokens.tolist(), ref_dict))
        return speech_tokens.float().repeat_interleave(4)[None] / 8192, None


class Watermarker:
    def __init__(self):
        self.calls = 0

    def apply_watermark(self, wav, sample_rate):
        self.calls += 1
        return wav + 1.0


class Tokenizer:
    """A letter is a token."""

    def text_to_tokens(self, text, language_id=None):
        return torch.tensor([[1 + ord(letter) % 250 for letter in text]])


def make_tts(folder, variant="english", seed=0):
    """A ChatterboxTTS or ChatterboxMultilingualTTS on the CPU."""
    kind, conds_kind = {
        "english": (ChatterboxTTS, Conditionals),
        "multilingual": (ChatterboxMultilingualTTS, MultilingualConditionals),
    }[variant]
    voice = write_random_voice(folder / "voice.safetensors", 1)
    tts = kind.__new__(kind)  # the constructor loads the watermarker's network
    tts.sr, tts.device = 24000, "cpu"
    tts.t3, tts.s3gen, tts.ve = build_t3(preset("tiny", variant), seed), Vocoder(), None
    tts.tokenizer, tts.watermarker = Tokenizer(), Watermarker()
    tts.conds = conds_kind(conditionals(voice, 0.5), {"voice": 1})
    return tts
