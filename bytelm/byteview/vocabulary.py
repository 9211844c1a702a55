"""A tokenizer as the byte view needs it: the bytes of every token, which of them no text has, and how text is cut."""

import bisect
import dataclasses
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bytelm.byteview.pretokenizer import Pretokenizer
from bytelm.byteview.readings import Readings
from bytelm.byteview.segmenter import Segmenter, Tokens
from bytelm.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """`tokens[id]`: its bytes; None for control tokens and ids without a meaning."""

    tokens: tuple[bytes | None, ...]
    segmenter: Segmenter
    pretokenizer: Pretokenizer
    ends: list[int]  # ids that end a text
    start: int | None = None  # id in front of a text
    lead: bytes = b""  # what the tokenizer puts in front of a text's bytes
    lead_once: bool = False  # not in front of what stands behind a special token
    controls: dict[str, int] = dataclasses.field(default_factory=dict)  # special tokens by name
    whole_pieces: bool = False  # a piece that is a token is that token, whatever the merges say
    normal: Literal["", "NFC"] = ""  # name of a Unicode normal form that texts are in

    def __post_init__(self):
        if not any(self.tokens):
            raise ConfigError("the tokenizer has no token with bytes")
        ids = [*self.ends, *([] if self.start is None else [self.start])]
        if not self.ends or not all(isinstance(i, int) and 0 <= i < len(self.tokens) for i in ids):
            raise ConfigError(f"the ids that start and end a text ({self.start}; {self.ends}) are not among the "
                              f"tokenizer's {len(self.tokens)}")  # fmt: skip
        if len(set(self.ends)) < len(self.ends):
            object.__setattr__(self, "ends", list(dict.fromkeys(self.ends)))

    @cached_property
    def order(self) -> NDArray[np.int32]:
        """Ids of tokens that have bytes, sorted by them."""
        return np.array(
            sorted((i for i, t in enumerate(self.tokens) if t), key=lambda i: (self.tokens[i], i)), np.int32
        )

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """Bytes of each token in `order`."""
        return np.array([len(self.tokens[i] or b"") for i in self.order], np.int32)

    @cached_property
    def table(self) -> NDArray[np.int16]:
        """Bytes of each token in `order`, [n, longest]; -1 behind its end, so that every column of tokens with the same
        bytes in front is sorted."""
        out = np.full((len(self.order), int(self.lengths.max())), -1, np.int16)
        for row, i in enumerate(self.order):
            text = self.tokens[i] or b""
            out[row, : len(text)] = np.frombuffer(text, np.uint8)
        return out

    @cached_property
    def spoken(self) -> NDArray[np.bool_]:
        """Which tokens have bytes, or end a text, [v]."""
        out = np.array([bool(t) for t in self.tokens])
        out[self.ends] = True
        return out

    @cached_property
    def readings(self) -> Readings:
        return Readings(self.pretokenizer, self.tokens)

    @cached_property
    def unreachable(self) -> dict[bytes, int]:
        """Tokens that merges never make. With `whole_pieces` they are pieces of their own."""
        inside = self.segmenter.beginning
        return {t: i for i, t in enumerate(self.tokens) if t and not inside[i]}

    def closing(self, head: bytes) -> list[int]:
        """Tokens that end a piece which so far is `head` so that it is one of `unreachable`."""
        out = []
        names = self._unreachable_names
        for text in names[bisect.bisect_left(names, head) :]:
            if not text.startswith(head):
                break
            out += self._by_bytes.get(text[len(head) :], [])
        return out

    @cached_property
    def _unreachable_names(self) -> list[bytes]:
        return sorted(self.unreachable)

    @cached_property
    def _by_bytes(self) -> dict[bytes, list[int]]:
        out: dict[bytes, list[int]] = {}
        for i, text in enumerate(self.tokens):
            if text:
                out.setdefault(text, []).append(i)
        return out

    def encode(self, text: bytes, behind_special: bool = False) -> list[int] | None:
        """The tokenizer's tokens of a text (valid UTF-8), its lead included; None where it cannot be written."""
        out: list[int] = []
        if not text:
            return out
        lead = b"" if behind_special and self.lead_once else self.lead
        for piece in self.pretokenizer.pieces(lead.decode() + text.decode()):
            data = piece.encode()
            whole = self.unreachable.get(data) if self.whole_pieces else None
            ids = [whole] if whole is not None else self.segmenter.encode(data)
            if ids is None:
                return None
            out += ids
        return out

    def control(self, name: str) -> int:
        """Id of a special token."""
        if name not in self.controls:
            shown = ", ".join(sorted(self.controls)[:12]) or "none"
            raise ConfigError(f"the tokenizer has no special token {name!r} (it has {shown})")
        return self.controls[name]


def check_added(names: Iterable[str], where: str) -> None:
    """Raises ConfigError where a tokenizer takes ordinary text for a token before it cuts words. Names that begin as
    markup does, such as <tool_call>, [INST] or DeepSeek's <dsml: and its wide bars, are taken as control tokens."""
    plain = [n for n in names if not (n[:1] in "<[｜" and len(n) > 2 and any(c.isalpha() for c in n))]
    if plain:
        raise ConfigError(f"{where}: takes {plain[0]!r} for one token wherever it stands (an added token), which the "
                          "byte view does not know")  # fmt: skip


def usual_end(controls: dict[str, int], where: str) -> list[int]:
    """The special token that usually ends a text. Raises ConfigError where there is none."""
    found = [controls[name] for name in ("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>") if name in controls]
    if not found:
        raise ConfigError(f"{where}: neither the model's config nor the tokenizer says which token ends a text")
    return found[:1]


def byte_units(tokens: Tokens) -> Callable[[bytes], list[int] | None]:
    """What cuts a piece into the tokens of its single bytes; None where one has no token."""
    single: list[int | None] = [None] * 256
    for i, text in enumerate(tokens):
        if text is not None and len(text) == 1 and single[text[0]] is None:
            single[text[0]] = i

    def units(piece: bytes) -> list[int] | None:
        ids = [single[b] for b in piece]
        return None if None in ids else ids  # type: ignore[return-value]

    return units
