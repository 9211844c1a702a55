"""Strict YAML, config checks, and the configs we ship."""

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bytelm import codec
from bytelm.config import (
    Config,
    ConfigError,
    DataConfig,
    FlatConfig,
    HNetConfig,
    MeshConfig,
    OptimConfig,
    StackConfig,
    parse_layout,
)
from bytelm.parallel.mesh import make_mesh
from bytelm.train.state import plan_state


def test_round_trip_of_a_full_config():
    config = Config(
        data=DataConfig(train=("a", "b"), weights=(0.5, 2.0), valid=("v",)),
        optim=OptimConfig(lr_multipliers=(("embed", 2.0), ("mlp", 0.5))),
        model=FlatConfig(stack=StackConfig(layout="m2T1")),
    )
    assert codec.loads(codec.dumps(config)) == config
    assert codec.loads("") == Config()
    hnet = Config(model=HNetConfig(arch_layout="m4,[T1m4,[T2],m4T1],m4", d_model=(64, 64, 128), targets=(3.0, 3.0)))
    assert codec.loads(codec.dumps(hnet)) == hnet
    with pytest.raises(ConfigError, match="model.family: unknown value 'hnett'; did you mean 'hnet'"):
        codec.loads("model: {family: hnett}")


@given(st.floats(1e-12, 1e6), st.text(max_size=12), st.booleans())
@settings(max_examples=50)
def test_round_trip_of_any_value(lr, project, flag):
    config = Config(optim=OptimConfig(lr=lr))
    config = codec.from_dict(Config, codec.to_dict(config) | {"train": {"wandb_project": project, "tensorboard": flag}})
    assert codec.loads(codec.dumps(config)) == config


@pytest.mark.parametrize(
    "text,message",
    [
        ("train: {stepz: 3}", r"^here: train\.stepz: unknown key; did you mean 'steps'\?"),
        ("modle: {}", r"modle: unknown key; did you mean 'model'\?"),
        ("model: {stack: {qqqqqqqq: 1}}", r"model\.stack\.qqqqqqqq: unknown key; known keys: layout, d_model"),
        ("train: {steps: many}", r"train\.steps: got 'many' \(str\), expected a whole number"),
        ("train: {steps: 1.5}", r"train\.steps: got 1\.5 \(float\), expected a whole number"),
        ("train: {steps: true}", r"train\.steps: got True \(bool\), expected a whole number"),
        (
            "optim: {lr: 3e-4}",
            r"optim\.lr: got '3e-4' \(str\), expected a number \(YAML reads 3e-4 as a string: write 3\.0e-4\)",
        ),
        ("model: {dtype: float16}", r"model\.dtype: got 'float16' \(str\), expected one of float32, bfloat16"),
        ("data: {train: file.txt}", r"data\.train: got 'file.txt' \(str\), expected a list, such as \['file.txt'"),
        ("optim: {lr_multipliers: [[a, 1.0, 2]]}", r"optim\.lr_multipliers\[0\]: got 3 items, expected 2"),
        ("train: 3", r"train: got 3 \(int\), expected a mapping"),
        ("train: {steps: 1, steps: 2}", r"key 'steps' is given twice"),
        ("a: [", r"not valid YAML"),
        ("train: {steps: 0}", r"train\.steps=0: must be at least 1"),
        ("model: {stack: {layout: X3}}", r"stack\.layout='X3': expected runs of a letter"),
        ("model: {stack: {layout: T0}}", r"each run needs 1 to 9,999 blocks"),
        ("model: {stack: {num_heads: 3}}", r"stack\.num_heads=3 does not divide stack\.d_model=256"),
        ("model: {stack: {num_kv_heads: 3}}", r"num_kv_heads=3 does not divide stack\.num_heads=4"),
        (
            "model: {stack: {layout: m1, ssm: {head_dim: 60}}}",
            r"ssm\.head_dim=60 does not divide expand \* d_model = 512",
        ),
        ("data: {batch_size: 8, shards: 3}", r"data\.shards=3 does not divide data\.batch_size=8"),
        ("data: {batch_size: 8, workers: 3}", r"data\.workers=3 does not divide the 8 streams"),
        ("data: {weights: [1.0, 2.0]}", r"data\.weights has 2 entries for 1 in data\.train"),
        ("mesh: {data: -1, fsdp: -1}", r"at most one of them -1"),
        ("optim: {no_decay: ['(']}", r"'\(' is not a regular expression"),
        ("eval: {batch_size: -1}", r"eval\.batch_size=-1: must not be negative"),
        ("eval: {max_bytes: -1}", r"eval\.max_bytes=-1: must not be negative"),
        ("train: {seed: -1}", r"train\.seed=-1: must not be negative"),
        ("optim: {clip_norm: -1.0}", r"optim\.clip_norm=-1\.0: must not be negative"),
        ("? [a]\n: 1", r"a key must be a name"),
        ("train: {grad_accum: 3}", r"train\.grad_accum=3 does not divide data\.batch_size=8"),
    ],
)
def test_what_a_wrong_config_says(text, message):
    with pytest.raises(ConfigError, match=message):
        codec.loads(text, source="here")


def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(ConfigError, match="no such config file"):
        codec.load(tmp_path / "x.yaml")
    (tmp_path / "e.yaml").touch()
    with pytest.raises(ConfigError, match="e.yaml: the config file is empty"):
        codec.load(tmp_path / "e.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read as a config"):
        codec.load(tmp_path / "b.yaml")


def test_differences_name_the_fields():
    a, b = Config(), codec.loads("optim: {lr: 0.5}\nmodel: {stack: {d_model: 128}}")
    assert codec.differences(a, b) == ["model.stack.d_model: 256 -> 128", "optim.lr: 0.001 -> 0.5"]
    assert codec.differences(a, a) == []


def test_layout():
    assert parse_layout("m2T1M10") == (("m", 2), ("T", 1), ("M", 10))


def shipped(root):
    return sorted((root / "configs").glob("*.yaml"))


def test_every_shipped_config_builds_and_meets_the_rules_table(root):
    """Shapes only: parameters, optimizer state and their shardings on one device and, where it divides, on 2 x 4."""
    assert len(shipped(root)) >= 3
    for path in shipped(root):
        config = codec.load(path)
        for sizes in (MeshConfig(data=1), MeshConfig(data=2, fsdp=4)):
            mesh = make_mesh(sizes, jax.devices()[: 1 if sizes.data == 1 else 8])
            setup = plan_state(config, mesh)
            assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(setup.abstract))
