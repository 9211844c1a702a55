"""Examples for encoder-decoder models: a source and a target of ids each, as rows of fixed length. Pure numpy.

A task (data.task) makes them: `spans` corrupts text, the diagnostics draw letters, `pairs` reads lines of a file. Each
is a random-access source of items, and a function from an item and a random generator to (source, target).
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from bytelm.config import ConfigError, DataConfig
from bytelm.data.corpus import Corpus
from bytelm.data.diagnostics import DIAGNOSTICS, Diagnostic, diagnostic_text, rewrite
from bytelm.data.pieces import piece_ends
from bytelm.data.readers import DataError
from bytelm.data.spans import SAFE_SENTINELS, corrupt, noise_counts, noise_mask, span_lengths
from bytelm.vocab import T5_IDS

Ids = NDArray[np.int32]
Row = dict[str, NDArray[np.int32]]  # source [t], inputs, targets, segments, pieces [s]; 0 is padding
DRAWN = 1 << 24  # items of an endless task
HELDOUT_SEED = 20250925  # of the examples that models are measured on, which are the same in every run


class Examples(ABC):
    """Items 0 .. len - 1, numbered from `first` in messages and batches."""

    first: int

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @abstractmethod
    def example(self, item: dict[str, Any], rng: np.random.Generator) -> tuple[Ids, Ids]:
        """Source and target ids, both with their end symbol."""

    @abstractmethod
    def where(self, index: int) -> str:
        """What messages call an item."""


class SpanExamples(Examples):
    """A corpus as one stream of documents, each with the end symbol behind it, in stretches of equal length; what is
    left at its end is not used."""

    def __init__(self, corpus: Corpus, config: DataConfig, first: int = 0):
        self.corpus, self.config, self.first = corpus, config, first
        self.length = span_lengths(config.seq_len, config.noise_density, config.mean_span)[0]
        spans = noise_counts(self.length, config.noise_density, config.mean_span)[1]
        if spans > SAFE_SENTINELS:
            raise ConfigError(
                f"data.mean_span={config.mean_span}, data.noise_density={config.noise_density}: {spans} spans in a row "
                f"of {config.seq_len}, but only {SAFE_SENTINELS} bytes never occur in text and can stand for one: make "
                "spans longer, or fewer, or rows shorter"
            )
        self.ends = piece_ends(corpus, 1, config.cache_dir)  # of each document and its end symbol, in ids

    def __reduce__(self):  # tables do not travel to worker processes
        return SpanExamples, (self.corpus, self.config, self.first)

    def __len__(self) -> int:
        return int(self.ends[-1]) // self.length if len(self.ends) else 0

    def _stretches(self, index: int) -> Iterator[tuple[int, int, int]]:
        """(document, first id, end) of each document that an item has ids of."""
        begin, end = index * self.length, (index + 1) * self.length
        document = int(np.searchsorted(self.ends, begin, side="right"))
        while begin < end:
            start = int(self.ends[document - 1]) if document else 0
            stop = min(int(self.ends[document]), end)
            yield document, begin - start, stop - start
            begin, document = stop, document + 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        parts = []
        for document, begin, end in self._stretches(index):
            data = np.frombuffer(self.corpus.read(document, begin, end), np.uint8).astype(np.int32) + T5_IDS.offset
            parts.append(data if len(data) == end - begin else np.append(data, np.int32(T5_IDS.end)))
        return {"ids": np.concatenate(parts), "piece": self.first + index}

    def example(self, item: dict[str, Any], rng: np.random.Generator) -> tuple[Ids, Ids]:
        ids, c = item["ids"], self.config
        return corrupt(ids, noise_mask(len(ids), c.noise_density, c.mean_span, rng))

    def where(self, index: int) -> str:
        stretches = list(self._stretches(index))
        document, begin, _ = stretches[0]
        name, offset = self.corpus.place(document)
        more = f" and {len(stretches) - 1} documents behind it" if len(stretches) > 1 else ""
        return f"{name}[{offset + begin}:{offset + begin + self.length}]{more}"


class DiagnosticExamples(Examples):
    """A diagnostic task's texts, drawn anew each time."""

    first = 0

    def __init__(self, config: DataConfig):
        self.config, self.task = config, cast(Diagnostic, config.task)

    def __len__(self) -> int:
        return DRAWN

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"piece": index}

    def example(self, item: dict[str, Any], rng: np.random.Generator) -> tuple[Ids, Ids]:
        text = diagnostic_text(self.task, self.config.seq_len - 1, rng)
        return to_ids(text.encode()), to_ids(rewrite(text, self.task).encode())

    def where(self, index: int) -> str:
        return f"example {index} of the task {self.task}"


class PairExamples(Examples):
    """Lines "input TAB target" of text files; a tab, new line or backslash inside is written \\t, \\n, \\\\."""

    def __init__(self, corpus: Corpus, config: DataConfig, first: int = 0, *, heldout: bool | None = None):
        """`heldout`: only the lines that data.valid_fraction holds out, or only the others; None: all.

        Raises DataError for a line without exactly one tab, or longer than its row (unless data.truncate).
        """
        self._arguments = (corpus, config, first, heldout)
        self.config, self.first = config, first
        self.pairs: list[tuple[bytes, bytes]] = []
        self._places: list[str] = []
        limits = config.seq_len - 1, target_length(config) - 1
        last = 0 if heldout is None else _last_held_out(corpus, config.valid_fraction)
        for document in range(len(corpus)):
            name = corpus.place(document)[0]
            for number, line in enumerate(_lines(corpus, document), 1):
                if not line or (heldout is not None and (_hash(line) <= last) != heldout):
                    continue
                sides = line.split(b"\t")
                if len(sides) != 2:
                    raise DataError(f"{name}, line {number}: {len(sides) - 1} tabs, expected one: input TAB target")
                sides = [_unescape(side) for side in sides]
                for side, limit, what in zip(sides, limits, ("data.seq_len", "data.target_len")):
                    if len(side) > limit and not config.truncate:
                        raise DataError(
                            f"{name}, line {number}: {len(side)} bytes, but the row has room for {limit} and the end "
                            f"({what}); raise it, or cut such lines with data.truncate"
                        )
                self.pairs.append((sides[0][: limits[0]], sides[1][: limits[1]]))
                self._places.append(f"{name}, line {number}")

    def __reduce__(self):
        corpus, config, first, heldout = self._arguments
        return _open_pairs, (corpus, config, first, heldout)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        source, target = self.pairs[index]
        return {"source": to_ids(source), "target": to_ids(target), "piece": self.first + index}

    def example(self, item: dict[str, Any], rng: np.random.Generator) -> tuple[Ids, Ids]:
        return item["source"], item["target"]

    def where(self, index: int) -> str:
        return self._places[index]


def _open_pairs(corpus: Corpus, config: DataConfig, first: int, heldout: bool | None) -> PairExamples:
    return PairExamples(corpus, config, first, heldout=heldout)


def _lines(corpus: Corpus, document: int) -> list[bytes]:
    return [line.removesuffix(b"\r") for line in corpus.read(document).split(b"\n")]


def _hash(line: bytes) -> int:
    return int.from_bytes(hashlib.sha256(line).digest()[:8], "big")


def _last_held_out(corpus: Corpus, fraction: float) -> int:
    """The greatest hash of a line that is held out: of those below `fraction` of all hashes, or the least of any; -1 if
    the fraction is 0."""
    if not fraction:
        return -1
    hashes = [_hash(line) for document in range(len(corpus)) for line in _lines(corpus, document) if line]
    limit = int(fraction * 2**64)
    return max((h for h in hashes if h < limit), default=min(hashes, default=-1))


def _unescape(text: bytes) -> bytes:
    if b"\\" not in text:
        return text
    parts = text.split(b"\\\\")
    return b"\\".join(part.replace(b"\\t", b"\t").replace(b"\\n", b"\n") for part in parts)


def to_ids(text: bytes) -> Ids:
    """A text's ids and the end symbol."""
    body = np.frombuffer(text, np.uint8).astype(np.int32) + T5_IDS.offset
    return np.append(body, np.int32(T5_IDS.end))


def target_length(config: DataConfig) -> int:
    """Target ids per row: as given, or what the task can need."""
    if config.target_len:
        return config.target_len
    if config.task == "spans":
        return span_lengths(config.seq_len, config.noise_density, config.mean_span)[1]
    return config.seq_len


def make_row(source: Ids, target: Ids, config: DataConfig, piece: int) -> Row:
    """One row of a batch. Raises ConfigError when the target does not fit."""
    length = target_length(config)
    if len(target) > length or len(source) > config.seq_len:
        raise ConfigError(
            f"data.target_len={length}, data.seq_len={config.seq_len}: an example has {len(target)} target and "
            f"{len(source)} source ids"
        )

    def padded(ids: Ids, width: int) -> Ids:
        return np.pad(ids, (0, width - len(ids))).astype(np.int32)

    inputs = np.concatenate([[np.int32(T5_IDS.start)], target[:-1]])
    segments = np.ones(len(target), np.int32)
    return {
        "source": padded(source, config.seq_len), "inputs": padded(inputs, length), "targets": padded(target, length),
        "segments": padded(segments, length), "pieces": np.full(length, piece, np.int32),
    }  # fmt: skip


def training_examples(sources: Sequence[Corpus], config: DataConfig) -> list[Examples]:
    """The examples of each source, numbered through. Raises ConfigError when there are none."""
    if config.task in DIAGNOSTICS:
        return [DiagnosticExamples(config)]
    out: list[Examples] = []
    for corpus in sources:
        first = sum(map(len, out))
        if config.task == "spans":
            out.append(SpanExamples(corpus, config, first))
        else:
            out.append(PairExamples(corpus, config, first, heldout=None if config.valid else False))
        if not len(out[-1]):
            raise ConfigError(f"data.train: too little text for one example of the task {config.task}")
    return out


def heldout_examples(corpus: Corpus | None, config: DataConfig) -> Examples:
    """The examples of the held-out text; a diagnostic needs none."""
    if config.task in DIAGNOSTICS:
        return DiagnosticExamples(config)
    assert corpus is not None
    if config.task == "spans":
        return SpanExamples(corpus, config)
    return PairExamples(corpus, config, heldout=None if config.valid else True)


def heldout_rows(examples: Examples, config: DataConfig, max_bytes: int = 0) -> Iterator[Row]:
    """Rows of examples until their sources hold `max_bytes` (0: all; of an endless task a quarter of a mebibyte). The
    same in every run."""
    if len(examples) == DRAWN:
        max_bytes = max_bytes or 1 << 18
    seen = 0
    for i in range(len(examples)):
        if 0 < max_bytes <= seen:
            return
        source, target = examples.example(examples[i], np.random.default_rng([HELDOUT_SEED, i]))
        seen += len(source)
        yield make_row(source, target, config, i)
