"""`bytelm plan --topology` with a real libtpu: small configs compiled for slices that are not here."""

import dataclasses
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bytelm import cli, codec
from bytelm.config import FlatConfig, StackConfig
from tiny import run_config


def test_without_libtpu_the_extra_is_named(root, monkeypatch, capsys):
    monkeypatch.setattr("bytelm.plan_compile._version", lambda name: "" if name == "libtpu" else "1")
    status = cli.run(["plan", str(root / "configs" / "byte_transformer_1B.yaml"), "--topology", "v5p:4x4x4"])
    assert status == 2 and "pip install 'bytelm[tpu]'" in capsys.readouterr().err


def test_bad_topologies_and_meshes(root, capsys):
    config = str(root / "configs" / "byte_transformer_1B.yaml")
    for options, message in [
        (["--topology", "v5e:16x32"], "the nearest real: v5e:16x16"),
        (["--topology", "v5p-128", "--num-slices", "two"], "--num-slices two: must be a whole number"),
        (["--topology", "v5p-128", "--mesh.fsdp", "7"], "do not multiply to 64 devices"),
        (["--topology", "v5p-128", "--data.batch-size", "8"], "is not a multiple of"),
    ]:
        assert cli.run(["plan", config, *options]) == 2
        assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def tpu():
    """Variables with which a process finds the libtpu that this jax wants; installed once, beside the test cache."""
    wanted = next(r for r in importlib.metadata.requires("jax") if r.startswith("libtpu"))
    wanted = wanted.split(";")[0].strip()
    folder = Path("~/.cache/bytelm").expanduser() / wanted.replace("*", "x").replace("==", "-")
    if not (folder / "libtpu").exists():
        done = subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--target", str(folder), wanted],
                              capture_output=True, text=True)  # fmt: skip
        if done.returncode:
            pytest.skip(f"{wanted} cannot be installed here: {done.stderr.strip().splitlines()[-1:]}")
    return {"PYTHONPATH": str(folder)}


@pytest.fixture
def plan(root, tmp_path, tpu):
    """plan(config, *options) -> (status, output, what it said) of the command in a process of its own."""

    def plan(config, *options):
        if not isinstance(config, str):
            (tmp_path / "c.yaml").write_text(codec.dumps(config))
            config = str(tmp_path / "c.yaml")
        env = {**os.environ, "PYTHONPATH": f"{root}:{tpu['PYTHONPATH']}", "XDG_CACHE_HOME": str(tmp_path / "cache"),
               "XLA_FLAGS": ""}  # fmt: skip
        done = subprocess.run([sys.executable, "-m", "bytelm.cli", "plan", config, *options], env=env,
                              capture_output=True, text=True, timeout=900)  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    return plan


@pytest.mark.slow
def test_a_small_model_on_real_slices(plan):
    """Memory as compiled agrees with what the state weighs; two slices; the second time from the cache."""
    config = run_config("x", mesh={"data": -1, "fsdp": 4}, data={"batch_size": 64, "seq_len": 128})
    status, out, err = plan(config, "--topology", "v5e:4x4", "--json")
    assert status == 0, err
    made = json.loads(out)
    assert made["fits"] and made["topology"]["chips"] == 16 and made["topology"]["hosts"] == 4
    assert made["plan"]["mesh"] == made["compiled"]["mesh"] == {"data": 4, "fsdp": 4, "tensor": 1}
    state = made["memory"]["parameters"] + made["memory"]["optimizer"]
    assert state <= made["compiled"]["arguments"] < 40 * state + 2**20  # tiny arrays are padded to whole tiles
    assert 0 < made["utilization"][0] < made["utilization"][1] < 1
    assert made["communication"]["between slices"] == 0 and made["compiled"]["versions"]["libtpu"]
    again = json.loads(plan(config, "--topology", "v5litepod-16", "--json")[1])
    assert again["compiled"] == made["compiled"]  # the same slice by its cloud name, not compiled again
    two = json.loads(plan(config, "--topology", "v5e:4x4", "--num-slices", "2", "--json")[1])
    assert two["topology"]["chips"] == 32 and two["compiled"]["mesh"]["data"] == 8
    assert two["communication"]["between slices"] > 0 and "between slices" in two["seconds"]
    status, _, err = plan(config, "--topology", "v5e:4x4", "--num-slices", "2", "--mesh.data", "1", "--mesh.fsdp", "32")
    assert status == 2 and "make it a multiple of 2" in err
    status, out, _ = plan(config, "--topology", "v6e-8")
    assert status == 0 and "v6e:2x4 (v6e-8): 8 chips, 1 hosts" in out and "headroom" in out and "binds" in out


@pytest.mark.slow
def test_attention_in_16_bits_is_a_kernel(plan):
    """Heads over two chips, two to a key head, narrow ones, a window, a row that is no multiple of a block."""
    stack = StackConfig(layout="T2", d_model=96, num_heads=4, num_kv_heads=2, window=200)
    config = dataclasses.replace(run_config("x", mesh={"tensor": 2}, data={"batch_size": 16, "seq_len": 640}),
                                 model=FlatConfig(stack=stack, dtype="bfloat16"))  # fmt: skip
    for options, some in (((), True), (("--model.dtype", "float32"), False)):
        status, out, err = plan(config, "--topology", "v5e:2x4", "--json", *options)
        assert status == 0, err
        assert (json.loads(out)["compiled"]["kernels"] > 0) == some


@pytest.mark.slow
def test_a_billion_where_it_does_not_fit(root, plan):
    config = str(root / "configs" / "byte_transformer_1B.yaml")
    status, out, err = plan(config, "--topology", "v5litepod-16")
    assert status == 0, err
    assert "1,012,746,240 parameters" in out
    needs, has = map(float, re.search(r"DOES NOT FIT: needs ([\d.]+).*has ([\d.]+) GiB on a chip", out).groups())
    assert needs > has == 15.75
    assert "--train.grad-accum 2" in out and "--data.batch-size 16: fits, 32 does not" in out
