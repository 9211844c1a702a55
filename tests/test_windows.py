"""Which inputs a byte is predicted from: properties for every length, context and window."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from bytelm.vocab import FLAT_IDS
from bytelm.windows import WORTH_SHARING, alike, document_windows, scoring_windows, visible_from


@given(st.integers(0, 60), st.integers(0, 200), st.integers(1, 40))
def test_each_position_is_scored_once_in_order(context, text, window):
    total = context + text
    scored = []
    for first, end, begin in scoring_windows(context, total, window):
        assert 0 <= first <= begin < end <= total and end - first <= window
        scored += range(begin, end)
    assert scored == list(range(context, total))


@given(st.integers(1, 300), st.integers(1, 40))
def test_without_context_it_is_the_rolling_rule(total, window):
    """lm-eval: disjoint windows; the last slid back to be full where the text is long enough."""
    windows = scoring_windows(0, total, window)
    assert [begin for _, _, begin in windows] == list(range(0, total, window))
    assert all(end - first == min(window, total) for first, end, _ in windows)


def test_a_context_keeps_at_least_half_a_window_where_it_can():
    first, end, begin = scoring_windows(100, 190, 20)[0]
    assert (first, end, begin) == (90, 110, 100)
    assert scoring_windows(100, 105, 20) == [(85, 105, 100)]
    assert scoring_windows(3, 15, 20) == [(0, 15, 3)]


@given(st.integers(0, 400), st.integers(1, 50))
def test_visible_text_fits_and_moves_on_in_steps(length, window):
    first = visible_from(length, window)
    inputs = length - first + (1 if first == 0 else 0)
    assert 0 <= inputs <= window
    assert inputs >= 1 or window == 1
    assert visible_from(length + 1, window) >= first
    if length + 1 <= window:
        assert first == 0


def test_document_windows_start_with_the_start_symbol():
    rows = list(document_windows(b"abcdefg", FLAT_IDS, 3))
    assert rows[0][0].tolist() == [256, 97, 98]
    assert rows[1][0].tolist() == [99, 100, 101]
    assert rows[2][0].tolist() == [100, 101, 102] and rows[2][1].tolist() == [101, 102, 103] and rows[2][2] == 2
    assert np.concatenate([y[s:] for _, y, s in rows]).astype(np.uint8).tobytes() == b"abcdefg"


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 60), st.binary(max_size=3)), max_size=8))
def test_contexts_in_a_row_that_begin_alike(parts):
    """Every pair once and in order; what a run shares is what its contexts have in common, a half of each or more."""
    stems = [b"x" * 40, b"x" * 30 + b"y" * 30, b"z" * 50]
    pairs = [(stems[i][:n], text) for i, n, text in parts]
    runs = alike(pairs)
    assert [pair for _, run in runs for pair in run] == pairs
    for shared, run in runs:
        assert all(context.startswith(shared) for context, _ in run)
        if len(run) > 1:
            assert len(shared) >= max(WORTH_SHARING, *(len(context) // 2 for context, _ in run))
            assert len({context[len(shared) : len(shared) + 1] for context, _ in run}) > 1 or shared in dict(run)
    same = [(b"one context for all of them", bytes([n])) for n in range(3)]
    assert alike(same) == [(same[0][0], same)] and alike([]) == []
