"""Several positions at once on a cache (`extend`, `keep`): what single steps give, whatever is kept of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bytelm.config import SSMConfig, StackConfig
from bytelm.models.build import byte_ids
from tiny import FULL, HYBRID, blt, entropy, flat, hat, hnet, megabyte, network, spacebyte

MIXED = StackConfig(layout="M1t1m1", d_model=32, num_heads=4, num_kv_heads=1, window=9, rope_dim=4,
                    ssm=SSMConfig(d_state=4, head_dim=16, conv_width=3, chunk=4))  # fmt: skip
MODELS = {
    "hybrid": flat(HYBRID), "full": flat(FULL), "mixed": flat(MIXED), "hnet2": hnet(2),
    "hnet words": hnet(1, chunker="words"), "hnet random": hnet(2, chunker="random"),
    "hnet entropy": hnet(1, chunker="entropy", patcher=entropy()), "hat": hat(),
    "hat space": hat(rule="space", pool_norm="none", guide_every_layer=False, pool_kv_heads=2, guide_kv_heads=2),
    "spacebyte": spacebyte(), "spacebyte learned": spacebyte(positions=64, slots=64), "megabyte": megabyte(),
    "megabyte 5": megabyte(patch=5, main=dataclasses.replace(megabyte().main, d_model=80)),
    "hat mamba": hat(backbone=MIXED), "spacebyte mamba": spacebyte(main=MIXED), "blt mamba": blt(main=MIXED),
    "megabyte mamba": megabyte(main=MIXED), "blt": blt(),
    "blt joined": blt(patcher=entropy(rule="both", max_patch=4), read_every_layer=False),
}  # fmt: skip
# Characters of one to four bytes, broken ones, words, spaces, symbols.
TEXT = "a ça 你好! éx 🇩🇪 мир, n't\n\n".encode() + b"\xe4\xbd \xff\xf0\x9f\x98z"


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("count", [1, 7])
def test_reading_several_at_once_equals_single_steps(name, count):
    """Rows at different places keep different numbers of what they read, none and all among them, many times over: the
    logits are those of single steps, for a window smaller than what is read, too."""
    b, room = 4, 64
    graph, state = nnx.split(network(MODELS[name], seed=1)[0])
    rng = np.random.default_rng(count)
    text = np.frombuffer(TEXT * 3, np.uint8).astype(np.int32)
    symbols = byte_ids(MODELS[name])
    starts = rng.integers(0, len(TEXT), b)
    ids = np.stack([text[start : start + room] for start in starts]) + symbols.offset
    ids[0] = rng.integers(32, 100, room) + symbols.offset
    ids[:, 0] = symbols.start
    ids = jnp.asarray(ids)
    lengths = jnp.array([1, 5, 2, 9])
    prefill = jax.jit(lambda s, x, n: nnx.merge(graph, s).prefill(x, n, room))
    step = jax.jit(lambda s, x, c: nnx.merge(graph, s).step(x, c))
    extend = jax.jit(lambda s, x, c: nnx.merge(graph, s).extend(x, c)[:2])
    keep = jax.jit(lambda s, c, t, n: nnx.merge(graph, s).keep(c, t, n))
    longest = int(lengths.max()) + count * 5
    _, cache = prefill(state, ids[:, :16], lengths)
    logits, plain = prefill(state, ids[:, :16], lengths)
    want = [[np.asarray(logits[i])] for i in range(b)]  # of each row, behind each of its positions
    for n in range(longest):
        logits, plain = step(state, ids[jnp.arange(b), lengths + n], plain)
        for i in range(b):
            want[i].append(np.asarray(logits[i]))
    at, kept_before = np.zeros(b, int), set()
    for _ in range(5):
        index = np.asarray(lengths)[:, None] + at[:, None] + np.arange(count)
        found, trail = extend(state, jnp.take_along_axis(ids, jnp.asarray(index), axis=1), cache)
        for i in range(b):
            np.testing.assert_allclose(found[i], want[i][at[i] + 1 : at[i] + 1 + count], atol=2e-5)
        kept = rng.integers(0, count + 1, b)
        kept_before |= set(kept.tolist())
        cache = keep(state, cache, trail, jnp.asarray(kept, jnp.int32))
        at += kept
    logits, _ = step(state, ids[jnp.arange(b), lengths + jnp.asarray(at)], cache)
    for i in range(b):
        np.testing.assert_allclose(logits[i], want[i][at[i] + 1], atol=2e-5)
    assert {0, count} <= kept_before


INSIDE = {"hat": hat(), "spacebyte": spacebyte(), "hnet": hnet(1, chunker="words"),
          "blt": blt(patcher=entropy(threshold=99.0))}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", INSIDE)
def test_inside_a_chunk_a_guess_is_what_a_step_says(name):
    """And behind its end it is not; BLT's has none here."""
    graph, state = nnx.split(network(INSIDE[name], seed=1)[0])
    symbols = byte_ids(INSIDE[name])
    text = np.frombuffer(b"one two", np.uint8).astype(np.int32) + symbols.offset
    ids = jnp.asarray(np.concatenate([[symbols.start], text]))[None]
    prefill = jax.jit(lambda s, x, n: nnx.merge(graph, s).prefill(x, n, 32))
    step, alone = (
        jax.jit(lambda s, x, c, way=way: getattr(nnx.merge(graph, s), way)(x, c)) for way in ("step", "alone")
    )
    _, cache = prefill(state, ids, jnp.array([ids.shape[1]]))
    stepped = guessed = cache
    for byte in (b"f", b"o", b" ", b"x"):
        x = jnp.array([byte[0] + symbols.offset])
        wanted, stepped = step(state, x, stepped)
        found, guessed = alone(state, x, guessed)
        error = float(jnp.abs(found - wanted).max())
        if byte in b"fo" or name == "blt":
            assert error < 2e-5, byte
    assert name == "blt" or error > 1e-3
