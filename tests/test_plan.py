"""Plans: exact parameter and state sizes, checked against real arrays on a real mesh."""

import dataclasses
import json

import jax
import pytest

from bytelm import codec
from bytelm.cli import read_config
from bytelm.cli import run as cli
from bytelm.config import ConfigError
from bytelm.models.build import count_parameters
from bytelm.parallel.mesh import make_mesh
from bytelm.plan import make_plan
from bytelm.plan_sweep import ROOM, sweep
from bytelm.topology import parse_topology
from bytelm.train.state import init_state, plan_state
from tiny import run_config


def test_memory_of_the_state_is_exact():
    config = run_config("x", mesh={"data": 1, "fsdp": 2, "tensor": 4})
    plan = make_plan(config, 8)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        state = init_state(config, plan_state(config, mesh))
    on_device_0 = lambda tree: sum(  # noqa: E731
        leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree) if leaf.ndim
    )
    assert plan.memory["weights"] == on_device_0(state["params"])
    assert plan.memory["optimizer"] == on_device_0(state["opt"])
    assert plan.total_parameters == count_parameters(state["params"])
    assert plan.mesh == {"data": 1, "fsdp": 2, "tensor": 4}


def test_sharding_and_remat_lower_the_memory():
    def total(**model):
        config = run_config("x", data={"batch_size": 64, "seq_len": 512}, mesh={"data": -1})
        stack = codec.from_dict(type(config.model.stack), {"layout": "M2T2", "window": 64, **model})
        return make_plan(
            codec.from_dict(type(config), codec.to_dict(config) | {"model": {"stack": codec.to_dict(stack)}}), 8
        )

    none, dots, full = (total(remat=r).memory["activations (estimate)"] for r in ("none", "dots", "full"))
    assert none > 1.5 * dots > 1.5 * full > 0


@pytest.mark.parametrize("args,message", [
    (["--devices", "3"], "is not a multiple of data x fsdp x grad_accum"),
    (["--devices", "16", "--mesh.data", "2"], "do not multiply to 16 devices"),
    (["--devices", "x"], "must be a whole number"),
    (["--chip", "h1000"], "choose one of v4, v5e"),
    (["--devices"], "--devices needs a value"),
])  # fmt: skip
def test_what_a_wrong_plan_says(root, capsys, args, message):
    assert cli(["plan", str(root / "configs/byte_mamba2_small.yaml"), *args]) == 2
    assert message in capsys.readouterr().err


def test_command(root, capsys):
    source = str(root / "configs/byte_transformer_small.yaml")
    assert cli(["plan", source, "--devices", "4", "--chip=h100", "--model.stack.d-model", "512"]) == 0
    text = capsys.readouterr().out
    assert "useful FLOPs per byte" in text and "data 4 x fsdp 1 x tensor 1" in text and "NVIDIA H100" in text
    assert cli(["plan", source, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["total_parameters"] == 3_508_480
    with pytest.raises(ConfigError):
        make_plan(codec.load(source), 0, "nope")


def test_sweep_ranks_every_mesh(root):
    config = read_config(str(root / "configs/byte_transformer_1B.yaml"), ["--train.grad-accum", "4"], "test")
    topology = parse_topology("v5e:4x4")
    found, refused = sweep(config, topology)
    meshes = [tuple(one.plan.mesh[axis] for axis in ("data", "fsdp", "tensor")) for one in found]
    every = {(16 // t // f, f, t) for t in (1, 2, 4, 8, 16) for f in (1, 2, 4, 8, 16) if t * f <= 16}
    assert (
        len(set(meshes)) == len(meshes)
        and set(meshes) | {tuple(int(part.split()[1]) for part in name.split(" x ")) for name in refused} == every
    )
    fits = [one.plan.total_memory <= ROOM * 16 * 2**30 for one in found]
    assert fits == [one.fits for one in found] == sorted(fits, reverse=True)
    for group in (True, False):
        times = [one.times.fast + one.times.slow for one in found if one.fits is group]
        assert times == sorted(times)
    one = found[0]  # as that mesh is planned by itself
    here = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **one.plan.mesh))
    assert make_plan(here, 16, "v5e") == one.plan


def test_sweep_of_several_slices_keeps_copies_whole(root):
    config = read_config(str(root / "configs/byte_transformer_1B.yaml"), [], "test")
    found, refused = sweep(config, parse_topology("v5e:4x4", 2))
    assert all(one.plan.mesh["data"] % 2 == 0 for one in found)
    assert any("whole copies" in why for why in refused.values())


def test_sweep_command(root, capsys):
    config = str(root / "configs/hnet_1stage_L.yaml")
    assert cli(["plan", config, "--topology", "v5p-8", "--sweep"]) == 0
    said = capsys.readouterr().out
    assert "v5p:2x2x1 (v5p-8): 4 chips of 95 GiB" in said and "--mesh.data" in said
    assert cli(["plan", config, "--topology", "v5p-8", "--sweep", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["meshes"][0]["memory"] > 0 and {"data", "fsdp", "tensor"} == set(record["meshes"][0]["mesh"])
    assert cli(["plan", config, "--sweep"]) == 2
    assert "name it with --topology" in capsys.readouterr().err
    assert cli(["plan", config, "--topology", "v5e-256", "--sweep", "--data.batch-size", "8"]) == 2
    assert "no mesh of v5e:16x16 works" in capsys.readouterr().err
