"""The commands on a tiny trained H-Net: chunks in three forms, reserved bytes, plans, mistakes."""

import dataclasses
import json

import pytest

from bytelm.cli import run as cli
from bytelm.train.loop import train
from tiny import hnet, run_config

pytestmark = pytest.mark.slow  # one run is trained for all of them


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    (folder / "t.txt").write_bytes(b"some text, \xffand more of it. " * 200)
    data = {"train": (str(folder / "t.txt"),), "valid": (f"{folder}/t.txt[:600]",), "reserved": "replace"}
    config = dataclasses.replace(run_config(folder / "run", steps=2, data=data), model=hnet(2))
    train(config)
    return folder / "run"


def test_chunks_in_the_terminal_as_json_and_as_a_page(trained, tmp_path, capsys):
    text = "naïve café — to be"
    assert cli(["chunks", str(trained), "--text", text]) == 0
    out = capsys.readouterr().out
    assert "level 0" in out and "level 1" in out and "bytes per" in out and "na" in out
    assert cli(["chunks", str(trained), "--text", text, "--json"]) == 0
    levels = json.loads(capsys.readouterr().out)
    assert len(levels) == 2 and levels[0]["offset"] == list(range(len(text.encode())))
    starts = [o for o, cut in zip(levels[0]["offset"], levels[0]["cut"]) if cut]
    assert levels[1]["offset"] == starts
    (tmp_path / "t.bin").write_bytes(b"ab \xc3" + "é".encode() * 900)
    page = tmp_path / "page.html"
    assert cli(["chunks", str(trained), "--file", f"{tmp_path}/t.bin", "--max-bytes", "101", "--html", str(page)]) == 0
    assert page.read_text().startswith("<!doctype html>") and capsys.readouterr().out.strip() == str(page)


def test_reserved_bytes_as_the_run_was_trained(trained, capsys):
    """The run replaced FF in its text: eval and sample do so without being told; `error` refuses."""
    assert cli(["eval", str(trained), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["bytes"] == 600 and record["family"] == "hnet"
    assert cli(["eval", str(trained), "--reserved", "error"]) == 2
    assert "0xFF at offset" in capsys.readouterr().err


def test_sample_takes_reserved_bytes_too(trained, capfdbinary):
    assert cli(["sample", str(trained), "--prompt", "some", "--max-bytes", "8"]) == 0
    assert capfdbinary.readouterr().out.startswith(b"some")


def test_plan_takes_bytes_per_chunk(root, capsys):
    config = str(root / "configs/hnet_2stage_XL.yaml")
    assert cli(["plan", config, "--devices", "16", "--chip", "v5p", "--bytes-per-chunk", "3,6.9", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["total_parameters"] == 1_603_492_224 and plan["bytes_per_chunk"] == [3.0, 6.9]
    assert plan["executed_flops_per_byte"] > plan["train_flops_per_byte"]
    assert cli(["plan", config, "--devices", "16"]) == 0
    assert "at 3 and 9 bytes per chunk" in capsys.readouterr().out


@pytest.mark.parametrize(
    "args,message",
    [
        (["chunks", "RUN"], "no text to cut"),
        (["chunks", "RUN", "--text", "a", "--file", "b"], "not both"),
        (["chunks", "RUN", "--file", "missing"], "No such file"),
        (["chunks", "RUN", "--text", "a", "--config", "x.json"], "a run with a config of its own"),
        (["plan", "CONFIG", "--bytes-per-chunk", "3"], "each of 2 levels"),
        (["plan", "CONFIG", "--bytes-per-chunk", "6,3"], "none smaller"),
        (["plan", "CONFIG", "--bytes-per-chunk", "nan,3"], "none smaller"),
        (["plan", "CONFIG", "--bytes-per-chunk", "many"], "give numbers"),
        (["train", "CONFIG", "--model.targets", "3", "--dry-run"], "each of the 2 chunking levels"),
        (["convert", "RUN", "OUT", "--to", "hnet"], "the reference has"),
    ],
)
def test_user_mistakes(trained, root, tmp_path, capsys, args, message):
    names = {"RUN": str(trained), "CONFIG": str(root / "configs/hnet_2stage_L.yaml"), "OUT": str(tmp_path / "out")}
    assert cli([names.get(a, a) for a in args]) == 2
    said = "".join(capsys.readouterr())
    assert message in " ".join(said.split()) and "Traceback" not in said


def test_a_flat_model_has_no_chunks(tmp_path, capsys):
    train(run_config(tmp_path / "flat", steps=1))
    assert cli(["chunks", str(tmp_path / "flat"), "--text", "abc"]) == 2
    assert "it has no chunks" in capsys.readouterr().err
