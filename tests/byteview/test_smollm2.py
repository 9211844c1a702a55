"""A real pretrained model, out of a GGUF file (98 MB, fetched once)."""

import subprocess
import sys

import numpy as np
import pytest

import bytelm
from bytelm.byteview.byte_view import TokenizedLM
from bytelm.byteview.cover import chain
from bytelm.byteview.prompts import chat

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def lm(root):
    pytest.importorskip("gguf")
    done = subprocess.run([sys.executable, str(root / "scripts/fetch_smollm2")], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"the model cannot be downloaded here: {done.stderr.strip()[-200:]}")
    return bytelm.load(done.stdout.strip())


def test_it_knows_the_capital_wherever_the_prompt_ends(lm):
    assert lm.generate(b"The capital of Fr", 13, temperature=0) == b"ance is Paris"
    row = lm.logprobs(b"def fib(n):\n    ret")
    assert np.exp(row[ord("u")]) > 0.98  # the prompt's own tokens say a space
    assert np.exp(row).sum() == pytest.approx(1)


def test_one_pass_equals_byte_by_byte(lm):
    text = "The mayor of Zürich (it's 日本) won't pay 1234 francs.\n\n  x".encode()
    score = lm.score(text)
    rows = lm.logprobs_batch([text[:n] for n in range(0, len(text), 7)])
    np.testing.assert_allclose(score.per_byte[::7], rows[np.arange(len(rows)), list(text[::7])], atol=2e-3)


def test_a_chat_has_the_tokens_and_probabilities_of_transformers(lm):
    """The ids of apply_chat_template and the likeliest next tokens, as transformers 5.24 gives them for this file."""
    pytest.importorskip("jinja2")
    asked = chat(lm, [{"role": "user", "content": "What is the capital of France?"}])
    ids = [*asked.trunk, *lm.vocabulary.encode(asked.opening)]
    assert ids == [1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712,
                   8182, 2, 198, 1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531,
                   198]  # fmt: skip
    row = lm.model.session().read(chain(ids))[-1].astype(np.float64)
    found = np.exp(row - np.logaddexp.reduce(row))
    for token, p in ((504, 0.152178), (60, 0.140183), (15319, 0.103761), (2219, 0.060422)):
        assert found[token] == pytest.approx(p, abs=2e-4)
    assert asked.generate_tokens([b""], 60, temperature=0) == [b"The capital of France is Paris."]


def test_every_way_to_cut_costs_little(lm):
    every = TokenizedLM(lm.model, lm.vocabulary, "all")
    covers = every.follow([b"The capital of Fr"])
    assert np.exp(covers.logprobs()[0, ord("a")]) > 0.9
    assert every.generate(b"The capital of Fr", 4, temperature=0) == b"ance"
