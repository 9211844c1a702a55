"""An H-Net as a ByteLM: reserved symbols, batches at different chunk phases, rows that wait, chunks of a text."""

import numpy as np
import pytest

from bytelm.lm import NetworkLM
from bytelm.vocab import ReservedByteError
from tiny import hnet, network

WINDOW = 48
CONFIG = hnet(2)
PARAMS = network(CONFIG, scale=4.0)[1]
TEXT = "Ein Satz, naïve café — 😀 und mehr als ein Fenster lang.".encode()


def make(**options):
    return NetworkLM(CONFIG, PARAMS, WINDOW, **options)


@pytest.fixture(scope="module")
def lm():
    return make()


@pytest.mark.slow
def test_reserved_symbols_are_impossible(lm):
    p = lm.logprobs(b"abc")
    assert p[254] == p[255] == -np.inf and np.isfinite(np.delete(p, [254, 255])).all()
    assert np.exp(p).sum() == pytest.approx(1, abs=1e-12)
    drawn = lm.generate_batch([b"a", b"b"], 60, temperature=5.0, seed=3)
    assert all(byte < 254 for text in drawn for byte in text) and all(map(len, drawn))


def test_texts_with_reserved_bytes(lm):
    bad = b"ab\xffc\xfe"
    for call in (lm.logprobs, lm.score, lm.generate, lm.chunks):
        with pytest.raises(ReservedByteError, match=r"0xFF at offset 2"):
            call(bad)
    other = make(reserved="replace")
    score = other.score(bad)
    clean = other.score("ab\ufffdc\ufffd")
    assert score.per_byte.shape == (5,) and score.total == pytest.approx(clean.total)
    np.testing.assert_allclose(score.per_byte[[0, 1, 3]], clean.per_byte[[0, 1, 5]], atol=1e-6)
    assert score.per_byte[2] == pytest.approx(clean.per_byte[2:5].sum())
    np.testing.assert_array_equal(other.logprobs(bad), other.logprobs("ab\ufffdc\ufffd"))
    levels = other.boundaries(bad)
    assert levels[0].offset.tolist() == [0, 1, 2, 3, 4]  # each byte of the caller's text once
    assert all((np.diff(level.offset) > 0).all() for level in levels)


@pytest.mark.slow
def test_rows_of_a_batch_do_not_see_each_other(lm):
    """Rows at different chunk phases, of unequal prompts: each makes what it makes alone."""
    prompts = [b"", b"The quick brow", TEXT[:20], b"aaaa"]
    batch = lm.generate_batch(prompts, 40, seed=5, temperature=0)
    alone = [lm.generate(p, 40, temperature=0) for p in prompts]
    assert batch == alone and len(set(batch)) > 1


@pytest.mark.slow
@pytest.mark.parametrize("wait", [0.25, 0.5, 1.0])
def test_waiting_rows_make_the_same_bytes(lm, wait):
    prompts = [b"", b"The quick brow", TEXT[:20], b"aaaa", b"zz"]
    for options in ({"temperature": 0}, {"temperature": 1.0, "seed": 11}, {"top_k": 5, "seed": 2, "stop": ["e"]}):
        want = lm.generate_batch(prompts, 40, **options)
        assert make(wait=wait).generate_batch(prompts, 40, **options) == want


@pytest.mark.slow
def test_waiting_runs_the_inner_network_less_often():
    """Count its runs over the same bytes."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from bytelm import generate
    from bytelm.models.hnet import HNet
    from bytelm.models.hnet_stage import Stage

    calls = {}
    for name, quorum in (("never", 1), ("half", 4), ("all", 8)):
        count = []
        real = Stage.ask_inner

        def counting(self, pending, cache, rows, real=real, count=count):
            if self.outer == CONFIG.d_model[0] and not hasattr(self, "pad") and rows.shape == (8,):
                jax.debug.callback(lambda any_row: count.append(bool(any_row)), jnp.any(rows))
            return real(self, pending, cache, rows)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Stage, "ask_inner", counting)
            network = nnx.merge(nnx.split(jax.eval_shape(lambda: HNet(CONFIG, rngs=nnx.Rngs(params=0))))[0], PARAMS)
            graph = nnx.split(network)[0]
            ids = jnp.asarray(np.random.default_rng(0).integers(97, 105, (8, 4)), jnp.int32)
            decoder = generate.Decoder(graph, PARAMS)
            logits, cache = decoder.prefill(ids, jnp.full(8, 4), WINDOW)
            alphabet = (jnp.arange(257) % 256, jnp.ones(257, bool))
            keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(jnp.arange(8))
            sampling = (jnp.float32(1), jnp.int32(0), jnp.float32(1))
            out = generate._decode_waiting(
                *decoder.steps, alphabet, cache, logits, keys, jnp.int32(0), sampling, 24, quorum
            )
            jax.block_until_ready(out[0])
            jax.effects_barrier()
        generate._decode_waiting.clear_cache()
        calls[name] = (sum(count), np.asarray(out[0]))
    np.testing.assert_array_equal(calls["never"][1], calls["half"][1])
    np.testing.assert_array_equal(calls["never"][1], calls["all"][1])
    assert calls["all"][0] < calls["half"][0] < calls["never"][0]


def test_boundaries_of_a_text(lm):
    levels = lm.boundaries(TEXT)
    assert len(levels) == 2
    assert levels[0].offset.tolist() == list(range(len(TEXT)))  # every byte may start a chunk
    assert set(levels[1].offset) <= set(levels[0].starts)  # only chunks of the level below may
    for level, starts in zip(levels, lm.chunks(TEXT)):
        np.testing.assert_array_equal(starts, level.offset[level.cut])
        np.testing.assert_array_equal(level.cut, level.probability > 0.5)
    short = lm.boundaries(TEXT[:20])
    np.testing.assert_array_equal(short[0].cut, levels[0].cut[:20])


def test_long_texts_are_read_in_overlapping_windows(lm):
    text = TEXT * 4
    level = lm.boundaries(text)[0]
    assert level.offset.tolist() == list(range(len(text)))
    # What a window reads depends on the half window before it: the same byte read by hand.
    half = WINDOW // 2
    last = lm.boundaries(text[: WINDOW - 1])[0]
    np.testing.assert_array_equal(level.cut[: WINDOW - 1], last.cut)
    assert half > 0


def test_bad_options():
    with pytest.raises(ValueError, match="wait=2"):
        make(wait=2)
    with pytest.raises(ValueError, match="reserved='maybe'"):
        make(reserved="maybe")
