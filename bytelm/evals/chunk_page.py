"""Chunks of a text as a self-contained HTML page: colours, a hover card for every character, figures; a slider over
training steps where there are several states of a model. The page's own code is chunk_page.html."""

import base64
import html
import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from bytelm.boundaries import Boundaries, chunk_stats
from bytelm.vocab import utf8_length


@dataclass(frozen=True)
class Snapshot:
    """The boundaries of the text at one state of a model."""

    label: str
    levels: list[Boundaries]


def characters(text: bytes) -> list[tuple[str, int, int]]:
    """(what to show, first byte, bytes) of every character. Controls, and bytes outside characters, show as \\xNN."""
    out, at = [], 0
    while at < len(text):
        size = utf8_length(text[at])
        piece = text[at : at + size]
        try:
            shown = piece.decode("utf-8")
        except UnicodeDecodeError:
            size, shown = 1, f"\\x{text[at]:02X}"
        if shown not in "\n\r\t" and unicodedata.category(shown[0]) == "Cc":
            shown = "".join(f"\\x{byte:02X}" for byte in piece)  # an escape would command the terminal
        out.append((shown, at, size))
        at += size
    return out


def level_rows(text: bytes, levels: Sequence[Boundaries]) -> list[list[str]]:
    """The figures of each level, as text for a table (see `LEVEL_COLUMNS`)."""
    rows = []
    for i, level in enumerate(levels):
        s = chunk_stats(text, level)
        rows.append([
            str(i), f"{s.chunks:,}", f"{s.bytes_per_chunk:.2f}", " / ".join(map(str, s.lengths)),
            f"{100 * s.at_space:.0f} % ({100 * s.bytes_at_space:.0f} % of bytes)",
            f"{100 * s.inside_character:.0f} % ({100 * s.bytes_inside_character:.0f} %)", f"{s.mean_probability:.3f}",
        ])  # fmt: skip
    return rows


LEVEL_COLUMNS = ("level", "chunks", "bytes per chunk", "length p10 / p50 / p90 / p99", "starts at white space",
                 "starts inside a character", "mean probability")  # fmt: skip


def chunk_page(text: bytes, snapshots: Sequence[Snapshot], title: str, picture: Path | None = None) -> str:
    """The page. `picture` (a PNG, such as a run's loss plot) is put inside it."""
    data = {
        "characters": characters(text),
        "bytes": list(text),
        "columns": LEVEL_COLUMNS,
        "snapshots": [
            {"label": shot.label, "rows": level_rows(text, shot.levels), "levels": [_level(lv) for lv in shot.levels]}
            for shot in snapshots
        ],
    }
    image = ""
    if picture is not None and picture.exists():
        image = f'<img alt="loss" src="data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}">'
    content = json.dumps(data).replace("</", "<\\/")  # a text may hold </script>
    page = resources.files("bytelm.evals").joinpath("chunk_page.html").read_text(encoding="utf-8")
    parts = {"TITLE": html.escape(title), "IMAGE": image, "DATA": content}
    return re.sub("TITLE|IMAGE|DATA", lambda found: parts[found[0]], page)


def _level(level: Boundaries) -> dict[str, Any]:
    return {
        "offset": level.offset.tolist(),
        "p": [round(float(p), 4) for p in level.probability],
        "cut": level.cut.astype(int).tolist(),
    }
