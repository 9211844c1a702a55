"""TPU slices by name, communication by hand, and what a compiled text or an error says."""

import dataclasses
import math

import pytest

from bytelm import codec
from bytelm.communication import bytes_per_step
from bytelm.config import ConfigError, DataConfig, MeshConfig
from bytelm.models.build import structure
from bytelm.plan_compile import count_collectives, out_of_memory
from bytelm.topology import GENERATIONS, Topology, parse_topology, shapes
from tiny import FULL, flat, hnet, run_config


@pytest.mark.parametrize(
    "text,name,cloud,chips,hosts",
    [
        ("v5p:4x4x4", "v5p:4x4x4", "v5p-128", 64, 16),
        ("v5p-128", "v5p:4x4x4", "v5p-128", 64, 16),
        ("v5p:4x8x4", "v5p:4x4x8", "v5p-256", 128, 32),
        ("v5p-12288", "v5p:16x16x24", "v5p-12288", 6144, 1536),
        ("v5p-8", "v5p:2x2x1", "v5p-8", 4, 1),
        ("v5litepod-16", "v5e:4x4", "v5litepod-16", 16, 4),
        ("v5e-8", "v5e:2x4", "v5litepod-8", 8, 1),
        ("v6e-256", "v6e:16x16", "v6e-256", 256, 64),
        ("v4-4096", "v4:8x16x16", "v4-4096", 2048, 512),
    ],
)
def test_slices_that_exist(text, name, cloud, chips, hosts):
    found = parse_topology(text)
    assert (found.name, found.cloud_name, found.chips, found.hosts) == (name, cloud, chips, hosts)
    three = parse_topology(text, 3)
    assert (three.name, three.chips, three.hosts) == (name, 3 * chips, 3 * hosts)


@pytest.mark.parametrize(
    "text,message",
    [
        ("v5e:16x32", r"no such slice; the nearest real: v5e:16x16 \(v5litepod-256, 256 chips\)$"),
        ("v6e-512", r"the nearest real: v6e:16x16"),
        ("v5p-100", r"the nearest real: v5p:2x4x4 \(v5p-64, 32 chips\), v5p:4x4x4 \(v5p-128, 64 chips\)"),
        ("v5p-129", "no such slice"), ("v5p:5x5x5", "nearest real"), ("v5p:4x4", "nearest real"),
        ("v5p:16x24x24", r"v5p:16x16x24"), ("h100", "give a shape such as"), ("", "give a shape"),
        ("v5p:", "give a shape"),
        ("v9:2x2", "generations: v4, v5p, v5e, v6e"),
    ],
)  # fmt: skip
def test_slices_that_do_not(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_topology(text)
    with pytest.raises(ConfigError, match="num-slices 0"):
        parse_topology("v5p-8", 0)


def test_every_slice_has_one_name():
    for generation in GENERATIONS.values():
        for shape in shapes(generation):
            topology = Topology(generation, shape)
            assert parse_topology(topology.name).shape == shape
            assert math.prod(parse_topology(topology.cloud_name).shape) == topology.chips


def test_communication_of_an_mlp_stack_by_hand():
    """Two attention blocks, by hand: matrices gathered twice and reduced once over fsdp, all-reduced over data."""
    config = run_config("x", mesh={"data": 2, "fsdp": 4, "tensor": 2}, data={"batch_size": 16, "seq_len": 32})
    config = dataclasses.replace(config, model=flat(FULL))
    _, params = structure(config.model)
    d, heads, kv, mlp, k = 32, 4, 2, 48, 8
    matrices = 2 * (d * heads * k * 2 + d * kv * k * 2 + 3 * d * mlp)  # q and out, k and v, gate up and down
    table = params["embed"]["table"].size
    norms = 5 * d
    got = bytes_per_step(config, params, {"data": 2, "fsdp": 4, "tensor": 2}, ())
    share = 4 * (matrices / 2 + table)  # bytes split over fsdp, on one chip of the tensor axis
    assert got["parameter gather"] == pytest.approx(2 * share * 3 / 4)
    assert got["gradient reduce"] == pytest.approx(
        share * 3 / 4 + 2 * share / 4 / 2 + 2 * 4 * norms * 3 / 4 + 2 * 4 * norms / 2
    )
    assert got["tensor"] == pytest.approx(
        2 * (2 * 2 * 2 * 32 * d) * 4 * 2 / 2
    )  # rows, sums, float32, all-reduce of two
    assert got["sequence"] == got["between slices"] == 0
    two = bytes_per_step(config, params, {"data": 2, "fsdp": 4, "tensor": 2}, (), slices=2)
    assert two["between slices"] == pytest.approx(2 * (share / 4 + 4 * norms) / 2)
    assert two["gradient reduce"] + two["between slices"] == pytest.approx(got["gradient reduce"])
    accumulated = dataclasses.replace(config, train=dataclasses.replace(config.train, grad_accum=2))
    more = bytes_per_step(accumulated, params, {"data": 2, "fsdp": 4, "tensor": 2}, ())
    assert more["parameter gather"] == 2 * got["parameter gather"] and more["tensor"] == got["tensor"]


def test_communication_in_bfloat16_and_of_an_hnet():
    config = dataclasses.replace(run_config("x"), model=hnet(2))
    mesh = {"data": 1, "fsdp": 8, "tensor": 1}
    _, params = structure(config.model)
    full = bytes_per_step(config, params, mesh, (20, 10))
    half = bytes_per_step(
        dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="bfloat16")), params, mesh, (20, 10)
    )
    assert 0.5 < half["parameter gather"] / full["parameter gather"] < 0.7  # routers and tables stay float32
    alone = bytes_per_step(config, params, {"data": 1, "fsdp": 1, "tensor": 1}, (20, 10))
    assert not any(alone.values())
    wide = {"data": 1, "fsdp": 2, "tensor": 4}
    more, fewer = (bytes_per_step(config, params, wide, slots)["tensor"] for slots in ((20, 10), (10, 5)))
    assert fewer < more < 2 * fewer  # slots cost, bytes as well


def test_what_a_compiled_text_holds():
    text = """
  %a = bf16[8,128]{1,0:T(8,128)} all-gather(bf16[1,128] %x), channel_id=1
  %b = (f32[16]{0}, f32[4,4]{1,0}) all-reduce(%p, %q), channel_id=2
  %c = (bf16[2]{0}, bf16[16]{0}) all-gather-start(%z)
  %d = bf16[16]{0} all-gather-done(%c)
  %e = f32[3,5]{1,0} add(%a, %b)
"""
    found = count_collectives(text)  # an all-reduce of two arrays counts both, a start counts its results
    assert found == {"all-gather": {"count": 2, "bytes": 2048 + 32}, "all-reduce": {"count": 1, "bytes": 64 + 64}}


@pytest.mark.parametrize("fits", [0, 1, 5, 17, 31, 32, 63])
def test_the_largest_batch_is_found(fits, root, monkeypatch, tmp_path):
    """Against a compiler in which so many rows of 64 fit: exact up to a sixteenth."""
    from bytelm import plan_pod

    tried = []

    def compile_for(config, topology, cache):
        rows = config.data.batch_size // 64
        tried.append(rows)
        return {} if rows <= fits else {"out_of_memory": {"needs": 10.0 + 2 * rows, "has": 95.0}}

    monkeypatch.setattr(plan_pod, "compile_for", compile_for)
    config = codec.load(root / "configs" / "byte_transformer_1B.yaml")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=64 * 64, workers=32))
    made = plan_pod.make_pod_plan(config, parse_topology("v5p:4x4x4"), tmp_path)
    said = made.advice[-1]
    if fits == 0:
        assert "no batch fits" in said
    else:
        found = int(said.split()[1].rstrip(":")) // 64
        assert found <= fits <= found + max(1, found // 16) and len(tried) < 10


def test_what_an_error_says():
    said = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 29.40G of 15.75G hbm. Exceeded hbm capacity"
    assert out_of_memory(said) == {"needs": 29.4, "has": 15.75}
    assert out_of_memory("Used 900.5M of 15.75G hbm")["needs"] == pytest.approx(0.8794, abs=1e-4)
    other = "the total memory required for HLO temporaries (147.29G) exceeds available HBM (15.75G)."
    assert out_of_memory(other) == {"needs": 147.29, "has": 15.75}
    assert out_of_memory("INTERNAL: something else") is None


def test_the_billion_has_its_parameters(root):
    config = codec.load(root / "configs" / "byte_transformer_1B.yaml")
    assert isinstance(config.data, DataConfig) and config.mesh == MeshConfig(data=1, fsdp=-1)
    _, params = structure(config.model)
    import jax

    assert sum(x.size for x in jax.tree.leaves(params)) == 1_012_746_240
