"""Results on disk: what a stopped or foreign evaluation keeps, which are shown together, the headline."""

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from bytelm.config import ConfigError
from bytelm.evals.results import Result, Results, key_of
from bytelm.evals.runner import headline
from bytelm.evals.summary import Summary


def test_results_of_others_are_left_alone(tmp_path):
    file = tmp_path / "results.jsonl"
    for other in (b'{"doc_id": 1, "acc": 0.5}\n', b"no json\n", b'[1]\n{"key": "a"}\n'):
        file.write_bytes(other)
        with pytest.raises(ConfigError, match="line 1 is no result of this version of bytelm"):
            Results(tmp_path)
        assert file.read_bytes() == other


def test_latest_results(tmp_path):
    results = Results(tmp_path)
    for key, model, bits in (("a", "m (tokens)", 2.0), ("b", "n", 3.0), ("c", "m (tokens)", 1.0)):
        results.add(Result(key, model, "bpb", "text", {"bpb": bits}))
    again = Results(tmp_path)
    assert [(r.key, r.model) for r in again.latest({})] == [("c", "m (tokens)"), ("b", "n")]
    assert [r.key for r in again.latest({}, {"m"})] == ["c"] and again.latest({}, {"o"}) == []
    results.path.write_bytes(results.path.read_bytes().rstrip(b"\n"))  # as files are that are joined by hand
    more = Results(tmp_path)
    more.add(Result("d", "n", "bpb", "text", {}))
    assert list(more.found) == list(Results(tmp_path).found) == ["a", "b", "c", "d"]


def test_the_headline_fits_a_terminal():
    """Nine models, names of which are long: whole figures, every model."""
    names = [f"run{n}" for n in range(8)] + ["SmolLM2-135M-Instruct.Q4_1 (bytes)"]
    results = [Result(n, n, "bpb", "text", {"bpb": 1.234}) for n in names]
    results += [Result(f"{n} size", n, "model", "size", {"parameters": 1.2e6, "window_tokens": 8192.0}) for n in names]
    console = Console(width=80, record=True, file=io.StringIO())
    for table in headline(Summary(results), console.width):
        console.print(table)
    said = console.export_text()
    assert said.count("1.234") == said.count("1.2 M") == said.count("8,192 tokens") == 9
    assert all(name in said for name in names[:8]) and "SmolLM2" in said and max(map(len, said.splitlines())) <= 80


def test_results_of_one_set_are_shown_together(tmp_path):
    """Another seed or size was asked, and stopped: its results do not mix with those of the whole one before."""
    results = Results(tmp_path)
    for key, task, which, nats in (("a", "without", "s", [3.0, 3.0]), ("b", "clean", "s", [1.0, 1.0]),
                                   ("c", "drop", "s", [2.0, 2.0]), ("d", "without", "t", [9.0])):  # fmt: skip
        results.add(Result(key, "m", "noise", task, {"bpb": 1.0}, {"nats": nats, "bytes": [1]}, which))
    assert [r.key for r in Results(tmp_path).latest({})] == ["d"]
    shown = Results(tmp_path).latest({"noise": "s"})
    assert [r.key for r in shown] == ["a", "b", "c"] and Summary(shown).recovered("m", "drop") == 0.5


def test_results_outlive_a_crash(tmp_path):
    results = Results(tmp_path / "out")
    results.add(Result("a", "m", "bpb", "text", {"bpb": 2.5, "odd": math.nan}, {"é": [1]}))
    with results.path.open("ab") as file:
        file.write(b'{"key": "b", "model": "m", "sui')
    again = Results(tmp_path / "out")
    assert list(again.found) == ["a"] and math.isnan(again.found["a"].metrics["odd"])
    again.add(Result("b", "m", "bpb", "text", {"bpb": 2.0}))
    assert list(Results(tmp_path / "out").found) == ["a", "b"]
    assert all(json.loads(line) for line in results.path.read_text().splitlines())
    assert key_of(a=1, b=[2]) == key_of(b=[2], a=1) != key_of(a=1, b=[3])
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        Results(Path(tmp_path / "file"))
