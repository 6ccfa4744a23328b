"""The C++ tokenizer, punc_norm and Unicode tables against `tokenizers`, Chatterbox and this Python.

The C++ side is the program tokenize_lines (tests/host/tokenize_lines.cpp).
"""

import ast
import importlib.util
import json
import random
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from programs import built
from texts import PUNCTUATION, SPECIALS, TRAINING, WHITE_SPACE, random_scalar, random_texts

tokenizers = pytest.importorskip("tokenizers")

TOOL = built("tokenize_lines")
pytestmark = pytest.mark.skipif(TOOL is None, reason="tokenize_lines is not built (VIVACE_BUILD_TESTS=ON)")


def run_tool(what, texts=()):
    """What the C++ side makes of each text."""
    lines = "".join(json.dumps(text) + "\n" for text in texts)
    done = subprocess.run([TOOL, str(what)], input=lines.encode(), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return [json.loads(line) for line in done.stdout.decode().splitlines()]


# Tokenizer files


def train(vocab_size=704, **model):
    """A tokenizer.json of Chatterbox's format: BPE of 704 tokens, [STOP] 0, [UNK] 1, [SPACE] 2, [START] 255."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="[UNK]", **model))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - 1, special_tokens=SPECIALS, limit_alphabet=300, show_progress=False
    )
    bpe.train_from_iterator(TRAINING + ["ä ö ü é ñ 日 本 e\u0301"] * 3, trainer)
    data = json.loads(bpe.to_str())
    order = sorted(data["model"]["vocab"], key=data["model"]["vocab"].get)
    order.insert(255, "[START]")
    data["model"]["vocab"] = {token: index for index, token in enumerate(order)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    specials = sorted([*SPECIALS, "[START]"], key=order.index)
    data["added_tokens"] = [{"id": order.index(token), "content": token, **flags} for token in specials]
    return data


@pytest.fixture(scope="module")
def chatterbox_json():
    data = train()
    assert len(data["model"]["vocab"]) == 704 and len(data["added_tokens"]) == 49
    return data


def library_ids(library, text):
    """None where the library fails: it cannot strip white space that is an added token itself."""
    try:
        return library.encode(text).ids
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        return None


def check_parity(path, data, texts, english=False):
    path.write_text(json.dumps(data))
    library = tokenizers.Tokenizer.from_file(str(path))
    inputs = [text.replace(" ", "[SPACE]") for text in texts] if english else texts
    expected = [library_ids(library, text) for text in inputs]
    assert expected.count(None) < len(texts) / 20
    for text, ours, theirs in zip(texts, run_tool(path, texts), expected, strict=True):
        assert theirs is None or ours == theirs, f"{text!r} in {path}"
    return expected


def test_encode_equals_the_library_on_twelve_thousand_texts(chatterbox_json, tmp_path):
    texts = random_texts(seed=1, count=12_000)
    ids = check_parity(tmp_path / "tokenizer.json", chatterbox_json, texts, english=True)
    used = {token for row in ids for token in row}
    assert len(used) > 600 and {0, 1, 2, 255} <= used, "the texts leave much of the vocabulary out"


def test_merges_written_as_one_string_mean_the_same(chatterbox_json, tmp_path):
    data = json.loads(json.dumps(chatterbox_json))
    data["model"]["merges"] = [" ".join(pair) for pair in data["model"]["merges"]]
    check_parity(tmp_path / "tokenizer.json", data, random_texts(seed=2, count=500), english=True)


def test_texts_of_ten_thousand_characters_encode_equally(chatterbox_json, tmp_path):
    rng = random.Random(3)
    texts = ["a" * 10_000, "ab" * 5_000, "\U0001f600" * 10_000, " " * 10_000, "[" * 10_000, "[laugh" * 1_700]
    texts += ["".join(rng.choices("etaoinshr", k=10_000)) for _ in range(8)]
    texts += [" ".join(random_texts(seed=4, count=400, longest=8))[:10_000] for _ in range(4)]
    texts += ["".join(random_scalar(rng) for _ in range(10_000)) for _ in range(4)]
    check_parity(tmp_path / "tokenizer.json", chatterbox_json, texts, english=True)


def test_a_word_of_a_million_letters_takes_seconds_not_hours(chatterbox_json, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(chatterbox_json))
    begin = time.monotonic()
    (ids,) = run_tool(path, ["".join(random.Random(5).choices("etaoinshr", k=1_000_000))])
    assert 300_000 < len(ids) < 1_000_000
    assert time.monotonic() - begin < 30


def add_token(data, content, **flags):
    vocab = data["model"]["vocab"]
    taken = [*vocab.values(), *(token["id"] for token in data["added_tokens"])]
    defaults = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    entry = {"id": vocab.get(content, max(taken) + 1), "content": content, **defaults, **flags}
    data["added_tokens"].append(entry)


@pytest.mark.parametrize("seed", range(6))
def test_added_tokens_with_every_flag_are_cut_out_equally(chatterbox_json, tmp_path, seed):
    rng = random.Random(seed)
    data = json.loads(json.dumps(chatterbox_json))
    data["added_tokens"] = data["added_tokens"][:20]
    contents = [
        "  ",
        "x y",
        "\n",
        "a",
        "ab",
        "abc",
        "aa",
        "the",
        "é",
        "日本",
        "[laugh",
        "laughter]",
        "\u3000",
        "]]",
        "-",
    ]
    for content in contents:
        flags = ["single_word", "lstrip", "rstrip", "normalized", "special"]
        add_token(data, content, **{name: rng.random() < 0.4 for name in flags})
    texts = random_texts(seed, 800)
    texts += ["".join(rng.choices([*contents, " ", "z", "_", "\u0301", "\t"], k=12)) for _ in range(1500)]
    check_parity(tmp_path / "tokenizer.json", data, texts, english=True)
    data["model"]["vocab"]["[space]"] = data["model"]["vocab"].pop("[SPACE]")  # the tool replaces spaces no more
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] != "[SPACE]"]
    check_parity(tmp_path / "tokenizer.json", data, texts)


@pytest.mark.parametrize("fuse_unk", [False, True])
@pytest.mark.parametrize("unk", ["[UNK]", None])
@pytest.mark.parametrize("pre_tokenizer", [True, False])
@pytest.mark.parametrize("ignore_merges", [False, True])
def test_options_of_the_model_mean_the_same(chatterbox_json, tmp_path, fuse_unk, unk, pre_tokenizer, ignore_merges):
    data = json.loads(json.dumps(chatterbox_json))
    data["model"].update(fuse_unk=fuse_unk, unk_token=unk, ignore_merges=ignore_merges)
    if not pre_tokenizer:
        data["pre_tokenizer"] = None
    check_parity(tmp_path / "tokenizer.json", data, random_texts(seed=6, count=400), english=True)


@pytest.mark.parametrize("seed", range(12))
def test_merges_in_random_order_and_to_the_same_token_encode_equally(tmp_path, seed):
    rng = random.Random(seed)
    vocab = {"[UNK]": 0, **{letter: i + 1 for i, letter in enumerate("abcd")}}
    merges = []
    while len(merges) < 40:
        left, right = rng.choices([token for token in vocab if token != "[UNK]" and len(token) < 4], k=2)
        vocab.setdefault(left + right, len(vocab))
        merges.append([left, right])  # some come twice: the later rank counts
    rng.shuffle(merges)
    model = {"type": "BPE", "unk_token": "[UNK]", "fuse_unk": bool(seed % 2), "vocab": vocab, "merges": merges}
    data = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "model": model}
    texts = ["".join(rng.choices("aabbccdde ", k=rng.randrange(40))) for _ in range(600)]
    check_parity(tmp_path / "tokenizer.json", data, texts)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(), min_size=1, max_size=50))
def test_any_text_that_hypothesis_finds_encodes_equally(chatterbox_json, tmp_path, texts):
    check_parity(tmp_path / "tokenizer.json", chatterbox_json, texts, english=True)


# Characters


def test_each_code_point_is_a_word_or_white_space_character_as_for_the_library():
    pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    rows = run_tool("unicode")[1:]
    assert len(rows) == 0x110000
    for start in range(0, 0x110000, 4096):
        block = [c for c in range(start, start + 4096) if not 0xD800 <= c <= 0xDFFF]
        text = "".join(f"a{chr(c)}a " for c in block)
        begins = {offsets: piece for piece, offsets in pre_tokenizer.pre_tokenize_str(text)}
        for index, c in enumerate(block):
            is_word = (4 * index, 4 * index + 3) in begins
            is_space = not is_word and (4 * index + 1, 4 * index + 2) not in begins
            assert rows[c][:2] == [is_word, is_space], hex(c)


def test_each_code_point_has_the_case_and_space_of_this_python():
    version, *rows = run_tool("unicode")
    differing = []
    for c in range(0x110000):
        if 0xD800 <= c <= 0xDFFF:
            continue
        char = chr(c)
        expected = [char.isspace(), char.islower(), char.upper() if char.islower() else ""]
        if rows[c][2:] != expected:
            differing.append(hex(c))
    if version == unicodedata.unidata_version:
        assert not differing
    else:  # another Unicode: it adds letters, and now and then a capital for an old one
        assert len(differing) < 200, differing


# Chatterbox itself

SITE = importlib.util.find_spec("chatterbox")
chatterbox = pytest.mark.skipif(SITE is None, reason="chatterbox-tts is not installed")


def chatterbox_punc_norm(module):
    """The function alone: importing the module would load audio libraries that are not needed here."""
    path = Path(SITE.submodule_search_locations[0]) / module
    functions = [node for node in ast.parse(path.read_text()).body if getattr(node, "name", "") == "punc_norm"]
    namespace = {}
    exec(compile(ast.Module(functions, []), str(path), "exec"), namespace)
    return namespace["punc_norm"]


@pytest.mark.chatterbox
@chatterbox
@pytest.mark.parametrize(("module", "variant"), [("tts.py", "punc_norm"), ("mtl_tts.py", "punc_norm_multilingual")])
def test_punc_norm_equals_chatterbox(module, variant):
    rng = random.Random(7)
    punc_norm = chatterbox_punc_norm(module)
    texts = random_texts(seed=8, count=6_000)
    texts += [
        "".join(rng.choices([*PUNCTUATION, "...", " ", " ", "a", *WHITE_SPACE], k=rng.randrange(12)))
        for _ in range(9000)
    ]
    texts += [random_scalar(rng) + "b" for _ in range(3000)]
    if sys.version_info[:2] == (3, 11):  # the tables' Unicode: every lower-case letter, else the older ones
        texts += [chr(c) + "b" for c in range(0x110000) if chr(c).islower()]
    else:
        texts += [chr(c) + "b" for c in range(0x250) if chr(c).islower() and c != 0x19B]
        texts = [text for text in texts if not text or ord(text[0]) < 0x250]
    for text, got in zip(texts, run_tool(variant, texts), strict=True):
        assert got == punc_norm(text), repr(text)


@pytest.mark.chatterbox
@chatterbox
def test_english_tokenizer_equals_chatterbox(chatterbox_json, tmp_path):
    pytest.importorskip("huggingface_hub")
    path = Path(SITE.submodule_search_locations[0]) / "models" / "tokenizers" / "tokenizer.py"
    spec = importlib.util.spec_from_file_location("chatterbox_tokenizer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(chatterbox_json))
    theirs = module.EnTokenizer(str(file))
    texts = random_texts(seed=9, count=3_000)
    for text, got in zip(texts, run_tool(file, texts), strict=True):
        assert got == theirs.encode(text), repr(text)


# What is refused


def remove_start(data):
    del data["model"]["vocab"]["[START]"]
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] != "[START]"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(normalizer={"type": "Lowercase"}), "normalizer is an object, expected null: not supported"),
        (lambda d: d.update(post_processor={"type": "ByteLevel"}), "post_processor"),
        (
            lambda d: d["pre_tokenizer"].update(type="ByteLevel"),
            'pre_tokenizer.type is "ByteLevel", expected "Whitespace"',
        ),
        (lambda d: d["model"].update(type="Unigram"), 'model.type is "Unigram", expected "BPE"'),
        (lambda d: d["model"].update(byte_fallback=True), "model.byte_fallback is true"),
        (lambda d: d["model"].update(dropout=0.1), "model.dropout is 0.1"),
        (lambda d: d["model"].update(unk_token="nope"), "model.unk_token"),
        (lambda d: d["model"]["merges"].append(["zz", "zzz"]), "model.merges["),
        (lambda d: d["model"]["vocab"].update(bad=-1), "model.vocab.bad is -1"),
        (lambda d: d["model"].pop("vocab"), "model.vocab is missing"),
        (lambda d: d["added_tokens"][0].update(id=7), "added_tokens[0].id is 7, expected 0"),
        (lambda d: add_token(d, "[new]") or d["added_tokens"][-1].update(id=900), "is 900, expected 704"),
        (remove_start, 'no token "[START]"'),
    ],
)
def test_a_file_that_asks_for_more_is_refused_by_name(chatterbox_json, tmp_path, change, message):
    data = json.loads(json.dumps(chatterbox_json))
    change(data)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(data))
    done = subprocess.run([TOOL, str(path)], input=b"", capture_output=True, check=False)
    assert done.returncode == 1
    assert message in done.stderr.decode() and str(path) in done.stderr.decode()
