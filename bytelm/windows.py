"""Which inputs a byte is predicted from when a text is longer than a model's window: scoring and going on."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from bytelm.vocab import ByteIds

WORTH_SHARING = 16  # bytes that contexts begin with together
DEFAULT_WINDOW = 8192


def scoring_windows(context: int, total: int, window: int) -> list[tuple[int, int, int]]:
    """Windows that score positions context .. total - 1 once each: (first input, end, first scored) position.

    Position p is the prediction of byte p from the inputs first .. p. Without context this is lm-eval's rolling rule:
    disjoint windows, the last one slid back to be full, scoring only what the others have not. What does not fit beside
    a context keeps at most half a window of it.
    """
    if total <= context:
        return []
    if total - context > window // 2:
        first = max(0, context - window // 2) if total > window else 0
    else:
        first = max(0, total - window)
    out = [(first, min(first + window, total), context)]
    for scored in range(first + window, total, window):
        end = min(scored + window, total)
        out.append((max(0, end - window), end, scored))
    return out


def visible_from(length: int, window: int) -> int:
    """First byte of a text of `length` bytes that a model with `window` positions sees when it goes on with the text.

    The whole text and the start symbol where they fit; else the text's end, dropped in steps of half a window. Depends
    on the length only, so that continuing a text byte by byte and asking again from its new end see the same.
    """
    if length + 1 <= window:
        return 0
    half = max(window // 2, 1)
    return -(-(length - window) // half) * half if length > window else half


def document_windows(
    text: bytes, ids: ByteIds, window: int, context: int = 0
) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int32], int]]:
    """(inputs, targets, first scored) of each window that scores text[context:]; inputs and targets are [<= window]."""
    return row_windows(np.frombuffer(text, np.uint8).astype(np.int32) + ids.offset, ids.start, window, context)


def row_windows(
    targets: NDArray[np.int32], start: int, window: int, context: int = 0
) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int32], int]]:
    """The same of a text's ids, behind the symbol `start`."""
    inputs = np.concatenate([[np.int32(start)], targets])[:-1].astype(np.int32)
    for first, end, scored in scoring_windows(context, len(targets), window):
        yield inputs[first:end], targets[first:end], scored - first


def overlapping_windows(text: bytes, ids: ByteIds, window: int) -> Iterator[tuple[NDArray[np.int32], int, int]]:
    """Windows for reading a decision at every byte of a text: (inputs, byte at input 0, first byte to read).

    The first window begins with the start symbol (which is byte -1); later ones overlap the one before by half, and
    only what has at least half a window in front of it is read from them.
    """
    body = np.frombuffer(text, np.uint8).astype(np.int32) + ids.offset
    inputs = np.concatenate([[np.int32(ids.start)], body]).astype(np.int32)
    yield inputs[:window], -1, 0
    half = max(window // 2, 1)
    for begin in range(half, len(inputs) - window + half, half):
        yield inputs[begin : begin + window], begin - 1, begin - 1 + window - half


def alike(pairs: Sequence[tuple[bytes, bytes]]) -> list[tuple[bytes, list[tuple[bytes, bytes]]]]:
    """Runs of (context, text) whose contexts have at least a half in common, and what each run has."""
    runs: list[tuple[bytes, list[tuple[bytes, bytes]]]] = []
    longest = 0  # context of the last run
    for context, text in pairs:
        if runs:
            shared, run = runs[-1]
            same = next((n for n, (a, b) in enumerate(zip(shared, context)) if a != b), min(len(shared), len(context)))
            if same >= max(WORTH_SHARING, max(longest, len(context)) // 2):
                run.append((context, text))
                runs[-1], longest = (shared[:same], run), max(longest, len(context))
                continue
        runs.append((context, [(context, text)]))
        longest = len(context)
    return runs


def end_of(text: bytes, room: int) -> bytes:
    """The end of a text that fits, from the beginning of a character."""
    end = text[max(len(text) - max(room, 0), 0) :]
    return end[next((n for n, byte in enumerate(end[:4]) if byte & 0xC0 != 0x80), 0) :]
