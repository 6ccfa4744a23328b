"""A demo tokenizer in the format of Chatterbox's tokenizer.json, for a model without a checkpoint.

It has the same structure (BPE over whitespace-separated pieces, a [SPACE] token, 704 entries, the same special ids) and
merges of its own, learned from the text below. With a checkpoint, use the checkpoint's tokenizer.
"""

import itertools
import json
import re
from collections import Counter
from pathlib import Path

from vivace.t3.config import ENGLISH_TEXT_VOCAB

SPECIAL_IDS = {"[STOP]": 0, "[UNK]": 1, "[SPACE]": 2, "[START]": 255}
MERGES = 420  # leaves room for the characters

TEXT = """
The morning train was late again, so everyone on the platform had time to read the paper, drink their coffee and look at
the sky. Nobody was angry. A woman with a red umbrella told her neighbour about the weather in the north, where it had
been raining for three weeks without stopping, and about her brother, who would not leave his house because the river
was too high. "What should he do?" she asked. "He could come and stay with us, but who would take care of the horses?"
An old man answered that horses are better swimmers than people think. When he was young, he said, he had seen a whole
herd cross the water at night, under a bright moon, following one another slowly and quietly as though they were walking
in a dream. Then the train came, the doors opened, and the story was lost in the noise of voices, suitcases and music.
I have often thought about that evening since. There is something in the way people speak to each other while they are
waiting, something which is different from every other kind of talking: it has no purpose, it asks for nothing, and yet
it is never empty. Words like these are made of breath and light. You hear them once, you forget them before you reach
the next station, and many years later, in another country, a single sentence comes back to you with its own tone, its
own speed, its small mistakes and its laughter. That is how we remember those we loved. Not their faces, which change,
nor their hands, but the sound of them calling from the kitchen, or singing under the stairs when they believed that no
one was listening. Please listen, then. Speak clearly, breathe between the phrases, and let the silence do its work. It
will be worth your while. Thank you very much, good night, and see you tomorrow at seven, eight or nine o'clock!
"""


def learn_merges(text: str, count: int) -> list[tuple[str, str]]:
    """Byte-pair encoding (arXiv 1508.07909): the most frequent adjacent pair of symbols, again and again.

    Of equally frequent pairs the first in the alphabet wins, so the result depends on the text alone.
    """
    words = Counter(tuple(word) for word in re.findall(r"\w+|[^\w\s]+", text))
    merges = []
    while len(merges) < count:
        pairs: Counter = Counter()
        for word, frequency in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += frequency
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        merged: Counter = Counter()
        for word, frequency in words.items():
            merged[_merge(word, best)] += frequency
        words = merged
    return merges


def _merge(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    symbols, i = [], 0
    while i < len(word):
        if word[i : i + 2] == pair:
            symbols.append(word[i] + word[i + 1])
            i += 2
        else:
            symbols.append(word[i])
            i += 1
    return tuple(symbols)


def demo_tokenizer() -> dict:
    """The contents of tokenizer.json: 704 entries, always the same."""
    merges = learn_merges(TEXT, MERGES)
    # Printable ASCII, then Latin-1 letters and on until the vocabulary is full.
    characters = (chr(code) for code in itertools.chain(range(0x21, 0x7F), range(0xA1, 0x24F)) if chr(code) != "\xad")
    ascii_characters = list(itertools.islice(characters, 94))
    symbols = [*ascii_characters, *dict.fromkeys(a + b for a, b in merges)]
    free = [i for i in range(ENGLISH_TEXT_VOCAB) if i not in SPECIAL_IDS.values()]
    symbols += itertools.islice(characters, len(free) - len(symbols))
    vocab = SPECIAL_IDS | dict(zip(symbols, free, strict=True))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": content,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for content, i in SPECIAL_IDS.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "[UNK]",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])),
            "merges": [f"{a} {b}" for a, b in merges],
        },
    }


def write_demo_tokenizer(path: str | Path) -> None:
    Path(path).write_text(json.dumps(demo_tokenizer(), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
