"""Sources with a known floor: the law of what is drawn, and that a table which looks k back reaches the floor."""

import math

import numpy as np
import pytest

from bytelm.evals.markov import best_bits, frequency_bits, source_text


@pytest.mark.parametrize("k,p,q", [(1, 0.1, 0.3), (2, 0.1, 0.1), (5, 0.4, 0.2), (3, 0.9, 0.7)])
def test_law_and_floor(k, p, q):
    text = np.frombuffer(source_text(300_000, k, p, q, 7), np.uint8) - ord("0")
    assert text.mean() == pytest.approx(p / (p + q), abs=0.01)
    before, after = text[:-k], text[k:]
    assert after[before == 0].mean() == pytest.approx(p, abs=0.01)
    assert 1 - after[before == 1].mean() == pytest.approx(q, abs=0.01)
    chances = np.array([[1 - p, p], [q, 1 - q]])
    assert -np.log2(chances[before, after]).mean() == pytest.approx(best_bits(p, q), abs=0.01)
    shares = np.bincount(text) / len(text)
    assert -np.log2(shares[text]).mean() == pytest.approx(frequency_bits(p, q), abs=0.01)
    if k > 1:  # neighbours are independent
        joint = np.histogram2d(text[:-1], text[1:], bins=2)[0] / (len(text) - 1)
        assert np.abs(joint - np.outer(joint.sum(1), joint.sum(0))).max() < 0.005


def test_bounds():
    assert best_bits(0.5, 0.5) == frequency_bits(0.3, 0.3) == 1
    assert best_bits(0.1, 0.1) == pytest.approx(-0.1 * math.log2(0.1) - 0.9 * math.log2(0.9))
    assert source_text(50, 2, 0.1, 0.2, 0) == source_text(50, 2, 0.1, 0.2, 0) != source_text(50, 2, 0.1, 0.2, 1)
