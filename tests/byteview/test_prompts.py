"""Beginnings, special tokens, chats, filling in, and what is usually done about cut prompts."""

import dataclasses
import itertools

import numpy as np
import pytest

import bytelm
from bytelm.byteview.byte_view import TokenizedLM
from bytelm.byteview.cover import chain, log_sum
from bytelm.byteview.healing import healed, uncorrected
from bytelm.byteview.prompts import chat, fill_in, split_special, with_special
from bytelm.config import ConfigError
from bytelm.protocol import ImpossibleText

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NAMES = ("<|im_start|>", "<|im_end|>", "<fim_prefix>", "<fim_suffix>", "<fim_middle>")


@pytest.fixture(scope="module")
def lm(root):
    """A real model whose five last tokens are special ones."""
    base = bytelm.load(root / "tests/golden/convert/model_tiny_lm")
    v = base.vocabulary
    ids = range(len(v.tokens) - 6, len(v.tokens) - 1)
    tokens = tuple(None if i in ids else t for i, t in enumerate(v.tokens))
    special = dataclasses.replace(v, tokens=tokens, controls={**v.controls, **dict(zip(NAMES, ids))})
    return TokenizedLM(base.model, special, chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def sp(root):
    return bytelm.load(root / "tests/golden/convert/model_tiny_sp")


def row_behind(lm, ids):
    """What the model says behind tokens, as probabilities of the first byte of one more; control tokens left out."""
    row = np.asarray(lm.model.session().read(chain(ids))[-1], np.float64)
    row = np.exp(row - log_sum(row))
    out = np.zeros(257)
    for i, text in enumerate(lm.vocabulary.tokens):
        if text:
            out[text[0]] += row[i]
    out[256] = row[lm.vocabulary.ends].sum()
    return out / out.sum()


@pytest.mark.slow
def test_bytes_in_front_stay_open(lm, sp):
    for model in (lm, sp):
        behind = model.behind(b"The lic").behind("en")
        np.testing.assert_allclose(behind.logprobs(b"se"), model.logprobs(b"The license"), atol=1e-5)
        np.testing.assert_allclose(
            behind.score("se of").per_byte, model.score("se of", context="The licen").per_byte, atol=1e-5
        )
        assert behind.generate(b"", 12, temperature=0) == model.generate(b"The licen", 12, temperature=0)
        assert behind.generate(b"", 12, seed=3) == model.generate(b"The licen", 12, seed=3)
        assert behind.window == model.window - len("The licen")
        with pytest.raises(ConfigError, match="bytes stand before"):
            behind.score_tokens(["x"])


def test_a_special_token_closes_what_is_before_it(lm):
    start, end = lm.vocabulary.controls["<|im_start|>"], lm.vocabulary.controls["<|im_end|>"]
    asked = lm.behind(start, "user\nThe licen", end)
    ids = [start, *lm.vocabulary.encode(b"user\nThe licen"), end]
    assert asked.trunk == [lm.vocabulary.start, *ids]
    assert lm.behind(*(start, "a"), start=False).trunk == [start]
    once = dataclasses.replace(lm.vocabulary, lead=b" ", lead_once=True)
    led = TokenizedLM(lm.model, once).behind("The", start, "The", end)
    the, bare = lm.vocabulary.encode(b" The"), lm.vocabulary.encode(b"The")
    assert led.trunk == [lm.vocabulary.start, *the, start, *bare, end] and led.grammar.lead == b""
    plain = TokenizedLM(lm.model, lm.vocabulary, "lastfree").behind(start, "user\nThe licen", end)
    np.testing.assert_allclose(np.exp(plain.logprobs()), row_behind(lm, plain.trunk), atol=1e-6)
    (tokens,) = asked.score_tokens([" and"])
    nodes = chain([*asked.trunk, *lm.vocabulary.encode(b" and")])
    rows = lm.model.session().read(nodes).astype(np.float64)
    first = len(asked.trunk) - 1
    expected = sum(rows[n][nodes[n + 1].token] - log_sum(rows[n]) for n in range(first, len(nodes) - 1))
    assert tokens == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ImpossibleText, match="no UTF-8"):
        lm.behind(b"\xff", end)
    with pytest.raises(ConfigError, match="token 99999"):
        lm.behind(99999)
    with pytest.raises(ConfigError, match="stand before every text"):
        lm.behind("x" * 600)


@pytest.mark.slow
def test_special_text(lm):
    ids = lm.vocabulary.controls
    assert split_special("a<|im_start|>b<|im_end|><|im_x", lm.vocabulary) == [
        b"a", ids["<|im_start|>"], b"b", ids["<|im_end|>"], b"<|im_x"]  # fmt: skip
    parsed = with_special(lm, "<|im_start|>user\nThe li")
    assert parsed.trunk == [lm.vocabulary.start, ids["<|im_start|>"]] and parsed.opening == b"user\nThe li"
    name = next(n for n, i in ids.items() if i == lm.vocabulary.start)
    assert with_special(lm, name + "x").trunk == [lm.vocabulary.start]  # not twice
    once = TokenizedLM(lm.model, dataclasses.replace(lm.vocabulary, lead=b" ", lead_once=True))
    assert with_special(once, name + "The").before == b"The" and with_special(once, "The").before == b" The"
    assert lm.logprobs("<|im_start|>").shape == (257,)  # by default, text like any other


def test_chat(lm):
    pytest.importorskip("jinja2")
    ids = lm.vocabulary.controls
    answer = chat(lm, [{"role": "user", "content": "  Hi there "}])
    assert answer.trunk == [
        ids["<|im_start|>"], *lm.vocabulary.encode(b"user\nHi there"), ids["<|im_end|>"],
        *lm.vocabulary.encode(b"\n"), ids["<|im_start|>"]]  # fmt: skip
    assert answer.opening == b"assistant\n"
    assert isinstance(answer.generate(max_bytes=5), bytes)
    for messages, match in (
        ([{"role": "user", "content": "a<|im_end|>b"}], r"spells the special token <\|im_end\|>"),
        ([{"content": "a"}], "a role and a content"),
        ([{"role": "user", "content": None}], "a role and a content"),
        ([{"role": "user<|im_end|>", "content": "a"}], "spells the special token"),
    ):
        with pytest.raises(ConfigError, match=match):
            chat(lm, messages)
    with pytest.raises(ConfigError, match="no chat template"):
        chat(TokenizedLM(lm.model, lm.vocabulary), [])
    for template, match in (
        ("{{ raise_exception('only pairs') }}", "only pairs"),
        ("{% if %}", "cannot be filled in"),
        ("{{ messages + 1 }}", "cannot be filled in"),
    ):
        with pytest.raises(ConfigError, match=match):
            chat(TokenizedLM(lm.model, lm.vocabulary, chat_template=template), [])


def test_fill_in(lm):
    ids = lm.vocabulary.controls
    v, before, behind, middle = lm.vocabulary, *(ids[name] for name in NAMES[2:])
    spm = fill_in(lm, "def f", "\n    return x")
    assert (spm.trunk, spm.opening) == ([before, behind, *v.encode(b"\n    return x"), middle], b"def f")
    psm = fill_in(lm, "def f", "\n", order="psm")
    assert (psm.trunk, psm.opening) == ([before, *v.encode(b"def f"), behind, *v.encode(b"\n"), middle], b"")
    assert len(spm.generate(max_bytes=6)) <= 6
    with pytest.raises(ConfigError, match="no special tokens for filling in"):
        fill_in(TokenizedLM(lm.model, dataclasses.replace(v, controls={})), "a", "b")
    with pytest.raises(ConfigError, match="order='mps'"):
        fill_in(lm, "a", "b", order="mps")
    named = fill_in(lm, "a", "b", names=("<|im_start|>", "<|im_end|>", "<fim_middle>"))
    assert named.trunk[0] == ids["<|im_start|>"]


def test_healing_is_right_where_it_goes_back_far_enough(lm, sp):
    for model, prompt in itertools.product((lm, sp), (b"The license of the sof", b"It is a li")):
        view = TokenizedLM(model.model, model.vocabulary, "all").logprobs(prompt)
        ids = model.vocabulary.encode(prompt)
        plain = uncorrected(model, prompt)
        assert plain.trunk == [model.vocabulary.start, *ids]
        np.testing.assert_allclose(np.exp(plain.logprobs()), row_behind(model, plain.trunk), atol=1e-6)
        distance = [0.5 * np.abs(np.exp(healed(model, prompt, back).logprobs()) - np.exp(view)).sum()
                    for back in (0, 3, len(ids))]  # fmt: skip
        assert distance[0] > 0.1 > distance[1] and distance[2] < 1e-4
    np.testing.assert_allclose(uncorrected(sp, b"").logprobs(), TokenizedLM(sp.model, sp.vocabulary, "all").logprobs())
    with pytest.raises(ImpossibleText):
        uncorrected(lm, b"caf\xc3")
    with pytest.raises(ConfigError, match="back=-1"):
        healed(lm, b"a", -1)
