"""Heads for further bytes: their loss is a plain loop's, they learn, and the model beside them stays as it is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bytelm.config import AheadConfig, ConfigError, TokensConfig
from bytelm.models.ahead import Ahead
from bytelm.models.build import count_parameters, init_params, structure
from bytelm.models.flops import forward_flops
from bytelm.train.init import FRESH
from tiny import flat, hnet, network


def plain_loss(heads, y, inputs, segments, weight):
    """One position, one head at a time, in float64."""
    mix, out = (np.asarray(part.kernel[...], np.float64) for part in (heads.mix, heads.out))
    losses, rights = [], []
    for k in range(len(mix)):
        found = []
        for row in range(len(y)):
            for t in range(y.shape[1] - 2 - k):
                if segments[row, t] and segments[row, t] == segments[row, t + 2 + k]:
                    h = y[row, t].astype(np.float64)
                    z = h @ mix[k]
                    logits = (h + z / (1 + np.exp(-z))) @ out[k]
                    target = inputs[row, t + 2 + k]
                    nll = np.log(np.sum(np.exp(logits - logits.max()))) + logits.max() - logits[target]
                    found.append((nll, np.argmax(logits) == target))
        losses.append(np.mean([nll for nll, _ in found]) if found else 0.0)
        rights.append(np.mean([r for _, r in found]) if found else 0.0)
    return weight * np.mean(losses), rights


def test_loss_equals_a_plain_loop():
    """Targets are the bytes of the same document behind the next one; documents that end, padding, a row too short."""
    rng = np.random.default_rng(0)
    config = AheadConfig(bytes=4, weight=0.7)
    ahead = Ahead(config, 8, 32, std=0.5, dtype="float32", rngs=nnx.Rngs(params=jax.random.key(0)))
    y = rng.normal(size=(3, 12, 8)).astype(np.float32)
    inputs = rng.integers(0, 32, (3, 12)).astype(np.int32)
    segments = np.array([[1] * 12, [1] * 5 + [2] * 3 + [3] + [0] * 3, [4] * 2 + [0] * 10], np.int32)
    for seg, there in ((segments, segments), (None, np.ones((3, 12), np.int32))):
        loss, metrics = ahead.loss(jnp.asarray(y), jnp.asarray(inputs), seg if seg is None else jnp.asarray(seg))
        want, rights = plain_loss(ahead.heads, y, inputs, there, config.weight)
        np.testing.assert_allclose(loss, want, rtol=1e-5)
        np.testing.assert_allclose([metrics[f"ahead{k}/right"] for k in range(1, 5)], rights, rtol=1e-6)
    logits = ahead(jnp.asarray(y[:, 0]))
    assert logits.shape == (3, 4, 32)


@pytest.mark.slow
@pytest.mark.parametrize("config", [flat(), hnet(1)], ids=["flat", "hnet"])
def test_heads_learn_and_leave_logits_alone(config):
    more = dataclasses.replace(config, ahead=AheadConfig(bytes=2))
    whole, params = network(more)
    alone = nnx.merge(structure(config)[0], {k: v for k, v in params.items() if k != "ahead"})
    ids = jnp.asarray(np.frombuffer(b"the same words, the same words, " * 2, np.uint8).astype(np.int32))[None]
    np.testing.assert_array_equal(whole(ids).logits, alone(ids).logits)
    graph = structure(more)[0]
    value = jax.jit(jax.value_and_grad(lambda p: nnx.merge(graph, p)(ids).aux_loss))
    first, grads = value(params)
    for _ in range(30):
        params = jax.tree.map(lambda p, g: p - 0.1 * g / (1e-6 + jnp.sqrt(jnp.mean(g**2))) * 0.05, params, grads)
        last, grads = value(params)
    assert last < first - 0.3 and np.isfinite(last)


def test_what_they_cost_and_where_they_may_be():
    config = flat(ahead=AheadConfig(bytes=3))
    d = config.stack.d_model
    more = forward_flops(config, 64) - forward_flops(flat(), 64)
    assert more == 2 * 3 * (d * d + d * 257)
    extra = count_parameters(init_params(config, jax.random.key(0))) - count_parameters(
        init_params(flat(), jax.random.key(0))
    )
    assert extra == 3 * (d * d + d * 384)
    assert FRESH.match("ahead/heads/mix/kernel")  # a model without heads can begin one that has them
    with pytest.raises(ConfigError, match="byte model"):
        TokensConfig(ahead=AheadConfig(bytes=1))
    with pytest.raises(ConfigError, match="above 0"):
        AheadConfig(weight=0.0)
