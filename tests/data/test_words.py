"""The word rule: Unicode's own tests, the consequences HAT's report names, any bytes, stretches, and byte by byte."""

import itertools
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bytelm.config import ConfigError, HATConfig
from bytelm.data import words
from bytelm.data.marks import WordMarks
from bytelm.data.pieces import Pieces
from bytelm.data.sources import open_corpus
from bytelm.data.word_rule import automaton, properties, segment_starts, unicode_version, word_starts
from bytelm.data.words import WordRule
from bytelm.models.build import byte_ids

TEST_FILE = Path(__file__).parent / "WordBreakTest.txt"
# Characters of every class and flag, and how they meet: the ones that the rule tells apart.
TELLING = " aAbZ.'\",_(1\n\r\t \u0085\u0301\u200d\u00ad\U0001f1e9\U0001f1eb\U0001f468\u30ab\u05d0\u3000\u2003\u4e2d"
TELLING += "\u2044\u02d7\u00b7\u0e01"
texts = st.text(st.sampled_from(TELLING), max_size=24) | st.text(max_size=24)
blobs = st.lists(
    texts.map(str.encode)
    | st.binary(max_size=6)
    | st.sampled_from([b"\xe4\xbd", b"\xf0\x9f", b"\xc1", b"\xed\xb2\x80"])
).map(b"".join)
rules = st.sampled_from(words.RULES)


def test_unicode_s_own_test_file():
    """All of it, of the version that the tables are of."""
    lines = [line.split("#")[0].split() for line in TEST_FILE.read_text(encoding="utf-8").splitlines()]
    cases = [line for line in lines if line]
    assert len(cases) > 1800 and unicode_version() in TEST_FILE.read_text(encoding="utf-8").splitlines()[0]
    for case in cases:
        points = np.array([int(x, 16) for x in case[1::2]])
        want = [x == "÷" for x in case[0::2]][:-1]
        assert segment_starts(properties()[points]).tolist() == want, case


@pytest.mark.parametrize(
    "text, want",
    [
        (" a", [" a"]), ("  a", ["  ", "a"]), ("a ", ["a", " "]), ("\n\n", ["\n", "\n"]), ("\r\n", ["\r\n"]),
        ("3.14", ["3.", "14"]), ("don't", ["don'", "t"]), ("HTTPServer", ["HTTPServer"]),
        ("parseJSONToObj", ["parse", "JSONTo", "Obj"]), ("a=b+c", ["a", "=", "b", "+", "c"]), ("<|", ["<", "|"]),
        ("f(x),", ["f(", "x),"]), (" (of", [" (", "of"]), ("中文。", ["中", "文。"]), ("ひら", ["ひ", "ら"]),
        ("カタカナ", ["カタカナ"]), ("한국어 말", ["한국어", " 말"]), ("👨\u200d👩x", ["👨\u200d👩", "x"]),
        ("🇩🇪🇫🇷", ["🇩🇪", "🇫🇷"]), ("", []),
    ],
)  # fmt: skip
def test_what_the_rule_does(text, want):
    assert words.split(text) == want


def test_white_space_rule():
    """The paper's: white space stays with the word in front of it."""
    assert words.split("The  quick\n\nfox ", "space") == ["The  ", "quick\n\n", "fox "]
    assert words.split("  a", "space") == ["  ", "a"]


def test_goldens_words():
    """The words of the reference's own splitter in the golden case."""
    from safetensors.numpy import load_file

    io = load_file(Path(__file__).parent.parent / "golden/hierarchical/hat_tiny/io.safetensors")
    for ids, word, n in zip(io["tokens"], io["word_ids"], io["n_bytes"]):
        want = np.flatnonzero(np.diff(word[:n], prepend=-1))
        np.testing.assert_array_equal(words.split_bytes(ids[:n].astype(np.uint8).tobytes()), want)


@given(texts, rules)
def test_words_add_up(text, rule):
    parts = words.split(text, rule)
    assert "".join(parts) == text and all(parts)


@given(blobs, rules, st.sampled_from([0, 4, 7, 100]))
def test_words_of_any_bytes(data, rule, limit):
    starts = words.split_bytes(data, rule, limit)
    assert (len(starts) > 0) == (len(data) > 0) and (starts[:1] == 0).all() and (np.diff(starts) > 0).all()
    parts = [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)])]
    assert b"".join(parts) == data and (not limit or all(len(p) <= limit for p in parts))
    for part in parts:  # what is no UTF-8 stands alone, all else is whole characters
        if len(part) > 1:
            part.decode()


@given(texts, rules)
def test_automaton_is_the_rule_without_lookahead(text, rule):
    points = np.array([ord(c) for c in text], np.uint32)
    want = word_starts(properties()[points], rule, lookahead=False).tolist()
    assert automaton(rule).starts(points.tolist()) == want


@given(blobs, rules, st.sampled_from([0, 5, 100]))
def test_byte_by_byte(data, rule, limit):
    """Pushing bytes finishes the words that the marks say are known, and no others."""
    marks = words.marks(data, rule, limit)
    starts = np.flatnonzero(marks & words.CAUSAL_START)
    known = np.cumsum(marks & words.CAUSAL_START > 0) - (marks >> words.UNKNOWN_SHIFT)
    splitter, done = words.Splitter(rule, limit), []
    for i in range(len(data)):
        done += splitter.push(data[i : i + 1])
        assert len(done) == max(known[i] - 1, 0)
        assert b"".join(done) + splitter.pending == data[: i + 1]
    want = [data[a:b] for a, b in itertools.pairwise(starts)]
    assert done == want[: len(done)]


def _documents():
    rng = random.Random(0)
    latin = "".join(rng.choice(["word ", "Two\n", "f(x) ", "don't", "ü ", "\n\n"]) for _ in range(6000))
    yield latin.encode()
    yield "".join(rng.choice("中文字好。，的") for _ in range(9000)).encode()
    yield "".join(rng.choice("กขคงจ") for _ in range(9000)).encode()  # no place where the rule begins by itself
    yield b"ACGT" * 10000
    yield rng.randbytes(40000)
    yield ("слово " * 4000).encode()


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("rule", words.RULES)
def test_stretches_of_a_document(number, rule):
    """What a loader marks in pieces equals the marks, and the offsets, of the whole."""
    data = list(_documents())[number]
    whole = words.marks(data, rule, 100)
    np.testing.assert_array_equal(np.flatnonzero(whole & words.START), words.split_bytes(data, rule, 100))
    reads = []

    def read(a, b):
        reads.append(b - a)
        return data[a:b]

    rng = random.Random(number)
    for begin in [0, words.BLOCK, 2 * words.BLOCK - 1, *(rng.randrange(len(data)) for _ in range(40))]:
        end = min(begin + rng.randrange(1, 700), len(data))
        np.testing.assert_array_equal(words.stretch_marks(read, len(data), begin, end, rule, 100), whole[begin:end])
    assert max(reads) <= 2 * words.BLOCK + 1000


@pytest.mark.parametrize("rule", words.RULES)
@pytest.mark.parametrize("place", [b" ", "é ".encode(), b"\n", b"\na"])
def test_stretches_around_the_only_place_where_the_rule_begins(rule, place):
    """One place in reach of a block's edge and none elsewhere."""
    block = words.BLOCK
    for offset in (*range(-9, 10), 500):
        data = b"A" * (block + offset) + place + b"A" * (3 * block)
        whole = words.marks(data, rule, 100)
        for begin in (block - 20, block + 3, 2 * block - 7, 2 * block, 2 * block + 30, 3 * block + 2):
            got = words.stretch_marks(lambda a, b, data=data: data[a:b], len(data), begin, begin + 120, rule, 100)
            np.testing.assert_array_equal(got, whole[begin : begin + 120], f"{offset}, {begin}")


@pytest.mark.parametrize(
    "text", ["1\u2044" + "\u0301" * 90 + "2", " " + "\u202f" * 300 + "a", "a\u02d7" + "\u200d" * 500 + "b"]
)
def test_stretches_that_end_where_the_rule_looks_far_ahead(text):
    data = (text * 3).encode() + b" end"
    whole = words.marks(data)
    for end in (1, 2, 3, 4, 5, 9):
        got = words.stretch_marks(lambda a, b: data[a:b], len(data), 0, end)
        np.testing.assert_array_equal(got & words.START, whole[:end] & words.START)


def test_prefixes_are_stable_but_for_marks_that_are_no_punctuation():
    """A word's beginning, once its first character is read, is never taken back; U+2044 between digits is."""
    text = "The naïve café (1.5 m²) — don't: a.b,c 12:30 «да» 你好。x_y=z 🇩🇪"
    marks = words.marks(text.encode())
    assert ((marks & words.START > 0) == (marks & words.CAUSAL_START > 0)).all()
    marks = words.marks("1⁄2".encode())
    assert (marks & words.START > 0).tolist() == [True, False, False, False, False]
    assert (marks & words.CAUSAL_START > 0).tolist() == [True, True, False, False, True]


def test_known_with_the_last_byte_of_the_first_character():
    unknown = words.marks("é你\n".encode() + b"\xe4\xbdA\x80") >> words.UNKNOWN_SHIFT
    assert unknown.tolist() == [1, 0, 1, 1, 0, 0, 1, 2, 0, 0]


def test_pieces_carry_the_marks_of_their_document(tmp_path):
    """Each input of a piece is marked as in the whole document, wherever it was cut; the start symbol is a word."""
    text = ("Größe 1⁄2 (of 3).\n你好 don't 🇩🇪 " * 9).encode() + b"\xe4\xbd tail"
    (tmp_path / "a.txt").write_bytes(text)
    corpus = open_corpus((str(tmp_path / "a.txt"),))
    pieces = Pieces(corpus, 13, byte_ids(HATConfig()), marks=WordMarks(corpus, WordRule("unicode", 8)))
    columns = np.concatenate([pieces[i]["columns"] for i in range(len(pieces))])
    assert columns[0, 3] == words.START | words.CAUSAL_START
    np.testing.assert_array_equal(columns[1:, 3], words.marks(text, "unicode", 8))
    np.testing.assert_array_equal(columns[1:, 0], np.frombuffer(text, np.uint8))


def test_bad_arguments():
    with pytest.raises(ConfigError, match="choose one of unicode, space"):
        words.split("a", "words")
    with pytest.raises(ConfigError, match="max_bytes=3"):
        words.split("a", max_bytes=3)
    with pytest.raises(ValueError, match="lone surrogate"):
        words.split("a\ud800")
    assert words.split("x" * 250, max_bytes=100) == ["x" * 100, "x" * 100, "x" * 50]


@settings(deadline=None)
@given(st.text(max_size=40))
def test_splitting_again_changes_nothing(text):
    """A word alone is one word, unless it begins with what only stays with the character before it."""
    for word in words.split(text):
        if (properties()[ord(word[0])] & 31) not in (4, 5, 7):
            assert words.split(word) == [word]
