"""Bits per byte: a uniform model, a model whose exact score is known, and the corpus bookkeeping."""

import math

import numpy as np
import pytest

from bytelm.data.sources import open_corpus
from bytelm.evals.bpb import bits_per_byte, first_bytes, window_scorer
from bytelm.vocab import FLAT_IDS

TEXTS = [b"abracadabra", b"x", b"the quick brown fox" * 7]


def uniform(inputs, targets):
    return np.full(inputs.shape, -math.log(256))


@pytest.mark.parametrize("window,batch", [(4, 3), (8, 1), (64, 2), (500, 4)])
def test_uniform_is_eight_bits(window, batch):
    result = bits_per_byte(window_scorer(uniform, FLAT_IDS, window=window, batch_size=batch), TEXTS, window)
    assert result.bpb == pytest.approx(8.0, abs=1e-12)
    assert (result.bytes, result.documents, result.window) == (sum(map(len, TEXTS)), 3, window)


@pytest.mark.parametrize("window,batch", [(4, 3), (8, 1), (200, 2)])
def test_bigram_model_equals_brute_force(window, batch):
    """A bigram model's score does not depend on the window: every byte after the first sees its neighbour."""
    table = np.random.default_rng(0).dirichlet(np.ones(256), 257)
    scorer = window_scorer(lambda x, y: np.log(table[x, y]), FLAT_IDS, window=window, batch_size=batch)
    want = 0.0
    for text in TEXTS:
        before = 256
        for byte in text:
            want -= math.log2(table[before, byte])
            before = byte
    assert bits_per_byte(scorer, TEXTS, window, group_bytes=5).bpb == pytest.approx(
        want / sum(map(len, TEXTS)), rel=1e-12
    )


def test_longer_windows_see_more():
    """A model that knows how many inputs it has: the first byte of a window sees one input, the last `window`."""

    def logprobs(x, y):
        return -np.broadcast_to(np.arange(x.shape[1]) + 1.0, x.shape)

    scorer = window_scorer(logprobs, FLAT_IDS, window=4, batch_size=2)
    assert scorer([b"abcdef"]) == [1 + 2 + 3 + 4 + 3 + 4]  # the last window is slid back and scores its last two


def test_first_bytes_cuts_the_last_document(tmp_path):
    for i, text in enumerate((b"aaaa", b"bbbb", b"cccc")):
        (tmp_path / f"{i}.txt").write_bytes(text)
    corpus = open_corpus((f"{tmp_path}/*.txt",))
    assert list(first_bytes(corpus, 6)) == [b"aaaa", b"bb"]
    assert list(first_bytes(corpus)) == [b"aaaa", b"bbbb", b"cccc"]
    assert math.isnan(bits_per_byte(lambda d: [], [], 4).bpb)
