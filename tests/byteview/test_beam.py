"""Covers that wait or are taken away: every way to cut a text, bounds on what was left out, prompts drawn as tokens."""

import collections
import dataclasses
import json

import jax
import numpy as np
import pytest

import bytelm
from bytelm.byteview.byte_view import TokenizedLM
from bytelm.byteview.cover import chain
from bytelm.config import ConfigError
from bytelm.protocol import ImpossibleText
from bytelm.vocab import END

MODELS = ("tiny_lm", "tiny_sp")
ROUNDING = 2e-6  # of the model's float32


@pytest.fixture(scope="module")
def golden(root):
    return root / "tests/golden/convert"


@pytest.fixture(scope="module")
def loaded(golden):
    return {name: bytelm.load(golden / f"model_{name}") for name in MODELS}


def known(golden, name):
    """(prefix, exact probabilities when every way to cut it counts) where all of them could be listed."""
    stored = np.load(golden / name / "next_byte.npz")
    for i, row in enumerate(json.loads((golden / name / "prefixes.json").read_text())):
        if f"all_{i}" in stored:
            yield bytes.fromhex(row["hex"]), np.exp(stored[f"all_{i}"])


@pytest.mark.slow
@pytest.mark.parametrize("name, beam", [("tiny_lm", 512), ("tiny_sp", 512), ("tiny_sp", 8), ("tiny_lm", 3)])
def test_every_way_to_cut_a_text(golden, loaded, name, beam):
    lm = TokenizedLM(loaded[name].model, loaded[name].vocabulary, "all", beam=beam)
    prefixes, truths = zip(*known(golden, name))
    assert len(prefixes) > 25
    with jax.default_matmul_precision("highest"):
        covers = lm.follow(prefixes)
        found = np.exp(covers.logprobs())
    distance = 0.5 * np.abs(found - np.stack(truths)).sum(axis=1)
    low, high = covers.intervals()
    assert (low <= np.stack(truths) + ROUNDING).all() and (np.stack(truths) <= high + ROUNDING).all()
    assert (distance <= covers.bounds() + ROUNDING).all()
    assert distance.max() <= (ROUNDING if beam == 512 else 1e-2 if beam == 8 else 1)
    assert (covers.bounds().max() > 0.01) == (beam < 512)  # a narrow beam says that it is no longer sure


@pytest.mark.slow
def test_a_beam_that_loses_the_text(golden, loaded):
    lm = TokenizedLM(loaded["tiny_lm"].model, loaded["tiny_lm"].vocabulary, "all", beam=1)
    lost = 0
    for prefix, _ in known(golden, "tiny_lm"):
        try:
            lm.logprobs(prefix)
        except ConfigError as e:
            lost += "beam=1: none of the strings" in str(e)
    assert lost > 0


@pytest.mark.slow
def test_scores_count_every_way(golden, loaded):
    lm = TokenizedLM(loaded["tiny_lm"].model, loaded["tiny_lm"].vocabulary, "all")
    text = (golden / "text.txt").read_bytes()[:40]
    score = lm.score(text[8:], context=text[:8])
    rows = [lm.logprobs(text[:n])[text[n]] for n in (8, 20, 39)]
    np.testing.assert_allclose(score.per_byte[[0, 12, 31]], rows, atol=1e-5)
    masked = loaded["tiny_lm"].score(text).total
    assert masked - 1 < lm.score(text).total < masked + 1
    impossible = lm.score(b"ab\xff")  # every byte is a token here: improbable, no more
    assert np.isfinite(impossible.total) and impossible.per_byte[2] < -5


@pytest.mark.parametrize("semantics", ["masked", "canonical", "lastfree"])
@pytest.mark.parametrize("skip", [1e-3, 0.05])
def test_nodes_that_wait(golden, loaded, semantics, skip):
    base = loaded["tiny_lm"]
    lm = TokenizedLM(base.model, base.vocabulary, semantics)
    text = (golden / "text.txt").read_bytes()[:90]
    lazy, exact, worst = lm.follow([text[:5]], skip=skip), lm.follow([text[:5]]), 0.0
    for byte in text[5:]:
        found, true = np.exp(lazy.logprobs()[0]), np.exp(exact.logprobs()[0])
        distance = 0.5 * np.abs(found - true).sum()
        assert distance <= lazy.bounds()[0] + ROUNDING <= skip + 2 * ROUNDING
        worst = max(worst, distance)
        lazy.push([byte])
        exact.push([byte])
    assert lazy.session.tokens_read <= exact.session.tokens_read - (skip == 0.05)
    assert worst > 0 and exact.bounds()[0] == 0


@pytest.mark.slow
def test_tokens_have_the_law_of_bytes(loaded):
    lm = loaded["tiny_lm"]
    prompt, drawn = b"under the li", collections.Counter()
    for seed in range(20):
        drawn.update(lm.generate_batch([prompt] * 100, 2, seed=seed))
    count = drawn.total()
    first = lm.logprobs(prompt)
    second = lm.logprobs_batch([prompt + bytes([b]) for b in range(256) if np.isfinite(first[b])])
    true = {}
    for b, row in zip(np.flatnonzero(np.isfinite(first[:256])), second):
        for c in np.flatnonzero(np.isfinite(row)):
            true[bytes([b]) + (b"" if c == END else bytes([c]))] = np.exp(first[b] + row[c])
    true[b""] = np.exp(first[END])
    assert set(drawn) <= set(true) and sum(true.values()) == pytest.approx(1, abs=1e-4)
    for text, p in true.items():
        assert abs(drawn[text] - count * p) < 5 * np.sqrt(count * p * (1 - p)) + 2, (text, drawn[text], count * p)


def test_tokens_at_other_temperatures(loaded):
    lm = loaded["tiny_lm"]
    greedy = lm.generate_tokens([b"The licen", b"def f"], 24, temperature=0)
    assert greedy == lm.generate_tokens([b"The licen", b"def f"], 24, temperature=0, seed=9)
    assert greedy[0].startswith(b"se") and all(len(text) == 24 for text in greedy)
    ids = lm.vocabulary.encode(b"The licen" + greedy[0])
    cut = next(n for n in range(len(ids)) if len(b"".join(lm.vocabulary.tokens[i] for i in ids[:n])) > len("The licen"))
    row = lm.model.session().read(chain([lm.vocabulary.start, *ids[:cut]]))[-1]
    assert int(np.argmax(row)) == ids[cut]  # behind the cover, plain greedy decoding
    assert lm.generate_tokens([b"The licen"], 24, temperature=0, stop=[greedy[0][5:8]])[0] == greedy[0][:5]
    streamed = b"".join(lm.stream(b"def f", 24, seed=5))
    assert streamed == lm.generate_batch([b"def f", b"x"], 24, seed=5)[0]
    assert lm.generate_tokens([], 5) == []
    every = TokenizedLM(lm.model, lm.vocabulary, "all")
    assert every.generate_tokens([b"The licen"], 24, temperature=0)[0].startswith(b"se")
    assert every.generate(b"The licen", 9, seed=2) == every.generate(b"The licen", 9, seed=2) != b""
    with pytest.raises(ConfigError, match="no law of their own"):
        TokenizedLM(lm.model, lm.vocabulary, "canonical").generate_tokens([b"a"])
    with pytest.raises(ImpossibleText):
        lm.generate(b"\x80", 5)


def test_impossible_where_every_way_counts(loaded):
    """A byte that no token has: the prompt is refused, whatever is asked."""
    v = loaded["tiny_lm"].vocabulary
    tokens = tuple(None if t and b"\x04" in t else t for t in v.tokens)
    lm = TokenizedLM(loaded["tiny_lm"].model, dataclasses.replace(v, tokens=tokens), "all")
    for ask in (lm.logprobs, lambda t: lm.generate(t, 3), lambda t: lm.generate(t, 3, top_p=0.9)):
        with pytest.raises(ImpossibleText, match="0x04 at offset 14"):
            ask(b"The license of\x04")
    assert lm.follow([]).logprobs().shape == (0, END + 1)


def test_wrong_arguments(loaded):
    lm = loaded["tiny_lm"]
    with pytest.raises(ConfigError, match="beam=0"):
        TokenizedLM(lm.model, lm.vocabulary, "all", beam=0)
    with pytest.raises(ConfigError, match="skip=1"):
        lm.follow([b"a"], skip=1.0)
    with pytest.raises(ConfigError, match="long_text='cut'"):
        TokenizedLM(lm.model, lm.vocabulary, long_text="cut")


def test_sliding(loaded):
    base = loaded["tiny_lm"]
    lm = TokenizedLM(base.model, base.vocabulary, long_text="slide")
    prompt = b"The quick brown fox. " * 24
    with pytest.raises(ConfigError, match="let it slide"):
        base.generate(prompt, 20)
    out = lm.generate(prompt, 20, temperature=0)
    for n in (0, 7, 15):
        assert out[n] == int(np.argmax(lm.logprobs(prompt + out[:n])))
    covers, read = lm.follow([prompt[:509]]), []
    for byte in prompt[509:] + b"and so on":
        covers.logprobs()
        read.append(covers.session.tokens_read)
        covers.push([byte])
    assert sum(more > 2 for more in np.diff(read)) == 1  # it slides once, and goes on from there
    alone = lm.generate_batch([b"The li"], 30, seed=5)[0]
    assert alone == lm.generate_batch([b"The li", prompt + prompt[:20]], 30, seed=5)[0]
