"""`vivace report`: the page, the figures as files, the tables as markdown."""

import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from vivace import cli
from vivace.report import browser, page


class Reader(HTMLParser):
    """Collects what a page would fetch, and whether its elements are closed."""

    EMPTY = ("meta", "rect", "line", "circle", "path")

    def __init__(self):
        super().__init__()
        self.open, self.fetched, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.fetched += [f"{tag} {n}={v}" for n, v in attributes if n in ("src", "href", "srcset", "data", "action")]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(text):
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    return reader


def test_the_page_is_whole_and_fetches_nothing(rows):
    text = page.page(rows)
    reader = read(text)
    assert reader.fetched == []
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", text)
    assert '<meta name="viewport" content="width=device-width' in text and "prefers-color-scheme:dark" in text
    assert len(text) < 400_000


def test_the_page_says_what_was_measured_and_on_what(rows):
    words = " ".join(read(page.page(rows)).text)
    assert "NVIDIA <H200>" in words and "580.1" in words and "abc1234" in words and "2026-11-22" in words
    assert "100 ×" in words and "40,000" in words and "0.33 ms" in words  # the head
    for title in ("Throughput and memory", "Times real time", "Token step", "Attention", "Decode attention"):
        assert title in words
    assert "12 GB card" in words and "24 GB card" in words and "plain read of the same bytes" in words
    assert "Generation of whole requests" in words and "Token step, milliseconds" in words  # the tables


def test_what_makes_figures_weak_is_said_at_the_top(rows):
    weak = [row | {"device": "cpu", "cpu": "AMD"} for row in rows]
    weak[0] |= {"throttled": "power limit in 5 of 18 seconds"}
    weak.append({"op": "step", "case": "s", "rows": 1, "tokens": 3, "error": "out of memory", "gpu": "another"})
    notes = page.notes_of(weak)
    assert any("CPU" in note for note in notes) and any("power limit in 5 of 18" in note for note in notes)
    assert any("1 of" in note and "failed" in note for note in notes) and any("different machines" in n for n in notes)
    assert page.notes_of(rows) == []
    assert "out of memory" in page.page(weak)


@pytest.mark.parametrize("op", ["generate", "step", "forward", "decode", "overhead"])
def test_any_part_of_a_run_makes_a_page(rows, op):
    some = [row for row in rows if row["op"] == op]
    read(page.page(some))
    read(page.page(some[:1]))


def test_a_run_with_nothing_but_failures_makes_a_page():
    failed = {"op": "forward", "case": "f", "d": 64, "causal": True, "s": 8, "heads": 1, "error": "no kernel"}
    text = page.page([failed])
    assert "no kernel" in text and "Further measurements" in text and "1 of 1 measurements failed" in text
    read(text)


def test_texts_of_the_rows_cannot_become_markup(rows):
    evil = [row | {"model": "<script>alert(1)</script>", "gpu": '"><img src=x>'} for row in rows]
    text = page.page(evil)
    assert "<script>alert" not in text and "<img" not in text and read(text).fetched == []


def test_the_command_writes_the_page_figures_and_tables(rows, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(browser, "find", lambda: None)
    run = tmp_path / "run.json"
    run.write_text(json.dumps(rows))
    figures = tmp_path / "figures"
    flags = ["-o", str(tmp_path / "r.html"), "--figures", str(figures), "--markdown", "--title", "Two & three"]
    assert cli.main(["report", str(run), *flags]) == 0
    text = capsys.readouterr()
    assert "<title>Two &amp; three</title>" in (tmp_path / "r.html").read_text()
    names = sorted(path.name for path in figures.iterdir())
    assert names == [f"{name}.svg" for name in ("attention", "decode", "generate", "overhead", "real-time", "step")]
    for path in figures.iterdir():
        root = ElementTree.parse(path).getroot()
        assert float(root.get("width")) == 976 and "prefers-color-scheme" in path.read_text()
    assert "no PNGs" in text.err
    assert "| 2 | 300 | sm90a | 0.330 | 3,000 | 0.240 | 1.38 | 2.04 (compile) | 6.2 |" in text.out
    assert (
        "`vivace plan` is off by " in text.out
        and "| vivace (bfloat16) | 64 |" in text.out
        and "### Attention" in text.out
    )
    assert "| 64 | causal | sm90a | 405 (1.10) | 441 (1.10) | 564 (1.10) |" in text.out


def test_a_file_that_is_no_run_is_named(tmp_path, capsys):
    path = tmp_path / "run.json"
    path.write_text("[1]")
    assert cli.main(["report", str(path)]) == 1
    assert str(path) in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path / "none.json")]) == 1
    path.write_text("[]")
    assert cli.main(["report", str(path)]) == 1 and "no rows" in capsys.readouterr().err
