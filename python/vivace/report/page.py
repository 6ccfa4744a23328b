"""The page itself: machine, headline figures, charts with their tables. One file, nothing fetched."""

from collections.abc import Sequence
from html import escape

from vivace.bench.output import fact_text, plain
from vivace.bench.tables import Table
from vivace.report import style
from vivace.report.figures import Figure, figures, heads
from vivace.report.svg import size

NOUNS = {"generate": "Generation", "step": "Token step", "forward": "Attention", "decode": "Decode attention"}
MARGIN = 20  # pixels around a standalone figure

#: What is said about the machine, line by line.
FACT_LINES = {
    "Machine": ("gpu", "cpu", "threads", "memory_gib", "power_limit_w", "clock_max_mhz", "clock_mhz_median"),
    "Versions": ("vivace", "commit", "torch", "cuda", "cudnn", "driver", "transformers", "date"),
    "At most": ("matmul_tflops", "copy_gb_s", "read_gb_s"),
}
FACTS = tuple(name for names in FACT_LINES.values() for name in names)


def page(rows: Sequence[dict], title: str = "vivace, measured") -> str:
    """The report of the rows as HTML."""
    facts = merged_facts(rows)
    machine = str(facts.get("gpu") or facts.get("cpu") or "one machine")
    parts = [
        f"<header><div><h1>{escape(title)}</h1><p class=muted>on {escape(machine)}</p></div>"
        "<button type=button hidden>light / dark</button></header>",
        f"<dl class=facts>{''.join(fact_line(title, names, facts) for title, names in FACT_LINES.items())}</dl>",
    ]
    notes = notes_of(rows)
    if notes:
        parts.append(f"<div class=notes>{''.join(f'<p>{escape(note)}</p>' for note in notes)}</div>")
    cards = "".join(
        f"<div class=head><b>{escape(value)}</b><span>{escape(text)}</span></div>" for value, text in heads(rows)
    )
    if cards:
        parts.append(f"<div class=heads>{cards}</div>")
    parts += [section(figure) for figure in figures(rows)]
    parts.append(
        "<footer><p>Medians of repeated samples, candidates in turns on one machine; ratios above 1 mean that vivace "
        "is faster. Measured by <code>vivace bench</code>, drawn by <code>vivace report</code>.</p></footer>"
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style.THEMES}{style.CHART}{style.PAGE}</style></head>"
        f"<body><main>{''.join(parts)}</main><script>{style.SCRIPT}</script></body></html>\n"
    )


def section(figure: Figure) -> str:
    head = f'<section id="{figure.name}"><h2>{escape(figure.title)}</h2>'
    below = "".join(table(one) for one in figure.tables)
    if figure.draw is None:
        return f"{head}{below}</section>"
    drawn = "".join(
        f'<div class="{name}">{figure.draw(narrow)}</div>' for name, narrow in (("wide", False), ("narrow", True))
    )
    details = f"<details><summary>The numbers as a table</summary>{below}</details>" if below else ""
    return f"{head}<p class=muted>{escape(figure.text)}</p><figure>{drawn}</figure>{details}</section>"


def table(one: Table) -> str:
    def cells(tag, line):
        return "".join(
            f"<{tag}{' class=left' if i in one.left else ''}>{escape(text)}</{tag}>" for i, text in enumerate(line)
        )

    body = "".join(f"<tr>{cells('td', line)}</tr>" for line in one.lines)
    note = f"<p class=muted>{escape(one.note)}</p>" if one.note else ""
    return (
        f"<div class=scroll><table><caption>{escape(one.title + one.constants)}</caption>"
        f"<thead><tr>{cells('th', one.headings)}</tr></thead><tbody>{body}</tbody></table></div>{note}"
    )


def standalone(svg: str, theme: str | None = None) -> str:
    """An SVG as a file of its own, with its rules inside: of one theme, or following the reader's."""
    rules = style.THEMES.replace(":root", "svg")
    if theme is not None:
        rules = f"svg{{{style.variables(0 if theme == 'light' else 1)}}}"
    ground = f'<rect x="-{MARGIN}" y="-{MARGIN}" width="100%" height="100%" style="fill:var(--card)"/>'
    head, body = svg.split(">", 1)
    return f"{pad(head)}><style>{rules}{style.CHART}</style>{ground}{body}\n"


def pad(head: str, margin: int = MARGIN) -> str:
    """The opening tag of an SVG with a margin around its picture."""
    wide, high = (value + 2 * margin for value in size(head))
    start, _, rest = head.partition(' viewBox="')
    rest = rest.partition('"')[2].partition(' height="')[2].partition('"')[2]
    box = f'viewBox="{-margin} {-margin} {wide:g} {high:g}" width="{wide:g}" height="{high:g}"'
    return f"{start} {box}{rest}"


def merged_facts(rows: Sequence[dict]) -> dict:
    """A fact of all runs: its value, or the values where they differ."""
    found = {}
    for name in FACTS:
        values = list(dict.fromkeys(plain(name, row[name]) for row in rows if name in row))
        if values:
            if name == "date":
                values = sorted({value[:10] for value in values})
            elif name in ("matmul_tflops", "copy_gb_s", "read_gb_s", "clock_mhz_median"):
                numbers = sorted({float(value) for value in values})
                values = [f"{n:g}" for n in (numbers if len(numbers) == 1 else [numbers[0], numbers[-1]])]
                found[name] = "–".join(values)
                continue
            found[name] = ", ".join(values)
    return found


def fact_line(title: str, names: Sequence[str], facts: dict) -> str:
    known = "".join(fact(name, facts[name]) for name in names if name in facts)
    return f"<dt>{title}</dt><dd>{known}</dd>" if known else ""


def fact(name: str, value) -> str:
    label, _, text = fact_text(name, value).partition(": ")
    return f"<span>{escape(label)} <b>{escape(text)}</b></span>"


def notes_of(rows: Sequence[dict]) -> list[str]:
    """What makes figures weaker than they look."""
    notes = []
    if any(row.get("device") == "cpu" for row in rows):
        notes.append("Measured on a CPU, in part with a tiny model: these figures say nothing about a GPU.")
    machines = {str(row.get("gpu") or row.get("cpu")) for row in rows}
    if len(machines) > 1:
        notes.append(f"Of different machines ({', '.join(sorted(machines))}): compare within one section only.")
    for op in ("generate", "step", "forward", "decode"):
        held = sorted({row["throttled"] for row in rows if row["op"] == op and "throttled" in row})
        notes += [f"{NOUNS[op]}: clocks were held down by {text}." for text in held[:1]]
    failed = [row for row in rows if "error" in row]
    if failed:
        notes.append(f"{len(failed)} of {len(rows)} measurements failed; the tables say why.")
    return notes
