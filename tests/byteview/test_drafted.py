"""Drafted sampling from tokenized models: the bytes are those of drawing one by one, and the cache holds no more."""

import numpy as np
import pytest

import bytelm
from bytelm.byteview.byte_view import TokenizedLM
from bytelm.config import ConfigError
from bytelm.copying import Counts
from bytelm.following import draw_rows
from bytelm.generate import Sampling

PASSAGE = b"Permission is granted to copy the work. "
PROMPTS = [PASSAGE + b"Permission is gra", b"def f(x):\n    return x\n\ndef f(x", b"", "naïve naïve na".encode(), b"z"]


@pytest.fixture(scope="module", params=["tiny_lm", "tiny_sp"])
def base(request, root):
    return bytelm.load(root / "tests/golden/convert" / f"model_{request.param}")


def together(rows):
    out = []
    for new in rows:
        out = [a + b for a, b in zip(out or [b""] * len(new), new)]
    return out


@pytest.mark.slow
@pytest.mark.parametrize("semantics", ["masked", "canonical", "lastfree"])
def test_bytes_are_those_of_drawing_one_by_one(base, semantics):
    """Texts side by side, ends of texts among them (temperature 1.6), the end of a prompt inside a character."""
    plain = TokenizedLM(base.model, base.vocabulary, semantics)
    lm = TokenizedLM(base.model, base.vocabulary, semantics, draft="copy")
    prompts = [*PROMPTS, PROMPTS[3][:-3]]
    for options in (dict(temperature=0.0), dict(temperature=1.0), dict(temperature=1.6, top_p=0.95)):
        want = together(draw_rows(plain.follow(prompts), len(prompts), 40, Sampling(**options), 3, (), 8))
        assert lm.generate_batch(prompts, 40, seed=3, **options) == want
    c = lm.counts
    assert c.drafted > c.right > 0 and c.passes > 0 and c.made >= sum(map(len, want))
    stop = lm.generate(PROMPTS[0], 40, temperature=0.0)[5:8]
    assert (
        lm.generate(PROMPTS[0], 40, temperature=0.0, stop=[stop])
        == lm.generate(PROMPTS[0], 40, temperature=0.0).partition(stop)[0]
    )
    assert lm.generate(PROMPTS[0], 0) == b""


@pytest.mark.slow
def test_guesses_are_read_at_once_and_taken_back(base):
    """Behind a guess, right or wrong, the distributions are those of asking anew, and the cache keeps as many nodes."""
    rng = np.random.default_rng(0)
    covers, text = base.follow([PASSAGE]), PASSAGE
    for guess in (b"Permission", b"Perm\xff\xfe", b"", b"is granted zzz", bytes(rng.integers(97, 123, 9).tolist())):
        (rows,) = covers.look([guess])
        assert len(rows) == len(guess) + 1
        for n, row in enumerate(rows):
            if np.isfinite(row).any():
                np.testing.assert_allclose(np.exp(row), np.exp(base.logprobs(text + guess[:n])), atol=2e-6)
        kept = min(len(guess), int(rng.integers(0, 8)), 4)
        covers.keep([kept])
        text += guess[:kept]
        assert covers.trees[0].text == base.before + text
        fresh = base.follow([text])
        fresh.logprobs()
        held = covers.session.used[0] - len(covers.session.free[0])
        assert held == len(covers.trees[0].held()) <= len(fresh.trees[0].held())
        np.testing.assert_allclose(np.exp(covers.logprobs()[0]), np.exp(base.logprobs(text)), atol=2e-6)


@pytest.mark.slow
def test_sliding_texts_and_what_is_refused(base):
    slide = dict(long_text="slide")
    plain = TokenizedLM(base.model, base.vocabulary, **slide)
    lm = TokenizedLM(base.model, base.vocabulary, draft="copy", **slide)
    assert isinstance(lm.counts, Counts)
    long = (PASSAGE * 40)[: lm.window - 20]
    assert lm.generate(long, 50, temperature=0.0) == plain.generate(long, 50, temperature=0.0)
    fixed = lm.fixed(lm.trunk, b"")  # every way to go on: nothing is guessed
    assert fixed.draft == "none" and len(fixed.generate(PASSAGE * 2, 5, temperature=0.0)) <= 5
    for options in (dict(semantics="all", draft="copy"), dict(draft="own")):
        with pytest.raises(ConfigError, match="draft="):
            TokenizedLM(base.model, base.vocabulary, **options)


@pytest.mark.parametrize("semantics", ["masked", "canonical", "lastfree"])
def test_contexts_that_begin_alike_are_read_once(base, semantics):
    """Texts with and without something in common, impossible ones, none, and a shared part that ends inside a token."""
    lm = TokenizedLM(base.model, base.vocabulary, semantics)
    contexts = [PASSAGE + end for end in (b"Permi", b"Permission", b"", "Perm naïve".encode())]
    texts = [b"ssion is", b"", b"\xff no", " café".encode()]
    sessions, made = [], lm.model.session
    lm.model.session = lambda *a, **k: (sessions.append(1), made(*a, **k))[1]
    try:
        together = lm.score_batch(texts, contexts)
    finally:
        del lm.model.session
    assert len(sessions) == 1
    with pytest.MonkeyPatch.context() as patch:  # too much to keep: each by itself, to the same scores
        patch.setattr("bytelm.byteview.byte_view.KEPT_ROWS", 8 * len(lm.vocabulary.tokens) * 10)
        apart = lm.score_batch(texts, contexts)
    for score, other in zip(together, apart):
        np.testing.assert_allclose(score.per_byte, other.per_byte, atol=5e-6)
    for score, text, context in zip(together, texts, contexts):
        alone = lm.score(text, context)
        np.testing.assert_allclose(score.per_byte, alone.per_byte, atol=5e-6)
        assert score.total == pytest.approx(alone.total, abs=2e-5)
    assert np.isneginf(together[2].total)
    bad = lm.score_batch([b"a", b""], [b"\xff" * 20, b"\xff" * 20 + b"b"])
    assert np.isneginf(bad[0].total) and bad[1].total == 0
