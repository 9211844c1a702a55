"""The suites' oracles: a uniform model is at chance and at eight bits, one that knows the answers is at 100 %, figures
that are worked out by hand."""

import json
import math
from itertools import islice, pairwise, product

import numpy as np
import pytest

from bytelm.config import ConfigError
from bytelm.data.noise import Draws
from bytelm.data.sources import open_corpus
from bytelm.evals import counting, cute, hellaswag, langgame, noisy, traps, word_tasks
from bytelm.evals.choices import Question, ask, corruptions, interval
from bytelm.evals.entrants import Entrant
from bytelm.evals.results import Result
from bytelm.evals.suites import SUITES, Material, Sizes, units
from bytelm.evals.summary import Summary
from bytelm.evals.variants import PAIRS, variants_unit
from models import Knows, Table, uniform

TEXT = ("It was the best of times, it was the worst of times; wisdom and foolishness together. "
        "Straße naïve Привет, strangers wandered quietly beneath enormous lanterns.\n").encode() * 60  # fmt: skip
STEMS = ("able", "brim", "cart", "dust", "elms", "flow", "grip", "hush")
ENDS = ("", "s", "ing", "ed", "er", "ly", "ness", "ful")
MORE_WORDS = " ".join(stem + end for stem in STEMS for end in ENDS) + " to an it of we go by my is"


@pytest.fixture
def material(tmp_path):
    (tmp_path / "text.txt").write_bytes(TEXT)
    (tmp_path / "words.txt").write_text(MORE_WORDS)
    write_cute(tmp_path / "cute")
    (tmp_path / "hs.jsonl").write_text("".join(json.dumps(item(n)) + "\n" for n in range(12)))
    return Material(
        text=open_corpus((str(tmp_path / "text.txt"),)), cute=tmp_path / "cute", hellaswag=tmp_path / "hs.jsonl",
        words=tmp_path / "words.txt", sizes=Sizes(bpb_bytes=3000, passages=5, items=6, hellaswag=12),
    )  # fmt: skip


def item(n):
    return {"ind": n, "activity_label": "Baking", "ctx_a": f"A man [step] bakes {n} loaves.", "ctx_b": "he",
            "endings": [f"eats loaf {n} [title] {e}" for e in "abcd"], "label": str(n % 4)}  # fmt: skip


def write_cute(folder):
    folder.mkdir()
    words = ["stone", "river", "bridge", "winter", "candle", "garden", "silver", "market"]
    for task, (_, asked) in cute.TASKS.items():
        columns = [f"input{n + 1}" for n in range(asked.count("{"))]
        rows = [[*[w[0] for _ in columns[1:]], w, f"{w[::-1]}{n}"] for n, w in enumerate(words)]
        if task.endswith("word"):
            rows = [[*row[:-2], f"The {row[-2]} is old.", f"The {row[-1]} was old."] for row in rows]
        if task.startswith("contains"):
            rows = [[*row[:-1], ("Yes", "No")[n % 2]] for n, row in enumerate(rows)]
        if task in ("orth", "sem"):
            rows = [[w, w + "s", w[::-1], w + "s"] for w in words]
        lines = [[*columns, "label"], *rows]
        (folder / f"{task}.tsv").write_text("".join("\t".join(line) + "\n" for line in lines))


def all_questions(material):
    """(questions, chance) of every task that is asked by likelihood."""
    words = word_tasks.words_of([MORE_WORDS.encode()])
    for task in cute.TASKS:
        yield cute.questions(material.cute, task, 0), cute.chance(task)
    for task in (*word_tasks.CHARBENCH, *word_tasks.PROBES):
        yield word_tasks.questions(words, task, 0), word_tasks.CHANCE[task]
    for kind in langgame.KINDS:
        yield list(islice(langgame.language_questions(word_tasks.frequent(words), kind), 60)), 1 / 4
    for spelling in counting.SPELLINGS:
        yield counting.count_questions(spelling, 30), counting.CHANCE
    for form in counting.FORMATS:
        yield counting.sum_questions(form, 20), counting.CHANCE
    yield langgame.sum_questions(40), 1 / 4
    yield traps.questions(TRAP_WORDS, longest_first(TRAP_WORDS), 0), traps.CHANCE
    for task in hellaswag.TASKS:
        yield hellaswag.hellaswag_questions(material.items, task), hellaswag.CHANCE


TRAP_WORDS = ["moves", "move", "table", "stable", "one", "ones", "own", "sown", "cart", "carts", "ashes", "sashes"]


def longest_first(words):
    """A tokenizer that takes the longest word it knows from the left."""

    def cut(text):
        at, ends = 1, [1]
        while at < len(text):
            known = [w for w in words if text.startswith(w.encode(), at)]
            at += max(map(len, known), default=1)
            ends.append(at)
        return ends

    return cut


def test_every_question_has_one_right_ending_and_known_models_score_what_they_must(material):
    for questions, chance in all_questions(material):
        assert questions
        for q in questions:
            assert len(set(q.endings)) == len(q.endings) == round(1 / chance)
        knows = ask(Knows(questions), questions)
        assert all(knows.right(by).all() for by in ("gain", "sum", "bytes", "characters"))


@pytest.mark.parametrize("kind", ["uniform", "bigram"])
def test_models_that_do_not_read_the_question_are_at_chance(material, kind):
    """Whatever they think of the endings by themselves: a question makes none of them more probable, so the first is
    picked, and answers take every place alike."""
    lm = uniform()
    if kind == "bigram":  # in halves, so that sums are exact and equal ones equal
        lm = Table(np.log2(np.exp2(-np.random.default_rng(0).integers(1, 30, (257, 257)).astype(float))))
    for questions, chance in all_questions(material):
        if questions[0].neutral is not None:
            right = ask(lm, questions).right("gain")
            first = np.mean([q.answer == 0 for q in questions])
            assert right.mean() == first == pytest.approx(chance, abs=1 / len(questions) + (chance == 1 / 4) * 0.1)


def test_uniform_model_is_at_chance_on_hellaswag():
    rng = np.random.default_rng(0)
    items = [
        hellaswag.Item(
            str(n), "A man bakes.", tuple("x" * int(k) for k in rng.integers(3, 60, 4)), int(rng.integers(4))
        )
        for n in range(600)
    ]
    for task in hellaswag.TASKS:
        right = ask(uniform(), hellaswag.hellaswag_questions(items, task)).right("characters")
        assert right.mean() == pytest.approx(1 / 4, abs=0.08), task  # 4.5 standard errors


def test_choices_equal_brute_force_of_a_bigram_model():
    rng = np.random.default_rng(0)
    table = np.log(rng.dirichlet(np.ones(257), 257))
    lm = Table(table)
    questions = [
        Question(rng.bytes(5), tuple(rng.bytes(int(n)) for n in rng.integers(1, 9, 4)), int(rng.integers(4)))
        for _ in range(40)
    ]
    found = ask(lm, questions)
    for q, row, right in zip(questions, found.nats, found.right("bytes")):
        scores = []
        for ending in q.endings:
            before = q.context[-1]
            total = 0.0
            for byte in ending:
                total, before = total + table[before, byte], byte
            scores.append(total)
        np.testing.assert_allclose(row, scores)
        assert right == (int(np.argmax(np.array(scores) / [len(e) for e in q.endings])) == q.answer)


def test_all_suites_of_a_uniform_model(material):
    """Eight bits everywhere; contexts that do not help recover nothing."""
    entrant = Entrant("uniform", uniform())
    results = []
    for unit in units(
        [n for n in SUITES if n not in ("languages", "morphemes", "traps", "records")], material, written=True
    ):
        if unit.fits(entrant):
            metrics, details = unit.run(entrant)
            results.append(Result(unit.suite + unit.task, "uniform", unit.suite, unit.task, metrics, details))
    summary = Summary(results)
    assert summary.metric("uniform", "bpb", "text", "bpb") == pytest.approx(8, abs=1e-12)
    for task in ("without", "clean", *summary.rules()):
        assert summary.metric("uniform", "noise", task, "bpb") == pytest.approx(8, abs=1e-9)
    assert math.isnan(summary.recovered("uniform", "drop"))
    assert summary.metric("uniform", "cute-written", "spell", "accuracy") == 0
    tables = {table.title: table for table in [summary.headline(), *summary.tables()]}
    assert {"Headline", "cute", "charbench", "HellaSwag"} <= set(tables)
    for table in tables.values():
        assert all(len(row) == len(table.columns) for row in table.rows)


def test_written_answers(material):
    for task in ("spell", "sub_word", "orth"):
        questions = cute.questions(material.cute, task, 0)
        entrant = Entrant("knows", Knows(questions))
        unit = next(u for u in units(["cute"], material, True) if (u.suite, u.task) == ("cute-written", task))
        metrics, details = unit.run(entrant)
        assert metrics["accuracy"] == 1, details


def test_recovered_by_hand():
    nats = {"without": [10.0, 6.0], "clean": [6.0, 2.0], "drop": [8.0, 5.0]}
    results = [Result(t, "m", "noise", t, {"bpb": 1.0}, {"nats": n, "bytes": [1, 1]}) for t, n in nats.items()]
    assert Summary(results).recovered("m", "drop") == pytest.approx((16 - 13) / (16 - 8))
    begun = Result("n", "begun", "noise", "without", {"bpb": 1.0}, {"nats": [1.0], "bytes": [1]})  # and was stopped
    record = Summary([*results, begun]).record()
    assert record["begun"]["noise"] == {"without": {"bpb": 1.0}} and "recovered" in record["m"]["noise"]["drop"]
    assert math.isnan(noisy.recovered(5, 5, 4)) and noisy.recovered(10, 6, 12) == -0.5


@pytest.mark.parametrize("sizes", [(900, 2000, 50), (774,), (5000, 773)])
def test_passages_are_neighbours_and_do_not_overlap(tmp_path, sizes):
    text = ("Привет, naïve\r\n\r\nWelt 漢字 😀.  " * 400).encode()
    for n, size in enumerate(sizes):
        (tmp_path / f"{n}.txt").write_bytes(text[n : n + size])
    corpus = open_corpus((f"{tmp_path}/*.txt",))
    for count in (1, 3, 100):
        found = noisy.passages(corpus, count)
        assert 1 <= len(found) <= count
        spans = []
        for p in found:
            document, start = map(int, p.name.split(":"))
            whole = corpus.read(document)
            at = whole.index(p.context + p.text, start)
            spans.append((document, at, at + len(p.context + p.text)))
            assert p.context.decode() and p.text.decode() and not p.context[-1:].isspace()
            assert 464 <= len(p.context) <= 512 and 253 <= len(p.text) <= 256 and p.text[:1] in b" \r"
        assert all(a[0] < b[0] or a[2] <= b[1] for a, b in pairwise(spans))


# H-Net's Tables 2 and 3 (1.3B): clean, the five noises (each the mean of three tasks), their mean, robustness score.
PUBLISHED = {
    "Transformer": (58.0, (31.6, 30.7, 28.0, 28.5, 43.0), 32.3, 22.2),
    "SpaceByte++": (60.1, (30.9, 32.1, 40.3, 30.6, 58.5), 38.5, 38.5),
    "H-Net, 2 stages": (62.2, (31.1, 34.7, 44.1, 33.0, 61.7), 40.9, 42.8),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_robustness_scores(model):
    """They follow from the published accuracies: off by 0.1, 0.1 and 0.0, by what was rounded."""
    clean, noises, mean, score = PUBLISHED[model]
    assert np.mean(noises) == pytest.approx(mean, abs=0.1)
    assert hellaswag.robustness(clean / 100, float(np.mean(noises)) / 100) == pytest.approx(score, abs=0.15)


def test_robustness_is_undefined_at_chance():
    assert math.isnan(hellaswag.robustness(0.25, 0.3))
    flags = np.random.default_rng(0).random((16, 200)) < 0.5
    low, high = hellaswag.robustness_interval(flags[0], flags[1:])
    assert low < hellaswag.robustness(flags[0].mean(), flags[1:].mean()) < high


def test_hellaswag_texts(material):
    first = material.items[0]
    assert first.context == "Baking: A man bakes 0 loaves. He"
    assert first.endings[1] == "eats loaf 0. b"
    both = hellaswag.hellaswag_questions(material.items, "upper_both")[0]
    assert both.context == b"BAKING: A MAN BAKES 0 LOAVES. HE" and both.endings[0] == b" EATS LOAF 0. A"
    contexts = {t: hellaswag.hellaswag_questions(material.items, t)[3].context for t in ("drop_context", "drop_both")}
    assert contexts["drop_context"] == contexts["drop_both"]


def test_broken_files_name_what_is_wrong(tmp_path, material):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps(item(0)) + '\n{"ctx_a": "x"}\n')
    with pytest.raises(ConfigError, match="line 2 is no item of HellaSwag"):
        hellaswag.read_hellaswag(bad)
    (material.cute / "spell.tsv").write_text("a\tb\tc\n")
    with pytest.raises(ConfigError, match=r"spell.tsv: expected 2 columns"):
        cute.read_cute(material.cute, "spell")
    with pytest.raises(ConfigError, match=r"sem_rand.tsv: no such file"):
        cute.read_cute(material.cute, "sem_rand")
    (material.cute / "spell.tsv").write_bytes(b"input1\tlabel\nstone\ts t \xff n e\n")
    with pytest.raises(ConfigError, match=r"spell.tsv: is no UTF-8 text"):
        cute.read_cute(material.cute, "spell")
    (material.cute / "del_word.tsv").write_text(
        "input1\tinput2\tlabel\n" + "".join(f"{w}\t{w}\t{w}\n" for w in "abcdef")
    )
    with pytest.raises(ConfigError, match=r"CUTE, del_word, row \['"):
        cute.questions(material.cute, "del_word", 0)
    with pytest.raises(ConfigError, match="no words to ask for"):
        next(langgame.language_questions([], "most"))
    with pytest.raises(ConfigError, match="suite cute: needs CUTE's data"):
        units(["cute"], Material(text=material.text), False)
    with pytest.raises(ConfigError, match="words of 4 to 10 letters"):
        word_tasks.questions({"stone": 1}, "nth_character", 0)


def test_what_two_words_share():
    words = word_tasks.words_of([MORE_WORDS.encode()])
    questions = word_tasks.questions(words, "common_substring", 0)
    for q in questions:
        a, b = q.context.decode().rsplit("Question: ", 1)[1].split('"')[1:4:2]
        shared = [ending.decode().strip('"') for ending in q.endings]
        assert [part in a and part in b for part in shared] == [n == q.answer for n in range(4)]
        assert len(shared[q.answer]) >= 3 and a != b
    assert len(questions) >= 3


def test_short_samples_hold_every_length():
    words = dict.fromkeys(
        ["".join(p) for p in islice(product("abc", repeat=9), 300)] + ["word", "other", "longer"] * 2, 1
    )
    words |= dict.fromkeys(["".join(p) for p in product("xyz", repeat=4)], 1)
    asked = [q.context.decode().rsplit("Question: ", 1)[1].split('"')[3]
             for q in word_tasks.questions(words, "count_character_frequency", 10)]  # fmt: skip
    assert {len(word) for word in asked} == {4, 9}


def test_charbench_answers_count_as_they_say():
    words = word_tasks.words_of([MORE_WORDS.encode()])
    for task, count in (("count_character_frequency", str.count), ("find_first_occurrence", str.index),
                        ("find_last_occurrence", str.rindex)):  # fmt: skip
        for q in word_tasks.questions(words, task, 0):
            asked = q.context.decode().rsplit("Question: ", 1)[1]
            letter, word = (part for part in asked.split('"')[1:4:2])
            assert q.endings[q.answer].decode() == f'{count(word, letter)}"'
    used = [set(a.context.decode().rsplit("Question: ", 1)[1] for a in word_tasks.questions(words, t, 0))
            for t in word_tasks.CHARBENCH]  # fmt: skip
    asked = [{q.split('"')[-4] for q in each} for each in used]
    assert all(not a & b for n, a in enumerate(asked) for b in asked[n + 1 :])  # no word serves two tasks


def test_sums_and_spellings():
    for prompt, answer in islice(langgame.sums(seed=3), 200):
        a, b = prompt.strip("$=").split("+")
        assert int(answer.rstrip("$")[::-1]) == int(a) + int(b)
    assert [counting.spelt(1234567, form) for form in counting.FORMATS] == [
        "1234567", "1,234,567", "123,456,7", "1 234 567", "123 456 7",
    ]  # fmt: skip
    plain, commas = counting.sum_questions("plain", 20), counting.sum_questions("comma_left", 20)
    assert [q.answer for q in plain] == [q.answer for q in commas]
    assert [[e.replace(b",", b"") for e in q.endings] for q in commas] == [list(q.endings) for q in plain]
    strings = {s: counting.count_questions(s, 9) for s in counting.SPELLINGS}
    assert len({tuple(q.endings[q.answer] for q in each) for each in strings.values()}) == 1


def test_corruptions_are_wrong_and_differ():
    for n, text in enumerate(["", "a", "aa", "abc", "aaaaaaaa"]):
        found = corruptions(list(text), Draws(n), 5, "abcdefgh")
        assert len(set(found)) == 5 and tuple(text) not in found
        assert all(abs(len(wrong) - len(text)) <= 1 for wrong in found)
    with pytest.raises(ValueError, match="cannot be got wrong"):
        corruptions(["a"], Draws(0), 3, "a")


def test_intervals_hold_the_mean():
    values = np.random.default_rng(1).random(500) < 0.3
    low, high = interval(int(values.sum()), 500)
    assert low < values.mean() < high and high - low == pytest.approx(2 * 1.96 * math.sqrt(0.21 / 500), rel=0.15)
    assert interval(50, 50) == (pytest.approx(0.929, abs=1e-3), 1.0) and interval(0, 50)[0] == 0.0


def test_traps_are_what_the_tokens_fall_into():
    words, cut = TRAP_WORDS, longest_first(TRAP_WORDS)
    found = traps.traps(words, cut, 100)
    assert {(a, b) for a, b, _, _ in found} == set(product(("cart", "move", "one"), ("sashes", "stable", "sown")))
    assert all(a + b == c + d for a, b, c, d in found)
    assert traps.traps(words, lambda text: range(len(text)), 9) == []  # tokens end everywhere: no trap
    with pytest.raises(ConfigError, match="cuts only 1 pairs"):
        traps.questions(words[:4], cut, 9)


def test_variants_of_a_model_that_sees_one_byte():
    """What stands behind a word depends on its last letter only, which a slip leaves and some forms change."""
    figures, _ = variants_unit(Table(np.log(np.random.default_rng(0).dirichlet(np.ones(257), 257))), 0)
    assert figures["slip"] == 0 < figures["same"] and 0 < figures["told"] < 1
    assert variants_unit(uniform(), 0)[0]["told"] == 0
    assert all(len(pair) == 2 and pair[0] != pair[1] for pair in PAIRS)
