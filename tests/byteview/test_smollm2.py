"""A real pretrained model, out of a GGUF file (98 MB, fetched once)."""

import subprocess
import sys

import numpy as np
import pytest

import bytelm

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def lm(root):
    pytest.importorskip("gguf")
    done = subprocess.run([sys.executable, str(root / "scripts/fetch_smollm2")], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"the model cannot be downloaded here: {done.stderr.strip()[-200:]}")
    return bytelm.load(done.stdout.strip())


def test_it_knows_the_capital_wherever_the_prompt_ends(lm):
    assert lm.generate(b"The capital of France is", 7, temperature=0) == b" Paris."
    assert lm.generate(b"The capital of Fr", 17, temperature=0) == b"ance is Paris. Th"
    row = lm.logprobs(b"def fib(n):\n    ret")
    assert np.exp(row[ord("u")]) > 0.98  # the prompt's own tokens say a space
    assert np.exp(row).sum() == pytest.approx(1)


def test_one_pass_equals_byte_by_byte(lm):
    text = "The mayor of Zürich (it's 日本) won't pay 1234 francs.\n\n  x".encode()
    score = lm.score(text)
    rows = lm.logprobs_batch([text[:n] for n in range(0, len(text), 7)])
    np.testing.assert_allclose(score.per_byte[::7], rows[np.arange(len(rows)), list(text[::7])], atol=2e-3)
