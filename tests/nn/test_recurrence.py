"""The chunked state-space forms against the recurrence, in double precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bytelm.nn.recurrence import causal_conv, linear_scan, ssd, ssd_sequential, ssd_step


def problem(t, seed=0, b=2, h=3, p=4, n=5):
    rng = np.random.default_rng(seed)
    x, B, C = (jnp.asarray(rng.standard_normal(s)) for s in ((b, t, h, p), (b, t, n), (b, t, n)))
    dt = jnp.asarray(rng.uniform(1e-3, 2.0, (b, t, h)))
    A = jnp.asarray(-rng.uniform(0.1, 16.0, h))
    return x, dt, A, B, C


def random_segments(t, seed=0, b=2):
    rng = np.random.default_rng(seed + 100)
    return jnp.asarray(np.cumsum(rng.random((b, t)) < 0.15, axis=1) + 1, jnp.int32)


@pytest.mark.parametrize("form", ["scan", "batched"])
@pytest.mark.parametrize("t,chunk", [(37, 8), (64, 16), (5, 128), (1, 4), (48, 1)])
@pytest.mark.parametrize("packed", [False, True])
def test_chunked_equals_recurrence(x64, form, t, chunk, packed):
    args = problem(t, seed=t)
    segments = random_segments(t, seed=t) if packed else None
    want, want_state = ssd_sequential(*args, segments)
    got, state = ssd(*args, segments, chunk=chunk, form=form)
    np.testing.assert_allclose(got, want, atol=1e-10, rtol=0)
    np.testing.assert_allclose(state, want_state, atol=1e-10, rtol=0)


@pytest.mark.parametrize("form", ["scan", "batched"])
def test_chunked_gradients_equal_recurrence(x64, form):
    args, segments = problem(29), random_segments(29)
    mix = jnp.asarray(np.random.default_rng(1).standard_normal((2, 29, 3, 4)))

    def loss(f):
        return lambda *a: jnp.sum(f(*a)[0] * mix) + jnp.sum(jnp.sin(f(*a)[1]))

    want = jax.grad(loss(lambda *a: ssd_sequential(*a, segments)), argnums=range(5))(*args)
    got = jax.grad(loss(lambda *a: ssd(*a, segments, chunk=8, form=form)), argnums=range(5))(*args)
    for g, w in zip(got, want):
        np.testing.assert_allclose(g, w, atol=1e-10, rtol=1e-9)


def test_recurrence_equals_numpy(x64):
    x, dt, A, B, C = (np.asarray(v) for v in problem(11))
    y, state = np.zeros_like(x), np.zeros((2, 3, 4, 5))
    for i in range(11):
        for b in range(2):
            for h in range(3):
                state[b, h] = np.exp(dt[b, i, h] * A[h]) * state[b, h] + dt[b, i, h] * np.outer(x[b, i, h], B[b, i])
                y[b, i, h] = state[b, h] @ C[b, i]
    got, got_state = ssd_sequential(*problem(11))
    np.testing.assert_allclose(got, y, atol=1e-12)
    np.testing.assert_allclose(got_state, state, atol=1e-12)


def test_zero_dt_keeps_the_state(x64):
    x, dt, A, B, C = problem(20)
    _, short = ssd(x[:, :13], dt[:, :13], A, B[:, :13], C[:, :13], chunk=8)
    _, padded = ssd(x, dt.at[:, 13:].set(0), A, B, C, chunk=8)
    np.testing.assert_allclose(padded, short, atol=1e-12)


def test_step_continues_the_row(x64):
    x, dt, A, B, C = problem(9)
    want, want_state = ssd(x, dt, A, B, C, chunk=4)
    _, state = ssd(x[:, :8], dt[:, :8], A, B[:, :8], C[:, :8], chunk=4)
    state, y = ssd_step(state, x[:, 8], dt[:, 8], A, B[:, 8], C[:, 8])
    np.testing.assert_allclose(y, want[:, 8], atol=1e-12)
    np.testing.assert_allclose(state, want_state, atol=1e-12)


def test_large_decays_give_finite_gradients():
    x, dt, A, B, C = (v.astype(jnp.float32) for v in problem(64))
    grads = jax.grad(lambda dt, A: jnp.sum(ssd(x, dt, A, B, C, random_segments(64), chunk=16)[0]), (0, 1))(dt * 50, A)
    assert all(np.isfinite(g).all() for g in grads)


def test_conv_equals_numpy(x64):
    rng = np.random.default_rng(0)
    x, kernel, bias = rng.standard_normal((2, 10, 3)), rng.standard_normal((4, 3)), rng.standard_normal(3)
    segments = np.array([[1] * 4 + [2] * 6, [1] * 10], np.int32)
    want = np.zeros_like(x) + bias
    for b in range(2):
        for i in range(10):
            for tap in range(4):
                if i - tap >= 0 and segments[b, i - tap] == segments[b, i]:
                    want[b, i] += kernel[3 - tap] * x[b, i - tap]
    got = causal_conv(jnp.asarray(x), jnp.asarray(kernel), jnp.asarray(bias), jnp.asarray(segments))
    np.testing.assert_allclose(got, want, atol=1e-12)


def test_conv_shorter_than_its_kernel():
    x = jnp.ones((1, 2, 1))
    np.testing.assert_allclose(causal_conv(x, jnp.ones((4, 1)), jnp.zeros(1))[0, :, 0], [1, 2])


def scan_twin(decay, x):
    out, h = np.zeros_like(x), np.zeros((len(x), x.shape[-1]))
    for t in range(x.shape[1]):
        h = decay[:, t, None] * h + x[:, t]
        out[:, t] = h
    return out


@pytest.mark.parametrize("form", ["scan", "blocked"])
@pytest.mark.parametrize("t,block", [(1, 4), (7, 4), (12, 4), (13, 64)])
def test_linear_scan_equals_numpy_twin(x64, form, t, block):
    rng = np.random.default_rng(t)
    decay, x, g = rng.random((2, t)), rng.standard_normal((2, t, 3)), rng.standard_normal((2, t, 3))
    decay[0, t // 2], decay[1, 0] = 0, 0  # new stretches
    run = lambda a, u: linear_scan(a, u, form=form, block=block)  # noqa: E731
    np.testing.assert_allclose(run(jnp.asarray(decay), jnp.asarray(x)), scan_twin(decay, x), atol=1e-12)
    grads = jax.grad(lambda a, u: jnp.vdot(run(a, u), g), argnums=(0, 1))(jnp.asarray(decay), jnp.asarray(x))

    def loss(a, u):
        return (scan_twin(a, u) * g).sum()

    for which, got in enumerate(grads):
        for index in np.ndindex(got.shape):
            arguments = [[decay.copy(), x.copy()] for _ in range(2)]
            arguments[0][which][index] += 1e-6
            arguments[1][which][index] -= 1e-6
            numeric = (loss(*arguments[0]) - loss(*arguments[1])) / 2e-6
            np.testing.assert_allclose(got[index], numeric, atol=1e-7)


def test_linear_scan_stays_exact_where_decay_is_extreme():
    """Decays of 1e-4 in a row: sums of logarithms reach -600 within a block."""
    rng = np.random.default_rng(0)
    decay = np.where(rng.random((2, 300)) < 0.5, 1e-4, 0.9999).astype(np.float32)
    x = rng.standard_normal((2, 300, 4)).astype(np.float32)
    want = scan_twin(decay.astype(np.float64), x.astype(np.float64))
    for form, limit in (("scan", 2e-6), ("blocked", 1e-4)):
        got = linear_scan(jnp.asarray(decay), jnp.asarray(x), form=form)
        assert np.abs(got - want).max() / np.abs(want).max() < limit, form
