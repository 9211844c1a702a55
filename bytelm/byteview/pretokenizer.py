"""How tokenizers cut text into pieces before they look for tokens, and which classes of characters they tell apart.

A pre-tokenizer is a chain of steps; each cuts the pieces that the one before it left. No token spans two pieces. All
that a step can see of a character is which of the sets in its pattern it belongs to: characters in the same sets form a
class, so that what is learned about one text holds for every text of the same classes.
"""

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise

import numpy as np
import regex
from numpy.typing import NDArray

from bytelm.config import ConfigError

# How the usual patterns spell English contractions. Their letters are told apart behind an apostrophe only.
_CONTRACTIONS = regex.compile(
    r"""'s\|'t\|'re\|'ve\|'m\|'ll\|'d
      | '\(\?i:\[[a-z]+\](?:\|[a-z]{2})*\)
      | \(\?i:'s\|'t\|'re\|'ve\|'m\|'ll\|'d\)
      | '\(\?:\[[a-z]+\](?:\|[a-z]{2})*\)""",
    regex.VERBOSE,
)
_ATOMS = regex.compile(
    r"""(?P<set>\[\^?\]?(?:\[:\^?\w+:\]|\\[pP]\{[^}]*\}|\\x\{[^}]*\}|\\.|[^\]\\])*\])
      | (?P<escape>\\[pP]\{[^}]*\}|\\[pP]\w|\\u[0-9a-fA-F]{4}|\\x[0-9a-fA-F]{2}|\\.)
      | (?P<group>\(\?(?:[a-zA-Z-]*[:)]|<?[=!]|>))
      | (?P<count>\{\d*,?\d*\}[+?]?)
      | (?P<other>[|()*+?.^$])
      | (?P<literal>.)""",
    regex.VERBOSE | regex.DOTALL,
)
_SETS = regex.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]", regex.DOTALL)
_LOOKS_BACK = regex.compile(r"\(\?<[=!]|(?<!\\)\^|\\[bBAG]")
LONG_RUN = 3  # as many characters of one class in a row as any pattern without counts can tell from more
COUNTED_RUN = 12  # runs of classes that stand before a {m,n} may be shortened by multiples of this (2, 3, 4, 6, 12)


@dataclasses.dataclass(frozen=True)
class Split:
    """One step: where a match of the pattern begins and ends, a piece ends ("isolated"); only where it ends, so that a
    match belongs to what stands before it ("previous"); only where it begins ("next"); or as isolated, with matches in
    a row as one ("contiguous"). Raises ConfigError for a behavior that loses text, and on use for a broken pattern."""

    pattern: str
    behavior: str = "isolated"

    def __post_init__(self):
        if self.behavior not in ("isolated", "previous", "next", "contiguous"):
            raise ConfigError(f"pre-tokenizer: a split of behavior {self.behavior!r} loses text or is not known")

    @cached_property
    def compiled(self) -> regex.Pattern:
        try:
            return regex.compile(self.pattern, regex.V1)
        except regex.error as e:
            raise ConfigError(f"pre-tokenizer: the pattern {self.pattern!r} cannot be read ({e})") from None

    def cut(self, text: str) -> list[int]:
        """Places inside the text where a piece ends."""
        found = [m.span() for m in self.compiled.finditer(text) if m.end() > m.start()]
        edges: set[int] = set()
        for n, (a, b) in enumerate(found):
            if self.behavior in ("isolated", "next") or (
                self.behavior == "contiguous" and not (n and found[n - 1][1] == a)
            ):
                edges.add(a)
            if self.behavior in ("isolated", "previous") or (
                self.behavior == "contiguous" and not (n + 1 < len(found) and found[n + 1][0] == b)
            ):
                edges.add(b)
        return sorted(edges - {0, len(text)})


@dataclasses.dataclass(frozen=True)
class Pretokenizer:
    """A chain of steps; none: a text is one piece."""

    steps: tuple[Split, ...] = ()

    def cuts(self, text: str) -> list[int]:
        """Places inside the text where a piece ends, ascending."""
        edges = [0, len(text)]
        for step in self.steps:
            inner = [a + cut for a, b in pairwise(edges) for cut in step.cut(text[a:b])]
            edges = sorted({*edges, *inner})
        return edges[1:-1]

    def pieces(self, text: str) -> list[str]:
        """The text, cut."""
        edges = [0, *self.cuts(text), len(text)]
        return [text[a:b] for a, b in pairwise(edges) if b > a]

    @cached_property
    def classes(self) -> "CharacterClasses":
        return CharacterClasses(self.steps)


def _every_character() -> str:
    return "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))


@dataclasses.dataclass(frozen=True)
class _Atoms:
    sets: frozenset[str]  # patterns of one character
    letters: frozenset[str]  # letters of contractions
    counted: frozenset[str]  # sets that stand before a {m,n}
    known: bool  # whether no literal letters are left outside of contractions

    @classmethod
    def of(cls, patterns: Sequence[str]) -> "_Atoms":
        sets, letters, counted, known = set(), set(), set(), True
        for pattern in patterns:
            for found in _CONTRACTIONS.finditer(pattern):
                letters |= {c for c in found[0].replace("?i:", "").replace("?:", "") if c.isalpha()}
                sets.add("'")
            last = ""
            if _LOOKS_BACK.search(_SETS.sub("", pattern)):
                raise ConfigError(f"pre-tokenizer: the pattern {pattern!r} looks back; where a piece ends must not "
                                  "depend on what stands in front of it")  # fmt: skip
            for m in _ATOMS.finditer(_CONTRACTIONS.sub("", pattern)):
                if m["count"] and last:
                    counted.add(last)
                atom = m["set"] or m["escape"] or (regex.escape(m["literal"]) if m["literal"] else "")
                if atom:
                    last = atom
                    sets.add(atom)
                    known &= not (m["literal"] and m["literal"].isalpha())
        return cls(frozenset(sets), frozenset(letters), frozenset(counted), known)


class CharacterClasses:
    """Numbers characters by the sets they are in. A character of each class stands for all of them."""

    def __init__(self, steps: Sequence[Split]):
        patterns = [step.pattern for step in steps]
        atoms = _Atoms.of(patterns)
        self.known = atoms.known
        every = _every_character()
        points = np.concatenate([np.arange(0xD800), np.arange(0xE000, 0x110000)])
        flags = "(?i)" if any("(?i" in p for p in patterns) else ""

        def members(atom: str, flags: str = "") -> NDArray[np.bool_]:
            out = np.zeros(0x110000, bool)
            for m in regex.finditer(f"{flags}(?:{atom})+", every, regex.V1 | regex.DOTALL):
                out[points[m.start() : m.end()]] = True
            out[0xD800:0xE000] = out[0x378]  # surrogates are no characters: with what is not assigned
            return out

        number = np.zeros(0x110000, np.int64)
        for atom in sorted(atoms.sets):
            number = self._refine(number, members(atom))
            if flags and len(atom.strip("\\")) == 1:
                number = self._refine(number, members(atom, flags))
        coarse = number  # without the letters of contractions
        for letter in sorted(atoms.letters):
            number = self._refine(number, members(letter))
            if flags:
                number = self._refine(number, members(letter, flags))
        self._fine = number.astype(np.int32)
        _, first = np.unique(number[points], return_index=True)
        self.count = len(first)
        special = np.zeros(0x110000, bool)
        for letter in atoms.letters:
            special |= members(letter, "(?i)")
        # A coarse class is stood for by a character that no contraction has.
        ordinary = np.flatnonzero(~special)
        plain = {int(coarse[p]): int(number[p]) for p in ordinary[::-1]}
        self._coarse_of = np.array([plain.get(int(coarse[points[i]]), int(number[points[i]])) for i in first], np.int32)
        shown = [points[i] for i in first]
        for p in ordinary[ordinary < 128][::-1]:  # printable ones, for people who look
            shown[int(number[p])] = p
        self.shown = "".join(chr(p) for p in shown)
        self.apostrophe = int(self._fine[ord("'")]) if atoms.letters else -1
        counted = np.zeros(self.count, bool)
        for atom in atoms.counted:
            counted[np.unique(number[members(atom)])] = True
        self.counted = counted

    @staticmethod
    def _refine(number: NDArray[np.int64], member: NDArray[np.bool_]) -> NDArray[np.int64]:
        return np.unique(number * 2 + member, return_inverse=True)[1].reshape(number.shape)

    def of(self, text: str, before: Sequence[int] = ()) -> tuple[int, ...]:
        """Class of each character. Letters of contractions are told apart up to two places behind an apostrophe, which
        may be among the classes `before`."""
        fine = self._fine[np.frombuffer(text.encode("utf-32-le"), np.uint32)].tolist()
        out, last = [], [c for c in before[-2:]]
        for c in fine:
            near = self.apostrophe in last or not self.known
            out.append(c if near else int(self._coarse_of[c]))
            last = [*last[-1:], c]
        return tuple(out)

    def text(self, classes: Sequence[int]) -> str:
        """A text of these classes."""
        return "".join(self.shown[c] for c in classes)

    @cached_property
    def coarse(self) -> tuple[int, ...]:
        """Classes of characters that stand near no apostrophe."""
        return tuple(sorted({int(c) for c in self._coarse_of}))

    def reachable(self, partial: bytes) -> frozenset[int]:
        """Classes of the characters that may start with these bytes, an unfinished UTF-8 character."""
        lead = partial[0]
        low = {2: (lead & 0x1F) << 6, 3: (lead & 0x0F) << 12, 4: (lead & 0x07) << 18}
        length = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
        point, free = low[length], 6 * (length - 1)
        for byte in partial[1:]:
            free -= 6
            point |= (byte & 0x3F) << free
        least = {2: 0x80, 3: 0x800, 4: 0x10000}[length]
        points = np.arange(max(point, least), min(point + (1 << free), 0x110000))
        points = points[(points < 0xD800) | (points > 0xDFFF)]
        return frozenset(int(c) for c in np.unique(self._coarse_of[self._fine[points]]))
