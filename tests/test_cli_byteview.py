"""sample, eval and their mistakes with a tokenized model."""

import json
import shutil

import pytest

from bytelm.cli import run as main


@pytest.fixture(scope="module")
def golden(root):
    return root / "tests/golden/convert"


def test_sample_and_explain(golden, capsysbinary):
    model = str(golden / "model_tiny_lm")
    assert main(["sample", model, "--prompt", "The licen", "--temperature", "0", "--max-bytes", "12"]) == 0
    assert capsysbinary.readouterr().out.startswith(b"The license")
    assert main(["sample", model, "--prompt", "The licen", "--explain"]) == 0
    out = capsysbinary.readouterr().out.decode()
    assert "tokens of the prompt:  The | ␣l | ic | en" in out and "next byte" in out


def test_eval_says_both_figures(golden, capsys):
    text = str(golden / "text.txt")
    assert main(["eval", str(golden / "model_tiny_lm"), "--text", text, "--max-bytes", "300", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["bpb"] == pytest.approx(2.8196, abs=1e-3) and record["bpb_masked"] == pytest.approx(2.7994, abs=1e-3)


@pytest.mark.parametrize(
    "args, message",
    [
        (["eval", "MODEL", "--text", "TEXT", "--semantics", "canonical"], "no code lengths"),
        (["sample", "MODEL", "--input", "x"], "reads no input"),
        (["sample", "NO_TOKENIZER"], "no tokenizer beside the weights"),
        (["sample", "BROKEN"], "cannot be read as a tokenizer"),
        (["sample", "CLIP"], "do not join to the text"),
        (["sample", "NORMALISED"], "normalizer Lowercase changes the text"),
        (["sample", "WORDPIECE"], "WordPiece"),
        (["sample", "SHORT.gguf"], "cannot be read as GGUF"),
    ],
)
def test_mistakes(golden, tmp_path, capsys, args, message):
    good = golden / "model_tiny_lm"
    tokenizer = json.loads((good / "tokenizer.json").read_text())
    changes = {
        "CLIP": {"model": {**tokenizer["model"], "end_of_word_suffix": "</w>"}},
        "NORMALISED": {"normalizer": {"type": "Lowercase"}},
        "WORDPIECE": {"model": {"type": "WordPiece", "vocab": {"a": 0}}},
    }
    name = next((a for a in args if a.isupper() or a.endswith(".gguf")), "MODEL")
    path = tmp_path / name
    if name.endswith(".gguf"):
        pytest.importorskip("gguf")
        path.write_bytes(b"GGUF\3\0\0\0")
    elif name in ("NO_TOKENIZER", "BROKEN", *changes):
        shutil.copytree(good, path)
        if name == "NO_TOKENIZER":
            (path / "tokenizer.json").unlink()
        else:
            text = json.dumps({**tokenizer, **changes[name]}) if name in changes else "{"
            (path / "tokenizer.json").write_text(text)
    places = {"MODEL": str(good), "TEXT": str(golden / "text.txt"), name: str(path if path.exists() else good)}
    assert main([places.get(a, a) for a in args]) == 2
    assert message in capsys.readouterr().err
