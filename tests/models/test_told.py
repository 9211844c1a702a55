"""Boundaries told by a rule in an H-Net: cached against full, causality, packing, how often they come."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tiny
from bytelm.config import ConfigError
from bytelm.data import words
from bytelm.interop.hnet import reference_config
from bytelm.models.told import told_boundaries

KINDS = ("spacelike", "words", "space_words", "fixed", "random")
TEXTS = ("The fox (of 3)  took a\n\nnap.", "Größe, ça va? 你好 мир x", "aB1 don't\tx_y = 1")
LENGTH = 30


def rows():
    out = np.full((3, LENGTH), 97, np.int32)
    for row, text in zip(out, TEXTS):
        data = (bytes([254]) + text.encode()[:12] + b"\xe4\xbd" + text.encode())[:LENGTH]
        row[: len(data)] = np.frombuffer(data, np.uint8)
    return jnp.asarray(out)


@functools.cache
def make(kind):
    network, params = tiny.network(tiny.hnet(1, chunker=kind))
    return network, nnx.split(network)[0], params


@functools.partial(jax.jit, static_argnames="graph")
def run(graph, params, inputs, segments=None):
    out = nnx.merge(graph, params)(inputs, segments)
    return out.logits, out.levels[0].boundary


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_cached_steps_equal_the_full_forward(kind):
    network, graph, params = make(kind)
    inputs, full = rows(), np.asarray(run(*make(kind)[1:], rows())[0])

    @jax.jit
    def follow(params, cache, ids):
        network = nnx.merge(graph, params)
        return jnp.swapaxes(jax.lax.scan(lambda c, x: network.step(x, c)[::-1], cache, ids.T)[1], 0, 1)

    np.testing.assert_allclose(follow(params, network.empty_cache(3, LENGTH), inputs), full, atol=2e-5)
    lengths = np.array([13, 14, 5])
    first, cache = jax.jit(lambda p: nnx.merge(graph, p).prefill(inputs, jnp.asarray(lengths), 2 * LENGTH))(params)
    ahead = np.minimum(lengths[:, None] + np.arange(LENGTH), LENGTH - 1)
    rest = np.asarray(follow(params, cache, jnp.take_along_axis(inputs, ahead, axis=1)))
    for i, n in enumerate(lengths):
        np.testing.assert_allclose(np.asarray(first)[i], full[i, n - 1], atol=2e-5)
        np.testing.assert_allclose(rest[i, : LENGTH - n], full[i, n:], atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_boundaries_are_causal_and_of_one_document(kind):
    """No boundary changes before a changed byte; packed documents have those they have alone."""
    inputs = rows()
    told = jax.jit(functools.partial(told_boundaries, kind, 4.0))
    before = np.asarray(told(inputs, None))
    for at, new in itertools.product((1, 7, 13, 20), (32, 0xE4, 0xBD)):
        np.testing.assert_array_equal(np.asarray(told(inputs.at[:, at].set(new), None))[:, :at], before[:, :at])
    packed = jnp.concatenate([inputs[0, :11], inputs[1, :19]])[None]
    segments = jnp.asarray(np.repeat([1, 2], [11, 19]))[None]
    want = np.concatenate([before[0, :11], before[1, :19]])
    np.testing.assert_array_equal(np.asarray(told(packed, segments))[0], want)


def test_what_the_rules_say():
    text = b"The fox (of 3)  took a nap, and 12 more.\n" * 40
    inputs = jnp.asarray(np.frombuffer(bytes([254]) + text, np.uint8).astype(np.int32))[None]

    def starts(kind):
        return np.flatnonzero(np.asarray(told_boundaries(kind, 4.0, inputs, None))[0, 1:])

    np.testing.assert_array_equal(starts("words"), words.split_bytes(text))
    np.testing.assert_array_equal(starts("space_words"), words.split_bytes(text, "space"))
    np.testing.assert_array_equal(starts("fixed"), np.arange(3, len(text), 4))
    assert abs(len(starts("random")) / len(text) - 0.25) < 0.04
    letter = np.array([chr(byte).isalnum() for byte in text])
    np.testing.assert_array_equal(starts("spacelike"), np.flatnonzero(~letter[1:] & letter[:-1]) + 1)


def test_a_rule_in_the_router_s_place(tmp_path):
    network, graph, params = make("fixed")
    assert "router" not in params["backbone"]
    logits, boundary = run(graph, params, rows())
    assert np.isfinite(np.asarray(logits)).all()
    np.testing.assert_array_equal(boundary[0], np.arange(LENGTH) % 3 == 0)
    with pytest.raises(ConfigError, match="has no level"):
        tiny.hnet(1, arch_layout="m1", d_model=(32,), window=(0,), targets=(), chunker="fixed")
    with pytest.raises(ConfigError, match="learned boundaries only"):
        reference_config(network.config)
