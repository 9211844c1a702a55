"""Cutting text into pieces, and the classes of characters behind it."""

import numpy as np
import pytest
from texts import SENTENCES

from bytelm.byteview.pretokenizer import Pretokenizer, Split
from bytelm.byteview.vocabulary import check_added
from bytelm.config import ConfigError
from bytelm.patterns import GPT2


@pytest.fixture(scope="module")
def gpt2():
    return Pretokenizer((Split(GPT2),))


def test_pieces(gpt2):
    pieces = gpt2.pieces("we're  12ab\n\n x")
    assert pieces == ["we", "'re", " ", " 12", "ab", "\n\n", " x"]
    digits = Pretokenizer((Split(r"\p{N}"), Split(GPT2)))
    assert digits.pieces("a 12") == ["a", " ", "1", "2"]
    assert Pretokenizer((Split(" ", "next"),)).pieces(" a b") == [" a", " b"]
    assert Pretokenizer((Split("-", "previous"),)).pieces("a-b-") == ["a-", "b-"]
    assert Pretokenizer((Split("-", "contiguous"),)).pieces("a--b") == ["a", "--", "b"]
    assert Pretokenizer().pieces("a b") == ["a b"] and gpt2.pieces("") == []


def test_a_text_of_the_same_classes_is_cut_alike(gpt2):
    classes = gpt2.classes
    for text in SENTENCES:
        stand_in = classes.text(classes.of(text))
        assert gpt2.cuts(stand_in) == gpt2.cuts(text)


def test_letters_of_contractions_count_behind_an_apostrophe_only(gpt2):
    classes = gpt2.classes
    assert classes.of("sss") == classes.of("aaa") and classes.of("'s") != classes.of("'a")
    assert classes.of("s", classes.of("'")) == classes.of("'s")[1:]


def test_reachable_classes(gpt2):
    classes = gpt2.classes
    every = {classes.of(chr(p))[0] for p in range(0x80, 0x800)}
    assert set().union(*(classes.reachable(bytes([b])) for b in range(0xC2, 0xE0))) == every
    assert classes.reachable("日".encode()[:2]) == {classes.of("日")[0]}


def test_patterns_that_are_refused():
    for pattern in (r"(?<=a)b", r"^a|b", r"\bword\b"):
        with pytest.raises(ConfigError, match="looks back"):
            _ = Pretokenizer((Split(pattern),)).classes
    with pytest.raises(ConfigError, match="cannot be read"):
        Split("(").cut("a")
    with pytest.raises(ConfigError, match="loses text"):
        Split("a", "removed")
    assert Pretokenizer((Split(r"[^a]+|a"),)).classes.count == 2


def test_added_tokens():
    check_added(["<tool_call>", "[INST]", "<｜User｜>", "｜DSML｜", "<dsml:"], "x")
    with pytest.raises(ConfigError, match=r"takes '\\n\\n' for one token"):
        check_added(["<h1>", "\n\n"], "x")


def test_representatives_are_of_their_class(gpt2):
    classes = gpt2.classes
    numbers = np.array([classes._fine[ord(c)] for c in classes.shown])
    assert (numbers == np.arange(classes.count)).all()
