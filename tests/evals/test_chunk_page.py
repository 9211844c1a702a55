"""Chunks on a page and in the terminal, and their figures."""

import io
import json
import re

import numpy as np
import pytest
from rich.console import Console

from bytelm.boundaries import Boundaries, LevelRow, chunk_stats, text_boundaries
from bytelm.evals.chunk_history import ChunkHistory
from bytelm.evals.chunk_page import Snapshot, characters, chunk_page, level_rows
from bytelm.evals.chunk_view import print_chunks
from bytelm.vocab import HNET_IDS

TEXT = "to be, naïve\n</script><b> \xe9".encode() + b"\xff\xe4\xbd"


def level(text, starts, offsets=None):
    offsets = np.arange(len(text)) if offsets is None else np.asarray(offsets)
    cut = np.isin(offsets, starts)
    return Boundaries(offsets, np.where(cut, 0.9, 0.2), cut)


def test_characters_cover_every_byte_once():
    found = characters(TEXT)
    assert sum(size for _, _, size in found) == len(TEXT)
    assert [first for _, first, _ in found] == list(np.cumsum([0, *(size for _, _, size in found)])[:-1])
    shown = [char for char, _, _ in found]
    assert "ï" in shown and "\\xFF" in shown and "\\xE4" in shown and "\\xBD" in shown


def test_controls_do_not_reach_the_terminal():
    shown = "".join(char for char, _, _ in characters("a\x1b[31m\x00\x9bb\n\t".encode()))
    assert shown == "a\\x1B[31m\\x00\\xC2\\x9Bb\n\t"


def test_a_title_that_looks_like_a_mark_of_the_page():
    page = chunk_page(b"abc", [Snapshot("", [level(b"abc", [0])])], "DATA IMAGE TITLE")
    assert "<title>DATA IMAGE TITLE</title>" in page and page.count('"characters"') == 1


def test_stats_of_known_chunks():
    text = "ab cd é x".encode()  # offsets: a0 b1 _2 c3 d4 _5 é6-7 _8 x9
    stats = chunk_stats(text, level(text, [0, 3, 7]))
    assert stats.chunks == 3 and stats.bytes_per_chunk == pytest.approx(10 / 3)
    assert stats.lengths == (3, 3, 4, 4) or stats.lengths[1] == 3
    assert stats.at_space == pytest.approx(1 / 3)  # byte 3 follows a space; 0 and 7 do not
    assert stats.bytes_at_space == pytest.approx(6 / 10)
    assert stats.inside_character == pytest.approx(1 / 3) and stats.bytes_inside_character == pytest.approx(1 / 10)
    none = chunk_stats(text, level(text, []))
    assert none.chunks == 0 and none.lengths == (10,) * 4


def test_page_holds_the_text_and_nothing_of_it_runs():
    page = chunk_page(TEXT, [Snapshot("step 1", [level(TEXT, [0, 3])]), Snapshot("step 2", [level(TEXT, [0])])], "<T>")
    assert "<title>&lt;T&gt;</title>" in page and "http" not in page.replace("http-equiv", "")
    stored = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1]
    data = json.loads(stored)  # the text's own </script> did not end it
    assert bytes(data["bytes"]) == TEXT and [s["label"] for s in data["snapshots"]] == ["step 1", "step 2"]
    assert data["snapshots"][0]["levels"][0]["cut"][:4] == [1, 0, 0, 1]


def test_terminal_shows_bars_without_colours_and_none_with():
    plain = io.StringIO()
    print_chunks(b"ab cd", [level(b"ab cd", [0, 3])], Console(file=plain, width=100))
    assert "|ab |cd" in plain.getvalue() and "level 0" in plain.getvalue()
    coloured = io.StringIO()
    console = Console(file=coloured, width=100, force_terminal=True, color_system="standard")
    print_chunks("aé\nb".encode(), [level("aé\nb".encode(), [2])], console)
    assert "\x1b[" in coloured.getvalue() and "|" not in coloured.getvalue().split("level", 2)[1].split("chunks")[0]


def test_rows_have_every_column():
    rows = level_rows(TEXT, [level(TEXT, [0, 3]), level(TEXT, [0], [0, 3])])
    assert [row[0] for row in rows] == ["0", "1"] and {len(row) for row in rows} == {7}


def test_history_goes_on_after_a_resume(tmp_path):
    history = ChunkHistory(tmp_path, 0, b"abc")
    for step in (2, 4, 6):
        history.add(step, [level(b"abc", [0])])
    again = ChunkHistory(tmp_path, 4, b"abc")  # what came after step 4 is done anew
    assert again.has(2) and again.has(4) and not again.has(6)
    assert not ChunkHistory(tmp_path, 4, b"other").has(2)
    (tmp_path / "chunks.jsonl").write_text("not json\n" + (tmp_path / "chunks.jsonl").read_text())
    assert ChunkHistory(tmp_path, 9, b"abc").has(6)
    again.write_report(tmp_path / "report.html", "run", tmp_path / "none.png")
    assert "step 4" in (tmp_path / "report.html").read_text()
    ChunkHistory(tmp_path, 0, b"").write_report(tmp_path / "none.html", "run", tmp_path / "none.png")
    assert not (tmp_path / "none.html").exists()


def test_windows_overlap_and_offsets_stay_the_callers():
    """A stand-in network that cuts where the id is a multiple of five, whatever the window."""

    def levels_of(row):
        padded, n = np.append(row, [0, 0, 0]), len(row) + 3
        return [LevelRow(np.arange(n, dtype=np.int32), np.ones(n, bool), padded / 256, padded % 5 == 0)]

    text = bytes(range(100, 200))
    (found,) = text_boundaries(levels_of, text, HNET_IDS, window=16)
    assert found.offset.tolist() == list(range(100)) and found.starts.tolist() == list(range(0, 100, 5))
    assert text_boundaries(levels_of, b"", HNET_IDS, window=16)[0].offset.size == 0
