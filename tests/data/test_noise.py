"""Noise: the rules' own words, rates, and that it depends on nothing but its keys."""

import subprocess
import sys
from itertools import groupby

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bytelm.config import ConfigError
from bytelm.data.noise import NEIGHBOURS, RULES, WORDS, Draws, misspeller, noised, read_misspellings

TEXT = "An owl, and 12 more (naïve) Straßen: Привет мир. " * 400


@pytest.mark.parametrize("rule,text,want", [
    ("antspeak", "an owl", "A N   O W L"), ("antspeak_byt5", "an owl", " A N O W L "), ("upper", "straße", "STRASSE"),
])  # fmt: skip
def test_fixed_rules(rule, text, want):
    assert noised(text.encode(), rule, seed=0, document=0).decode() == want


def characters(rule, text=TEXT, **keys):
    return noised(text.encode(), rule, **{"seed": 1, "document": 2, **keys}).decode()


def test_rates():
    assert len(characters("drop")) == pytest.approx(0.9 * len(TEXT), rel=0.01)
    assert len(characters("repeat")) == pytest.approx(1.4 * len(TEXT), rel=0.01)
    cased = [(a, b) for a, b in zip(TEXT, characters("random_case", TEXT.replace("ß", "s"))) if a.lower() != a.upper()]
    assert np.mean([b.isupper() for _, b in cased]) == pytest.approx(0.5, abs=0.02)
    inside = sum(map(len, WORDS.findall(TEXT)))
    assert inside - sum(map(len, WORDS.findall(characters("word_delete")))) == pytest.approx(0.1 * inside, rel=0.06)
    changed = sum(a != b for a, b in zip(TEXT, characters("word_replace")))
    assert changed == pytest.approx(0.1 * inside * 25.3 / 26, rel=0.06)  # some letters become themselves


@given(st.text(), st.sampled_from(["word_permute", "word_replace", "word_delete"]), st.integers(0, 9))
@settings(max_examples=150, deadline=None)
def test_word_rules_leave_white_space_where_it_is(text, rule, seed):
    out = characters(rule, text, seed=seed)
    assert [c for c in out if c.isspace()] == [c for c in text if c.isspace()]
    if rule == "word_permute":
        assert sorted(out) == sorted(text)
    if rule == "word_replace":
        assert len(out) == len(text)


@given(st.text(alphabet=st.sampled_from("abcdefgh ßéЖ.1")), st.sampled_from([r for r in RULES if r.startswith("typo")]))
@settings(max_examples=150, deadline=None)
def test_a_typo_is_one_slip_inside_a_long_word(text, rule):
    import re

    letters = re.compile(r"[^\W\d_]+")
    out = characters(rule, text)
    before, after = letters.findall(text), letters.findall(out)
    assert letters.sub("", out) == letters.sub("", text)  # nothing changes between the words
    assert len(before) == len(after)
    for a, b in zip(before, after):
        assert (a[0], a[-1]) == (b[0], b[-1])
        assert abs(len(a) - len(b)) <= 1
        if len(a) < 4:
            assert a == b
        if rule == "typo_swap":
            assert sorted(a) == sorted(b)
        if rule == "typo_keyboard":
            assert sum(x != y for x, y in zip(a, b)) <= 1


@given(st.binary(max_size=60), st.sampled_from(sorted(RULES)))
@settings(max_examples=300, deadline=None)
def test_any_bytes(data, rule):
    out = noised(data, rule, seed=0, document=0)
    assert out == noised(data, rule, seed=0, document=0)
    valid = data.decode("utf-8", "ignore").encode() == data
    if valid:
        out.decode()  # noise on a text is a text


@given(st.text(max_size=80), st.integers(0, 99))
@settings(max_examples=200, deadline=None)
def test_what_stays_of_a_text(text, seed):
    text = text.encode("utf-8", "ignore").decode()

    def changed(rule):
        return noised(text.encode(), rule, seed=seed, document=0).decode()

    letters = iter(text)
    assert all(c in letters for c in changed("drop"))  # in the order of the text
    assert changed("upper") == text.upper()
    assert all(c in (old.upper(), old.lower()) for c, old in zip(changed("random_case"), text)) or any(
        len(c.upper()) != 1 or len(c.lower()) != 1 for c in text
    )
    before, after = ([(c, len(list(run))) for c, run in groupby(t)] for t in (text, changed("repeat")))
    assert [c for c, _ in before] == [c for c, _ in after]
    assert all(n <= more <= 4 * n for (_, n), (_, more) in zip(before, after))
    for rule in ("word_permute", "word_replace", "typo_swap", "typo_keyboard"):
        assert len(changed(rule)) == len(text)


def test_keys_alone_decide():
    assert characters("drop") == characters("drop")
    for other in ({"seed": 2}, {"document": 3}, {"field": "ending0"}):
        assert characters("drop") != characters("drop", **other)
    # A prefix of a document is noised as the document is: draws come in the order of its characters.
    assert characters("drop").startswith(characters("drop", TEXT[:1000])[:800])
    code = (
        "from bytelm.data.noise import noised; print(noised(b'The quick brown fox' * 3, 'repeat', seed=5, document=6))"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert other == str(noised(b"The quick brown fox" * 3, "repeat", seed=5, document=6))


def test_draws_are_even():
    draws = Draws("even")
    counts = np.bincount([draws.below(7) for _ in range(7000)], minlength=7)
    assert counts.min() > 850 and counts.max() < 1150
    assert draws.uniform(20_000).mean() == pytest.approx(0.5, abs=0.01)
    assert sorted(draws.shuffled(list(range(50)))) == list(range(50))


def test_keys_beside_each_other():
    assert (
        set(NEIGHBOURS["g"]) == set("ftyhvb")
        and set(NEIGHBOURS["q"]) == set("wa")
        and set(NEIGHBOURS["m"]) == set("njk")
    )
    assert all(a in NEIGHBOURS[b] for a in NEIGHBOURS for b in NEIGHBOURS[a])


def test_misspellings(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("teh->the\ntehe->the\nqiuck->quick, quack\nallot->a lot\nfiest\tfirst\n", encoding="utf-8")
    assert read_misspellings(path) == {"the": ["teh", "tehe"], "quick": ["qiuck"], "first": ["fiest"]}
    out = noised(b"The first fox, THE quick.", misspeller(path), seed=0, document=0, name="misspelt").decode()
    assert out.replace("Tehe", "Teh").replace("TEHE", "TEH") == "Teh fiest fox, TEH qiuck."
    path.write_text("nothing here")
    with pytest.raises(ConfigError, match="no line `typo->word`"):
        misspeller(path)
    with pytest.raises(ConfigError, match="choose antspeak, drop"):
        noised(b"x", "dorp", seed=0, document=0)
