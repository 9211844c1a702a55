"""Compression with a model: nothing is lost, whatever the bytes; the size is what `score` says; damage is told."""

import math
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bytelm
from bytelm.cli import run as cli
from bytelm.coding import CodeError, Decoder, Encoder, compress, decompress
from bytelm.config import ConfigError
from bytelm.interop.weights import save_weights
from bytelm.lm import NetworkLM
from bytelm.seq2seq_lm import Seq2SeqLM
from tiny import FULL, HYBRID, flat, hat, hnet, network, t5

WINDOW = 64


@given(st.lists(st.tuples(st.integers(0, 6), st.lists(st.integers(1, 1 << 30), min_size=7, max_size=7)), max_size=60))
@settings(max_examples=200, deadline=None)
def test_coder_gives_back_what_was_written(symbols):
    encoder = Encoder()
    for symbol, sizes in symbols:
        encoder.write(sum(sizes[:symbol]), sum(sizes[: symbol + 1]), sum(sizes))
    code = encoder.finish()
    bits = sum(-math.log2(sizes[symbol] / sum(sizes)) for symbol, sizes in symbols)
    assert 8 * len(code) <= bits + 0.01 + 16
    decoder = Decoder(code)
    assert not decoder.overrun()
    for symbol, sizes in symbols:
        ends = np.cumsum([0, *sizes])
        assert ends[symbol] <= decoder.place(int(ends[-1])) < ends[symbol + 1]
        decoder.read(int(ends[symbol]), int(ends[symbol + 1]), int(ends[-1]))


@pytest.mark.parametrize("low,high", [(0, 1), (255, 256), (100, 101)])
def test_a_long_row_of_one_symbol_is_told_from_a_code_that_is_cut_off(low, high):
    encoder = Encoder()
    for _ in range(20_000):  # NUL after NUL: a code of zeros
        encoder.write(low, high, 256)
    code = encoder.finish()
    for cut, whole in ((len(code), True), (len(code) - 30, False)):
        decoder = Decoder(code[:cut])
        for _ in range(20_000):
            decoder.read(low, high, 256)
        assert decoder.overrun() != whole


FAMILIES = {"flat": flat(FULL), "hybrid": flat(HYBRID), "hnet": hnet(1), "hat": hat()}


def model(family):
    config = FAMILIES[family]
    return NetworkLM(config, network(config, scale=3.0)[1], WINDOW)


@pytest.fixture(scope="module")
def tokenized(root):
    return bytelm.load(root / "tests/golden/convert/model_tiny_lm")


TEXT = ("It was the best of times — naïve, 漢字 😀. " * 12).encode()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_size_is_the_score_and_nothing_is_lost(family):
    lm = model(family)
    for text in (TEXT[:200], TEXT[:64], TEXT[:65], b""):
        code = compress(lm, text)
        assert decompress(lm, code) == text
        assert len(code) <= -lm.score(text).total / math.log(2) / 8 * 1.001 + 16


@pytest.mark.slow
def test_size_of_a_tokenized_model(root, tokenized):
    text = (root / "tests/golden/convert/text.txt").read_bytes()[:300]
    code = compress(tokenized, text)
    assert decompress(tokenized, code) == text
    assert len(code) <= -tokenized.score(text).total / math.log(2) / 8 * 1.001 + 16


@pytest.mark.slow
@pytest.mark.parametrize("family", ["flat", "hnet", "hat"])
@pytest.mark.parametrize(
    "text",
    [bytes(range(256)), b"\xfe\xff\xc0" * 30, b"\x00" * 70, TEXT[1:90] + b"\xf5" + TEXT],
    ids=["all", "reserved", "zeros", "one"],
)
def test_any_bytes(family, text):
    lm = model(family)
    assert decompress(lm, compress(lm, text)) == text


@pytest.mark.slow
@pytest.mark.parametrize("text", [b"\xff", "né".encode()[:2] + b"a", TEXT[1:40], b"abc\x80" * 4])
def test_bytes_that_a_tokenizer_cannot_write(tokenized, text):
    assert decompress(tokenized, compress(tokenized, text)) == text


@pytest.mark.slow
def test_many_texts():
    """Random bytes, texts of few letters, and cut real text, with a flat model and an H-Net. BYTELM_FUZZ=10000 takes
    five minutes."""
    rng = np.random.default_rng(0)
    lms = [model("flat"), model("hnet")]
    for n in range(int(os.environ.get("BYTELM_FUZZ", "600"))):
        size = int(rng.integers(0, 24)) if n % 50 else int(rng.integers(0, 200))
        kind = n % 3
        text = rng.bytes(size) if kind == 0 else bytes(rng.choice(list(b"ab \xc3\xa9"), size).tolist())
        if kind == 2:
            start = int(rng.integers(0, len(TEXT) - size))
            text = TEXT[start : start + size]
        lm = lms[n % 2]
        assert decompress(lm, compress(lm, text)) == text, (n, text)


def test_what_is_damaged_or_of_another_model_is_refused():
    lm = model("flat")
    code = compress(lm, TEXT[:40])
    flipped = code[:-2] + bytes([code[-2] ^ 64, code[-1]])
    for bad, message in ((b"", "not a text that"), (b"x" + code[1:], "not a text that"), (code[:3], "cut off"),
                         (flipped, "damaged"), (code[:-4], "damaged")):  # fmt: skip
        with pytest.raises(CodeError, match=message):
            decompress(lm, bad)
    with pytest.raises(CodeError, match="another model"):
        decompress(NetworkLM(FAMILIES["flat"], network(FAMILIES["flat"], seed=1)[1], WINDOW), code)
    config = t5("none")
    with pytest.raises(ConfigError, match="encoder-decoder"):
        compress(Seq2SeqLM(config, network(config)[1], 32), b"x")


def test_steps_on_a_cache_are_next_byte_probabilities():
    """Also beyond the window, where a text is read anew, and with texts that end."""
    lm = model("hybrid")
    follower, texts = lm.follow([TEXT[:5], TEXT[7:50], b""]), [TEXT[:5], TEXT[7:50], b""]
    for n in range(70):
        logs = follower.logprobs()
        if n % 9 == 0 or n > 60:
            np.testing.assert_allclose(logs, lm.logprobs_batch(texts), atol=2e-5)
        new = [TEXT[(n * k) % 200] for k in (1, 3, 5)]
        follower.push(new)
        texts = [t + bytes([b]) for t, b in zip(texts, new)]
    follower.push([256, 97, 98])
    logs = follower.logprobs()
    assert np.isneginf(logs[0]).all() and np.isfinite(logs[1:, :256]).all()
    assert lm.follow([]).logprobs().shape == (0, 257)


def test_commands(tmp_path, capsys):
    config = FAMILIES["flat"]
    save_weights(tmp_path / "m", config, network(config, scale=3.0)[1], WINDOW, "float32")
    file, packed = tmp_path / "a.txt", tmp_path / "a.txt.bytelm"
    file.write_bytes(TEXT)
    assert cli(["compress", str(tmp_path / "m"), str(file)]) == 0
    assert f"{len(TEXT):,} bytes as {packed.stat().st_size:,}" in capsys.readouterr().out
    assert cli(["decompress", str(tmp_path / "m"), str(packed)]) == 2  # a.txt is there
    assert "is there; --force" in capsys.readouterr().err
    assert cli(["decompress", str(tmp_path / "m"), str(packed), "-o", str(tmp_path / "b.txt")]) == 0
    assert (tmp_path / "b.txt").read_bytes() == TEXT
    packed.write_bytes(packed.read_bytes()[:-9])
    assert cli(["decompress", str(tmp_path / "m"), str(packed), "-o", str(tmp_path / "c.txt")]) == 2
    assert "damaged" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "a.txt.bytelm", "b.txt", "m"]
