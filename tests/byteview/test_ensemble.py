"""Several models as one: two tokenized models with different vocabularies."""

import jax
import numpy as np
import pytest

import bytelm
from bytelm.byteview.byte_view import TokenizedLM
from bytelm.byteview.ensemble import Ensemble
from bytelm.config import ConfigError
from bytelm.vocab import END

TEXT = b"The clerk kept a small notebook"


@pytest.fixture(scope="module")
def members(root):
    golden = root / "tests/golden/convert"
    with jax.default_matmul_precision("highest"):
        return [bytelm.load(golden / f"model_{name}") for name in ("tiny_lm", "tiny_sp")]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mixture", "bayes", "product"])
def test_scores_are_the_sum_of_steps(members, kind):
    ensemble = Ensemble(members, [0.3, 0.7], kind)
    score = ensemble.score(TEXT[5:], context=TEXT[:5])
    prefixes = [TEXT[:n] for n in range(5, len(TEXT))]
    rows = ensemble.logprobs_batch(prefixes)
    np.testing.assert_allclose(np.exp(rows).sum(axis=1), 1, atol=1e-9)
    np.testing.assert_allclose(score.per_byte, rows[np.arange(len(rows)), list(TEXT[5:])], atol=1e-4)
    follower, last = ensemble.follow([TEXT[:5]]), []
    for byte in TEXT[5:]:
        last.append(follower.logprobs()[0])
        follower.push([byte])
    np.testing.assert_allclose(np.array(last), rows, atol=1e-4)


@pytest.mark.slow
def test_what_a_mixture_is(members):
    rows = np.stack([m.logprobs(TEXT) for m in members])
    mixed = Ensemble(members, [1, 3]).logprobs(TEXT)
    np.testing.assert_allclose(np.exp(mixed), 0.25 * np.exp(rows[0]) + 0.75 * np.exp(rows[1]), atol=1e-9)
    alone = Ensemble(members, [1, 0]).logprobs(TEXT)
    np.testing.assert_allclose(np.exp(alone), np.exp(rows[0]), atol=1e-9)
    product = Ensemble(members, [0.5, 0.5], "product").logprobs(TEXT)
    with np.errstate(invalid="ignore"):
        expected = np.exp(0.5 * rows.sum(axis=0))
    np.testing.assert_allclose(np.exp(product), expected / expected.sum(), atol=1e-9)


@pytest.mark.slow
def test_bayes_is_the_mean_of_whole_texts(members):
    totals = np.array([m.score(TEXT).total for m in members])
    found = Ensemble(members, [0.3, 0.7], "bayes").score(TEXT).total
    assert found == pytest.approx(np.logaddexp.reduce(totals + np.log([0.3, 0.7])), abs=1e-6)


@pytest.mark.slow
def test_samples(members):
    ensemble = Ensemble(members)
    together = ensemble.generate_batch([b"The licen", b"def f"], 12, seed=1)
    assert together == [ensemble.generate_batch([b"The licen"], 12, seed=1)[0], together[1]] and len(together[1]) <= 12
    assert ensemble.generate(b"The licen", 4, temperature=0).startswith(b"se")


def test_a_floor_lets_a_product_live(members):
    rows = np.stack([m.logprobs(b"caf\xc3") for m in members])
    assert np.isneginf(rows).any()
    plain, floored = (Ensemble(members, kind="product", floor=f).logprobs(b"caf\xc3") for f in (0.0, 1e-6))
    assert np.isneginf(plain).any() and np.isfinite(floored).all() and floored[END] < -5


def test_asked_or_not_between_two_bytes(members):
    """Weights that follow the text are the same whether or not somebody looked at every step."""
    ensemble = Ensemble(members, [0.5, 0.5], "bayes")
    asked, unasked = ensemble.follow([b"The "]), ensemble.follow([b"The "])
    for byte in b"licen":
        asked.logprobs()
        asked.push([byte])
        unasked.push([byte])
    np.testing.assert_allclose(unasked.logprobs(), asked.logprobs(), atol=1e-9)


@pytest.mark.parametrize("kind", ["mixture", "bayes"])
def test_a_member_that_thinks_a_text_impossible(members, kind):
    """It has no say in what follows: in scores, step by step, and when asked at once."""
    every = TokenizedLM(members[0].model, members[0].vocabulary, "all")
    ensemble, text = Ensemble([members[0], every], kind=kind), b"ab\xffcd"
    follower, logs = ensemble.follow([b""]), []
    for byte in text:
        logs.append(follower.logprobs()[0, byte])
        follower.push([byte])
    np.testing.assert_allclose(ensemble.score(text).per_byte, logs, atol=1e-4)
    assert ensemble.logprobs(text[:3])[text[3]] == pytest.approx(logs[3], abs=1e-4)
    product = Ensemble([members[0], every], kind="product").score(text)
    assert np.isneginf(product.per_byte[2:]).all() and np.isfinite(product.per_byte[:2]).all()


def test_proxy_tuning(members):
    base, other = members
    rows = [m.logprobs(TEXT) for m in (base, other)]
    moved = Ensemble.proxy_tuned(base, other, base, alpha=0.5).logprobs(TEXT)
    expected = np.exp(0.5 * rows[0] + 0.5 * rows[1])  # base * (other / base) ^ 0.5
    likely = expected > 1e-3
    np.testing.assert_allclose(np.exp(moved)[likely], (expected / expected.sum())[likely], rtol=1e-3)
    same = Ensemble.proxy_tuned(base, other, other).logprobs(TEXT)
    np.testing.assert_allclose(np.exp(same), np.exp(rows[0]), atol=1e-6)
    assert np.isfinite(Ensemble.proxy_tuned(base, other, base).score(b"caf\xc3\xa9").total)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(kind="sum"), "choose mixture, bayes, product"),
        (dict(weights=[1.0]), "2 members but 1 weights"),
        (dict(weights=[1.0, -1.0]), "must not be negative"),
        (dict(weights=[1.0, -1.0], kind="product"), "needs a floor"),
        (dict(weights=[1.0, float("nan")]), "must be numbers"),
        (dict(floor=1.0), r"must be in \[0, 1\)"),
    ],
)
def test_mistakes(members, change, message):
    with pytest.raises(ConfigError, match=message):
        Ensemble(members, **change)
    with pytest.raises(ConfigError, match="at least one"):
        Ensemble([])
