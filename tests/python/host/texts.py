"""Texts that a tokenizer may meet, random ones too: each follows from a fixed seed."""

import pydoc_data.topics
import random

SPECIALS = [
    "[STOP]",
    "[UNK]",
    "[SPACE]",
    "[PAD]",
    "[SEP]",
    "[CLS]",
    "[MASK]",
    "[laughter]",
    "[laugh]",
    "[sigh]",
    "[gasp]",
]
SPECIALS += [
    "[cough]",
    "[whisper]",
    "[giggle]",
    "[um]",
    "[uh]",
    "[singing]",
    "[music]",
    "[en]",
    "[de]",
    "[ja]",
    "[zh-CN]",
]
SPECIALS += [f"[tag{i}]" for i in range(48 - len(SPECIALS))]  # and [START]: 49 as in Chatterbox's file
WHITE_SPACE = [chr(c) for c in range(0x3001) if chr(c).isspace()]
TRAINING = [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)[:12]]
PUNCTUATION = list("...,;:!?-—–“”‘’\"'()[]{}…、。？！¡¿/\\@#$%^&*+=<>|~`_")


def random_scalar(rng):
    """A code point of any plane, unassigned ones too, more often from the lower ones."""
    while True:
        c = rng.randrange(rng.choice([0x80, 0x300, 0x3000, 0x10000, 0x20000, 0x110000]))
        if not 0xD800 <= c <= 0xDFFF:
            return chr(c)


def random_piece(rng, words):
    kind = rng.randrange(12)
    if kind < 4:
        return rng.choice(words)
    if kind == 4:
        return rng.choice([*SPECIALS, "[START]"])
    if kind == 5:  # nearly a tag, nested brackets
        tag = rng.choice([*SPECIALS, "[START]"])
        return rng.choice(
            ["[" + tag, tag + "]", tag[:-1], tag[1:], tag.lower(), tag.upper(), tag[:3] + tag, f"[{tag}]"]
        )
    if kind == 6:
        return rng.choice(WHITE_SPACE) * rng.randrange(1, 4)
    if kind == 7:
        return "".join(rng.choices(PUNCTUATION, k=rng.randrange(1, 5)))
    if kind == 8:
        return "".join(random_scalar(rng) for _ in range(rng.randrange(1, 6)))
    if kind == 9:  # combining marks on letters, and alone
        return rng.choice(["e", "ä", "", "あ"]) + "".join(chr(rng.randrange(0x300, 0x370)) for _ in range(3))
    if kind == 10:
        return rng.choice(
            [
                "👩‍👩‍👧",
                "🇩🇪",
                "ß",
                "ŉ",
                "ﬁ",
                "İ",
                "ı",
                "ǆ",
                "Ω",
                "ñ",
                "日本語",
                "한국어",
                "مرحبا",
                "שָׁלוֹם",
                "\u200d",
                "\0",
            ]
        )
    return str(rng.randrange(10**6)) + rng.choice(["", "st", "%", "_x", "²", "½"])


def random_texts(seed, count, longest=40):
    rng = random.Random(seed)
    words = " ".join(TRAINING).split()
    texts = ["", " ", "  ", "a", "[SPACE]", "[[SPACE]]", "[SPACE", "[START][STOP]", "\n", "\u3000", "\x1c", "\ufeff"]
    while len(texts) < count:
        pieces = [random_piece(rng, words) for _ in range(rng.randrange(1, longest))]
        texts.append(rng.choice(["", " ", " ", "  "]).join(pieces))
    return texts
