"""The rules table, the mesh, and that a run on 2 x 4 devices equals the run on one."""

import math
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from bytelm.config import AheadConfig, ConfigError, MeshConfig, StackConfig
from bytelm.data.pipeline import Batches, load_text
from bytelm.models.build import byte_ids, structure
from bytelm.parallel.mesh import compiler_options, device_order, make_mesh, shard, unroll
from bytelm.parallel.rules import RULES, logical_axes, path_string, state_shardings
from bytelm.topology import GENERATIONS, shapes
from bytelm.train.state import init_state, plan_state
from bytelm.train.step import make_train_step, place_batch
from tiny import HYBRID, blt, flat, hat, hnet, megabyte, run_config, spacebyte, t5

AHEAD = AheadConfig(bytes=2)


def test_exactly_one_row_matches_each_parameter():
    config = flat(StackConfig(layout="M1T1", d_model=32, num_heads=4), tie_embeddings=False)
    paths = [path_string(p) for p, _ in jax.tree.leaves_with_path(structure(config)[1])]
    matched = {logical_axes(p) for p in paths}
    assert len(paths) > 20 and ("layers", "embed", "heads", None) in matched
    with pytest.raises(ValueError, match="'stack/new/thing': no row of the sharding table"):
        logical_axes("stack/new/thing")
    with pytest.raises(ValueError, match="the rows .* and .* of the sharding table match"):
        logical_axes("embed/table", (*RULES, (r"table", (None, None))))


def test_every_row_is_used():
    """A row that matches nothing is a parameter that was renamed."""
    configs = [flat(StackConfig(layout="M1T1", d_model=32, num_heads=4), tie_embeddings=False, ahead=AHEAD), hnet(2)]
    configs += [t5(kind) for kind in ("learned", "boundary", "convolution")]
    configs += [hat(), spacebyte(positions=64, slots=64), megabyte(positions=64), blt()]
    paths = ["chunks/need", "chunks/capacity"]
    for config in configs:
        paths += [path_string(p) for p, _ in jax.tree.leaves_with_path(structure(config)[1])]
    for row in RULES:
        hits = 0
        for path in paths:
            try:
                logical_axes(path, (row,))
                hits += 1
            except ValueError:
                pass
        assert hits, row


def test_mesh_sizes():
    assert dict(make_mesh(MeshConfig(data=-1, fsdp=2, tensor=2)).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    with pytest.raises(ConfigError, match="need 3 devices .* but 8 are here"):
        make_mesh(MeshConfig(data=3))
    with pytest.raises(ConfigError, match="but 8 are here"):
        make_mesh(MeshConfig(data=-1, tensor=3))


def test_indivisible_dimension_is_named():
    config = run_config("x", model={"stack": StackConfig(layout="T1", d_model=30, num_heads=3, d_mlp=64)})
    with pytest.raises(
        ConfigError, match=r"mesh\.tensor=4 does not divide kv_heads=3 of .*stack/run0/attention/k/kernel"
    ):
        plan_state(config, make_mesh(MeshConfig(data=1, fsdp=2, tensor=4)))


def test_shard_is_a_no_op_without_a_mesh():
    x = jnp.ones((4, 2))
    assert shard(x, "batch", None) is x
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=4))):
        spec = jax.jit(lambda x: shard(x, "batch", None))(jnp.ones((8, 2))).sharding.spec
        assert tuple(spec)[:1] == (("data", "fsdp"),) and not any(tuple(spec)[1:])


def losses(mesh_sizes, devices, steps=5, **changes):
    config = run_config("unused", mesh=mesh_sizes, model={"ahead": AHEAD}, **changes)
    mesh = make_mesh(config.mesh, jax.devices()[:devices])
    sources, _ = load_text(config.data)
    batches = Batches(sources, config.data, byte_ids(config.model), seed=0)
    with jax.set_mesh(mesh):
        setup = plan_state(config, mesh)
        state = init_state(config, setup)
        step = make_train_step(config, setup)
        out = []
        for _ in range(steps):
            state, metrics = step(state, place_batch(next(batches), mesh))
            out.append([float(metrics["nll"]), float(metrics["grad_norm"])])
    return np.array(out), state


@pytest.fixture(scope="module")
def on_one_device():
    return losses({"data": 1}, 1)


@pytest.mark.slow
def test_rows_in_pieces_equal_whole_ones(on_one_device):
    """Also in microbatches."""
    got, state = losses({"data": 1, "fsdp": 2, "sequence": 2, "tensor": 2}, 8, train={"grad_accum": 2})
    np.testing.assert_allclose(got[:, 0], on_one_device[0][:, 0], atol=1e-5)
    up = state["params"]["stack"]["run1"]["mlp"]["up"]["kernel"]
    assert up.sharding.spec == P(None, ("fsdp", "sequence"), "tensor")
    assert up.addressable_shards[0].data.size * 8 == up.size


@pytest.mark.parametrize("fsdp,tensor", [(2, 4), (4, 2)])
def test_sharded_training_equals_one_device(on_one_device, fsdp, tensor):
    want, state = on_one_device
    got, sharded = losses({"data": 1, "fsdp": fsdp, "tensor": tensor}, 8)
    np.testing.assert_allclose(got[:, 0], want[:, 0], atol=1e-5)
    q = sharded["params"]["stack"]["run1"]["attention"]["q"]["kernel"]
    assert q.sharding.spec == P(None, "fsdp", "tensor", None) and q.addressable_shards[0].data.size * 8 == q.size
    up = sharded["params"]["stack"]["run1"]["mlp"]["up"]["kernel"]
    assert up.sharding.spec == P(None, "fsdp", "tensor") and up.addressable_shards[0].data.size * 8 == up.size
    mu = sharded["opt"][1].mu["stack"]["run0"]["mamba"]["x"]["kernel"]
    assert mu.addressable_shards[0].data.size * 8 == mu.size
    np.testing.assert_allclose(
        np.asarray(q), np.asarray(state["params"]["stack"]["run1"]["attention"]["q"]["kernel"]), atol=2e-4
    )


def test_initial_state_does_not_depend_on_the_mesh(on_one_device):
    config = run_config("unused")
    states = []
    for sizes, n in ((MeshConfig(data=1), 1), (MeshConfig(data=1, fsdp=2, tensor=4), 8)):
        mesh = make_mesh(sizes, jax.devices()[:n])
        with jax.set_mesh(mesh):
            states.append(init_state(config, plan_state(config, mesh))["params"])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), *states)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_gradient_accumulation_equals_the_whole_batch(on_one_device, devices):
    want, _ = on_one_device
    sizes = {"data": devices}
    # On 8 devices the batch of 8 leaves nothing to accumulate: there the mesh is 4 x tensor 2.
    sizes = sizes if devices == 1 else {"data": 2, "fsdp": 2, "tensor": 2}
    got, _ = losses(sizes, devices, train={"grad_accum": 2})
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_state_shardings_refuses_a_wrong_rank():
    mesh = make_mesh(MeshConfig())
    with pytest.raises(ValueError, match="has shape .* the sharding table gives it axes"):
        state_shardings(mesh, {"embed": {"table": jax.ShapeDtypeStruct((4,), jnp.float32)}})


def test_hybrid_heads_divide_by_four():
    assert HYBRID.num_heads % 4 == 0 and HYBRID.kv_heads % 4 == 0 and HYBRID.ssm_heads % 4 == 0


def chips(generation, shape, slices=1):
    """What libtpu says of the chips of some slices, as far as an order needs it."""
    kind = {"v5e": "TPU v5 lite", "v6e": "TPU v6 lite", "v5p": "TPU v5", "v4": "TPU v4"}[generation]
    places = [(*at, *(0,) * (3 - len(at))) for at in np.ndindex(*shape)]
    return [
        SimpleNamespace(platform="tpu", device_kind=kind, coords=at, core_on_chip=0, slice_index=s, process_index=0,
                        id=s * len(places) + i)
        for s in range(slices) for i, at in enumerate(places)
    ]  # fmt: skip


@pytest.mark.parametrize("generation", list(GENERATIONS))
def test_every_mesh_of_every_slice_has_an_order(generation):
    """A tensor axis of 4 takes part of a side of 8 or 16, in one slice or in several."""
    for shape in shapes(GENERATIONS[generation]):
        count = math.prod(shape)
        for tensor in (1, 2, 4, 8, 16):
            for slices in (1, 2, 4):
                if count % tensor or count * slices > 1024 or (count > 256 and tensor not in (2, 4)):
                    continue
                devices = chips(generation, shape, slices)
                order = device_order((slices, count // tensor, tensor), devices)
                assert sorted(d.id for d in order.flat) == list(range(count * slices))
                for i in range(slices):
                    assert len({d.slice_index for d in order[i].flat}) == 1


def test_several_devices_of_a_cpu_have_neither_loops_nor_threads_around_collectives():
    eight, one = (make_mesh(MeshConfig(), jax.devices()[:n]) for n in (8, 1))
    assert unroll() == 1
    for mesh, wanted in ((eight, True), (one, 1)):
        with jax.set_mesh(mesh):
            assert unroll() is wanted
    assert compiler_options(eight) == {"xla_cpu_multi_thread_eigen": False}
    assert compiler_options(one) == compiler_options(jax.sharding.get_mesh()) == compiler_options(None) == {}


@pytest.mark.parametrize("asked,threads", [
    ({}, "None"), ({"JAX_NUM_CPU_DEVICES": "1"}, "None"), ({"JAX_NUM_CPU_DEVICES": "4"}, "16"),
    ({"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}, "32"),
    ({"JAX_NUM_CPU_DEVICES": "4", "NPROC": "9"}, "9"),
])  # fmt: skip
def test_devices_that_the_environment_asks_for_have_threads(root, asked, threads):
    env = {k: v for k, v in os.environ.items() if k not in ("NPROC", "XLA_FLAGS", "JAX_NUM_CPU_DEVICES")} | asked
    command = [sys.executable, "-c", "import os, bytelm; print(os.environ.get('NPROC'))"]
    assert subprocess.run(command, env=env, cwd=root, capture_output=True, text=True).stdout.strip() == threads
