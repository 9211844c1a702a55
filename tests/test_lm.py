"""The ByteLM protocol on a network: probabilities, scores, samples, streams, and loading."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bytelm.config import ConfigError
from bytelm.generate import draw, visible_inputs
from bytelm.lm import NetworkLM, load, log_softmax
from bytelm.models.build import init_params
from bytelm.parallel.rules import path_string
from bytelm.vocab import FLAT_IDS
from tiny import FULL, HYBRID, flat, hat, hnet, network, spacebyte

WINDOW = 24


@pytest.fixture(scope="module", params=["hybrid", "full"])
def lm(request):
    config = flat({"hybrid": HYBRID, "full": FULL}[request.param])
    return NetworkLM(config, network(config, scale=3.0)[1], WINDOW)


TEXT = "Ein Satz, naïve café — 😀 und mehr als ein Fenster lang.".encode()


def test_logprobs_are_a_distribution(lm):
    p = lm.logprobs("The quick brow")
    assert p.shape == (257,) and p.dtype == np.float64
    assert np.exp(p).sum() == pytest.approx(1.0, abs=1e-12)
    batch = lm.logprobs_batch([b"", b"a", "The quick brow", TEXT])
    np.testing.assert_allclose(batch[2], p, atol=2e-5)
    np.testing.assert_allclose(batch[0], lm.logprobs(), atol=2e-5)


def test_score_is_the_sum_of_next_byte_logprobs(lm):
    """Chain rule, within the window: scoring a text and asking byte by byte agree."""
    text, context = b"brown fox", b"The quick "
    score = lm.score(text, context)
    chain = [lm.logprobs(context + text[:i])[byte] for i, byte in enumerate(text)]
    np.testing.assert_allclose(score.per_byte, chain, atol=2e-5)
    assert score.total == pytest.approx(score.per_byte.sum())
    assert lm.score("", "x").total == 0.0 and lm.score("").per_byte.shape == (0,)


def test_batched_scores_equal_single_ones(lm):
    texts, contexts = [b"a", TEXT, b"hello" * 30, b""], [b"", b"x" * 50, TEXT, b"c"]
    for got, text, context in zip(lm.score_batch(texts, contexts), texts, contexts):
        np.testing.assert_allclose(got.per_byte, lm.score(text, context).per_byte, atol=2e-5)
    with pytest.raises(ValueError, match="2 texts but 1 contexts"):
        lm.score_batch(["a", "b"], ["c"])


def test_long_texts_are_scored_by_the_rolling_rule(lm):
    """Windows of 24: bytes 0-23 after the start symbol, then 24-47 after byte 23, the rest in a window slid back."""
    text = TEXT[:57]
    score = lm.score(text)
    rows = [(None, 0, 24), (23, 24, 48), (57 - 24 - 1, 57 - 24, 57)]
    parts = []
    for before, first, end in rows:
        ids = np.array([256 if before is None else text[before], *text[first : end - 1]], np.int32)
        logits = np.asarray(nnx.merge(lm.graph, lm.params)(jnp.asarray(ids[None])).logits[0])
        parts.append(log_softmax(logits)[np.arange(end - first), list(text[first:end])])
    want = np.concatenate([parts[0], parts[1], parts[2][48 - 33 :]])
    np.testing.assert_allclose(score.per_byte, want, atol=2e-5)


def greedy_by_logprobs(lm, prompt, n):
    out = b""
    while len(out) < n:
        symbol = int(lm.logprobs(prompt + out).argmax())
        if symbol == 256:
            break
        out += bytes([symbol])
    return out


@pytest.mark.parametrize("prompt", [b"", b"The", TEXT[:23], TEXT[:24], TEXT])
def test_greedy_generation_equals_asking_again_each_byte(lm, prompt):
    """Cached decoding, across the window's end (24) and its re-reads, against full forward passes."""
    assert lm.generate(prompt, 40, temperature=0) == greedy_by_logprobs(lm, prompt, 40)


def test_rows_of_a_batch_do_not_influence_each_other(lm):
    prompts = [b"abc", b"", TEXT, b"x" * 10, b"q"]
    batch = lm.generate_batch(prompts, 50, seed=3, top_p=0.9)
    shorter = lm.generate_batch(prompts[:2], 50, seed=3, top_p=0.9)
    assert batch[:2] == shorter
    assert lm.generate_batch([], 5) == []
    assert lm.generate(b"abc", 50, seed=3, top_p=0.9) == batch[0]
    assert lm.generate(b"abc", 50, seed=4, top_p=0.9) != batch[0]
    assert all(len(b) <= 50 for b in batch)


def test_longer_requests_begin_with_shorter_ones(lm):
    long = lm.generate(b"abc", 70, seed=1)
    for n in (0, 1, 31, 33):
        assert lm.generate(b"abc", n, seed=1) == long[:n]


def test_stop_strings(lm):
    text = lm.generate(b"abc", 70, seed=1)
    for length in (1, 3):
        stop = text[40 : 40 + length]
        want = text[: text.find(stop)]
        assert lm.generate(b"abc", 70, seed=1, stop=[stop]) == want
        assert b"".join(lm.stream(b"abc", 70, seed=1, stop=[stop])) == want
    assert (
        lm.generate(b"abc", 70, seed=1, stop=[text[5:8], text[3:5]])
        == text[: min(text.find(text[5:8]), text.find(text[3:5]))]
    )


def test_stream_gives_the_same_bytes_in_whole_characters(lm, monkeypatch):
    assert b"".join(lm.stream(b"abc", 70, seed=1)) == lm.generate(b"abc", 70, seed=1)
    script = "aé€😀ü\N{SNOWMAN}z".encode() * 3
    monkeypatch.setattr(lm, "_continue", lambda *a, **k: ([script[i : i + 2]] for i in range(0, len(script), 2)))
    pieces = list(lm.stream(b""))
    assert b"".join(pieces) == script and len(pieces) > 10
    assert all(piece.decode() for piece in pieces)


@pytest.mark.parametrize(
    "options,message",
    [({"temperature": -1}, "temperature=-1"), ({"top_p": 0}, "top_p=0"), ({"top_k": -2}, "top_k=-2"),
     ({"max_bytes": -1}, "max_bytes=-1"), ({"stop": [""]}, "empty string"),
     ({"temperature": math.nan}, "temperature=nan")],
)  # fmt: skip
def test_bad_options(lm, options, message):
    with pytest.raises(ConfigError, match=message):
        lm.generate(b"", **options)


def test_flat_models_have_no_chunks(lm):
    assert lm.chunks("text") == []


def test_visible_inputs():
    assert visible_inputs(b"abc", FLAT_IDS, 4).tolist() == [256, 97, 98, 99]
    assert visible_inputs(b"abcd", FLAT_IDS, 4).tolist() == [99, 100]
    assert visible_inputs(b"abcdef", FLAT_IDS, 4).tolist() == [99, 100, 101, 102]
    assert visible_inputs(b"abcdefg", FLAT_IDS, 4).tolist() == [101, 102, 103]


def test_draw_follows_the_distribution():
    """Empirical frequencies of temperature, top-k and top-p against the exact truncated distribution."""
    logits = np.log(np.array([0.4, 0.3, 0.15, 0.1, 0.05]))
    n = 20000
    keys = jax.random.split(jax.random.key(0), n)
    rows = np.broadcast_to(logits, (n, 5)).astype(np.float32)

    def frequencies(temperature, top_k, top_p):
        drawn = jax.jit(draw)(rows, keys, np.float32(temperature), np.int32(top_k), np.float32(top_p))
        return np.bincount(np.asarray(drawn), minlength=5) / n

    def exact(p, temperature, keep):
        p = np.array(p) ** (1 / temperature) * np.array(keep)
        return p / p.sum()

    p = np.exp(logits)
    np.testing.assert_allclose(frequencies(1, 0, 1), p, atol=0.012)
    np.testing.assert_allclose(frequencies(0.5, 0, 1), exact(p, 0.5, [1] * 5), atol=0.012)
    np.testing.assert_allclose(frequencies(1, 2, 1), exact(p, 1, [1, 1, 0, 0, 0]), atol=0.012)
    np.testing.assert_allclose(frequencies(1, 0, 0.69), exact(p, 1, [1, 1, 0, 0, 0]), atol=0.012)
    np.testing.assert_allclose(frequencies(1, 0, 0.71), exact(p, 1, [1, 1, 1, 0, 0]), atol=0.012)
    np.testing.assert_allclose(frequencies(1, 3, 0.6), exact(p, 1, [1, 1, 0, 0, 0]), atol=0.012)
    assert frequencies(0, 0, 1)[0] == 1.0
    assert frequencies(1, 0, 1e-9)[0] == 1.0


def test_end_symbol_ends_a_row(lm):
    """Rows that draw END are shorter and do not hold it; the model really gave END some probability there."""
    prompts = [bytes([i]) for i in range(32)]
    texts = lm.generate_batch(prompts, 100, seed=0, temperature=3.0)
    ended = [(p, t) for p, t in zip(prompts, texts) if len(t) < 100]
    assert ended  # 3,200 draws of a nearly flat distribution over 257 symbols
    for prompt, text in ended:
        assert np.isfinite(lm.logprobs(prompt + text)[256])
        longer = lm.generate_batch(prompts, 110, seed=0, temperature=3.0)[prompts.index(prompt)]
        assert longer == text


@pytest.mark.parametrize("make,message", [
    (lambda p: p / "nothing", "no such file or directory"),
    (lambda p: p, "neither a run directory with checkpoints nor a weights directory"),
])  # fmt: skip
def test_load_says_what_is_wrong(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        load(make(tmp_path))


def test_load_names_models_it_does_not_know(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="does not load bert models"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"arch_layout": ["m1"]}')
    with pytest.raises(ValueError, match="expected one .pt or .safetensors file beside config.json"):
        load(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("model", [hat(), hnet(1), hnet(2), spacebyte()], ids=["hat", "hnet1", "hnet2", "spacebyte"])
def test_few_slots_for_chunks_change_no_score(model):
    """Texts with few boundaries, with one at nearly every byte, and padding behind both."""
    lm = NetworkLM(model, init_params(model, jax.random.key(0)), context=64)
    texts = [b"plain words of a text " * 3, b"a b c d e f g h i j " * 6, b"x" * 64, b"\n" * 100, b"one two"]
    found = lm.score_batch(texts)
    tried = lm._slots._tries
    whole = NetworkLM(model, lm.params, context=64)
    whole._slots._shares = []
    for a, b in zip(found, whole.score_batch(texts), strict=True):
        np.testing.assert_allclose(a.per_byte, b.per_byte, atol=1e-5)
    assert tried and whole._slots._tries == 0
    lm._slots._shares = [1 / 64] * len(lm._slots._shares)  # too few for any row
    for a, b in zip(lm.score_batch(texts), found, strict=True):
        np.testing.assert_allclose(a.per_byte, b.per_byte, atol=1e-5)
    assert lm._slots._misses


@pytest.mark.slow
def test_bfloat16_serves_from_matrices_in_bfloat16():
    """Which changes nothing but the memory: layers would cast them."""
    config = flat(HYBRID, dtype="bfloat16")
    made, params = network(config, scale=3.0)
    lm = NetworkLM(config, params, WINDOW)
    kinds = {path.endswith("kernel") and "conv" not in path: leaf.dtype for path, leaf in _named(lm.params)}
    assert kinds == {True: jnp.bfloat16, False: jnp.float32}
    text = b"The quick brown fox"
    ids = jnp.array([[FLAT_IDS.start, *text]])
    wanted = log_softmax(np.asarray(made(ids).logits[0, -1], np.float64))
    np.testing.assert_allclose(lm.logprobs(text), wanted, atol=0.02)
    assert len(lm.generate(text, 8, temperature=0)) <= 8


def _named(params):
    return [(path_string(path), leaf) for path, leaf in jax.tree.leaves_with_path(params)]
