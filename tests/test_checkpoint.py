"""Sums over saved arrays: the same on host and devices, and another for other arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bytelm.checkpoint import _device_sums, _host_sum, checksums


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_host_and_devices_sum_alike(kind):
    rng = np.random.default_rng(0)
    leaves = [jnp.asarray(rng.normal(size=shape) * 50, kind) for shape in ((), (0,), (7,), (3, 5, 4), (1, 9))]
    by_devices = [int(x) for x in _device_sums(leaves)]
    for block in (1, 6, 1 << 20):
        assert [_host_sum(np.asarray(x), block) for x in leaves] == by_devices
    by_path = checksums({"a": {"b": leaves[2]}, "c": leaves[3]})
    assert by_path == {"a/b": by_devices[2], "c": by_devices[3]}


@pytest.mark.parametrize(
    "change",
    [lambda x: np.roll(x, 1), lambda x: x[:, ::-1], lambda x: np.where(x == x[1, 2], np.nextafter(x, x + 1), x)],
    ids=["rolled", "reversed", "one bit"],
)
def test_other_arrays_have_another_sum(change):
    x = np.random.default_rng(1).normal(size=(4, 5)).astype(np.float32)
    assert checksums({"x": jax.device_put(change(x))}) != checksums({"x": jax.device_put(x)})
