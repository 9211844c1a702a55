"""Chunks of a text in the terminal, one block a level."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bytelm.boundaries import Boundaries
from bytelm.evals.chunk_page import LEVEL_COLUMNS, characters, level_rows

_COLOURS = ("black on bright_cyan", "black on bright_yellow", "black on bright_green")


def print_chunks(text: bytes, levels: Sequence[Boundaries], console: Console) -> None:
    """Every level's chunks in alternating colours (bars between them where there are no colours), and a table."""
    pieces = characters(text)
    for i, level in enumerate(levels):
        console.print(Text(f"level {i}", style="bold"))
        console.print(_coloured(pieces, level, plain=not console.is_terminal or console.no_color), soft_wrap=True)
        console.print()
    table = Table(box=None, pad_edge=False)
    for name in LEVEL_COLUMNS:
        table.add_column(name)
    for row in level_rows(text, levels):
        table.add_row(*row)
    console.print(table)


def _coloured(pieces: list[tuple[str, int, int]], level: Boundaries, plain: bool) -> Text:
    starts, out, chunk = set(level.starts.tolist()), Text(), 0
    for shown, first, size in pieces:
        cuts = sum(byte in starts for byte in range(first, first + size))
        chunk += cuts
        if plain:
            out.append("|" * (first in starts) + shown + "¦" * (cuts - (first in starts)))
        else:
            mark = "underline " if cuts > (first in starts) else ""  # a boundary inside the character
            for line in shown.splitlines(keepends=True):
                out.append(line, style=None if line.isspace() and "\n" in line else mark + _COLOURS[chunk % 3])
    return out
