"""Where words begin, character by character: Unicode text segmentation (UAX #29) and what HAT's rule adds to it.

A text is an array of property codes, one per character: its Word_Break class in the low bits, flags above. Two forms of
one rule: `word_starts` for whole texts, vectorised; `Automaton` for texts that come character by character, which
decides at each character, and so without the few cases where the rule looks at what follows.

Sources: UAX #29 section 4; the rule's description in the HAT report (arXiv 2603.15953). Written from those.
"""

import functools
from collections.abc import Iterable
from importlib import resources

import numpy as np
from numpy.typing import NDArray

# Word_Break classes, by number; the last is ours: a byte that is no part of valid UTF-8.
CLASSES = (
    "Other", "CR", "LF", "Newline", "Extend", "ZWJ", "Regional_Indicator", "Format", "Katakana", "Hebrew_Letter",
    "ALetter", "Single_Quote", "Double_Quote", "MidNumLet", "MidLetter", "MidNum", "Numeric", "ExtendNumLet",
    "WSegSpace", "Invalid",
)  # fmt: skip
CLASS_BITS = 31
PUNCTUATION, LOWER, UPPER, SPACE, EMOJI = 32, 64, 128, 256, 512  # \p{P}, Ll, Lu, White_Space, Extended_Pictographic
BLANK = 1024  # U+0020 itself

_ID = {name: i for i, name in enumerate(CLASSES)}
ZWJ, FLAG, BLANK_CLASS, INVALID = _ID["ZWJ"], _ID["Regional_Indicator"], _ID["WSegSpace"], _ID["Invalid"]


def _classes(*names: str) -> NDArray[np.bool_]:
    """A table over classes: True for those named."""
    out = np.zeros(CLASS_BITS + 1, bool)
    out[[_ID[name] for name in names]] = True
    return out


_HARD = _classes("CR", "LF", "Newline", "Invalid")  # always a boundary on both sides (WB3a, WB3b)
_IGNORED = _classes("Extend", "Format", "ZWJ")  # stay with what they follow (WB4)
_LETTER = _classes("ALetter", "Hebrew_Letter")
_MID_LETTER = _classes("MidLetter", "MidNumLet", "Single_Quote")
_MID_NUMBER = _classes("MidNum", "MidNumLet", "Single_Quote")
_BETWEEN = _MID_LETTER | _MID_NUMBER | _classes("Double_Quote")
_HEBREW, _QUOTES, _NUMERIC = _classes("Hebrew_Letter"), _classes("Double_Quote"), _classes("Numeric")


def _pair_table() -> NDArray[np.bool_]:
    """Whether two neighbouring classes stay together, whatever stands around them."""
    number, katakana, joiner = _NUMERIC, _classes("Katakana"), _classes("ExtendNumLet")
    table = np.zeros((CLASS_BITS + 1,) * 2, bool)
    for before, after in (
        (_classes("CR"), _classes("LF")),  # WB3
        (_LETTER, _LETTER),  # WB5
        (_HEBREW, _classes("Single_Quote")),  # WB7a
        (number, number), (_LETTER, number), (number, _LETTER),  # WB8 to WB10
        (katakana, katakana),  # WB13
        (_LETTER | number | katakana | joiner, joiner), (joiner, _LETTER | number | katakana),  # WB13a, WB13b
    ):  # fmt: skip
        table |= before[:, None] & after[None]
    return table


_PAIR = _pair_table()
# What a mark says of a byte: a word begins at it; one does by the rule without look-ahead; and in the bits above, how
# many of these, up to this byte, a reader of it cannot know of yet: those whose first character is not whole.
START, CAUSAL_START, UNKNOWN_SHIFT = 1, 2, 2
# Kinds of pieces. A piece's kind decides whether it stays with the next one.
ONE_SPACE, WHITE, MARK, WORD = range(4)  # exactly one U+0020; other white space or an invalid byte; one \p{P}; the rest
_JOINS = np.zeros((4, 4), bool)
_JOINS[ONE_SPACE, WORD] = True
_JOINS[[ONE_SPACE, MARK, WORD], MARK] = True


@functools.cache
def properties() -> NDArray[np.uint16]:
    """The property code of every code point; lone surrogates U+DC80 to U+DCFF stand for invalid bytes."""
    with np.load(str(resources.files("bytelm.data") / "word_tables.npz")) as file:
        start, code = file["start"], file["code"]
    table = np.repeat(code, np.diff(np.append(start, 0x110000)))
    table[0xD800:0xE000] = INVALID
    table[0x20] |= BLANK
    return table


def unicode_version() -> str:
    """The version of Unicode that the tables are of."""
    with np.load(str(resources.files("bytelm.data") / "word_tables.npz")) as file:
        return str(file["version"])


def settles_nothing(code: NDArray[np.uint16]) -> NDArray[np.bool_]:
    """Characters behind which a rule that looks ahead still looks: those that go with the one before, white space."""
    return _IGNORED[code & CLASS_BITS] | ((code & SPACE) > 0)


def segment_starts(code: NDArray[np.uint16], lookahead: bool = True) -> NDArray[np.bool_]:
    """Whether a UAX #29 word segment begins at each character. Without `lookahead` a letter or digit never waits for
    what follows the mark behind it: WB6, WB7, WB7b, WB7c, WB11 and WB12 are left out."""
    kind = (code & CLASS_BITS).astype(np.uint8)
    n = len(kind)
    starts = np.ones(n, bool)
    if n < 2:
        return starts
    stays = np.zeros(n, bool)
    stays[1:] = _IGNORED[kind[1:]] & ~_HARD[kind[:-1]]
    base = np.flatnonzero(~stays)
    c = kind[base]
    joined = np.zeros(len(c), bool)
    joined[1:] = _PAIR[c[:-1], c[1:]]
    if lookahead:
        mid = np.flatnonzero(_BETWEEN[c[1:-1]]) + 1 if len(c) > 2 else np.zeros(0, np.int64)
        before, at, after = c[mid - 1], c[mid], c[mid + 1]
        through = _LETTER[before] & _MID_LETTER[at] & _LETTER[after]  # WB6, WB7
        through |= _HEBREW[before] & _QUOTES[at] & _HEBREW[after]  # WB7b, WB7c
        through |= _NUMERIC[before] & _MID_NUMBER[at] & _NUMERIC[after]  # WB11, WB12
        joined[mid[through]] = joined[mid[through] + 1] = True
    flags = c == FLAG
    if flags.any():  # WB15, WB16: regional indicators go in pairs
        index = np.arange(len(c))
        run = np.maximum.accumulate(np.where(flags, -1, index))
        joined |= flags & ((index - run) % 2 == 0)
    starts[base] = ~joined
    starts[stays] = False
    touching = (kind[1:] == BLANK_CLASS) & (kind[:-1] == BLANK_CLASS)  # WB3d
    touching |= (kind[:-1] == ZWJ) & ((code[1:] & EMOJI) > 0)  # WB3c
    starts[1:] &= ~touching
    return starts


def word_starts(code: NDArray[np.uint16], rule: str = "unicode", lookahead: bool = True) -> NDArray[np.bool_]:
    """Whether a word begins at each character.

    `unicode`: UAX #29 segments, cut behind every mark (\\p{P}) and between a small and a capital letter; then one space
    stays with the word or mark behind it, and a mark with the space, word or mark in front of it.
    `space`: words end behind white space. In both an invalid byte is a word of its own.
    """
    if not len(code):
        return np.zeros(0, bool)
    invalid = (code & CLASS_BITS) == INVALID
    if rule == "space":
        white = (code & SPACE) > 0
        starts = np.ones(len(code), bool)
        starts[1:] = (white[:-1] & ~white[1:]) | invalid[1:] | invalid[:-1]
        return starts
    starts = segment_starts(code, lookahead)
    starts[1:] |= (code[:-1] & PUNCTUATION) > 0
    starts[1:] |= ((code[:-1] & LOWER) > 0) & ((code[1:] & UPPER) > 0)
    at = np.flatnonzero(starts)
    first, alone = code[at], np.diff(np.append(at, len(code))) == 1
    white = (code & SPACE) > 0
    plain = np.flatnonzero(~white)  # a piece is white where its first other character lies behind its end
    following = np.append(plain, len(code))[np.searchsorted(plain, at)]
    all_white = following >= np.append(at[1:], len(code))
    kinds = np.where((first & PUNCTUATION > 0) & alone, MARK, WORD)
    kinds[all_white | invalid[at]] = WHITE
    kinds[(first & BLANK > 0) & alone] = ONE_SPACE
    seen = kinds if lookahead else _first_look(first)
    stays = np.zeros(len(at), bool)
    stays[1:] = _JOINS[kinds[:-1], seen[1:]]
    starts[at[stays]] = False
    return starts


def _first_look(first: NDArray[np.uint16]) -> NDArray[np.int64]:
    """The kind of a piece as its first character shows it."""
    kinds = np.where(first & PUNCTUATION > 0, MARK, WORD)
    kinds[(first & SPACE > 0) | ((first & CLASS_BITS) == INVALID)] = WHITE
    return kinds


State = tuple[int, int, int, int, int]  # class that the rules see; code of the character before; parity; kind; blank
FRESH: State = (-1, -1, 0, WHITE, 0)


def _advance(state: State, code: int, rule: str) -> tuple[State, bool]:
    """The state behind a character, and whether a word begins at it. `word_starts` without look-ahead, step by step."""
    base, before, parity, kind, blank = state
    c = code & CLASS_BITS
    if rule == "space":
        ends = before < 0 or c == INVALID or before & CLASS_BITS == INVALID
        white = bool(code & SPACE)
        return (0, code & (SPACE | CLASS_BITS), 0, 0, 0), bool(ends or (before & SPACE and not white))
    old = before & CLASS_BITS if before >= 0 else -1
    if before < 0:
        starts, ignored = True, False
    else:
        ignored = bool(_IGNORED[c] and not _HARD[old])
        together = bool(base >= 0 and _PAIR[base, c]) or (c == FLAG and base == FLAG and parity == 1)
        starts = not ignored and not together
        if (c == BLANK_CLASS and old == BLANK_CLASS) or (old == ZWJ and code & EMOJI):
            starts = False
        starts = starts or bool(before & PUNCTUATION) or bool(before & LOWER and code & UPPER)
    look = MARK if code & PUNCTUATION else WHITE if code & SPACE or c == INVALID else WORD
    begins = starts and not (before >= 0 and _JOINS[ONE_SPACE if blank else kind, look])
    if starts:
        kind, blank = look, int(bool(code & BLANK))
    elif kind == WHITE and not code & SPACE:
        kind, blank = WORD, 0
    elif blank:
        blank = 0
    if not ignored:
        base, parity = c, (parity ^ 1 if base == FLAG else 1) if c == FLAG else 0
    return (base, code, parity, kind, blank), begins


class Automaton:
    """The rule without look-ahead as a table: `next[state, c]` and `begins[state, c]` for the code class c, where
    `code_class[code point]` is that of a character. State 0 is the start of a text; class 0 is an invalid byte."""

    def __init__(self, rule: str):
        codes, self.code_class = np.unique(properties(), return_inverse=True)
        order = np.argsort(codes != INVALID, kind="stable")
        codes, self.code_class = codes[order], np.argsort(order)[self.code_class].astype(np.uint8)
        number: dict[State, int] = {FRESH: 0}
        states, rows, cuts = [FRESH], [], []
        for state in states:  # grows while it is walked
            row, cut = [], []
            for code in codes.tolist():
                new, begins = _advance(state, code, rule)
                if new not in number:
                    number[new] = len(states)
                    states.append(new)
                row.append(number[new])
                cut.append(begins)
            rows.append(row)
            cuts.append(cut)
        self.next, self.begins = np.array(rows, np.int32), np.array(cuts, bool)

    def starts(self, code_points: Iterable[int]) -> list[bool]:
        """Whether a word begins at each character of a text."""
        state, out = 0, []
        for point in code_points:
            c = self.code_class[point]
            out.append(bool(self.begins[state, c]))
            state = self.next[state, c]
        return out


@functools.cache
def automaton(rule: str) -> Automaton:
    """The automaton of a rule, made once."""
    return Automaton(rule)
