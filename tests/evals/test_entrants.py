"""The ways to ask a model: an encoder-decoder goes on with a text through its first sentinel."""

import numpy as np
import pytest

from bytelm.evals.choices import Question, ask
from bytelm.evals.chunk_quality import unit_starts
from bytelm.evals.entrants import Continuing, entrants
from bytelm.evals.suites import Material, units
from bytelm.lm import NetworkLM
from bytelm.seq2seq_lm import Seq2SeqLM
from models import uniform
from tiny import flat, network, t5


@pytest.fixture(scope="module")
def lm():
    config = t5("none")
    return Seq2SeqLM(config, network(config, scale=2.0)[1], 32)


def test_an_encoder_decoder_continues(lm):
    continuing = Continuing(lm)
    texts, contexts = [b"the end", b"x", b"yz"], [b"This is ", b"", b"a"]
    found = continuing.score_batch(texts, contexts)
    for text, context, score in zip(texts, contexts, found):
        alone = lm.score(text, b"\xff", input=context + b"\xff")
        assert score.total == pytest.approx(alone.total, abs=1e-4) and score.greedy.shape == (len(text),)
    long = b"0123456789" * 9  # its end is read, with room for the sentinel and the end symbol
    np.testing.assert_allclose(continuing.score(b"z", long).total, continuing.score(b"z", long[-30:]).total)
    np.testing.assert_allclose(continuing.logprobs(b"abc"), lm.logprobs(b"\xff", input=b"abc\xff"), atol=1e-5)
    written = continuing.generate_batch([b"abc", b"This is "], 8, temperature=0)
    assert written[0] == lm.generate(b"\xff", 8, input=b"abc\xff", temperature=0, stop=[b"\xfe"])
    right = ask(continuing, [Question(b"a", (b"bc", b"de"), 0)]).nats[0]
    assert right[0] == pytest.approx(continuing.score(b"bc", b"a").total, abs=1e-4)


def test_long_texts_are_cut_in_pieces_of_the_trained_length():
    """An encoder's work grows with the square of its input; what it keeps is looked at piece by piece."""
    config = t5("learned")
    lm = Seq2SeqLM(config, network(config, scale=2.0)[1], 32)
    text = b"The owls of the old tower slept under it." * 3
    (starts,) = unit_starts(Continuing(lm), text)
    pieces = [chunk + at for at in range(0, len(text), 32) for chunk in lm.chunks(text[at : at + 32])]
    np.testing.assert_array_equal(starts, [s for piece in pieces for s in piece if s > 0])
    assert len(starts) and (np.diff(starts) > 0).all() and starts[-1] < len(text)
    assert unit_starts(Continuing(lm), b"")[:1] in ([], [pytest.approx([])])


def test_what_is_asked_of_whom(lm):
    (byte,), (other,) = entrants("e", lm), entrants("u", uniform())
    assert not byte.bits and other.bits
    config = flat()
    (network_,) = entrants("n", NetworkLM(config, network(config)[1], 32))
    assert network_.bits
    variants = units(["variants"], Material(), False)
    assert [u.fits(byte) for u in variants] == [True]


def test_scores_say_what_is_greedy():
    config = flat()
    lm = NetworkLM(config, network(config, scale=3.0)[1], 32)
    text = lm.generate(b"ab", 12, temperature=0)
    assert lm.score(text, b"ab").greedy.all()
    changed = bytes([text[0] ^ 1]) + text[1:]
    assert not lm.score(changed, b"ab").greedy[0]
    assert lm.score(b"").greedy.shape == (0,)
