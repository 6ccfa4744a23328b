"""The page in a real browser: on a desk and on a phone, light and dark, and the PNGs of the figures."""

import json
import re

import pytest

from vivace import cli
from vivace.report import browser, page, style

pytestmark = pytest.mark.skipif(
    browser.find() is None,
    reason=f"no browser: none of {', '.join(browser.BROWSERS)} is installed, and VIVACE_BROWSER is not set",
)
Image = pytest.importorskip("PIL.Image")
numpy = pytest.importorskip("numpy")

DARK = "--blink-settings=preferredColorScheme=0"
MEASURE = """<script>document.documentElement.dataset.measured=JSON.stringify({
  page: document.documentElement.scrollWidth, window: innerWidth, height: document.documentElement.scrollHeight,
  shown: [...document.querySelectorAll('figure svg[role]')].filter(e => e.parentElement.closest('svg') === null &&
    e.getBoundingClientRect().width > 0).map(e => [e.getBoundingClientRect().left, e.getBoundingClientRect().right]),
  button: document.querySelector('button').hidden,
  smallest: Math.min(...[...document.querySelectorAll('figure text')].filter(e => e.getBoundingClientRect().width > 0)
    .map(e => parseFloat(getComputedStyle(e).fontSize) * e.getScreenCTM().a))})</script>"""


@pytest.fixture
def opened(rows, tmp_path):
    """opened(): the page's address; opened(text): with more at its end."""

    def write(more=""):
        path = tmp_path / "report.html"
        path.write_text(page.page(rows).replace("</body>", f"{more}</body>"))
        return path.as_uri()

    return write


def colour(name, dark):
    value = next(values for known, *values in style.COLOURS if known == name)[int(dark)]
    return tuple(int(value[i : i + 2], 16) for i in (1, 3, 5))


def share(image, wanted):
    """Share of the pixels that have nearly this colour."""
    pixels = numpy.asarray(image.convert("RGB")).astype(int)
    return (abs(pixels - wanted).max(axis=-1) <= 8).mean()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1200, 390], ids=["desk", "phone"])
def test_the_page_shows_its_figures_in_its_theme(opened, tmp_path, width, dark):
    path = tmp_path / "shot.png"
    browser.screenshot(opened(), path, width, 2400, *([DARK] if dark else []), scale=1)
    image = Image.open(path)
    assert image.size == (width, 2400)
    assert share(image, colour("card", dark)) > 0.3 and share(image, colour("card", not dark)) < 0.02
    assert share(image, colour("own", dark)) > 0.002  # vivace's bars and lines


@pytest.mark.parametrize("width", [1200, 390, 320], ids=["desk", "phone", "small phone"])
def test_nothing_hangs_over_the_side_and_texts_can_be_read(opened, width):
    dom = browser.run(opened(MEASURE), "--dump-dom", f"--window-size={width},900")
    found = json.loads(re.search(r'data-measured="([^"]*)"', dom)[1].replace("&quot;", '"'))
    assert found["window"] == width and found["page"] <= width
    assert len(found["shown"]) == 6 and all(0 <= left < right <= width for left, right in found["shown"])
    assert found["smallest"] >= 8.5 and found["button"] is False


def test_the_reader_may_choose_the_other_theme(opened, tmp_path):
    path = tmp_path / "shot.png"
    browser.screenshot(opened("<script>document.querySelector('button').click()</script>"), path, 800, 600, scale=1)
    assert share(Image.open(path), colour("ground", True)) > 0.2
    browser.screenshot(opened() + "#dark", path, 800, 600, scale=1)
    assert share(Image.open(path), colour("ground", True)) > 0.2


def test_figures_are_written_as_pngs_of_both_themes(rows, tmp_path):
    run = tmp_path / "run.json"
    run.write_text(json.dumps(rows))
    assert cli.main(["report", str(run), "--figures", str(tmp_path)]) == 0
    for name in ("generate", "real-time", "step", "attention", "decode", "overhead"):
        for ending, dark in (("", False), ("-dark", True)):
            image = Image.open(tmp_path / f"{name}{ending}.png")
            assert image.width == 2 * 976
            assert share(image, colour("card", dark)) > 0.5 and share(image, colour("own", dark)) > 0.001
            ground = tuple(image.convert("RGB").getpixel((2, image.height - 3)))
            assert ground == colour("card", dark)
    assert not list(tmp_path.glob(".*.svg"))
