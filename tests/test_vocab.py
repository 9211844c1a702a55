"""UTF-8 boundaries, against Python's own decoder."""

import codecs

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bytelm.vocab import FLAT_IDS, complete_prefix, encode


@given(st.binary(max_size=12) | st.text(max_size=6).map(lambda s: s.encode()))
def test_complete_prefix_agrees_with_the_incremental_decoder(data):
    """Python's incremental decoder holds back exactly the bytes that may still become a character, and the start of a
    surrogate (ED A0 to ED BF), which never becomes one: that is for its error handler surrogatepass."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    decoder.decode(data)
    held = decoder.getstate()[0]
    if len(held) == 2 and held[0] == 0xED and held[1] >= 0xA0:
        held = b""
    assert len(data) - complete_prefix(data) == len(held)


def test_invalid_bytes_are_not_held_back():
    assert complete_prefix(b"\xff\xfe\x80\x80") == 4
    assert complete_prefix(b"ab\xf0\x9f\x98") == 2
    assert complete_prefix("ab😀".encode()) == 6


def test_encode():
    assert encode("é") == b"\xc3\xa9" and encode(b"\xff") == b"\xff"
    with pytest.raises(ValueError, match="character 1 is a lone surrogate"):
        encode("a\ud800")
    assert FLAT_IDS.symbol_ids().tolist() == list(range(257))
