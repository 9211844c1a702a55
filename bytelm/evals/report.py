"""An evaluation as one HTML page that needs nothing beside it: headline table, pictures, a table a suite, and how each
model cuts a passage."""

import base64
import html
import itertools
from collections.abc import Mapping
from pathlib import Path

from bytelm.evals.plots import draw
from bytelm.evals.summary import Summary, Table

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2733; max-width: 1200px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p.about { color: #55606e; margin: .2rem 0 .6rem; max-width: 75ch; }
div.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13.5px; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #e3e7ec; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
th { font-weight: 600; vertical-align: bottom; white-space: normal; min-width: 4.5rem; }
figure { margin: 1rem 0; } figcaption { color: #55606e; font-size: 13px; } img { max-width: 100%; }
.cut { white-space: pre-wrap; font: 14px/1.9 ui-monospace, monospace; }
.cut span { border-radius: 3px; background: #d7e6f7; } .cut span:nth-child(even) { background: #fbe3d6; }
footer { color: #55606e; font-size: 13px; margin-top: 3rem; }
"""


def write_report(summary: Summary, folder: Path, title: str, facts: Mapping[str, str]) -> Path:
    """Writes report.html and its pictures into a folder. `facts`: what was measured, on what, with which versions."""
    pictures = draw(summary, folder)
    parts = [f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"
             f"<meta name=viewport content='width=device-width, initial-scale=1'><style>{STYLE}</style>"
             f"<h1>{html.escape(title)}</h1>", _table(summary.headline())]  # fmt: skip
    for path, caption in pictures:
        image = base64.b64encode(path.read_bytes()).decode()
        parts.append(f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{image}">'
                     f"<figcaption>{html.escape(caption)}</figcaption></figure>")  # fmt: skip
    for table in summary.tables():
        parts.append(f"<h2>{html.escape(table.title)}</h2><p class=about>{html.escape(table.about)}</p>{_table(table)}")
    parts.append(_passages(summary))
    rows = "".join(f"<tr><td>{html.escape(k)}<td style='text-align:left'>{html.escape(v)}" for k, v in facts.items())
    parts.append(f"<footer><h2>What was measured</h2><div class=wide><table>{rows}</table></div></footer>")
    target = folder / "report.html"
    target.write_text("\n".join(parts), encoding="utf-8")
    return target


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(name)}" for name in table.columns)
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in row) for row in table.rows)
    return f"<div class=wide><table><tr>{head}{rows}</table></div>"


def _passages(summary: Summary) -> str:
    out = []
    for model in summary.models:
        result = summary.of(model, "chunks").get("text")
        if result is None or "passage" not in result.details:
            continue
        text = result.details["passage"].encode()
        for level, starts in enumerate(result.details["starts"]):
            bounds = [0, *starts, len(text)]
            units = (text[a:b].decode("utf-8", "backslashreplace") for a, b in itertools.pairwise(bounds))
            spans = "".join(f"<span>{html.escape(unit)}</span>" for unit in units)
            name = f"{model}, level {level}" if len(result.details["starts"]) > 1 else model
            out.append(f"<p class=about>{html.escape(name)}</p><div class=cut>{spans}</div>")
    return "<h2>Units of a passage</h2>" + "".join(out) if out else ""
