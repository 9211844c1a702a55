"""Figures of units against values worked out by hand and by brute force."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bytelm
from bytelm.byteview.plain_tokens import PlainTokens
from bytelm.config import ConfigError
from bytelm.evals.chunk_quality import (
    Agreement,
    chunk_unit,
    has_chunks,
    language_unit,
    level_figures,
    morpheme_unit,
    read_morphemes,
    read_parallel,
    renyi_efficiency,
    stability,
    unit_starts,
    word_gaps,
)
from bytelm.evals.entrants import Entrant, entrants
from bytelm.evals.results import Result
from bytelm.evals.summary import Summary
from models import Table, uniform


def agreement(starts, gaps, size):
    return Agreement().add(np.asarray(starts, np.int64), gaps, size).figures()


class Spaces(Table):
    """Units begin behind spaces (`at`: 0), or at other places of a text."""

    def __init__(self, places=None):
        super().__init__(uniform().table)
        self.places = places or (lambda text: [i + 1 for i, b in enumerate(text[:-1]) if b == 32])

    def chunks(self, text):
        return [np.array(self.places(text), np.int64)]


def test_gaps_between_words():
    assert word_gaps(b"the cat  sat.") == [(3, 4), (7, 9)]  # before, in and behind white space
    assert word_gaps("camelCase 漢字".encode())[-1] == (13, 13)  # where words meet
    assert word_gaps(b"one") == [] and word_gaps(b"") == []


def test_agreement_by_hand():
    text = b"the cat sat"
    gaps = word_gaps(text)
    right = agreement(np.array([4, 8]), gaps, len(text))
    assert (right["precision"], right["recall"], right["f1"]) == (1, 1, 1) and right["lift"] > 1
    assert agreement(np.array([3, 7]), gaps, len(text))["f1"] == 1  # at the space itself
    half = agreement(np.array([4, 6]), gaps, len(text))
    assert (half["precision"], half["recall"]) == (0.5, 0.5)
    assert agreement(np.array([], np.int64), gaps, len(text))["f1"] == 0


def test_lift_of_random_boundaries_is_one():
    text = b"some words of a text that goes on and on, one after the other. " * 300
    rng = np.random.default_rng(0)
    for density in (0.05, 0.2, 0.5):
        starts = np.flatnonzero(rng.random(len(text)) < density)
        assert agreement(starts[starts > 0], word_gaps(text), len(text))["lift"] == pytest.approx(1, abs=0.05)


def test_texts_without_gaps_or_units_do_not_spoil_the_others():
    texts = [b"the quick brown fox jumps over", b"hello", b"a b"]
    figures, _ = level_figures(texts, [np.array([4, 10]), np.array([2]), np.zeros(0, np.int64)])
    assert figures["word_precision"] == 2 / 3 and figures["word_recall"] == 2 / 6 and figures["word_lift"] > 0


def test_renyi_efficiency():
    assert renyi_efficiency([5, 5, 5, 5]) == pytest.approx(1)
    p = np.array([0.7, 0.2, 0.1])
    want = math.log((p**2.5).sum()) / (1 - 2.5) / math.log(3)
    assert renyi_efficiency([7, 2, 1]) == pytest.approx(want)
    assert math.isnan(renyi_efficiency([3]))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=40))
@settings(max_examples=60, deadline=None)
def test_lengths_of_units(lengths):
    text = bytes(np.random.default_rng(0).integers(97, 123, sum(lengths)).tolist())
    figures, found = level_figures([text], [np.cumsum(lengths)[:-1]])
    assert found.tolist() == lengths
    assert figures["bytes_per_unit"] == pytest.approx(np.mean(lengths)) and figures["longest"] == max(lengths)
    assert figures["single"] == np.mean(np.array(lengths) == 1)


def test_figures_of_units_at_spaces():
    texts = [("naïve words of a text, and more of it " * 5).encode()] * 2
    metrics, details = chunk_unit(Entrant("s", Spaces()), texts, 0)
    assert metrics["word_recall_0"] == metrics["word_precision_0"] == 1 < metrics["word_lift_0"]
    assert metrics["at_space_0"] == 1 and metrics["inside_character_0"] == 0 and metrics["stability_0"] == 1
    assert sum(details["lengths_0"]) == 2 * 45 and details["passage"].startswith("naïve")
    inside = Spaces(lambda text: [i for i, b in enumerate(text) if b & 0xC0 == 0x80])
    assert chunk_unit(Entrant("s", inside), texts, 0)[0]["inside_character_0"] == 1
    everywhere = Spaces(lambda text: list(range(1, len(text))))
    metrics, _ = chunk_unit(Entrant("s", everywhere), texts, 0)
    assert metrics["bytes_per_unit_0"] == 1 and metrics["word_lift_0"] == pytest.approx(1)


def test_stability_counts_what_moves():
    text = b"these are words that stand in a line and are looked at " * 3
    assert stability(Spaces(), [text], 0) == 1
    moves = Spaces(lambda text: [i for i in range(2, len(text), 3) if sum(text) % 2 or i < 10])
    assert stability(moves, [text] * 4, 0) < 1


def test_morphemes(tmp_path):
    path = tmp_path / "m.tsv"
    path.write_text("walked\twalk @@ed\t110\nran\trun\t000\nunkindly\tun @@kind @@ly\t110\n"
                    "two dogs\ttwo dog @@s\n", encoding="utf-8")  # fmt: skip
    words = read_morphemes(path)
    assert words == [("walked", [4]), ("unkindly", [2, 6]), ("dogs", [3])]
    perfect = Spaces(lambda text: [1, *(1 + c for c in dict(words)[text[1:].decode()])])
    found, _ = morpheme_unit(Entrant("m", perfect), words)
    assert found["f1"] == 1 and found["lift"] > 1
    every = Spaces(lambda text: list(range(1, len(text))))
    found, _ = morpheme_unit(Entrant("m", every), words)
    assert found["recall"] == 1 and found["lift"] == pytest.approx(1) and found["density"] == 1
    path.write_text("ran\trun\n")
    with pytest.raises(ConfigError, match="whose morphemes spell the word"):
        read_morphemes(path)


def test_languages(tmp_path):
    (tmp_path / "en.txt").write_text("one two\nthree\n")
    (tmp_path / "xx.txt").write_text("uno due tre\nquattro cinque\n")
    texts, aligned = read_parallel(tmp_path, 0)
    assert aligned and read_parallel(tmp_path, 1) == ({"en": [b"one two"], "xx": [b"uno due tre"]}, True)
    found, _ = language_unit(Entrant("s", Spaces()), texts["xx"])
    assert (found["bytes"], found["units"]) == (25, 5) and found["nats"] == pytest.approx(25 * math.log(256))
    results = [Result(t, "s", "languages", t, language_unit(Entrant("s", Spaces()), texts[t])[0]) for t in texts]
    (table,) = Summary(results).tables()
    assert table.rows == [["s, bytes", "1.00", "2.08"], ["s, units", "1.00", "1.67"], ["s, bits", "1.00", "2.08"]]
    (tmp_path / "yy.txt").write_text("\nlinea\n")  # where a line is missing in one, it counts in none
    assert read_parallel(tmp_path, 0) == ({"en": [b"three"], "xx": [b"quattro cinque"], "yy": [b"linea"]}, True)
    (tmp_path / "yy.txt").write_text("only one line\n\n\n")
    assert read_parallel(tmp_path, 1) == (texts | {"yy": [b"only one line"]}, False)  # each taken whole
    (tmp_path / "yy.txt").write_text(" \n")
    with pytest.raises(ConfigError, match=r"yy.txt is empty"):
        read_parallel(tmp_path, 0)
    (tmp_path / "en.txt").rename(tmp_path / "english.txt")
    with pytest.raises(ConfigError, match="one file LANGUAGE.txt a language, en or eng.txt among them"):
        read_parallel(tmp_path, 0)


@pytest.fixture(scope="module")
def tokenized(root):
    return bytelm.load(root / "tests/golden/convert/model_tiny_sp"), bytelm.load(
        root / "tests/golden/convert/model_tiny_lm"
    )


def test_chunks_of_text_that_is_cut_inside_characters(tokenized):
    text = "word ééé漢字 ".encode() * 90
    for entrant in entrants("m", tokenized[1])[:1]:
        metrics, details = chunk_unit(entrant, [text], 0)
        assert metrics["bytes_per_unit_0"] >= 1 and 0 <= metrics["stability_0"] <= 1
        assert text.startswith(details["passage"].encode())


def test_tokens_as_units(tokenized):
    for lm in tokenized:
        text = "The quick brown fox — naïve.".encode()
        (starts,) = unit_starts(PlainTokens(lm), text)
        pieces = [text[a:b] for a, b in zip([0, *starts], [*starts, len(text)])]
        tokens = [lm.vocabulary.tokens[i] for i in lm.token_ids(text)]
        assert b"".join(pieces) == text
        assert [p.strip() for p in pieces if p.strip()] == [t.strip() for t in tokens if t.strip()]
        by_tokens, by_bytes = entrants("m", lm)
        assert has_chunks(by_tokens) and not has_chunks(by_bytes)


@pytest.mark.slow
def test_plain_tokens_score_as_the_harness_asks(tokenized):
    """ln p of the tokens of the whole text beyond those of the context, with the white space in front of them."""
    for lm in tokenized:
        plain, context = PlainTokens(lm), "The license "
        texts = ["and the", "x", "of naïve things"]
        found = plain.score_batch(texts, [context] * 3)
        for text, score in zip(texts, found):
            whole, first = lm.token_ids(context + text), len(lm.token_ids(context.rstrip()))
            rows = lm.model.session().read(_chain([*lm.trunk, *whole[:-1]])).astype(np.float64)
            rows -= np.logaddexp.reduce(rows, axis=1, keepdims=True)
            past = len(lm.trunk) - 1
            want = sum(rows[past + n][t] for n, t in enumerate(whole) if n >= first)
            assert score.total == pytest.approx(want, abs=1e-4) == score.per_byte.sum()
        for context in ("", "It was"):  # longer than its positions: every token counts once
            long = "".join(f" of the license {n} and the terms" for n in range(120))
            bits = -plain.score(long, context).total / len(long) / math.log(2)
            assert bits == pytest.approx(
                -plain.score(long[: len(long) // 2]).total / (len(long) // 2) / math.log(2), rel=0.1
            )
        alone = plain.score_batch(["The license"])[0].total
        assert alone == pytest.approx(lm.score_tokens(["The license"])[0])
        with pytest.raises(ConfigError, match="no probabilities of next bytes"):
            plain.logprobs(b"x")


def _chain(ids):
    from bytelm.byteview.cover import chain

    return chain(ids)


def test_plain_tokens_write_their_likeliest_tokens(tokenized):
    lm = tokenized[1]
    plain, prompt = PlainTokens(lm), b"The licen"
    written = plain.generate(prompt, 6, temperature=0)
    ids = [*lm.trunk, *lm.token_ids(prompt)]
    text = b""
    while len(text) < 6:
        row = lm.model.session().read(_chain(ids))[-1]
        ids.append(int(np.argmax(np.where([t is not None for t in lm.vocabulary.tokens], row, -np.inf))))
        text += lm.vocabulary.tokens[ids[-1]]
    assert written == text[:6]
    assert plain.generate_batch([prompt, b"The"], 6, temperature=0)[0] == written
