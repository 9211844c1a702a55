"""H-Net: what must not change its result, causality at all levels, capacity, packing, steps, gradients, init."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from bytelm.config import ConfigError, HNetConfig, SSMConfig, parse_arch_layout
from bytelm.models.build import count_parameters, init_params, structure
from bytelm.models.hnet_recipe import lr_multipliers, reference_decays, stage_of
from bytelm.parallel.rules import path_string
from bytelm.train.losses import token_nll
from tiny import by_path, hnet, network

T = 40
MODELS = {levels: network(hnet(levels), seed=levels, scale=4.0) for levels in (1, 2)}


@pytest.fixture
def model():
    return MODELS[2][0]


def text(b=3, t=T, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(97, 105, (b, t)), jnp.int32)


def forward(model, ids, segments=None, capacity=None):
    return _forward(nnx.split(model)[0], nnx.split(model)[1], ids, segments, capacity)


def _run(graph, state, ids, segments, capacity):
    return nnx.merge(graph, state)(ids, segments, capacity)


_forward = jax.jit(_run, static_argnums=(0, 4))


def needed(out):
    return tuple(int(level.boundary.sum(axis=1).max()) for level in out.levels)


@pytest.mark.parametrize("levels", [1, 2])
def test_boundaries_are_mixed(levels):
    """The other tests would prove little on a model that cuts everywhere or nowhere."""
    out = forward(MODELS[levels][0], text())
    for level in out.levels:
        share = level.boundary.sum() / level.valid.sum()
        assert 0.15 < share < 0.85, share


@pytest.mark.slow
@pytest.mark.parametrize("levels", [1, 2])
def test_any_sufficient_capacity_gives_the_same_result(levels):
    """Exactly what is needed, nine more, the row, twice the row."""
    model, ids = MODELS[levels][0], text()
    want = forward(model, ids)
    exact = needed(want)
    for capacity in (exact, tuple(m + 9 for m in exact), (T,) * len(exact), (2 * T,) * len(exact)):
        got = forward(model, ids, None, capacity)
        np.testing.assert_allclose(got.logits, want.logits, atol=2e-5)
        np.testing.assert_allclose(got.aux_loss, want.aux_loss, atol=1e-6)
        for a, b in zip(got.levels, want.levels):
            n = int(b.valid.sum(axis=1).max())
            c = min(a.boundary.shape[1], b.boundary.shape[1])
            assert c >= n
            np.testing.assert_array_equal(np.where(a.valid, a.boundary, False)[:, :c], b.boundary[:, :c])


@pytest.mark.parametrize("levels,capacity", [(1, None), (2, None), (2, 6)])
def test_causality_is_bit_exact_at_all_levels(levels, capacity):
    """Changing byte t changes nothing before it: logits, probabilities, boundaries; with slots to spare or too few."""
    model = MODELS[levels][0]
    slots = None if capacity is None else (capacity, max(capacity - 1, 2))[:levels]
    ids = text(b=2)
    want = forward(model, ids, None, slots)
    for t in (1, 9, 23, 38):
        got = forward(model, ids.at[:, t:].set(110), None, slots)
        np.testing.assert_array_equal(got.logits[:, :t], want.logits[:, :t])
        assert (np.asarray(got.logits[:, t]) != np.asarray(want.logits[:, t])).any()
        for a, b in zip(got.levels, want.levels):
            before = np.asarray(b.valid) & (np.asarray(b.position) < t)
            for field in ("position", "probability", "boundary"):
                np.testing.assert_array_equal(
                    np.asarray(getattr(a, field))[before], np.asarray(getattr(b, field))[before]
                )


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, T - 1), st.integers(0, 2**31))
def test_overflow_drops_by_position_only(seed, cut, other):
    """With too few slots, text on the right never changes what came before, whatever the text."""
    model = MODELS[2][0]
    a, b = text(1, seed=seed), text(1, seed=other)
    b = b.at[:, :cut].set(a[:, :cut])
    x, y = (forward(model, ids, None, (6, 3)) for ids in (a, b))
    np.testing.assert_array_equal(x.logits[:, :cut], y.logits[:, :cut])


def test_overflow_keeps_the_first_and_is_counted(model):
    """Up to the first dropped boundary nothing differs from full capacity; the loss still sees every boundary."""
    ids = text()
    full = forward(model, ids)
    few = 5
    got = forward(model, ids, None, (few,) * len(full.levels))
    level = full.levels[0]
    count = np.asarray(level.boundary.sum(axis=1))
    assert float(got.metrics["level0/dropped"]) == np.maximum(count - few, 0).sum() > 0
    assert float(full.metrics["level0/dropped"]) == 0
    assert float(got.metrics["level0/fraction"]) == float(full.metrics["level0/fraction"])
    assert float(got.metrics["level0/ratio_loss"]) == float(full.metrics["level0/ratio_loss"])
    assert float(got.metrics["level0/need"]) == pytest.approx(np.quantile(count, 0.99))
    for row in range(len(ids)):
        dropped = np.flatnonzero(np.asarray(level.boundary[row]))[few]
        np.testing.assert_allclose(got.logits[row, :dropped], full.logits[row, :dropped], atol=2e-5)
        assert np.abs(got.logits[row, dropped:] - full.logits[row, dropped:]).max() > 1e-3


def test_packed_documents_equal_separate_ones(model):
    lengths = (17, 1, 16)
    documents = np.full((3, T), 99)
    for i, n in enumerate(lengths):
        documents[i, :n] = text(1, n, seed=n)[0]
    row = np.concatenate([*(d[:n] for d, n in zip(documents, lengths)), np.full(6, 97)])
    segments = np.repeat([1, 2, 3, 0], [*lengths, 6])
    packed = forward(model, *(jnp.asarray(np.tile(x, (3, 1)), jnp.int32) for x in (row, segments)))
    alone = forward(model, jnp.asarray(documents, jnp.int32))  # padded on the right, which causality hides
    start = 0
    for i, n in enumerate(lengths):
        np.testing.assert_allclose(packed.logits[0, start : start + n], alone.logits[i, :n], atol=2e-5)
        for level, other in zip(packed.levels, alone.levels):
            here = np.asarray(level.valid[0] & (level.position[0] >= start) & (level.position[0] < start + n))
            there = np.asarray(other.valid[i] & (other.position[i] < n))
            np.testing.assert_array_equal(np.asarray(level.boundary[0])[here], np.asarray(other.boundary[i])[there])
            np.testing.assert_allclose(
                np.asarray(level.probability[0])[here], np.asarray(other.probability[i])[there], atol=1e-6
            )
        start += n
    assert all(not level.boundary[0][level.position[0] >= start].any() for level in packed.levels)  # none in padding


def test_a_document_without_slots_does_not_read_anothers(model):
    """Far too few slots in a packed row: changing the first document still leaves the second alone."""
    row = text(3)
    segments = jnp.repeat(jnp.array([[1, 2]]), jnp.array([20, 20]), axis=1).repeat(3, axis=0)
    want, got = (forward(model, x, segments, (3, 2)) for x in (row, row.at[:, :20].set(text(3, 20, seed=9))))
    starved = np.array([(np.asarray(out.levels[0].boundary[:, :20]).sum(axis=1) >= 3) for out in (want, got)]).all(
        axis=0
    )
    assert starved.any()  # rows whose second document found no slot
    np.testing.assert_allclose(got.logits[starved, 20:], want.logits[starved, 20:], atol=2e-5)


@pytest.mark.slow
def test_padding_and_empty_slots_do_not_touch_loss_or_gradient(model):
    """The same two documents, padded and not, with slots for twice the row: one loss, one gradient, no NaN."""
    graph, state = nnx.split(model, nnx.Param)
    ids = text(2, 24)

    def loss(state, ids, segments, capacity):
        out = nnx.merge(graph, state)(ids, segments, capacity)
        return jnp.sum(jnp.where(segments > 0, out.logits[..., 0], 0)) / 48 + out.aux_loss

    levels = model.config.levels
    value_and_grad = jax.jit(jax.value_and_grad(loss), static_argnums=3)
    plain = value_and_grad(state, ids, jnp.ones((2, 24), jnp.int32), None)
    padded = jnp.pad(ids, ((0, 0), (0, 16)), constant_values=99)
    segments = jnp.pad(jnp.ones((2, 24), jnp.int32), ((0, 0), (0, 16)))
    more = value_and_grad(state, padded, segments, (80,) * levels)
    np.testing.assert_allclose(more[0], plain[0], rtol=1e-6)
    for a, b in zip(jax.tree.leaves(more[1]), jax.tree.leaves(plain[1])):
        assert jnp.isfinite(a).all()
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1, float(jnp.abs(b).max())))


def test_prefill_of_unequal_rows_and_steps_equal_forward(model):
    ids = text(4, 36)
    want = np.asarray(forward(model, ids).logits)
    lengths = jnp.array([1, 5, 20, 30], jnp.int32)
    graph, state = nnx.split(model)
    logits, cache = jax.jit(lambda s, x, n: nnx.merge(graph, s).prefill(x, n, 40))(state, ids[:, :30], lengths)
    step = jax.jit(lambda s, x, c: nnx.merge(graph, s).step(x, c))
    for i in range(6):
        for row, length in enumerate(lengths):
            np.testing.assert_allclose(logits[row], want[row, length + i - 1], atol=2e-5)
        logits, cache = step(state, ids[jnp.arange(4), lengths + i], cache)


def test_inner_state_advances_only_at_boundaries(model):
    ids = text(3, 30)
    level = forward(model, ids).levels[0]
    graph, state = nnx.split(model)
    step = jax.jit(lambda s, x, c: nnx.merge(graph, s).step(x, c)[1])
    cache = model.empty_cache(3, 30)
    for t in range(30):
        before, cache = cache, step(state, ids[:, t], cache)
        inner = [jax.tree.leaves(c.inner) for c in (before, cache)]
        for row in np.flatnonzero(~np.asarray(level.boundary[:, t])):
            np.testing.assert_array_equal(cache.value[row], before.value[row])
            # batch is the axis of size 3: first in lengths, second in stacked caches
            for a, b in zip(*inner):
                axis = 0 if a.shape[0] == 3 else 1
                np.testing.assert_array_equal(np.take(np.asarray(a), row, axis), np.take(np.asarray(b), row, axis))
    lengths = cache.inner.lengths if hasattr(cache.inner, "lengths") else cache.inner.encoder.lengths
    np.testing.assert_array_equal(lengths, level.boundary.sum(axis=1))


@pytest.mark.slow
def test_gradients_equal_finite_differences(x64):
    """In float64, in random directions, for the loss with its straight-through parts taken out of play by comparing
    only directions that move no boundary: a step of 1e-6."""
    config = hnet(2)
    _, params = network(config, scale=3.0)
    wide = object.__new__(HNetConfig)
    for name, value in vars(config).items():
        object.__setattr__(wide, name, value)
    object.__setattr__(wide, "dtype", "float64")
    graph, _ = structure(wide)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), params)
    ids, targets = text(2, 20), text(2, 20, seed=5)
    decoder = lambda path: "backbone/decoder" in path or "head" in path or "main" in path or "inner/decoder" in path  # noqa: E731

    def loss(p):
        out = nnx.merge(graph, p)(ids)
        return jnp.mean(token_nll(out.logits, targets)) + out.aux_loss

    loss, grads = jax.jit(loss), jax.jit(jax.grad(loss))(params)
    for _ in range(3):
        # What comes after the routers has ordinary gradients; what comes before also has the straight-through ones,
        # which no finite difference sees (golden cases check those).
        direction = jax.tree.map_with_path(
            lambda path, p: jnp.asarray(rng.standard_normal(p.shape) * decoder(path_string(path))), params
        )
        up, down = (jax.tree.map(lambda p, v, e=e: p + e * v, params, direction) for e in (1e-6, -1e-6))
        numeric = float(loss(up) - loss(down)) / 2e-6
        exact = sum(float(jnp.vdot(g, v)) for g, v in zip(jax.tree.leaves(grads), jax.tree.leaves(direction)))
        np.testing.assert_allclose(exact, numeric, rtol=2e-4)


def test_bfloat16_is_close(model):
    config = dataclasses.replace(model.config, dtype="bfloat16")
    graph, _ = structure(config)
    params = MODELS[model.config.levels][1]
    ids = text()
    want = forward(model, ids)
    got = jax.jit(lambda p: nnx.merge(graph, p)(ids))(params)
    assert got.logits.dtype == jnp.float32
    same = np.asarray(got.levels[0].boundary == want.levels[0].boundary)
    assert same.mean() > 0.97  # decisions near one half may flip
    assert np.abs(got.levels[0].probability - want.levels[0].probability).max() < 0.05


def test_start_values_are_the_references():
    """Spec of the reference's init: std of each kind, 1 / sqrt(residual additions so far), identity routers."""
    config = hnet(
        2, arch_layout="m2,[T1m2,[T3],m2T1],m2", d_model=(64, 64, 128), ssm=SSMConfig(d_state=64, head_dim=16)
    )
    p = by_path(init_params(config, jax.random.key(0)))
    # additions: stage 0: 4; stage 1: 4 + 8; stage 2: 12 + 6
    for name, std in (
        ("backbone/encoder/run0/mamba/x/kernel", 0.02), ("backbone/encoder/run0/mamba/out/kernel", 0.02 / 4**0.5),
        ("backbone/inner/encoder/run0/attention/out/kernel", 0.02 / 12**0.5), ("head/kernel", 0.02),
        ("backbone/inner/inner/main/run0/mlp/down/kernel", 0.02 / 18**0.5),
        ("backbone/inner/inner/main/run0/attention/q/kernel", 0.02), ("embed/table", 1.0),
    ):  # fmt: skip
        assert p[name].std() == pytest.approx(std, rel=0.06), name
    for level in ("backbone", "backbone/inner"):
        np.testing.assert_array_equal(p[f"{level}/router/q/kernel"], np.eye(64))
        assert not p[f"{level}/residual/kernel"].any()
        bias = p[f"{level}/residual/bias"]
        assert 0 < np.abs(bias).max() <= 1 / 8 and np.abs(bias).mean() == pytest.approx(1 / 16, rel=0.3)
    assert p["backbone/inner/inner/pad"].shape == (64,) and not p["backbone/inner/inner/pad"].any()
    assert "backbone/inner/pad" not in p  # equal widths need none


def test_published_learning_rates():
    """Equation 11 on the published sizes, as the specification works them out."""
    for arch, d, targets, want in (
        ("m4,[T22],m4", (1024, 1536), (6.0,), (2.63, 0.88)),
        ("m4,[T24],m4", (1024, 2048), (6.0,), (3.03, 0.88)),
        ("m4,[T1m4,[T26],m4T1],m4", (1024, 1024, 1536), (3.0, 3.0), (2.63, 1.52, 0.71)),
        ("m4,[T1m4,[T27],m4T1],m4", (1024, 1536, 2048), (3.0, 3.0), (3.03, 1.43, 0.71)),
    ):
        config = HNetConfig(arch_layout=arch, d_model=d, num_heads=(16,), targets=targets)
        assert lr_multipliers(config) == pytest.approx(want, abs=0.006)
    assert lr_multipliers(hnet(1, lr_multipliers=(2.0, 1.0))) == (2.0, 1.0)


def test_stages_and_decay_groups():
    names = [path_string(p) for p, _ in jax.tree.leaves_with_path(structure(hnet(2))[1])]
    by_stage = {s: [n for n in names if stage_of(n) == s] for s in range(3)}
    assert {"embed/table", "head/kernel", "backbone/router/q/kernel"} <= set(by_stage[0])
    assert "backbone/inner/residual/bias" in by_stage[1]
    assert "backbone/inner/inner/pad" in by_stage[2] and all("/main/" in n or "pad" in n for n in by_stage[2])
    kept = {n for n in names if not reference_decays(n)}
    assert kept == {
        n for n in names if n.endswith(("conv_x/bias", "conv_bc/bias", "residual/bias", "mamba/norm/scale"))
    }


def test_no_levels_is_one_stack():
    config = HNetConfig(arch_layout="T1", d_model=(32,), num_heads=(4,), targets=())
    model = nnx.merge(structure(config)[0], init_params(config, jax.random.key(0)))
    out = model(text(1, 8))
    assert out.levels == () and out.logits.shape == (1, 8, 256) and float(out.aux_loss) == 0


@pytest.mark.slow
def test_three_levels_build_and_run():
    config = HNetConfig(
        arch_layout="m1,[m1,[m1,[T1],m1],m1],m1", d_model=(32, 32, 32, 64), num_heads=(4,), targets=(2.0, 2.0, 2.0),
        ssm=SSMConfig(d_state=4, head_dim=8, chunk=8),
    )  # fmt: skip
    model, _ = network(config, scale=4.0)
    ids = text(2, 24)
    out = forward(model, ids)
    assert len(out.levels) == 3
    cache, logits = model.empty_cache(2, 24), []
    graph, state = nnx.split(model)
    step = jax.jit(lambda s, x, c: nnx.merge(graph, s).step(x, c))
    for t in range(24):
        one, cache = step(state, ids[:, t], cache)
        logits.append(one)
    np.testing.assert_allclose(np.stack(logits, 1), out.logits, atol=2e-5)


def test_layouts_are_parsed():
    arch = parse_arch_layout("m4, [T1m4,[T26],m4T1], m4")
    assert arch.stages == (("m4", "m4"), ("T1m4", "m4T1")) and arch.main == "T26"
    assert count_parameters(structure(hnet(1))[1]) > 0
    for layout, message in (
        ("m4,[T22,m4", "expected encoder"), ("m4,[],m4", "expected runs of a letter"), ("m4,[T2],x3", "x3"),
        ("[T2]", "expected encoder"), ("m4,[T2],m4,[T2],m4", "expected encoder"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match="arch_layout") as error:
            HNetConfig(arch_layout=layout)
        assert message.split()[0] in str(error.value)


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"d_model": (64,)}, "d_model=.*2 stages"), ({"d_model": (64, 32)}, "must not be narrower"),
        ({"targets": (1.0,)}, "above 1"), ({"targets": (3.0, 3.0)}, "each of the 1 chunking levels"),
        ({"num_heads": (4, 4, 4)}, "num_heads"), ({"num_heads": (5,)}, "model, stage 0: stack.num_heads=5"),
        ({"lr_multipliers": (1.0,)}, "lr_multipliers"),
    ],
)  # fmt: skip
def test_config_mistakes_are_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        hnet(1, **fields)
