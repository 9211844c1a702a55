"""Texts that match a regular expression or a grammar."""

import re

import numpy as np
import pytest

import bytelm
from bytelm.byteview.constraint import Constrained
from bytelm.config import ConfigError
from bytelm.vocab import END

pytest.importorskip("llguidance")


@pytest.fixture(scope="module")
def lm(root):
    return bytelm.load(root / "tests/golden/convert/model_tiny_lm")


@pytest.mark.slow
def test_samples_match(lm):
    year = Constrained(lm, regex=r"[0-9]{4}(-[0-9]{2})?", prompt="Copyright (C) ")
    samples = year.generate_batch([b""] * 12, 20, seed=1)
    assert all(re.fullmatch(rb"[0-9]{4}(-[0-9]{2})?", s) for s in samples) and len(set(samples)) > 2
    assert year.generate(b"19", 20, temperature=0)[:2].isdigit()
    nested = Constrained(lm, grammar='start: "(" start ")" | "x"')
    for text in nested.generate_batch([b""] * 8, 15, seed=2):
        assert re.fullmatch(rb"\(*x?\)*", text)
        assert len(text) == 15 or text.count(b"(") == text.count(b")")
    accented = Constrained(lm, regex="caf(e|\u00e9)", prompt="The ")
    assert accented.logprobs(b"caf\xc3")[0xA9] == 0  # inside a character nothing else is possible


@pytest.mark.slow
def test_the_law_is_the_models_among_what_matches(lm):
    one = Constrained(lm, regex="(the|a|of) ?", prompt="under ")
    row, free = one.logprobs(), lm.logprobs("under ")
    allowed = [ord(c) for c in "tao"]
    np.testing.assert_allclose(row[allowed], free[allowed] - np.logaddexp.reduce(free[allowed]), atol=1e-6)
    assert np.isneginf(np.delete(row, allowed)).all()
    texts = [t + s for t in (b"the", b"a", b"of") for s in (b"", b" ")]
    total = sum(np.exp(s.total + one.logprobs(t)[END]) for s, t in zip(one.score_batch(texts), texts))
    assert total == pytest.approx(1, abs=1e-6)  # all texts that match
    score = one.score(b"then")
    assert np.isfinite(score.per_byte[:3]).all() and np.isneginf(score.per_byte[3])


def test_mistakes(lm):
    with pytest.raises(ConfigError, match="cannot be read"):
        Constrained(lm, regex="(a")
    with pytest.raises(ConfigError, match="give one"):
        Constrained(lm)
    year = Constrained(lm, regex="[0-9]+")
    with pytest.raises(ConfigError, match="begins with b'1a'"):
        year.generate(b"1a")
    with pytest.raises(ConfigError, match="window"):
        year.score(b"12", window=5)
    assert year.logprobs_batch([]).shape == (0, 257)
    never = Constrained(lm, regex=r"a")
    follower = never.follow([b""])
    with pytest.raises(ConfigError, match="does not match"):
        follower.push([ord("b")])
