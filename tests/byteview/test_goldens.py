"""Two real small models against exact answers of a slow, certain implementation (tests/golden/convert)."""

import dataclasses
import itertools
import json
import shutil

import jax
import numpy as np
import pytest

import bytelm
from bytelm.byteview.byte_view import TokenizedLM
from bytelm.byteview.cover import log_sum
from bytelm.byteview.explain import explain, table
from bytelm.config import ConfigError, MeshConfig
from bytelm.protocol import ImpossibleText

MODELS = ("tiny_lm", "tiny_sp")
PROBABLE = 1e-8


@pytest.fixture(scope="module")
def golden(root):
    return root / "tests/golden/convert"


@pytest.fixture(scope="module")
def loaded(golden):
    with jax.default_matmul_precision("highest"):
        return {name: bytelm.load(golden / f"model_{name}") for name in MODELS}


def view(loaded, name, semantics):
    lm = loaded[name]
    return TokenizedLM(lm.model, lm.vocabulary, semantics)


def prefixes(golden, name):
    return [bytes.fromhex(row["hex"]) for row in json.loads((golden / name / "prefixes.json").read_text())]


@pytest.mark.parametrize("semantics", ["masked", "canonical", "lastfree"])
@pytest.mark.parametrize("name", MODELS)
def test_next_byte_equals_the_truth(golden, loaded, name, semantics):
    with jax.default_matmul_precision("highest"):
        found = view(loaded, name, semantics).logprobs_batch(prefixes(golden, name))
    stored = np.load(golden / name / "next_byte.npz")
    expected = np.stack([stored[f"{semantics}_{i}"] for i in range(len(found))])
    distance = 0.5 * np.abs(np.exp(found) - np.exp(expected)).sum(axis=1)
    assert distance.max() <= 2e-6
    likely = expected > np.log(PROBABLE)
    assert np.abs(found[likely] - expected[likely]).max() <= 1e-4
    assert (np.isneginf(found) == np.isneginf(expected)).all()


@pytest.mark.parametrize("semantics", ["masked", "canonical"])
@pytest.mark.parametrize("name", MODELS)
def test_whole_text_in_one_pass(golden, loaded, name, semantics):
    stored = json.loads((golden / name / "bpb.json").read_text())
    expected = np.array(stored[f"{semantics}_logp"])
    text = (golden / "text.txt").read_bytes()[: len(expected)]
    lm = view(loaded, name, semantics)
    with jax.default_matmul_precision("highest"):
        score = lm.score(text)
        behind = lm.score(text[50:], context=text[:50])
        row = lm.logprobs(text[:70])
    np.testing.assert_allclose(score.per_byte, expected, atol=1e-4)
    assert score.total == pytest.approx(score.per_byte.sum())
    np.testing.assert_allclose(behind.per_byte, expected[50:], atol=1e-4)
    assert row[text[70]] == pytest.approx(expected[70], abs=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_mass_is_handed_on(golden, loaded, name):
    """The mass of a text is that of its continuations: W(x) = sum of W(xb) + W(x, end), at every place."""
    lm, text = loaded[name], (golden / "text.txt").read_bytes()[:120]
    session, tree = lm.model.session(), lm.tree(b"")
    lm.read(session, [tree])
    before = log_sum(tree.log_mass())
    for byte in text:
        mass = tree.log_mass()
        assert abs(log_sum(mass) - before) < 1e-4
        before = mass[byte]
        session.forget(tree.drop(tree.push(byte)))
        lm.read(session, [tree])
    assert session.used[0] < len(text)  # slots of what is no longer looked at are taken again


def test_samples_are_the_same_alone_and_in_a_batch(loaded):
    lm = loaded["tiny_lm"]
    together = lm.generate_batch([b"def f", b"def f", "The licen"], 24, seed=5, temperature=0.9)
    assert together[0] == lm.generate(b"def f", 24, seed=5, temperature=0.9) and together[0] != together[1]
    streamed = b"".join(lm.stream(b"def f", 24, seed=5, temperature=0.9))
    assert streamed == together[0]
    greedy = lm.generate(b"The licen", 24, temperature=0)
    row = [int(np.argmax(lm.logprobs(b"The licen" + greedy[:n]))) for n in range(6)]
    assert bytes(row) == greedy[:6]
    assert lm.generate(b"The licen", 24, temperature=0, stop=[greedy[5:8]]) == greedy[: greedy.index(greedy[5:8])]


@pytest.mark.parametrize("name", MODELS)
def test_plain_tokens(golden, loaded, name):
    stored = json.loads((golden / name / "bpb.json").read_text())
    text = (golden / "text.txt").read_bytes()
    with jax.default_matmul_precision("highest"):
        (total,) = loaded[name].score_tokens([text[: stored["bytes"]]])
        assert -total / np.log(2) / stored["bytes"] == pytest.approx(stored["token_level_bpb"], abs=1e-5)
        short, long = loaded[name].score_tokens(["", text.decode()])
    assert short == 0 and np.isfinite(long) and long < total
    with pytest.raises(ImpossibleText, match="no UTF-8 at offset 1"):
        loaded[name].score_tokens([b"a\xff"])


def test_explanation_adds_up(loaded):
    for lm, prompt in itertools.product(
        loaded.values(), (b"def fib(n):\n    ret", b"The licen", "caf\u00e9".encode()[:4])
    ):
        found = explain(lm, prompt, covers=10_000)
        np.testing.assert_allclose(found.view, np.exp(lm.logprobs(prompt)), atol=1e-6)
        assert found.view.sum() == pytest.approx(1)
        assert sum(share for _, share in found.covers) == pytest.approx(1, abs=1e-3)
        assert all(b"".join(tokens).lstrip().startswith(prompt) for tokens, _ in found.covers)
        assert (found.plain is None) == (not found.tokens) == (prompt == b"caf\xc3")
        assert "covers of the prompt" in table(found)
    lm = loaded["tiny_lm"]
    every = TokenizedLM(lm.model, lm.vocabulary, "all")
    prompt = b"def fib(n):\n    return the license of"
    found = explain(every, prompt, covers=10_000)
    assert sum(share for _, share in found.covers) == pytest.approx(1, abs=1e-3)
    assert "the prompt is empty" in table(explain(every, b""))


def test_impossible_texts(loaded):
    lm = loaded["tiny_lm"]
    with pytest.raises(ImpossibleText, match=r"byte 0xFF at offset 2"):
        lm.logprobs(b"ab\xff")
    with pytest.raises(ImpossibleText):
        lm.generate(b"\x80", 5)
    score = lm.score(b"ab\xffcd")
    assert np.isfinite(score.per_byte[:2]).all() and np.isneginf(score.per_byte[2:]).all()
    assert lm.score(b"").total == 0 and lm.logprobs_batch([]).shape == (0, 257)


@pytest.mark.parametrize("record", [dict(bos_token_id=5000), dict(bos_token_id="a"), dict(eos_token_id=[2047, None])])
def test_ids_that_are_none(golden, tmp_path, record):
    shutil.copytree(golden / "model_tiny_lm", tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps({**config, **record}))
    with pytest.raises(ConfigError, match=r"must be ids|are not among the tokenizer's 2048"):
        bytelm.load(tmp_path / "m")


def test_texts_in_another_normal_form(loaded):
    lm = loaded["tiny_lm"]
    nfc = TokenizedLM(lm.model, dataclasses.replace(lm.vocabulary, normal="NFC"))
    composed, apart = "caf\u00e9", "cafe\u0301"
    np.testing.assert_allclose(nfc.score(composed).per_byte, lm.score(composed).per_byte, atol=1e-6)
    assert np.isfinite(lm.score(apart).total)
    with pytest.raises(ImpossibleText, match="not in Unicode's NFC"):
        nfc.behind("e").score("\u0301")
    for ask in (nfc.score, nfc.logprobs, nfc.generate, lambda t: nfc.score_tokens([t]), lambda t: nfc.follow([t])):
        with pytest.raises(ImpossibleText, match="not in Unicode's NFC"):
            ask(apart)


def test_longer_than_the_model(golden, loaded):
    lm, text = loaded["tiny_lm"], (golden / "text.txt").read_bytes()
    assert lm.window == 511
    score = lm.score(text)
    assert len(score.per_byte) == len(text) and np.isfinite(score.total)
    np.testing.assert_allclose(score.per_byte[:508], lm.score(text[:508]).per_byte, atol=1e-4)
    assert np.isfinite(lm.logprobs(text)).any()
    with pytest.raises(ConfigError, match="512"):
        lm.score(text, window=512)
    with pytest.raises(ConfigError, match="longer than"):
        lm.generate(text[:500], 100)


@pytest.mark.slow
def test_windows_that_would_begin_inside_a_character(loaded):
    for lm in loaded.values():
        text = "\u00e9\u00fc\u4e2d" * 90 + "x" + "\u4e2d" * 110  # 961 bytes
        for shift in range(3):
            score = lm.score("a" * shift + text, window=200)
            assert np.isfinite(score.total)
            assert np.isfinite(lm.logprobs("a" * shift + text)).any()
        sliding = TokenizedLM(lm.model, lm.vocabulary, long_text="slide")
        assert len(sliding.generate("\u4e2d" * 169, 12, temperature=0)) > 0


def test_wrong_arguments(golden, loaded):
    with pytest.raises(ConfigError, match="semantics='each'"):
        bytelm.load(golden / "model_tiny_lm", semantics="each")
    with pytest.raises(ConfigError, match="reads no input"):
        loaded["tiny_lm"].logprobs(b"a", input=b"b")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, mesh", [("tiny_lm", dict(data=1, tensor=4, fsdp=2)), ("tiny_sp", dict(tensor=2, fsdp=4))]
)
def test_over_several_devices(golden, loaded, name, mesh):
    """The same answers, with the weights split over eight devices."""
    split = bytelm.load(golden / f"model_{name}", mesh=MeshConfig(**mesh))
    kernel = split.model.params["blocks"]["up"]["kernel"]
    assert len(kernel.sharding.device_set) == 8 and kernel.addressable_shards[0].data.size * 8 == kernel.size
    for prompt in (b"The licen", "caf\u00e9 is".encode()):
        np.testing.assert_allclose(np.exp(split.logprobs(prompt)), np.exp(loaded[name].logprobs(prompt)), atol=1e-5)
    assert split.generate(b"The licen", 8, temperature=0) == loaded[name].generate(b"The licen", 8, temperature=0)
    with pytest.raises(ConfigError, match="does not divide"):
        bytelm.load(golden / f"model_{name}", mesh=MeshConfig(tensor=8))
