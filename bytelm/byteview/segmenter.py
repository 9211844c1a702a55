"""How a piece of text becomes tokens, and which tokens may stand side by side in one piece.

A string of tokens in one piece is canonical when the tokenizer gives it back for its own bytes. That is asked here
token by token: which tokens may follow the ones so far, with more bytes of the piece perhaps to come.
"""

import heapq
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

NEVER = np.iinfo(np.int32).max  # rank of a merge that does not exist
Tokens = Sequence[bytes | None]


class Kept:
    """What was last asked for of many masks over tokens, [v] each: as many as fit in 128 MiB."""

    def __init__(self, tokens: int):
        self._room = max((128 << 20) // max(tokens, 1), 64)
        self._masks: OrderedDict[Hashable, NDArray[np.bool_]] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], NDArray[np.bool_]]) -> NDArray[np.bool_]:
        """The mask of a key, made if it is not there."""
        if key not in self._masks:
            self._masks[key] = make()
            if len(self._masks) > self._room:
                self._masks.popitem(last=False)
        self._masks.move_to_end(key)
        return self._masks[key]


class Segmenter(ABC):
    """Cuts pieces into tokens. `tokens[id]` are a token's bytes; None for one that no text has."""

    tokens: Tokens

    @abstractmethod
    def encode(self, piece: bytes) -> list[int] | None:
        """The tokens of a piece; None where it cannot be written."""

    @abstractmethod
    def following(self, tokens: tuple[int, ...]) -> NDArray[np.bool_]:
        """Which tokens may come next in a piece that so far has these tokens (at least one), [v]."""

    @cached_property
    def beginning(self) -> NDArray[np.bool_]:
        """Which tokens a piece may begin with, when it may go on: those that are the tokens of their own bytes, [v]."""
        return np.array([text is not None and self.encode(text) == [i] for i, text in enumerate(self.tokens)])

    @property
    def reach(self) -> int:
        """How many tokens back `following` looks."""
        return 1

    def tail(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        """The last tokens, as many as `following` looks at."""
        return tokens[-self.reach :]


class BytePairs(Segmenter):
    """Byte pair encoding: of all neighbours that may be merged, those of the lowest rank first, from the left.

    (Sennrich et al. 2016.) Merges are a list in order of rank, or every pair whose bytes together are a token, ranked
    by `score` of it (tiktoken, SentencePiece).
    """

    def __init__(
        self,
        tokens: Tokens,
        merges: Sequence[tuple[int, int, int]] | None,
        rank: Sequence[int] | None = None,
        *,
        units: "Callable[[bytes], list[int] | None]",
    ):
        """`merges`: (left, right, result) in order of rank; without it `rank[id]` is that of the merge that makes a
        token. `units` gives the smallest tokens of a piece; None if one is missing."""
        self.tokens, self.units = tokens, units
        self._by_left: dict[int, dict[int, tuple[int, int]]] = {}
        if merges is not None:
            for place, (left, right, result) in enumerate(merges):
                self._by_left.setdefault(left, {}).setdefault(right, (place, result))
        else:
            assert rank is not None
            ids = {text: i for i, text in enumerate(tokens) if text is not None and rank[i] < NEVER}
            for text, i in ids.items():
                for cut in range(1, len(text)):
                    left, right = ids.get(text[:cut]), ids.get(text[cut:])
                    if left is not None and right is not None:
                        self._by_left.setdefault(left, {})[right] = (int(rank[i]), i)
        self._followers = Kept(len(tokens))

    def encode(self, piece: bytes) -> list[int] | None:
        units = self.units(piece)
        return None if units is None else [unit for unit, _ in self._merge(units)]

    def encode_with(self, piece: bytes, dropped: Callable[[], bool]) -> list[int] | None:
        """The tokens of a piece when each merge that comes up is left out where `dropped` says so, until another one
        is made (BPE-dropout; Provilkov et al. 2020)."""
        units = self.units(piece)
        return None if units is None else [unit for unit, _ in self._merge(units, dropped=dropped)]

    def _merge(
        self, units: list[int], trace: list | None = None, dropped: Callable[[], bool] | None = None
    ) -> list[tuple[int, int]]:
        """Merges until nothing is left to merge: (token, number of its node). `trace` receives (left node, right node,
        rank) of each merge; the nodes below len(units) are the units."""
        n = len(units)
        ids, node = list(units), list(range(n))
        after, before = list(range(1, n + 1)), list(range(-1, n - 1))
        heap: list[tuple[int, int, int, int]] = []

        def offer(i: int) -> None:
            j = after[i]
            if j < n:
                found = self._by_left.get(ids[i], {}).get(ids[j])
                if found:
                    heapq.heappush(heap, (found[0], i, ids[i], ids[j]))

        for i in range(n - 1):
            offer(i)
        alive, made = [True] * n, n
        left_out: list[tuple[int, int, int, int]] = []
        while heap:
            rank, i, left, right = heapq.heappop(heap)
            j = after[i] if alive[i] else n
            if j >= n or ids[i] != left or ids[j] != right:
                continue
            if dropped is not None:
                if dropped():
                    left_out.append((rank, i, left, right))
                    continue
                for one in left_out:
                    heapq.heappush(heap, one)
                left_out.clear()
            if trace is not None:
                trace.append((node[i], node[j], rank))
            ids[i], node[i], made = self._by_left[left][right][1], made, made + 1
            alive[j], after[i] = False, after[j]
            if after[j] < n:
                before[after[j]] = i
            offer(i)
            if before[i] >= 0:
                offer(before[i])
        return [(ids[i], node[i]) for i in range(n) if alive[i]]

    @property
    def _merging(self) -> NDArray[np.bool_]:
        """Tokens that merges make, or may use."""
        return self.beginning

    @cached_property
    def _spines(self) -> tuple[list[list[tuple[int, int]]], NDArray[np.int32], NDArray[np.int32], NDArray[np.bool_]]:
        """Of each token: the right edge of its merge tree, from its last unit up, as (token, rank of the merge it goes
        into); the left edges of all as two arrays [v, depth]; and whether ranks rise from every node to the one above.
        Tokens that are not the tokens of their own bytes have no edges."""
        v = len(self.tokens)
        right: list[list[tuple[int, int]]] = [[] for _ in range(v)]
        left: list[list[tuple[int, int]]] = [[] for _ in range(v)]
        rising = np.ones(v, bool)
        for i in np.flatnonzero(self._merging):
            units = self.units(self.tokens[int(i)] or b"") or []
            trace: list[tuple[int, int, int]] = []
            self._merge(units, trace)
            parts: list[tuple[int, int, int]] = [(-1, -1, -1)] * len(units) + trace
            names = [*units]
            for a, b, _ in trace:
                names.append(self._by_left[names[a]][names[b]][1])
            for a, b, rank in trace:
                rising[i] &= rank > max(parts[a][2], parts[b][2])
            for edge, side in ((left[i], 0), (right[i], 1)):
                node, above = len(parts) - 1, NEVER
                while node >= 0:
                    edge.append((names[node], above))
                    above = parts[node][2]
                    node = parts[node][side]
                edge.reverse()
        depth = max((len(edge) for edge in left), default=0) or 1
        ids, ups = np.zeros((v, depth), np.int32), np.full((v, depth), NEVER, np.int32)
        for i, edge in enumerate(left):
            for j, (token, up) in enumerate(edge):
                ids[i, j], ups[i, j] = token, up
        return right, ids, ups, rising

    def _row(self, left: int) -> NDArray[np.int32]:
        """Rank of the merge of `left` with each token."""
        row = np.full(len(self.tokens), NEVER, np.int32)
        found = self._by_left.get(left)
        if found:
            row[list(found)] = [rank for rank, _ in found.values()]
        return row

    def following(self, tokens: tuple[int, ...]) -> NDArray[np.bool_]:
        return self._followers.get(tokens[-1], lambda: self._pairs(tokens[-1]))

    def _pairs(self, last: int) -> NDArray[np.bool_]:
        """Which tokens may stand behind `last`: while both grow, merge by merge in order of rank, no merge across the
        seam comes first (of equal ranks the one further left)."""
        v = len(self.tokens)
        right, ids, ups, rising = self._spines
        edge = right[last]
        valid = self._merging.copy()
        if not edge:
            return np.zeros(v, bool)
        rows = np.stack([self._row(token) for token, _ in edge])
        up_left = np.array([up for _, up in edge], np.int32)
        who = np.flatnonzero(valid)
        i, j = np.zeros(len(who), np.int64), np.zeros(len(who), np.int64)
        for _ in range(len(edge) + ids.shape[1]):
            seam, rx, ry = rows[i, ids[who, j]], up_left[i], ups[who, j]
            broken = (seam < rx) & (seam <= ry) & (seam < NEVER)
            valid[who[broken]] = False
            go = ~broken & ((rx < NEVER) | (ry < NEVER))
            who, i, j, rx, ry = who[go], i[go], j[go], rx[go], ry[go]
            if not len(who):
                break
            i, j = i + (rx <= ry), j + (rx > ry)
        ours = self.tokens[last] or b""
        for t in np.flatnonzero(self._merging & ~(rising & rising[last])):
            # Merges that do not come in the order of their ranks: only a real run tells.
            valid[t] = self.encode(ours + (self.tokens[int(t)] or b"")) == [last, t]
        return valid


class Fallback(Segmenter):
    """Characters without a token are written as tokens of their bytes."""

    def set_fallback(self, fallback: Sequence[bool]) -> None:
        """`fallback[id]`: whether it is a byte of a character that has no token. `tokens` must be set."""
        self._bytes = np.array(fallback, bool)
        self._characters: dict[bytes, int] = {}
        for i, text in enumerate(self.tokens):
            if text and not fallback[i] and is_character(text):
                self._characters.setdefault(text, i)
        self._byte: list[int | None] = [None] * 256
        for i in np.flatnonzero(self._bytes):
            self._byte[(self.tokens[int(i)] or b"\0")[0]] = int(i)

    def spell(self, character: bytes) -> list[int] | None:
        """The tokens of the bytes of a character; None where one is missing."""
        ids = [self._byte[b] for b in character]
        return None if None in ids else ids  # type: ignore[return-value]

    @cached_property
    def beginning(self) -> NDArray[np.bool_]:
        out = np.zeros(len(self.tokens), bool)
        for i, text in enumerate(self.tokens):
            if text:
                out[i] = self._open(text) if self._bytes[i] else self.encode(text) == [i]
        return out

    def _open(self, partial: bytes) -> bool:
        """Whether some character without a token starts with these bytes."""
        if is_character(partial):
            return partial not in self._characters
        known = self._openings.get(partial)
        return known is not None and known > 0

    @cached_property
    def _openings(self) -> dict[bytes, int]:
        """Unfinished characters, and how many of the characters that they begin have no token."""
        out: dict[bytes, int] = {}
        for point in [*range(0x80, 0xD800), *range(0xE000, 0x110000)]:
            data = chr(point).encode()
            for n in range(1, len(data)):
                out[data[:n]] = out.get(data[:n], 0) + 1
        for data in self._characters:
            for n in range(1, len(data)):
                out[data[:n]] -= 1
        return out

    def unfinished(self, tokens: tuple[int, ...]) -> bytes:
        """The bytes of a character that some tokens of bytes end in the midst of."""
        partial = b""
        for i in reversed(tokens):
            if not self._bytes[i]:
                break
            partial = (self.tokens[i] or b"") + partial
            if partial[0] & 0xC0 != 0x80:
                break
        return b"" if is_character(partial) else partial

    def finishing(self, partial: bytes) -> NDArray[np.bool_]:
        """The tokens of bytes that may stand behind those of an unfinished character, [v]."""
        out = np.zeros(len(self.tokens), bool)
        for i in np.flatnonzero(self._bytes):
            out[i] = self._open(partial + (self.tokens[int(i)] or b""))
        return out


class CharacterPairs(Fallback, BytePairs):
    """Byte pair encoding over characters, with tokens of single bytes for the characters that have no token."""

    def __init__(
        self,
        tokens: Tokens,
        merges: Sequence[tuple[int, int, int]] | None,
        rank: Sequence[int] | None = None,
        *,
        fallback: Sequence[bool],
    ):
        """`fallback[id]`: whether it is a byte of a character that has no token."""
        self.tokens = tokens
        self.set_fallback(fallback)
        super().__init__(tokens, merges, rank, units=self._units)

    def _units(self, piece: bytes) -> list[int] | None:
        out: list[int] = []
        for char in piece.decode():
            data = char.encode()
            ids = [self._characters[data]] if data in self._characters else self.spell(data)
            if ids is None:
                return None
            out += ids
        return out

    @cached_property
    def _merging(self) -> NDArray[np.bool_]:
        return self.beginning & ~self._bytes

    @property
    def reach(self) -> int:
        return 4  # bytes of a character

    def following(self, tokens: tuple[int, ...]) -> NDArray[np.bool_]:
        partial = self.unfinished(tokens)
        if partial:
            return self.finishing(partial)
        if self._bytes[tokens[-1]]:
            return self.beginning
        return super().following(tokens) | (self.beginning & self._bytes)


def is_character(data: bytes) -> bool:
    try:
        return len(data.decode()) == 1
    except UnicodeDecodeError:
        return False


class Longest(Segmenter):
    """The longest token from the left, again and again (maximum prefix tokenization)."""

    def __init__(self, tokens: Tokens):
        self.tokens = tokens
        self._ids = {text: i for i, text in enumerate(tokens) if text}
        self._longest = max(map(len, self._ids), default=0)
        self._beginnings = {text[:n] for text in self._ids for n in range(1, len(text) + 1)}

    def encode(self, piece: bytes) -> list[int] | None:
        out, place = [], 0
        while place < len(piece):
            ends = range(min(place + self._longest, len(piece)), place, -1)
            end = next((e for e in ends if piece[place:e] in self._ids), None)
            if end is None:
                return None
            out.append(self._ids[piece[place:end]])
            place = end
        return out

    @property
    def reach(self) -> int:
        return self._longest

    def following(self, tokens: tuple[int, ...]) -> NDArray[np.bool_]:
        """Not those with which a token further back, or the last one, would have been longer."""
        heads, text = [], b""
        for i in reversed(tokens):
            text = (self.tokens[i] or b"") + text
            if text in self._beginnings:
                heads.append(text)

        def longer(data: bytes) -> bool:
            return any(head + data[:n] in self._ids for head in heads for n in range(1, len(data) + 1))

        return np.array([data is not None and not longer(data) for data in self.tokens])
