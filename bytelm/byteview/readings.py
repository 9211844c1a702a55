"""Which tokens may stand where, given that the tokenizer cuts text into pieces by looking ahead.

A string of tokens is a canonical prefix when some text begins with it once it is tokenized. Where the pre-tokenizer
cuts depends on what comes next ("\\n\\n" is one piece at the end of a text and two in front of a letter), so what is
kept of a string of tokens is a set of readings: a stretch of characters since the last place that is a cut whatever
follows, and the token edges in it that are cuts in some readings. Strings of tokens that end in the same state allow
the same.

Continuations are tried: short ones of every class of characters. That is complete for patterns that look ahead two
characters, one contraction, or a number of up to three digits.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from itertools import product

import numpy as np
from numpy.typing import NDArray

from bytelm.byteview.pretokenizer import COUNTED_RUN, LONG_RUN, Pretokenizer
from bytelm.vocab import complete_prefix

CONTRACTIONS = ("s", "t", "m", "d", "re", "ve", "ll")


@dataclasses.dataclass(frozen=True)
class State:
    """What counts of the tokens so far."""

    classes: tuple[int, ...] = ()  # of the whole characters since the last certain cut
    pending: bytes = b""  # an unfinished character behind them
    edges: tuple[tuple[int, bool], ...] = ()  # token edges between them: (place, whether the tokens may stand together)
    barred: tuple[tuple[int, int], ...] = ()  # stretches that must not be pieces


@dataclasses.dataclass(frozen=True)
class Allowed:
    """For each kind of token: whether some reading has a cut, or none, in front of it, and has one, or none, right
    behind it. Four masks over kinds, index [cut in front][cut behind]."""

    exists: NDArray[np.bool_]  # [2, 2, kinds]
    end: bool  # whether the text may end here


Kind = tuple[tuple[int, ...], bytes]  # classes of a token's whole characters, and the unfinished one behind them


class Readings:
    """The states of one tokenizer, and its tokens by kind."""

    def __init__(self, pretokenizer: Pretokenizer, tokens: Sequence[bytes | None]):
        self.pretokenizer, self.tokens = pretokenizer, tokens
        self.classes = pretokenizer.classes
        self._kinds: dict[Kind, int] = {}
        self._list: list[Kind] = []
        self._tables: dict[tuple[bytes, tuple[int, ...]], NDArray[np.int32]] = {}
        self._allowed: dict[State, Allowed] = {}
        self._steps: dict[tuple, tuple[State, tuple[int, ...]] | None] = {}
        self._reachable = lru_cache(1 << 14)(self.classes.reachable)
        self._cuts = lru_cache(1 << 18)(lambda classes: self.pretokenizer.cuts(self.classes.text(classes)))

    # Tokens by kind.

    def kind(self, token: bytes, pending: bytes, before: tuple[int, ...]) -> Kind | None:
        """What a token adds behind an unfinished character; None where the bytes are no text."""
        data = pending + token
        whole = complete_prefix(data)
        try:
            text = data[:whole].decode()
        except UnicodeDecodeError:
            return None
        return self.shorten(self.classes.of(text, before)), data[whole:]

    def kinds(self, state: State) -> NDArray[np.int32]:
        """Number of each token's kind behind a state, [v]; -1: the bytes would be no text."""
        key = (state.pending, self._before(state))
        table = self._tables.get(key)
        if table is None:
            table = np.full(len(self.tokens), -1, np.int32)
            for i, token in enumerate(self.tokens):
                if not token or (state.pending and not 0x80 <= token[0] < 0xC0):
                    continue
                kind = self.kind(token, *key)
                if kind is not None:
                    if kind not in self._kinds:
                        self._kinds[kind] = len(self._list)
                        self._list.append(kind)
                    table[i] = self._kinds[kind]
            self._tables[key] = table
        return table

    def _before(self, state: State) -> tuple[int, ...]:
        last = state.classes[-2:]
        if not self.classes.known:
            return ()
        return last if self.classes.apostrophe in last else ()

    def shorten(self, classes: tuple[int, ...], fixed: Sequence[int] = ()) -> tuple[int, ...]:
        """Without the middle of long runs of one class, between places that stay what they are."""
        return tuple(c for c, stays in zip(classes, self._stays(classes, fixed)) if stays)

    def _stays(self, classes: tuple[int, ...], fixed: Sequence[int]) -> list[bool]:
        out, start, marks = [], 0, {0, len(classes), *fixed}
        for i in range(1, len(classes) + 1):
            if i == len(classes) or classes[i] != classes[start] or i in marks:
                run = i - start
                if self.classes.counted[classes[start]] or not self.classes.known:
                    keep = run if run < 2 * COUNTED_RUN else COUNTED_RUN + run % COUNTED_RUN
                else:
                    keep = min(run, LONG_RUN)
                out += [True] * keep + [False] * (run - keep)
                start = i
        return out

    # Continuations.

    def probes(self, classes: tuple[int, ...], pending: bytes) -> Iterator[tuple[int, ...]]:
        """Continuations to try behind some characters."""
        if pending:
            for first in sorted(self._reachable(pending)):
                yield from self._telling[first]
            return
        yield ()
        yield from self._telling[-1]
        if self.classes.apostrophe in classes[-2:]:
            for c in CONTRACTIONS:
                for part in {c, c[1:]} - {""}:
                    yield self.classes.of(part, classes[-2:])

    @cached_property
    def _telling(self) -> dict[int, list[tuple[int, ...]]]:
        """Continuations by their first class, and of any class under -1: of those that cut every short text alike, one.

        The others would tell nothing: what is tried is every string of up to two classes, contractions, and numbers.
        """
        coarse, apostrophe = self.classes.coarse, self.classes.apostrophe
        words = [self.classes.of("'" + c) for c in CONTRACTIONS] if apostrophe >= 0 else []
        counted = [a for a in coarse if self.classes.counted[a]]
        probes = [p for n in (1, 2) for p in product(coarse, repeat=n)] + words
        probes += [(a,) * n + (b,) for a in counted for b in coarse for n in (2, 3)]
        short = 3 if len(coarse) <= 8 else 2
        texts = [t for n in range(1, short + 1) for t in product(coarse, repeat=n)]
        texts += [(a,) * n for a in coarse for n in range(3, LONG_RUN + 1)] + [w[:n] for w in words for n in (2, 3)]
        texts += [(a, *w[:n]) for w in words for a in coarse for n in (1, 2)]
        texts += [(b,) * m + (a,) * n for a in counted for b in coarse for n in range(1, 7) for m in (0, 1)]
        seen: dict[int, dict[tuple, tuple[int, ...]]] = {a: {} for a in (*coarse, -1)}
        for probe in probes:
            how = tuple(tuple(c for c in self.pretokenizer.cuts(self.classes.text(t + probe)) if c <= len(t))
                        for t in texts)  # fmt: skip
            seen[probe[0]].setdefault(how, probe)
            seen[-1].setdefault(how, probe)
        return {a: list(found.values()) for a, found in seen.items()}

    def _all_cuts(self, classes: tuple[int, ...], pending: bytes) -> Iterator[frozenset[int]]:
        """Cuts up to the end of `classes` for every continuation; a cut at the very end counts."""
        n = len(classes)
        for probe in self.probes(classes, pending):
            cuts = frozenset(c for c in self._cuts(classes + probe) if c <= n)
            yield cuts if probe else cuts | {n}

    def _fits(self, cuts: frozenset[int], state: State, extra: set[int]) -> bool:
        """Whether the tokens of a state stand in pieces that are cut so; `extra` are more places that may be cut."""
        edges = dict(state.edges)
        return (
            all(c in edges or c in extra for c in cuts)
            and all(joins or place in cuts for place, joins in edges.items())
            and not self._is_barred(cuts, state.barred)
        )

    @staticmethod
    def _is_barred(cuts: frozenset[int], barred: tuple[tuple[int, int], ...]) -> bool:
        return any((a == 0 or a in cuts) and b in cuts and not any(a < c < b for c in cuts) for a, b in barred)

    # What a state allows.

    def allowed(self, state: State) -> Allowed:
        """What kinds of tokens may follow."""
        known = self._allowed.get(state)
        table = self.kinds(state)
        if known is not None and known.exists.shape[2] > table.max(initial=-1):
            return known
        exists = np.zeros((2, 2, len(self._list)), bool)
        for number in np.unique(table[table >= 0]):
            classes, pending = self._list[number]
            self._try(state, classes, pending, exists[:, :, number])
        n = len(state.classes)
        end = not state.pending and self._fits(frozenset(self._cuts(state.classes)) | {n}, state, {0, n})
        self._allowed[state] = Allowed(exists, end)
        return self._allowed[state]

    def _try(self, state: State, classes: tuple[int, ...], pending: bytes, out: NDArray[np.bool_]) -> None:
        here, whole = len(state.classes), state.classes + classes
        extra = (set() if state.pending else {here}) | (set() if pending else {len(whole)})
        for cuts in self._all_cuts(whole, pending):
            if self._fits(cuts, state, extra):
                in_front = not state.pending and (here in cuts or here == 0)
                behind = not pending and len(whole) in cuts and len(whole) > here
                out[int(in_front), int(behind)] = True
                if out.all():
                    return

    def step(
        self, state: State, token: bytes, joins: bool, barred: Sequence[int] = ()
    ) -> tuple[State, tuple[int, ...]] | None:
        """(the state behind one more token, which places are still known), or None where no reading is left.

        `joins`: whether it may stand in one piece with the token before it. `barred`: places from which on the
        characters up to its end must not be a piece. Places are numbered: 0 is the last certain cut, 1 .. the edges,
        then the edge in front of the token and the one behind it.
        """
        kind = self.kind(token, state.pending, self._before(state))
        if kind is None:
            return None
        key = (state, kind, joins, tuple(barred))
        if key not in self._steps:
            self._steps[key] = self._step(state, *kind, joins, barred)
        return self._steps[key]

    def _step(self, state, classes, pending, joins, barred):
        here = len(state.classes)
        whole = state.classes + classes
        edges = state.edges
        places = [0, *(place for place, _ in edges), here, len(whole)]
        if state.pending:
            if not joins:
                return None
        elif here:
            edges = (*edges, (here, joins))
        bars = (*state.barred, *((places[i], len(whole)) for i in barred))
        wider, extra = State(whole, pending, edges, bars), set() if pending else {len(whole)}
        every = set(self._all_cuts(whole, pending))
        found = [cuts for cuts in every if self._fits(cuts, wider, extra)]
        if not found:
            return None
        # Certain is what holds for every continuation, also for those that these tokens rule out: what follows is cut
        # as if the text began there.
        certain = max(frozenset.intersection(*every), default=0)
        inside = frozenset().union(*found)
        kept = tuple((p, j) for p, j in edges if p > certain and p in inside)
        bars = [(a, b) for a, b in bars if a >= certain and (b == len(whole) or b in dict(kept))]
        fixed = [p for p, _ in kept] + [place for bar in bars for place in bar]
        stays = self._stays(whole[certain:], [p - certain for p in fixed])
        moved = np.concatenate([[0], np.cumsum(stays)])
        new = State(
            tuple(c for c, s in zip(whole[certain:], stays) if s),
            pending,
            tuple((int(moved[p - certain]), j) for p, j in kept),
            tuple((int(moved[a - certain]), int(moved[b - certain])) for a, b in bars),
        )
        known = [certain, *(p for p, _ in kept)]
        return new, tuple(places.index(p) for p in known)
