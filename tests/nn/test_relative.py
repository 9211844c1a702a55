"""Bucketed position bias, softmax1, and attention in blocks."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bytelm.nn import relative
from bytelm.nn.layers import Dropout
from bytelm.nn.relative import Attending, Keys, PositionBias, distance_bucket, relative_attend, softmax1


def test_buckets_are_the_reference_s(root):
    traces = json.loads((root / "tests/golden/mrt5/traces/relative_buckets.json").read_text())
    assert len(traces["buckets"]) == 6
    for name, wanted in traces["buckets"].items():
        buckets, farthest, bidirectional = name.split(",")
        ours = distance_bucket(jnp.asarray(traces["rel"]), int(buckets), int(farthest), bidirectional == "True")
        np.testing.assert_array_equal(ours, wanted)


def test_softmax1_is_the_reference_s(root):
    traces = json.loads((root / "tests/golden/mrt5/traces/softmax1.json").read_text())
    np.testing.assert_allclose(softmax1(jnp.float32(traces["x"])), traces["y"], rtol=2e-6, atol=1e-30)


def test_softmax1_leaves_weight_out_and_stays_finite():
    scores = jnp.array([[0.0, 0.0], [-1e9, -1e9], [1e4, 0.0], [-80.0, -90.0]])
    weights = softmax1(scores)
    np.testing.assert_allclose(weights.sum(axis=1), [2 / 3, 0, 1, np.exp(-80) + np.exp(-90)], rtol=1e-5, atol=1e-38)
    gradient = jax.grad(lambda s: (softmax1(s) * jnp.array([1.0, 2.0])).sum())(scores)
    assert np.isfinite(gradient).all()
    eps = 1e-3  # finite differences of the first row
    wanted = [((softmax1(scores[0] + eps * e) - softmax1(scores[0] - eps * e)) @ jnp.array([1.0, 2.0])) / (2 * eps)
              for e in jnp.eye(2)]  # fmt: skip
    np.testing.assert_allclose(gradient[0], wanted, atol=1e-4)


def twin(q, k, v, table, queries, keys, visible, gate, one, max_distance=20):
    """One query at a time, in float64."""
    b, t, h, _ = q.shape
    out = np.zeros(q.shape)
    for i in range(b):
        for x in range(t):
            for head in range(h):
                s = k[i, :, head] @ q[i, x, head]
                distance = jnp.asarray(keys[i] - queries[i][x])
                s = s + table[np.asarray(distance_bucket(distance, len(table), max_distance, True)), head]
                s = np.where(visible[i, x], s, -np.inf) + gate[i]
                e = np.exp(s - max(s.max(), 0))
                weights = e / (e.sum() + one * np.exp(-max(s.max(), 0)))
                out[i, x, head] = weights @ v[i, :, head]
    return out


@pytest.mark.parametrize("one", [False, True])
@pytest.mark.parametrize("rows", ["shared", "own"])
@pytest.mark.parametrize("block", [64, 4])
def test_attention_equals_a_numpy_twin_whole_and_in_blocks(monkeypatch, one, rows, block):
    monkeypatch.setattr(relative, "QUERY_BLOCK", block)
    rng = np.random.default_rng(0)
    b, t, h, width = 2, 11, 2, 3
    q, k, v = (rng.standard_normal((b, t, h, width)).astype(np.float32) for _ in range(3))
    table = rng.standard_normal((8, h)).astype(np.float32)
    place = np.sort(rng.choice(60, (b, t)), axis=1) if rows == "own" else np.arange(t)[None]
    visible = rng.random((b, 1, t)) < 0.7
    visible[:, :, 0] = True
    gate = -5 * rng.random((b, t)).astype(np.float32)
    bias = PositionBias(jnp.asarray(table), jnp.asarray(place), jnp.asarray(place), 20, True)
    spread, shown = np.broadcast_to(place, (b, t)), np.broadcast_to(visible, (b, t, t))
    wanted = twin(q, k, v, table, spread, spread, shown, gate, one)
    for held in (bias, bias.held()):
        keys = Keys(jnp.asarray(visible), jnp.asarray(gate))
        got, _ = relative_attend(*map(jnp.asarray, (q, k, v)), held, keys, Attending(one))
        np.testing.assert_allclose(got, wanted, atol=2e-6)


def test_blocks_change_neither_gradients_nor_the_excess_of_scores(monkeypatch):
    rng = np.random.default_rng(1)
    b, t, h, width = 2, 11, 2, 3
    q, k, v = (jnp.asarray(3 * rng.standard_normal((b, t, h, width)), jnp.float32) for _ in range(3))
    table, place = jnp.asarray(rng.standard_normal((8, h)), jnp.float32), jnp.arange(t)[None]
    causal = Keys(place[:, None, :] <= place[:, :, None])

    def total(q, table):
        y, excess = relative_attend(
            q, k, v, PositionBias(table, place, place, 20, False), causal, Attending(True, True)
        )
        return jnp.sum(jnp.sin(y)) + excess, excess

    (_, excess), whole = jax.value_and_grad(total, (0, 1), has_aux=True)(q, table)
    monkeypatch.setattr(relative, "QUERY_BLOCK", 4)
    (_, same), cut = jax.value_and_grad(total, (0, 1), has_aux=True)(q, table)
    assert excess > 0
    np.testing.assert_allclose(excess, same, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole, cut)


def test_dropout_drops_its_share_and_keeps_the_mean():
    x = jnp.ones((200, 200))
    some = Dropout(0.25, jax.random.key(0))
    y = some(x, 0)
    assert abs(float((y == 0).mean()) - 0.25) < 0.01
    assert abs(float(y.mean()) - 1) < 0.02
    assert not (some(x, 1) == y).all()
    assert not (some.fold(1)(x, 0) == y).all()
    assert (some(x, 0) == y).all()
    assert Dropout(0.25)(x, 0) is x
    assert Dropout(0.0, jax.random.key(0))(x, 0) is x
