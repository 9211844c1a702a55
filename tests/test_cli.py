"""The commands on a real (tiny) trained run, and that user mistakes end in one line and status 2."""

import json
import os
import shutil

import pytest

import bytelm
from bytelm import codec
from bytelm.cli import run as cli
from bytelm.evals.runner import identity
from bytelm.train.loop import train
from tiny import run_config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    config = run_config(folder / "run", steps=4)
    (folder / "config.yaml").write_text(codec.dumps(config))
    train(config)
    return folder / "run"


def test_help_and_version(capsys):
    assert cli(["--help"]) == 0 and "usage: bytelm COMMAND" in capsys.readouterr().out
    assert cli([]) == 2
    capsys.readouterr()
    assert cli(["--version"]) == 0 and capsys.readouterr().out == f"bytelm {bytelm.__version__}\n"
    assert cli(["train", "--help"]) == 0
    assert "--train.steps" in capsys.readouterr().out
    assert cli(["sample", "--help"]) == 0 and "--temperature" in capsys.readouterr().out
    assert cli(["trian"]) == 2 and "did you mean 'train'?" in capsys.readouterr().err


def test_eval_on_heldout_and_other_text(trained, tmp_path, capsys):
    assert cli(["eval", str(trained), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["bytes"] == 2146 and record["window"] == 32 and 5 < record["bpb"] < 8.1
    (tmp_path / "t.txt").write_bytes(b"\xff\xfe any bytes \x00" * 20)
    assert (
        cli(["eval", str(trained), "--text", f"{tmp_path}/t.txt", "--window", "16", "--max-bytes", "100", "--json"])
        == 0
    )
    record = json.loads(capsys.readouterr().out)
    assert (record["bytes"], record["window"]) == (100, 16)
    for step in ("2", "best"):
        assert cli(["eval", str(trained), "--checkpoint", step, "--json"]) == 0
    first, best = (json.loads(line)["bpb"] for line in capsys.readouterr().out.splitlines())
    assert best < first


def test_eval_compare_prints_compressors(trained, capsys):
    assert cli(["eval", str(trained), "--compare"]) == 0
    out = capsys.readouterr().out
    assert "xz" in out and "given the same training text" in out and (trained / "loss.png").exists()


def test_sample_streams_prompt_and_text(trained, capfdbinary):
    assert cli(["sample", str(trained), "--prompt", "ROMEO: é", "--max-bytes", "20", "--seed", "1"]) == 0
    out = capfdbinary.readouterr().out
    assert out.startswith("ROMEO: é".encode()) and out.endswith(b"\n")
    assert cli(["sample", str(trained), "--count", "2", "--max-bytes", "5", "--temperature", "0"]) == 0
    assert capfdbinary.readouterr().out.count(b"---") == 4


def test_convert_and_load_back(trained, tmp_path, capsys):
    assert cli(["convert", str(trained), str(tmp_path / "w"), "--dtype", "bfloat16"]) == 0
    assert cli(["convert", str(tmp_path / "w"), str(tmp_path / "w32")]) == 0
    assert bytelm.load(tmp_path / "w32").score("abc").total == pytest.approx(
        bytelm.load(trained).score("abc").total, abs=0.1
    )
    assert cli(["convert", str(trained), str(tmp_path / "w")]) == 2
    assert "is there and not empty" in capsys.readouterr().err


def test_dry_run_writes_nothing(trained, capsys):
    config = trained.parent / "config.yaml"
    target = trained.parent / "other"
    assert cli(["train", str(config), "--train.run-dir", str(target), "--train.steps", "7", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "steps: 7" in out and "memory on one device" in out and "nothing was trained" in out and not target.exists()


def test_train_takes_a_run_folder(trained, capsys):
    assert cli(["train", str(trained)]) == 0
    assert "resuming" in capsys.readouterr().err


def test_eval_suites_are_gone_on_with_and_reported(trained, tmp_path, capsys):
    args = ["eval", str(trained), "--suite", "bpb,noise,words", "--out", str(tmp_path / "out"), "--compare"]
    assert cli([*args, "--suite", "bpb"]) == 0
    assert "2 tasks done" in capsys.readouterr().out
    assert cli([*args, "--json"]) == 0
    said, told = capsys.readouterr()
    assert "11 tasks done" in told and "2 known" in told
    record = json.loads(said)
    assert record["run"]["bpb"]["text"]["bpb"] > 0 and record["compressors"]["bpb"]["text"]["xz"] > 0
    assert {"without", "clean", "drop"} <= set(record["run"]["noise"]) and "recovered" in record["run"]["noise"]["drop"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png") == 2 and "typo_keyboard" in page and "http" not in page.replace("http-", "")
    records = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert len(records) == len({r["key"] for r in records}) == 13
    assert cli(args) == 0
    assert "0 tasks done" in capsys.readouterr().out


def test_eval_of_several_models_where_one_is_broken(trained, tmp_path, capsys):
    """The others are done and reported; a copy of a model elsewhere is known; a report needs results alone."""
    out, broken, moved = tmp_path / "out", tmp_path / "broken", tmp_path / "moved" / "run"
    broken.mkdir()
    (broken / "model.safetensors").write_bytes(b"no weights")
    text = tmp_path / "text.txt"
    text.write_bytes(b"The owls of the old tower slept.\n" * 60)
    more = ["--suite", "bpb,noise", "--passages", "2", "--out", str(out), "--text", str(text)]
    assert cli(["eval", str(trained), str(broken), *more]) == 1
    said = "".join(capsys.readouterr())
    assert "run: 12 tasks done" in said and "broken: " in said and "not done" in said and "Traceback" not in said
    shutil.copytree(trained, moved)
    os.utime(text, (0, 0))
    assert cli(["eval", str(moved), *more]) == 0
    assert "run: 0 tasks done" in capsys.readouterr().out
    (out / "report.html").unlink()
    assert cli(["eval", "--report", "--out", str(out)]) == 0
    assert "typo_swap" in (out / "report.html").read_text() and "--report" not in capsys.readouterr().err
    assert cli(["eval", "other", "--report", "--out", str(out)]) == 2
    assert cli(["eval", str(moved), "--report", "--out", str(out)]) == 0
    assert cli(["eval", "--report", "--suite", "cute", "--out", str(out)]) == 2
    capsys.readouterr()
    assert (
        cli(["eval", str(trained), *more[:2], "--items", "1", *more[2:], "--seed", "3", "--json"]) == 0
    )  # another set
    assert cli(["eval", str(trained), *more, "--json"]) == 0  # known, and what --report shows again
    wanted = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert cli(["eval", "--report", "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run"] == wanted["run"]


def test_results_inside_of_models_are_not_theirs(tmp_path):
    """What a model is does not depend on where its results go, and two models stay two."""
    for name in "ab":
        (tmp_path / name / "results").mkdir(parents=True)
        (tmp_path / name / "model.safetensors").write_text(name)
        (tmp_path / name / "results" / "results.jsonl").write_text(name)
    a, b = tmp_path / "a", tmp_path / "b"
    for out in (tmp_path, tmp_path / "out"):
        assert identity(a, "latest", out) != identity(b, "latest", out) and identity(a, "latest", out)
    inside = identity(a, "latest", a / "results")
    assert [name for name, _ in inside] == ["model.safetensors"]
    for name in ("results.jsonl", "report.html", "noise.png"):
        (a / name).write_text("x")
    assert [name for name, _ in identity(a, "latest", a)] == ["model.safetensors", "results/results.jsonl"]
    assert cli(["eval", "--report", "--out", str(tmp_path / "empty")]) == 2


def test_eval_that_is_interrupted_keeps_what_is_done(trained, tmp_path, capsys, monkeypatch):
    from bytelm.evals import suites

    def stopped(material):
        def run(entrant):
            raise KeyboardInterrupt

        yield suites.Unit("words", "text", {}, run)

    with monkeypatch.context() as patch:
        patch.setitem(suites.SUITES, "words", stopped)
        args = ["eval", str(trained), "--suite", "bpb,words", "--out", str(tmp_path)]
        assert cli(args) == 75
    assert "the same command goes on" in " ".join(capsys.readouterr().out.split())
    assert cli(args) == 0
    assert "1 tasks done" in (said := capsys.readouterr().out) and "2 known" in said


@pytest.mark.parametrize(
    "args,message",
    [
        (["train", "nothing.yaml"], "nothing.yaml: no such config file"),
        (["train", "CONFIG", "--train.stepz", "3"], "Unrecognized options: --train.stepz"),
        (["train", "CONFIG", "--train.steps", "many"], "invalid"),
        (["train", "CONFIG", "--data.train", "missing*.txt", "--dry-run"], "'missing*.txt' matches no file"),
        (["train", "CONFIG", "--data.batch-size", "12", "--dry-run", "--train.grad-accum", "5"], "train.grad_accum=5"),
        (["train", "--train.steps", "3"], "the config file or run folder comes first"),
        (["train", "FOLDER"], "a folder without config.yaml"),
        (["eval", "nothing"], "nothing: no such file or directory"),
        (["eval", "RUN", "--text", "missing.txt"], "--text: 'missing.txt' matches no file"),
        (["eval", "RUN", "--suite", "cutes"], "suite 'cutes': did you mean"),
        (["eval", "RUN", "--suite", "noise"], "need a folder for their results: --out DIR"),
        (["eval", "RUN", "RUN"], "need a folder for their results: --out DIR"),
        (["eval", "RUN", "--suite", "cute", "--out", "FOLDER"], "suite cute: needs CUTE's data"),
        (["eval", "RUN", "--cute", "missing", "--out", "FOLDER"], "missing: no such file or directory"),
        (["eval", "RUN", "--window", "64", "--out", "FOLDER"], "--window is for one figure of one model"),
        (["eval", "RUN", "--cute", "FOLDER"], "--cute is for suites, which need a folder"),
        (["eval", "RUN", "--items", "3"], "--items is for suites, which need a folder"),
        (["eval", "RUN", "RUN", "--out", "FOLDER"], "a model is named twice"),
        (["eval", "RUN", "--report", "--out", "FOLDER"], "holds no results.jsonl"),
        (["sample", "RUN", "--temperature", "-1"], "temperature=-1"),
        (["sample", "RUN", "--prompt-file", "missing"], "No such file"),
        (["sample", "RUN", "--checkpoint", "9"], "no checkpoint '9'; there is:"),
    ],
)
def test_user_mistakes(trained, tmp_path, capsys, args, message):
    names = {"CONFIG": str(trained.parent / "config.yaml"), "RUN": str(trained), "FOLDER": str(tmp_path)}
    assert cli([names.get(a, a) for a in args]) == 2
    said = "".join(capsys.readouterr())
    assert message.lower() in said.lower().replace("\n", " ") and "Traceback" not in said
