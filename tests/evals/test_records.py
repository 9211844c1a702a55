"""Questions in llm-foundry's three forms: how they are read, and what is wrong with a file."""

import json
import math

import numpy as np
import pytest

from bytelm.config import ConfigError
from bytelm.evals import records
from bytelm.evals.choices import Question
from bytelm.protocol import Score
from models import Knows, Table, uniform


class Short(Table):
    """Has room for 64 bytes, and does not say what is greedy."""

    def __init__(self):
        super().__init__(np.full((257, 257), -math.log(257)))
        self.window, self.asked = 64, []

    def score_batch(self, *args, **more):
        return [Score(s.total, s.per_byte) for s in super().score_batch(*args, **more)]

    def generate(self, prompt, max_bytes=200, **more):
        assert len(prompt) + max_bytes == self.window
        self.asked.append(prompt)
        return b"yes"


def test_records_in_the_three_forms(tmp_path):
    choices, contexts, written = (tmp_path / f"{name}.jsonl" for name in ("choices", "contexts", "written"))
    choices.write_text(json.dumps({"query": "Q:", "choices": ["no", "yes"], "gold": 1}) + "\n\n")
    contexts.write_text(json.dumps({"context_options": ["He", "She"], "continuation": "ran.", "gold": 0}) + "\n")
    written.write_text(json.dumps({"context": "2+2=", "continuation": "4"}) + "\n"
                       + json.dumps({"context": "say", "continuation": " no"}) + "\n")  # fmt: skip
    (one,), (other,), both = map(records.read_records, (choices, contexts, written))
    assert one.pairs == ((b"Q:", b" no"), (b"Q:", b" yes")) and one.gold == 1
    assert other.pairs == ((b"He", b" ran."), (b"She", b" ran.")) and other.gold == 0
    assert [r.pairs for r in both] == [((b"2+2=", b" 4"),), ((b"say", b" no"),)]
    knows = Knows([Question(b"Q:", (b" yes",), 0), Question(b"He", (b" ran.",), 0), Question(b"say", (b" no",), 0)])
    for rows, guessed in (([one], 0), ([other], 1)):  # a uniform model takes the shorter, the first of equals
        metrics, _ = records.records_unit(knows, rows)
        assert metrics["accuracy"] == metrics["accuracy_bytes"] == 1 and metrics["chance"] == 1 / 2
        assert records.records_unit(uniform(), rows)[0]["accuracy"] == guessed
    assert records.records_unit(knows, both)[0]["accuracy"] == 0.5
    assert records.records_unit(uniform(), both)[0]["bpb"] == pytest.approx(8)
    for line in (
        '{"query": "x"}',
        '{"query": "x", "choices": ["a"], "gold": 0}',
        "[]",
        '{"query": 1, "choices": [2, 3]}',
    ):
        choices.write_text(line + "\n")
        with pytest.raises(ConfigError, match="line 1 is none of the forms"):
            records.read_records(choices)
    written.write_text(written.read_text() + contexts.read_text())
    with pytest.raises(ConfigError, match="line 3 is of another form"):
        records.read_records(written)


def test_a_model_with_little_room_writes_behind_the_end_of_a_context(tmp_path):
    """Where scores do not say what is greedy, the model writes, and is never asked for more than it holds."""
    file, context = tmp_path / "written.jsonl", "x" * 100 + "is it? "
    file.write_text("".join(json.dumps({"context": context, "continuation": c}) + "\n" for c in ("yes", "no!")))
    lm = Short()
    assert records.records_unit(lm, records.read_records(file))[0]["accuracy"] == 0.5
    assert lm.asked == [context.encode()[-61:]] * 2
