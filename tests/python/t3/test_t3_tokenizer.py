"""The demo tokenizer."""

import json

import pytest

from vivace.t3.tokenizer import demo_tokenizer, learn_merges, write_demo_tokenizer


def test_merges_are_learned_most_frequent_pair_first():
    assert learn_merges("aab aab ab", 9) == [("a", "b"), ("a", "ab")]
    assert learn_merges("ba ab", 1) == [("a", "b")]  # of equals, the first in the alphabet


def test_the_vocabulary_has_704_entries_and_chatterboxs_special_ids():
    model = demo_tokenizer()["model"]
    assert sorted(model["vocab"].values()) == list(range(704))
    assert {name: model["vocab"][name] for name in ("[STOP]", "[UNK]", "[SPACE]", "[START]")} == {
        "[STOP]": 0,
        "[UNK]": 1,
        "[SPACE]": 2,
        "[START]": 255,
    }
    for merge in model["merges"]:
        left, right = merge.split(" ")
        assert {left, right, left + right} <= model["vocab"].keys()


def test_it_is_the_same_every_time(tmp_path):
    write_demo_tokenizer(tmp_path / "a.json")
    write_demo_tokenizer(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_the_tokenizers_library_reads_it_and_text_survives(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    write_demo_tokenizer(tmp_path / "tokenizer.json")
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = 'The "morning" train, 42 voices & naïve café!'
    encoding = tokenizer.encode(text.replace(" ", "[SPACE]"))
    vocab = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    names = {i: name for name, i in vocab.items()}
    assert "".join(names[i] for i in encoding.ids).replace("[SPACE]", " ") == text
    assert 1 not in encoding.ids
    assert len(encoding.ids) < len(text)
    assert tokenizer.encode("日").ids == [1]
