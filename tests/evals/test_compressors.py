"""Compressor lines on the bundled split: xz measured, the recorded PPMd figure measured again."""

import builtins

import pytest

from bytelm.data.sources import open_corpus
from bytelm.evals.compressors import ppmd_given, xz_given


@pytest.fixture(scope="module")
def split():
    text = open_corpus(("bundled:shakespeare",)).read(0)
    return text[:1003854], text[1003854:]


def test_xz(split):
    assert xz_given(*split).bpb == pytest.approx(2.518, abs=0.003)


def test_recorded_ppmd_equals_pyppmd(split, monkeypatch):
    pytest.importorskip("pyppmd")
    measured = ppmd_given(*split)
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "pyppmd":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    recorded = ppmd_given(*split)
    assert "recorded" in recorded.source and "measured" in measured.source
    assert measured.bpb == pytest.approx(recorded.bpb, abs=1e-3)
    assert ppmd_given(b"some", b"other text") is None and ppmd_given(b"some", split[1]) is None
