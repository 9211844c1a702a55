"""sample, eval and their mistakes with a tokenized model."""

import json
import shutil

import pytest

from bytelm.cli import run as main


@pytest.fixture(scope="module")
def golden(root):
    return root / "tests/golden/convert"


@pytest.mark.slow
def test_sample_and_explain(golden, capsysbinary):
    model = str(golden / "model_tiny_lm")
    assert main(["sample", model, "--prompt", "The licen", "--temperature", "0", "--max-bytes", "12"]) == 0
    assert capsysbinary.readouterr().out.startswith(b"The license")
    assert main(["sample", model, "--prompt", "The licen", "--explain"]) == 0
    out = capsysbinary.readouterr().out.decode()
    assert "tokens of the prompt:  The | ␣l | ic | en" in out and "next byte" in out


@pytest.mark.slow
def test_ways_to_sample(golden, tmp_path, capsysbinary):
    model = tmp_path / "model"
    shutil.copytree(golden / "model_tiny_lm", model)
    template = "{% for m in messages %}<|endoftext|>{{ m.content }}{% endfor %}"
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))

    def sample(*more, prompt="The licen"):
        options = ["--prompt", prompt, "--temperature", "0", "--max-bytes", "12"]
        assert main(["sample", str(model), *options, *more]) == 0
        return capsysbinary.readouterr().out

    plain = sample()
    assert sample("--semantics", "all").startswith(b"The license")
    assert sample("--by-tokens").startswith(b"The license") and len(sample("--by-tokens")) == len(plain)
    assert sample("--special", prompt="<|endoftext|>The licen") == b"<|endoftext|>" + plain
    assert sample("--chat") == plain.removeprefix(b"The licen")
    long = "The quick brown fox. " * 26
    assert len(sample("--slide", prompt=long)) == len(long) + 13
    assert b"next byte" in sample("--chat", "--explain")
    counted = sample("--by-tokens", "--count", "2")
    assert counted.startswith(b"--- 1 ---\nThe license") and b"--- 2 ---" in counted


@pytest.mark.slow
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
        (["sample", "MODEL", "--chat", "--prompt", "x"], "no chat template"),
        (["sample", "MODEL", "--suffix", "x"], "no special tokens for filling in"),
        (["sample", "MODEL", "--suffix", "x", "--special"], "one of them"),
        (["sample", "MODEL", "--by-tokens", "--semantics", "canonical"], "no law of their own"),
        (["sample", "MODEL", "--special", "--input", "x"], "for encoder-decoders"),
        (["sample", "MODEL", "--prompt", "LONG"], "let it slide"),
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
    places = {
        "LONG": "x" * 600,
        "MODEL": str(good),
        "TEXT": str(golden / "text.txt"),
        name: str(path if path.exists() else good),
    }
    assert main([places.get(a, a) for a in args]) == 2
    assert message in capsys.readouterr().err
