"""The flags of `vivace report`, and what it writes."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def add_parser(commands) -> None:
    """Adds `report` to the command's subparsers."""
    report = commands.add_parser(
        "report",
        help="runs of vivace bench as one page with figures and tables",
        description="Runs of vivace bench as one self-contained page (-o), its figures as files (--figures), its "
        "tables as markdown (--markdown).",
    )
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN.json", help="written by vivace bench; or .csv")
    report.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="the page (report.html, where nothing is asked)"
    )
    report.add_argument(
        "--figures", type=Path, metavar="DIR", help="each figure as SVG, and as PNG where a Chromium is installed"
    )
    report.add_argument("--markdown", action="store_true", help="print the tables as markdown")
    report.add_argument("--title", default="vivace, measured", help="of the page")
    report.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Writes what was asked for."""
    from vivace.bench.output import read, write
    from vivace.report import markdown, page

    rows = [row for path in arguments.runs for row in read(path)]
    if not rows:
        raise ValueError("vivace report: the runs have no rows")
    output = arguments.output
    if output is None and arguments.figures is None and not arguments.markdown:
        output = Path("report.html")
    if output is not None:
        write(output, page.page(rows, arguments.title))
        say(f"wrote {output}")
    if arguments.figures is not None:
        say(f"wrote {', '.join(write_figures(rows, arguments.figures))} in {arguments.figures}")
    if arguments.markdown:
        print(markdown.text(rows), end="")
    return 0


def write_figures(rows: Sequence[dict], folder: Path) -> list[str]:
    """NAME.svg follows the reader's theme; NAME.png and NAME-dark.png are twice its size in pixels."""
    from vivace.bench.output import write
    from vivace.report import browser, page
    from vivace.report.figures import figures
    from vivace.report.svg import size as svg_size

    names = []
    for figure in figures(rows):
        if figure.draw is None:
            continue
        svg = figure.draw(False)
        write(folder / f"{figure.name}.svg", page.standalone(svg))
        names.append(f"{figure.name}.svg")
        if browser.find() is None:
            continue
        for theme, ending in (("light", ""), ("dark", "-dark")):
            single = page.standalone(svg, theme)
            source = folder / f".{figure.name}.svg"
            write(source, single)
            try:
                width, height = map(round, svg_size(single))
                browser.screenshot(source.resolve().as_uri(), folder / f"{figure.name}{ending}.png", width, height)
            finally:
                source.unlink()
            names.append(f"{figure.name}{ending}.png")
    if browser.find() is None:
        say(f"no PNGs: there is none of {', '.join(browser.BROWSERS)} (VIVACE_BROWSER names another)")
    return names


def say(text: str) -> None:
    print(f"vivace report: {text}", file=sys.stderr)
