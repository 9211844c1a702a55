"""What a delete gate keeps of a text: in the terminal, and as an HTML page."""

import html

import numpy as np
from rich.console import Console
from rich.text import Text

from bytelm.boundaries import Boundaries
from bytelm.evals.chunk_page import characters

DELETED = "·"  # stands for a deleted character where there are no colours


def _kept(text: bytes, level: Boundaries) -> list[tuple[str, int, int, float]]:
    """(what to show, bytes, bytes kept, highest certainty of a byte to be kept) of every character."""
    return [
        (shown, size, int(level.cut[first : first + size].sum()), float(level.probability[first : first + size].max()))
        for shown, first, size in characters(text)
    ]


def _figures(text: bytes, level: Boundaries) -> str:
    data, cut = np.frombuffer(text, np.uint8), level.cut
    parts = [f"{int(cut.sum()):,} of {len(text):,} bytes kept ({1 - cut.mean():.1%} deleted)"]
    for name, members in (("white space", b" \t\n\r"), ("ASCII vowels", b"aeiouAEIOU"), ("digits", b"0123456789")):
        some = np.isin(data, list(members))
        if some.any():
            parts.append(f"{name} {1 - cut[some].mean():.0%}")
    return "; deleted of ".join([parts[0], ", ".join(parts[1:])]) if parts[1:] else parts[0]


def print_kept(text: bytes, level: Boundaries, console: Console) -> None:
    """Deleted characters struck out and dim (a dot where there are no colours, a line break kept), those of which some
    bytes are kept underlined; and figures."""
    plain = not console.is_terminal or console.no_color
    out = Text()
    for shown, size, kept, _ in _kept(text, level):
        if kept == 0 and plain:
            out.append(DELETED + "\n" * shown.endswith("\n"))
        else:
            out.append(shown, style="dim strike" if kept == 0 else "underline" if kept < size else "bold")
    console.print(out, soft_wrap=True)
    console.print()
    console.print(_figures(text, level), markup=False, soft_wrap=True)


_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body{{font:16px/1.6 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a}}
pre{{white-space:pre-wrap;overflow-wrap:anywhere;font:15px/1.7 ui-monospace,monospace}}
.d{{color:#b0453a;background:#fbe9e7;text-decoration:line-through}} .p{{background:#fff3cd}} .k{{background:#e3f2e6}}
p{{color:#555}}</style><h1>{title}</h1><p>{figures}</p>
<p><span class="k">kept</span> <span class="p">some bytes of the character kept</span> <span class="d">deleted</span>;
hold the pointer over a character to see how sure the gate is that it should be kept.</p><pre>{body}</pre></html>
"""


def kept_page(text: bytes, level: Boundaries, title: str) -> str:
    """A self-contained page of the text with what is deleted struck out."""
    body = []
    for shown, size, kept, sure in _kept(text, level):
        kind = "d" if kept == 0 else "p" if kept < size else "k"
        seen = html.escape(shown) if shown.strip() or kept else shown.replace(" ", "&nbsp;").replace("\n", "⏎\n")
        body.append(f'<span class="{kind}" title="kept: {sure:.3f}">{seen}</span>')
    return _PAGE.format(title=html.escape(title), figures=html.escape(_figures(text, level)), body="".join(body))
