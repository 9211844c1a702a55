"""The files that tokenizers come in, made out of one real small tokenizer, and their mistakes."""

import base64
import json
import shutil
import struct

import pytest
from texts import many

import bytelm
from bytelm.byteview.rank_files import TIKTOKEN, read_tekken, read_tiktoken
from bytelm.byteview.sentencepiece_file import read_sentencepiece
from bytelm.byteview.tokenizer_files import read_chat_template, read_vocabulary
from bytelm.byteview.tokenizer_json import byte_characters, read_tokenizer_json, vocabulary_of
from bytelm.config import ConfigError
from bytelm.patterns import GPT2


@pytest.fixture(scope="module")
def source(root):
    return root / "tests/golden/convert/model_tiny_lm"


@pytest.fixture(scope="module")
def vocabulary(source):
    return vocabulary_of(read_tokenizer_json(source / "tokenizer.json"), start=2047, ends=[2047])


def same(found, expected, shift=0):
    for text in many(30):
        ids = expected.encode(text.encode())
        assert found.encode(text.encode()) == (None if ids is None else [i + shift for i in ids]), text


@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")])
def test_vocabulary_and_merges(source, vocabulary, tmp_path, names):
    model = json.loads((source / "tokenizer.json").read_text())["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (tmp_path / names[0]).write_text(json.dumps({**model["vocab"], "<|endoftext|>": 2047}))
    (tmp_path / names[1]).write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    record = {"model_type": "gpt2", "vocab_size": 2048, "bos_token_id": 2047, "eos_token_id": 2047}
    found = read_vocabulary(tmp_path, record)
    same(found, vocabulary)
    assert found.control("<|endoftext|>") == 2047 and found.tokens[2047] is None
    with pytest.raises(ConfigError, match="known for gpt2, qwen2, qwen3 only"):
        read_vocabulary(tmp_path, {**record, "model_type": "llama"})
    (tmp_path / names[1]).write_text("a b c\n")
    with pytest.raises(ConfigError, match="no list of merges"):
        read_vocabulary(tmp_path, record)
    (tmp_path / names[1]).unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        read_vocabulary(tmp_path, record)


def test_qwens_special_tokens_are_in_another_file(source, tmp_path):
    model = json.loads((source / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps({t: i for t, i in model["vocab"].items() if i < 300}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    more = {"300": {"content": "<|im_end|>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": more}))
    found = read_vocabulary(tmp_path, {"model_type": "qwen2", "vocab_size": 400, "eos_token_id": 300})
    assert found.controls["<|im_end|>"] == 300 and found.normal == "NFC" and found.start == 300


def ranks_of(vocabulary):
    """Bytes in order of rank: single bytes first, then what merges make."""
    texts = [t for t in vocabulary.tokens if t]
    return sorted(texts, key=lambda t: (len(t) > 1, texts.index(t)))


def test_tekken(vocabulary, tmp_path):
    ranks = ranks_of(vocabulary)
    rows = [{"rank": i, "token_bytes": base64.b64encode(t).decode(), "token_str": None} for i, t in enumerate(ranks)]
    config = {"pattern": GPT2, "default_vocab_size": 1500 + 20, "default_num_special_tokens": 20, "version": "v3"}
    (tmp_path / "tekken.json").write_text(json.dumps({"config": config, "vocab": rows}))
    found = read_tekken(tmp_path / "tekken.json")
    assert (found.start, found.ends, found.control("[SUFFIX]")) == (1, [2], 16)
    assert found.tokens[20] == ranks[0] and len(found.tokens) == 1520 and found.tokens[1519] == ranks[1499]
    for text in many(10):
        ids = found.encode(text.encode())
        assert b"".join(found.tokens[i] for i in ids) == text.encode()
    listed = [{"rank": 0, "token_str": "<s>"}, {"rank": 1, "token_str": "</s>"}]
    (tmp_path / "tekken.json").write_text(json.dumps({"config": config, "vocab": rows, "special_tokens": listed}))
    assert read_vocabulary(tmp_path, {"vocab_size": 1520}).controls == {"<s>": 0, "</s>": 1}
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(ConfigError, match="as a tekken file"):
        read_tekken(tmp_path / "tekken.json")


def test_files_of_ranks(vocabulary, tmp_path):
    ranks = ranks_of(vocabulary)
    lines = [base64.b64encode(t) + b" %d" % i for i, t in enumerate(ranks)]
    path = tmp_path / "cl100k_base.tiktoken"
    path.write_bytes(b"\n".join(lines) + b"\n")
    found = read_tiktoken(path, start=0)
    assert found.ends == [100257] and found.pretokenizer.steps[0].pattern == TIKTOKEN["cl100k_base"][0]
    assert read_vocabulary(tmp_path, {"vocab_size": 100300, "bos_token_id": 7}).start == 7
    assert b"".join(found.tokens[i] for i in found.encode(b"The license's")) == b"The license's"
    path.rename(tmp_path / "other.tiktoken")
    with pytest.raises(ConfigError, match="'other' is not known"):
        read_vocabulary(tmp_path, {"vocab_size": 100300})
    (tmp_path / "other.tiktoken").write_bytes(b"YQ== 0\n\nYWI= 99999999999\n")
    with pytest.raises(ConfigError, match="ranks that are none"):
        read_tiktoken(tmp_path / "other.tiktoken", "gpt2")
    (tmp_path / "other.tiktoken").write_bytes(b"YQ== 0\nYQ== 1\n")
    with pytest.raises(ConfigError, match="stands there twice"):
        read_tiktoken(tmp_path / "other.tiktoken", "gpt2")
    (tmp_path / "other.tiktoken").write_bytes(b"!!! 1\n")
    with pytest.raises(ConfigError, match="as a file of ranks"):
        read_tiktoken(tmp_path / "other.tiktoken", "gpt2")
    (tmp_path / "other.tiktoken").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"\n".join(lines))  # Llama 3's has such lines, but 128,000 of them
    with pytest.raises(ConfigError, match="'tokenizer' is not known"):
        read_vocabulary(tmp_path, {"vocab_size": 100300})


def message(*fields):
    """A protocol buffer's message of (number, value) with values bytes, float or int."""
    out = b""
    for number, value in fields:
        if isinstance(value, bytes):
            out += bytes([number << 3 | 2]) + bytes([len(value) & 0x7F | 0x80, len(value) >> 7]) + value
        elif isinstance(value, float):
            out += bytes([number << 3 | 5]) + struct.pack("<f", value)
        else:
            out += bytes([number << 3, value])
    return out


PIECES = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), *((f"<0x{b:02X}>", 0.0, 6) for b in range(256)),
          ("\u2581", -2.0, 1), ("a", -3.0, 1), ("b", -3.5, 1), ("\u2581a", -4.0, 1), ("ab", -5.0, 1),
          ("\u2581ab", -5.5, 1),
          ("ba", -9.0, 1)]  # fmt: skip


def test_unigram_files(tmp_path):
    pieces = [(1, message((1, text.encode()), (2, score), (3, kind))) for text, score, kind in PIECES]
    trainer, normalizer = (2, message((3, 1))), (3, message((1, b"identity"), (3, 1), (4, 0)))
    (tmp_path / "tokenizer.model").write_bytes(message(*pieces, trainer, normalizer))
    found = read_sentencepiece(tmp_path / "tokenizer.model", start=1)
    names = [text for text, _, _ in PIECES]
    ids = [names.index(t) for t in ("\u2581ab", "\u2581a", "a", "<0xC3>", "<0xA9>", "ab")]
    assert found.encode("ab aa\u00e9ab".encode()) == ids and found.lead == b" " and found.ends == [2]
    data = {
        "model": {"type": "Unigram", "vocab": [[t, s] for t, s, _ in PIECES], "unk_id": 0, "byte_fallback": True},
        "added_tokens": [{"id": i, "content": PIECES[i][0], "special": True} for i in range(3)],
        "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first"},
    }
    other = vocabulary_of(data, start=1)
    assert other.encode("ab aa\u00e9ab".encode()) == ids and other.lead_once
    data["model"]["vocab"].append(["b\u2581a", -1.0])
    with pytest.raises(ConfigError, match="spaces inside"):
        vocabulary_of(data, start=1)


def test_unigram_equals_the_package(tmp_path):
    """A model trained by sentencepiece itself: the same tokens for texts of many scripts."""
    sentencepiece = pytest.importorskip("sentencepiece")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(many(400, seed=3)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "tokenizer"), vocab_size=700, model_type="unigram",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=0.98,
        minloglevel=2,
    )  # fmt: skip
    true = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    found = read_sentencepiece(tmp_path / "tokenizer.model")
    for text in many(60, seed=5):
        assert found.encode(text.encode()) == true.encode(text), text


def test_chat_templates(source, tmp_path):
    assert read_chat_template(source) == ""
    shutil.copy(source / "tokenizer.json", tmp_path)
    several = [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert read_chat_template(tmp_path) == "D"
    (tmp_path / "chat_template.jinja").write_text("J")
    assert read_chat_template(tmp_path) == "J"
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        read_vocabulary(tmp_path, {"vocab_size": 2048, "eos_token_id": 2047})


@pytest.mark.slow
def test_several_ends(source, tmp_path):
    """A model that ends its answers in several ways: all of them are the end."""
    for name in ("model.safetensors", "tokenizer.json"):
        shutil.copy(source / name, tmp_path)
    record = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**record, "eos_token_id": [2047, 2046, 2047]}))
    one, two = bytelm.load(source, semantics="lastfree"), bytelm.load(tmp_path, semantics="lastfree")
    assert two.vocabulary.ends == [2047, 2046] and two.vocabulary.tokens[2046] is None
    assert two.logprobs("The license")[256] > one.logprobs("The license")[256]
    assert byte_characters()["!"] == 33
