"""Colours and layout of the report: light, dark, narrow. The same rules stand in every standalone figure."""

#: (variable, light, dark). Contrast of text is at least 4.5 to the ground in both.
COLOURS = (
    ("ground", "#fbfaf8", "#14151a"),
    ("card", "#ffffff", "#1c1e25"),
    ("edge", "#e4e1db", "#31343e"),
    ("ink", "#1d1c1a", "#ecebe8"),
    ("muted", "#66625b", "#a09e99"),
    ("grid", "#ebe8e2", "#2a2d36"),
    ("own", "#d9480f", "#ff8a4c"),
    ("own2", "#8a6100", "#d9b24a"),
    ("blue", "#2f6fb3", "#6aa9ea"),
    ("teal", "#16816f", "#4fc0ab"),
    ("violet", "#7b53b5", "#b493ec"),
    ("grey", "#77736c", "#989590"),
    ("floor", "#e3dfd7", "#2d3039"),
)

SERIES = ("own", "own2", "blue", "teal", "violet", "grey")


def variables(column: int) -> str:
    return "".join(f"--{name}:{values[column]};" for name, *values in COLOURS)


THEMES = (
    f":root{{color-scheme:light;{variables(0)}}}"
    f"@media(prefers-color-scheme:dark){{:root{{color-scheme:dark;{variables(1)}}}}}"
    f":root[data-theme=light]{{color-scheme:light;{variables(0)}}}"
    f":root[data-theme=dark]{{color-scheme:dark;{variables(1)}}}"
)

FAMILY = "Inter,ui-sans-serif,system-ui,-apple-system,'Segoe UI',Roboto,'Noto Sans',sans-serif"

CHART = (
    f"svg text{{font:12px {FAMILY};fill:var(--ink);font-variant-numeric:tabular-nums}}"
    "svg .title{font-weight:600;font-size:13px}"
    "svg .muted,svg .tick{fill:var(--muted)}svg .tick{font-size:11px}"
    "svg .grid{stroke:var(--grid)}svg .zero{stroke:var(--grey)}"
    "svg .level{stroke:var(--muted);stroke-dasharray:2 4}"
    "svg .line{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}"
    "svg .line.own{stroke-width:3}svg .dashed{stroke-dasharray:5 5}"
    "svg .value{font-weight:600;paint-order:stroke;stroke:var(--card);stroke-width:3px;stroke-linejoin:round}"
    "svg .dot{stroke:var(--card);stroke-width:1.5}"
    "svg .area.floor{fill:var(--floor)}"
    + "".join(
        f"svg .line.{name}{{stroke:var(--{name})}}"
        f"svg .dot.{name},svg .bar.{name},svg .value.{name}{{fill:var(--{name})}}"
        for name in SERIES
    )
)

PAGE = (
    "*{box-sizing:border-box}"
    f"body{{margin:0;background:var(--ground);color:var(--ink);font:16px/1.55 {FAMILY};-webkit-text-size-adjust:100%}}"
    "main{max-width:1040px;margin:0 auto;padding:40px 24px 72px}"
    "header{display:flex;justify-content:space-between;align-items:flex-start;gap:16px}"
    "h1{font-size:34px;line-height:1.15;margin:0 0 6px;letter-spacing:-.02em}"
    "h2{font-size:22px;line-height:1.25;margin:0 0 4px;letter-spacing:-.01em}"
    "p{margin:0 0 10px;max-width:78ch;text-wrap:pretty}.muted{color:var(--muted)}"
    ".facts{font-size:14px;color:var(--muted);margin:18px 0 0;display:grid;grid-template-columns:auto 1fr;gap:6px 18px}"
    ".facts dt{font-weight:600}.facts dd{margin:0;display:flex;flex-wrap:wrap;gap:2px 18px}"
    ".facts b{font-weight:600;color:var(--ink)}"
    ".notes{margin:16px 0 0;padding:12px 16px;border-left:3px solid var(--own);background:var(--card);font-size:14px}"
    ".notes p{margin:0 0 4px;max-width:none}"
    ".heads{display:grid;grid-template-columns:repeat(auto-fit,minmax(210px,1fr));gap:14px;margin:28px 0 8px}"
    ".head{background:var(--card);border:1px solid var(--edge);border-radius:12px;padding:16px 18px}"
    ".head b{display:block;font-size:30px;line-height:1.15;letter-spacing:-.02em;color:var(--own);"
    "font-variant-numeric:tabular-nums}"
    ".head span{font-size:14px;color:var(--muted);display:block;margin-top:4px;line-height:1.4}"
    "section{background:var(--card);border:1px solid var(--edge);border-radius:14px;padding:24px 26px;margin:20px 0}"
    "figure{margin:18px 0 6px}figure svg{display:block;width:100%;height:auto}"
    ".narrow{display:none}"
    "details{margin-top:14px;border-top:1px solid var(--edge);padding-top:10px}"
    "summary{cursor:pointer;font-size:14px;color:var(--muted)}summary:hover{color:var(--ink)}"
    ".scroll{overflow-x:auto;margin:10px 0 0;-webkit-overflow-scrolling:touch}"
    "table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums;white-space:nowrap}"
    "th,td{padding:5px 10px;text-align:right;border-bottom:1px solid var(--grid)}"
    "th{font-weight:600;color:var(--muted);position:sticky;top:0;background:var(--card)}"
    "td.left,th.left{text-align:left}caption{text-align:left;font-size:13px;color:var(--muted);padding:6px 0}"
    "tr:hover td{background:var(--ground)}"
    "button{font:inherit;font-size:14px;color:var(--ink);background:var(--card);border:1px solid var(--edge);"
    "border-radius:999px;padding:6px 14px;cursor:pointer;white-space:nowrap}"
    "button:focus-visible,summary:focus-visible{outline:2px solid var(--own);outline-offset:2px}"
    "footer{font-size:14px;color:var(--muted);margin-top:28px}code{font-size:.92em}"
    "@media(max-width:640px){main{padding:24px 14px 48px}h1{font-size:27px}"
    "section{padding:18px 16px;border-radius:12px}"
    ".wide{display:none}.narrow{display:block}.heads{grid-template-columns:1fr 1fr;gap:10px}.head{padding:12px 14px}"
    ".head b{font-size:21px;white-space:nowrap}.head span{font-size:13px}"
    ".facts{grid-template-columns:1fr;gap:2px}.facts dd{margin-bottom:6px;gap:0 14px}}"
    "@media print{button{display:none}section{break-inside:avoid}}"
)

#: Follows the system until the reader chooses; a page without scripts follows the system.
SCRIPT = (
    "(function(){var r=document.documentElement,b=document.querySelector('button');"
    "if(/dark|light/.test(location.hash))r.dataset.theme=location.hash.slice(1);"
    "b.hidden=false;b.onclick=function(){var d=r.dataset.theme?r.dataset.theme==='dark':"
    "matchMedia('(prefers-color-scheme:dark)').matches;r.dataset.theme=d?'light':'dark'}})()"
)
