"""Rows cut into pieces over devices equal whole ones: each function, and whole training steps."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bytelm.config import CapacityConfig, ConfigError, MeshConfig
from bytelm.nn.attend import attend, attend_in_pieces, causal_mask
from bytelm.nn.compaction import compact, expand, newest_slot, slot_positions
from bytelm.nn.recurrence import causal_conv, linear_scan, ssd, ssd_sequential
from bytelm.parallel.mesh import compiler_options, make_mesh
from bytelm.parallel.sequence import pieces
from bytelm.plan import make_plan
from bytelm.train.state import plan_state
from tiny import hat, hnet, run_config

T, PIECES = 48, 4
KINDS = ("whole", "documents")
DOCUMENTS = [[1] * 5 + [2] * 30 + [3] * 13, [1] * 12 + [2] * 12 + [4] * 20 + [0] * 4]


def mesh():
    return make_mesh(MeshConfig(data=1, sequence=PIECES, tensor=2), jax.devices()[:8])


def on_mesh(f):
    return jax.jit(f, compiler_options=compiler_options(mesh()))


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def segments_of(kind):
    return None if kind == "whole" else jnp.array(DOCUMENTS, jnp.int32)


def both(f, *args, atol=2e-5):
    """f and the gradients of a mixture of what it gives, in pieces and on one device."""

    def mixed(*args):
        y = f(*args)
        return jnp.sum(y * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)), y

    run = jax.grad(mixed, argnums=tuple(range(len(args))), has_aux=True)
    whole = jax.jit(run)(*args)
    with jax.set_mesh(mesh()):
        assert pieces() == PIECES
        cut = on_mesh(run)(*args)
    for a, b in zip(jax.tree.leaves(cut), jax.tree.leaves(whole)):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=atol * max(1, float(np.abs(b).max())))
    return whole[1]


@pytest.mark.parametrize("documents", KINDS)
@pytest.mark.parametrize("form,chunk", [("scan", 4), ("batched", 5), ("scan", 64)])
def test_state_space_recurrence(documents, form, chunk):
    x, B, C = draw(0, 2, T, 4, 3), draw(1, 2, T, 5), draw(2, 2, T, 5)
    dt, A = jnp.abs(draw(3, 2, T, 4)) / 4, -jnp.abs(draw(4, 4))
    segments = segments_of(documents)
    y = both(lambda x, dt, A, B, C: ssd(x, dt, A, B, C, segments, chunk=chunk, form=form)[0], x, dt, A, B, C)
    oracle, end = ssd_sequential(x, dt, A, B, C, segments)
    np.testing.assert_allclose(y, oracle, atol=1e-5)
    with jax.set_mesh(mesh()):
        state = on_mesh(lambda *v: ssd(*v, segments, chunk=chunk, form=form)[1])(x, dt, A, B, C)
    np.testing.assert_allclose(state, end, atol=1e-5)


@pytest.mark.parametrize("form", ["scan", "blocked"])
def test_smoothing(form):
    decay = jax.nn.sigmoid(draw(0, 2, T)).at[0, jnp.array([0, 7, 12, 36])].set(0).at[1, 0].set(0)
    both(lambda decay, x: linear_scan(decay, x, form=form, block=5), decay, draw(1, 2, T, 3))


@pytest.mark.parametrize("documents", KINDS)
def test_convolution(documents):
    both(lambda x, k, b: causal_conv(x, k, b, segments_of(documents)), draw(0, 2, T, 4), draw(1, 4, 4), draw(2, 4))


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_chunks_are_exchanged(share):
    """Slots are those of the whole row: all full, some empty, and too few for what is kept in one piece, or in all."""
    keep = np.random.default_rng(5).random((3, T)) < share
    keep[:, 0] = True
    keep[2] = np.arange(T) >= T - T // PIECES
    x, kept = draw(0, 3, T, 4), jnp.array(keep)

    def there_and_back(x, slots):
        at = slot_positions(kept, slots)
        chunks = compact(x, at)
        return expand(chunks * jnp.arange(1, slots + 1)[:, None], newest_slot(kept, slots))

    for slots in (4, 16, T):
        y = both(lambda x: there_and_back(x, slots), x, atol=1e-6)  # noqa: B023
        place = np.clip(np.cumsum(keep, axis=1) - 1, 0, slots - 1)
        at = np.full((3, slots), -1)
        for row, found in zip(at, map(np.flatnonzero, keep)):
            row[: len(found)] = found[:slots]
        source = np.take_along_axis(at, place, axis=1)
        wanted = np.where((source >= 0)[..., None], np.take_along_axis(x, np.maximum(source, 0)[..., None], 1), 0)
        np.testing.assert_array_equal(y, wanted * (place + 1).astype(np.float32)[..., None])


@pytest.mark.parametrize("documents", KINDS)
@pytest.mark.parametrize("window", [0, 5, 12, 30])
def test_attention(documents, window):
    """All keys; a window within a piece, as long as one, and over several."""
    q, k, v = draw(0, 2, T, 4, 6), draw(1, 2, T, 2, 6), draw(2, 2, T, 2, 6)
    segments = segments_of(documents)
    with jax.set_mesh(mesh()):
        y = on_mesh(lambda *qkv: attend_in_pieces(*qkv, window, segments))(q, k, v)
    np.testing.assert_allclose(y, attend(q, k, v, causal_mask(T, window, segments)), atol=2e-6)


@pytest.mark.parametrize("documents", KINDS)
@pytest.mark.parametrize("window,block,keys", [(0, 5, 7), (30, 12, 4), (0, 64, 64)])
def test_attention_in_blocks_with_gradients(documents, window, block, keys):
    """Keys go round all pieces; blocks that divide a piece, that do not, and that are longer."""
    args = (draw(0, 2, T, 4, 6), draw(1, 2, T, 2, 6), draw(2, 2, T, 2, 6))
    segments = segments_of(documents)

    def run(f):
        y, back = jax.vjp(f, *args)
        return y, back(jnp.cos(3 * y))

    wanted = run(lambda *a: attend(*a, causal_mask(T, window, segments)))
    with jax.set_mesh(mesh()):
        got = on_mesh(lambda: run(lambda *a: attend_in_pieces(*a, window, segments, block, keys)))()
    np.testing.assert_allclose(got[0], wanted[0], atol=2e-6)
    for g, w in zip(got[1], wanted[1]):
        np.testing.assert_allclose(g, w, atol=1e-5)


def test_nothing_as_large_as_all_scores_is_kept():
    """Under a scan over rematerialised layers, where jax would make what does not depend on weights in advance."""
    t = 4096

    def layer(x, _):
        attended = jax.checkpoint(lambda x: attend_in_pieces(x, x, x, 0, None, 64, 64), prevent_cse=False)
        return x + attended(x), None

    def loss(x):
        return jnp.sum(jax.lax.scan(layer, x, None, length=3)[0] ** 2)

    with jax.set_mesh(mesh()):
        traced = str(jax.make_jaxpr(jax.grad(loss))(jax.ShapeDtypeStruct((1, t, 4, 16), jnp.float32)))
    sizes = [math.prod(map(int, dims.split(","))) for dims in re.findall(r"\w\[([\d,]+)\]", traced)]
    assert 3 * t * 4 * 16 == max(sizes) < t * t / PIECES


def test_lengths_that_do_not_divide():
    with (
        jax.set_mesh(mesh()),
        pytest.raises(ValueError, match="rows of 50 positions cannot be cut into mesh.sequence=4"),
    ):
        linear_scan(jnp.zeros((1, 50)), jnp.zeros((1, 50, 2)))
    with jax.set_mesh(mesh()), pytest.raises(ValueError, match="18 slots cannot be cut into mesh.sequence=4"):
        compact(jnp.zeros((1, T, 2)), jnp.zeros((1, 18), jnp.int32))
    with pytest.raises(ConfigError, match="mesh sizes"):
        MeshConfig(sequence=0)


@pytest.mark.parametrize("model,sections,message", [
    (hat(), {}, "only flat models and H-Nets"),
    (hnet(1, chunker="words"), {}, "only flat models and H-Nets"),
    (hnet(1, attention="cudnn"), {}, "attention=cudnn reads whole rows"),
    (hnet(1, capacity=CapacityConfig(multiple=6)), {}, "model.capacity.multiple=6 cannot"),
    (hnet(1), {"data": {"seq_len": 34}}, "data.seq_len=34 cannot be cut into mesh.sequence=4"),
    (hnet(1), {"eval": {"window": 30}}, "eval.window=30 cannot"),
])  # fmt: skip
def test_runs_whose_rows_cannot_be_cut(model, sections, message):
    config = dataclasses.replace(run_config("unused", **sections), model=model)
    with pytest.raises(ConfigError, match=message):
        plan_state(config, mesh())
    with pytest.raises(ConfigError, match=message):
        make_plan(dataclasses.replace(config, mesh=MeshConfig(data=1, sequence=PIECES)))
