"""Documents cut into pieces: every byte and every end symbol is predicted exactly once, from the right input."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from bytelm.data.functional import count_pieces, document_piece, locate_piece
from bytelm.vocab import ByteIds

IDS = ByteIds(start=300, end=301, offset=3)


@given(st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=6), st.integers(1, 50))
def test_pieces_tile_the_documents(documents, piece):
    lengths = np.array([len(d) for d in documents], np.int64)
    ends = np.cumsum(count_pieces(lengths, piece))
    rebuilt = {i: [] for i in range(len(documents))}
    for document, start in (locate_piece(ends, i, piece) for i in range(int(ends[-1]))):
        text = documents[document]
        pair = document_piece(
            text[start : start + piece], text[start - 1] if start else None, start + piece > len(text), IDS
        )
        assert 1 <= len(pair) <= piece
        rebuilt[document].append(pair)
    for document, text in enumerate(documents):
        pairs = np.concatenate(rebuilt[document])
        ids = [b + 3 for b in text]
        assert pairs[:, 1].tolist() == [*ids, 301]
        assert pairs[:, 0].tolist() == [300, *ids]
